"""``adapter.start_from``: what a published adapter gives a new run, and what begins fresh."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from infinite_id_core.errors import FileError
from infinite_id_core.method.adapter import infinite_id_adapter
from infinite_id_core.method.records import AdapterConfig
from infinite_id_core.sdxl.layers import CrossAttentionLayer
from trainer.train import loop
from trainer.train.beginning import beginning
from trainer.train.estimate import dry_run

from .. import published_files as files
from .. import train_world

SIZES = dataclasses.replace(files.SMALL, face_hidden=1024, tokens=4)
LAYERS = tuple(
    CrossAttentionLayer(
        path=layer.path, block=("input", i, 0), width=layer.width, context_width=SIZES.context
    )
    for i, layer in enumerate(SIZES.layers)
)
WIDTHS = {layer.path: layer.width for layer in LAYERS}
RECORDED = AdapterConfig(
    context_width=SIZES.context,
    clip_width=1280,
    recogniser="buffalo_l/w600k_r50",
    clip_model="ViT-H-14",
    clip_layer="penultimate",
)


def written(family: str, folder: Path, container: str = "nested pickle") -> Path:
    name = "adapter.safetensors" if "safetensors" in container else "adapter.bin"
    return files.write(folder / name, container, files.made(family, SIZES, 3), SIZES)


@pytest.mark.parametrize("container", ["nested pickle", "flat safetensors", "training safetensors"])
@pytest.mark.parametrize("family", sorted(files.PROJECTORS))
def test_every_family_gives_its_key_values(family: str, container: str, tmp_path: Path) -> None:
    path = written(family, tmp_path, container)
    begun = beginning(path, RECORDED, LAYERS)
    own = files.made(family, SIZES, 3)["ip_adapter"]
    for layer in SIZES.layers:
        for part in "kv":
            found = begun.tensors[f"layers.{layer.path}.to_{part}.weight"]
            assert torch.equal(found, own[f"{layer.number}.to_{part}_ip.weight"])
    assert f"{2 * len(LAYERS)} of {2 * len(LAYERS)} K/V tensors" in begun.told
    assert not any(name.startswith("low_rank.") for name in begun.tensors)
    state = infinite_id_adapter(RECORDED, WIDTHS).state_dict()
    assert all(state[name].shape == t.shape for name, t in begun.tensors.items())


def test_faceids_mapper_is_the_face_mapper(tmp_path: Path) -> None:
    path = written("faceid", tmp_path)
    begun = beginning(path, RECORDED, LAYERS)
    assert "face_mapper 6 of 6" in begun.told and "clip_mapper 0 of 6 (fresh)" in begun.told
    adapter = infinite_id_adapter(RECORDED, WIDTHS)
    adapter.load_state_dict({**adapter.state_dict(), **begun.tensors})
    from infinite_id_core.files.adapter_options import AdapterOptions
    from infinite_id_core.files.adapters import read_adapter

    theirs = read_adapter(path, options=AdapterOptions(layers=LAYERS)).projector
    face = torch.nn.functional.normalize(torch.randn(2, 512), dim=-1)
    mapped = adapter.get_submodule("face_mapper")(face)
    torch.testing.assert_close(mapped, theirs({"face": face}))


@pytest.mark.parametrize(
    "other", [{"recogniser": "antelopev2/glintr100"}, {"embedding": "raw"}, {"face_tokens": 6}]
)
def test_a_mapper_of_another_feature_or_size_begins_fresh(
    other: dict[str, Any], tmp_path: Path
) -> None:
    recorded = dataclasses.replace(RECORDED, **other)
    begun = beginning(written("faceid", tmp_path), recorded, LAYERS)
    assert "face_mapper 0 of 6 (fresh)" in begun.told
    assert all(name.startswith("layers.") for name in begun.tensors)


def test_an_adapter_for_other_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="adapter.bin"):
        beginning(written("plus", tmp_path), RECORDED, LAYERS[:-1])


def test_a_run_starts_from_one_and_says_so(tmp_path: Path, caplog: Any) -> None:
    from infinite_id_core.hosts.diffusers_unet import unet_layers
    from trainer.train.checks import build_meta

    train_world.world(tmp_path)
    plain = train_world.config(tmp_path)
    layers = unet_layers(build_meta(plain))
    sizes = dataclasses.replace(
        SIZES,
        context=layers[0].context_width,
        layers=tuple(
            files.Layer(number=2 * i + 1, path=layer.path, width=layer.width)
            for i, layer in enumerate(layers)
        ),
    )
    path = tmp_path / "plus.bin"
    files.write(path, "nested pickle", files.made("plus", sizes, 3), sizes)
    config = train_world.config(tmp_path, adapter={"start_from": str(path)}, run={"steps": 1})
    said = f"{2 * len(layers)} of {2 * len(layers)} K/V tensors"
    assert said in dry_run(config)
    with caplog.at_level(logging.INFO):
        assert loop.train(config).finished
    assert said in caplog.text
