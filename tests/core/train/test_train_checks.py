"""What cannot run is refused before anything is loaded, by the run and by its dry run alike."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from infinite_id_core.errors import (
    FaceModelError,
    FileMissingError,
    MissingTensorError,
    ModelMismatchError,
    UnreadableError,
)
from infinite_id_core.files.adapters import read_adapter
from infinite_id_core.hosts.diffusers_sample import Prompt
from trainer.__main__ import main
from trainer.config import TrainConfig
from trainer.errors import BusyError, FilterError, ResumeError
from trainer.files import locked
from trainer.prompts import PromptFile, write_prompts
from trainer.train import loop, state
from trainer.train.estimate import dry_run

from .. import train_world

Make = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def root() -> Path:
    return train_world.shared()


@pytest.fixture
def make(root: Path, tmp_path: Path) -> Make:
    """Configurations of the shared world whose runs go to this test's folder."""

    def settings(name: str = "run", **sections: Any) -> TrainConfig:
        run = {"output": str(tmp_path / name), **sections.pop("run", {})}
        return train_world.config(root, run=run, **sections)

    return settings


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The dry run and the run raise the same, and the run has loaded nothing by then."""

    def explode(*_: Any) -> None:
        raise AssertionError("something was loaded or computed")

    def check(config: TrainConfig, kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=message):
            dry_run(config)
        with monkeypatch.context() as patch:
            for name in ("prepare_unet", "fill"):
                patch.setattr(loop, name, explode)
            with pytest.raises(kind, match=message):
                loop.train(config)

    return check


def test_a_run_that_is_sound_is(make: Make) -> None:
    assert "learning" in dry_run(make(previews={"every": 2}))


@pytest.mark.parametrize("place", ["file", "below a file"])
@pytest.mark.parametrize("section", ["run", "data"])
def test_a_folder_that_cannot_be_made(
    make: Make, refused: Any, tmp_path: Path, section: str, place: str
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    folder = file if place == "file" else file / "below"
    key = {"run": "output", "data": "cache"}[section]
    refused(make(**{section: {key: str(folder)}}), UnreadableError, "expected a folder")


def test_a_folder_that_may_not_be_written_to(
    make: Make, refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").mkdir()
    allowed = os.access
    monkeypatch.setattr(
        os, "access", lambda place, mode: "own" not in str(place) and allowed(place, mode)
    )
    refused(make(data={"cache": str(tmp_path / "own" / "new")}), UnreadableError, "does not allow")
    assert not (tmp_path / "own" / "new").exists()


def test_a_checkpoint_with_a_damaged_state(make: Make, refused: Any) -> None:
    loop.train(make(run={"steps": 1}))
    config = make(run={"steps": 2})
    (last,) = state.checkpoints(state.checkpoint_folder(config))
    (last / state.STATE).write_bytes(b"PK\x03\x04 no more")
    refused(config, ResumeError, "the checkpoint is damaged")


def test_an_image_encoder_that_is_not_there_or_another(
    make: Make, refused: Any, tmp_path: Path
) -> None:
    path = tmp_path / "encoder.safetensors"
    encoder = {"clip_model": "ViT-L-14", "clip_weights": str(path)}
    refused(make(encoder=encoder), FileMissingError, "encoder.safetensors")
    save_file({"visual.class_embedding": torch.zeros(1024)}, path)
    refused(make(encoder=encoder), MissingTensorError, "encoder.safetensors: lacks .* tensors")


def test_an_autoencoder_of_another_shape(make: Make, refused: Any, tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    save_file({"taesd_encoder.0.weight": torch.zeros(8, 3, 3, 3)}, path)
    refused(make(model={"vae": str(path)}), ModelMismatchError, "autoencoder is not SDXL's")


def test_text_encoders_of_another_shape(make: Make, refused: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.safetensors"
    save_file({f"clip_{n}.transformer.x": torch.zeros(1) for n in "lg"}, path)
    model = {"text_encoders": str(path)}
    config = make(model=model, objective={"pooled": "empty"})
    refused(config, ModelMismatchError, "clip_l is no CLIP text encoder")


def test_an_adapter_of_another_shape_to_start_from(make: Make, refused: Any) -> None:
    first = loop.train(make("first", run={"steps": 1})).adapter
    config = make(adapter={"start_from": str(first), "face_tokens": 2})
    refused(config, ModelMismatchError, "face_tokens: 4, now 2")


def test_an_adapter_for_a_unet_of_another_shape(make: Make, refused: Any) -> None:
    first = loop.train(make("first", run={"steps": 1})).adapter
    assert first is not None
    widths = read_adapter(first).widths
    config = make(adapter={"start_from": str(first)}, model={"unet": "microworld"})
    assert widths
    refused(config, ModelMismatchError, "cannot go on from this adapter")


def test_checkpoints_of_another_run(make: Make, refused: Any) -> None:
    loop.train(make(run={"steps": 1}))
    refused(make(optimiser={"rate": 2e-3}), ResumeError, "optimiser.rate: 0.001 then, 0.002 now")
    refused(make(model={"unet": "microworld"}), ResumeError, "the unet has changed")


def test_face_models_of_previews_that_are_not_there(
    make: Make, refused: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "models" / "antelopev2"
    config = make(previews={"every": 2, "face_models": str(folder)})
    refused(config, FaceModelError, "'antelopev2' was not found")


def test_prompts_of_previews_for_another_model(make: Make, refused: Any, tmp_path: Path) -> None:
    prompt = Prompt(context=torch.zeros(1, 77, 12), pooled=torch.zeros(1, train_world.POOLED))
    path = tmp_path / "prompts.safetensors"
    write_prompts(
        path, PromptFile(texts=("a",), negative_text="", positive=(prompt,), negative=prompt)
    )
    config = make(previews={"every": 2, "prompts": str(path)})
    refused(config, ModelMismatchError, r"widths \(12, 8\); the UNet reads \(16, 8\)")


def test_nobody_held_out_for_previews(refused: Any, tmp_path: Path) -> None:
    """The filters are not the cause, and the message does not say they are."""
    root = train_world.world(tmp_path, held_out=0)
    with pytest.raises(FilterError) as caught:
        dry_run(train_world.config(root, previews={"every": 2}))
    assert "filters" not in str(caught.value)
    refused(
        train_world.config(root, previews={"every": 2}),
        FilterError,
        r"nobody is held out.*--held-out.*previews\.every",
    )
    assert loop.train(train_world.config(root)).finished


def test_fewer_held_out_than_previews_ask_for_is_said(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    dry_run(make(previews={"every": 2, "people": 3}))
    assert "previews.people is 3, and no more than 1 are held out" in caplog.text
    caplog.clear()
    dry_run(make(previews={"every": 2, "people": 1}))
    assert "previews.people" not in caplog.text


def test_the_dry_run_sees_a_training_at_work(make: Make, tmp_path: Path) -> None:
    with locked(tmp_path / "run", "training"), pytest.raises(BusyError, match="just now"):
        dry_run(make())
    assert dry_run(make())


# --- filling caches --------------------------------------------------------------------------


def test_caches_are_filled_without_unet_and_beside_checkpoints(
    make: Make, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(root / "unet.safetensors", tmp_path)
    cache = {"cache": str(tmp_path / "cache")}
    config = make(model={"unet": str(tmp_path / "unet.safetensors")}, data=cache)
    loop.train(config)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "unet.safetensors").unlink()

    def explode(*_: Any) -> None:
        raise AssertionError("loaded")

    for name in ("prepare_unet", "new_adapter", "build_optimiser"):
        monkeypatch.setattr(loop, name, explode)
    file = train_world.write_config(tmp_path / "config.toml", config)
    assert main(["train", "--config", str(file), "--fill-caches"]) == 0
    assert list((tmp_path / "cache" / "latents").glob("*.safetensors"))
    assert state.checkpoints(state.checkpoint_folder(config))
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert after == before
