"""What a training run changes, keeps, refuses and writes."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from infinite_id_core.errors import MissingPackageError, ModelMismatchError, NotFiniteError
from infinite_id_core.files.adapters import read_adapter
from infinite_id_core.files.safetensors_file import read_header
from infinite_id_core.hosts.diffusers_train import identity_training
from infinite_id_core.hosts.diffusers_unet import text_projections, unet_layers
from infinite_id_core.scores.score import ReadFace
from infinite_id_core.sdxl.schedule import NoiseSchedule
from microworld import files
from trainer.__main__ import main
from trainer.config import TrainConfig
from trainer.data_index import Dataset
from trainer.errors import (
    BusyError,
    DiskFullError,
    NonFiniteError,
    NotCachedError,
    ResumeError,
    UnreadableError,
)
from trainer.files import locked
from trainer.models.unet import load_unet
from trainer.models.vae import Autoencoder
from trainer.train import filling, loop, state
from trainer.train.checks import adapter_config
from trainer.train.estimate import dry_run
from trainer.train.objective import DenoisingLoss, TrainingModel, face_bell
from trainer.train.samples import Caches, Keys, Plan, Samples

from .. import train_world


@pytest.fixture(scope="module")
def root() -> Path:
    return train_world.shared()


@pytest.fixture
def settings(root: Path, tmp_path: Path) -> Any:
    """Configurations of the shared world whose runs go to this test's folder."""

    def make(name: str = "run", **sections: Any) -> TrainConfig:
        run = {"output": str(tmp_path / name), **sections.pop("run", {})}
        return train_world.config(root, run=run, **sections)

    return make


@pytest.fixture(scope="module")
def plain_run(root: Path) -> Path:
    """Four steps with default options; its folder."""
    loop.train(train_world.config(root, "plain", run={"steps": 4}, checkpoints={"every": 2}))
    return root / "plain"


def parts(config: TrainConfig) -> tuple[Any, Any]:
    """The frozen UNet and the adapter at step 0, as a run makes them."""
    loaded = loop.prepare_unet(config, torch.device("cpu"))
    dataset = Dataset(config.data.folder, config.filters)
    return loaded, loop.new_adapter(
        config, adapter_config(config, dataset, loaded.context_width), loaded.unet
    )


# --- caches ----------------------------------------------------------------------------------


def test_fill_caches_computes_all_that_a_run_reads_and_nothing_else(
    settings: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(data={"cache": str(tmp_path / "cache")}, run={"steps": 1})
    file = train_world.write_config(tmp_path / "config.toml", config)
    assert main(["train", "--config", str(file), "--fill-caches"]) == 0
    filled = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert filled
    assert not (tmp_path / "run" / "adapter.safetensors").exists()
    capsys.readouterr()
    loop.train(config)
    assert {p: p.read_bytes() for p in (tmp_path / "cache").rglob("*.safetensors")} == filled


# --- what learns -----------------------------------------------------------------------------


def test_key_values_start_as_the_frozen_texts(settings: Any) -> None:
    loaded, adapter = parts(settings())
    text = text_projections(loaded.unet)
    assert len(text) == train_world.LAYERS
    for path, (k, v) in text.items():
        pair = adapter.key_value(path)
        assert torch.equal(pair.to_k.weight, k)
        assert torch.equal(pair.to_v.weight, v)
        assert pair.to_k.weight.data_ptr() != k.data_ptr()


def test_only_mappers_and_key_values_change(monkeypatch: pytest.MonkeyPatch, settings: Any) -> None:
    config = settings(run={"steps": 2})
    _, before = parts(config)
    kept: list[Any] = []
    original = loop.prepare_unet

    def remember(*args: Any) -> Any:
        kept.append(original(*args))
        return kept[-1]

    monkeypatch.setattr(loop, "prepare_unet", remember)
    outcome = loop.train(config)
    after = read_adapter(outcome.adapter).state_dict()
    unchanged = [n for n, t in before.state_dict().items() if torch.equal(t, after[n])]
    assert unchanged == []
    fresh = load_unet(config.model.unet, head_width=32).unet
    assert list(kept[0].unet.attn_processors.values())[0].__class__.__name__ == "AttnProcessor2_0"
    assert set(kept[0].unet.state_dict()) == set(fresh.state_dict())
    for name, tensor in kept[0].unet.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name
        assert not tensor.requires_grad


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("text_tokens", [0, 5])
def test_gradients_reach_every_trainable_tensor(
    settings: Any, text_tokens: int, checkpointing: bool
) -> None:
    loaded, adapter = parts(settings(optimiser={"checkpointing": checkpointing}))
    batch = {
        "timestep": torch.tensor([10, 900]),
        "size_ids": torch.ones(2, 6),
        "face": torch.randn(2, 512),
        "clip": torch.randn(2, 257, 96).half(),
    }
    if text_tokens:
        batch["context"] = torch.randn(2, text_tokens, train_world.CONTEXT)
        batch["pooled"] = torch.randn(2, train_world.POOLED)
    model = TrainingModel(adapter, loaded.unet, train_world.POOLED)
    with identity_training(loaded.unet, adapter, text_tokens=text_tokens):
        model(torch.randn(2, 4, 8, 8), batch).square().mean().backward()
    assert {n for n, p in model.named_parameters()} == {
        f"adapter.{n}" for n in adapter.state_dict()
    }
    assert [n for n, p in adapter.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is None for p in loaded.unet.parameters())


def test_text_has_no_say_unless_entangled(settings: Any) -> None:
    loaded, adapter = parts(settings())
    batch = {
        "timestep": torch.tensor([500]), "size_ids": torch.ones(1, 6),
        "face": torch.randn(1, 512), "clip": torch.randn(1, 257, 96),
        "context": torch.randn(1, 5, train_world.CONTEXT),
        "pooled": torch.randn(1, train_world.POOLED),
    }  # fmt: skip
    noisy = torch.randn(1, 4, 8, 8)
    model = TrainingModel(adapter, loaded.unet, train_world.POOLED)
    alone = {k: v for k, v in batch.items() if k not in ("context", "pooled")}
    with torch.no_grad(), identity_training(loaded.unet, adapter):
        out = model(noisy, alone)
        # Text projections that give nonsense change nothing: nobody reads them.
        for layer in unet_layers(loaded.unet):
            loaded.unet.get_submodule(layer.path).attn2.to_k.weight.mul_(50)
        assert torch.equal(model(noisy, alone), out)
    with torch.no_grad(), identity_training(loaded.unet, adapter, text_tokens=5):
        first = model(noisy, batch)
        batch["context"] = batch["context"] + 1
        assert not torch.allclose(model(noisy, batch), first)


def test_weights_stay_float32_in_every_precision(settings: Any) -> None:
    for precision in ("bf16", "fp32"):
        config = settings(precision, run={"steps": 1}, optimiser={"precision": precision})
        outcome = loop.train(config)
        header = read_header(state.checkpoints(state.checkpoint_folder(config))[-1] / state.ADAPTER)
        assert {entry.dtype for entry in header.tensors.values()} == {"F32"}, precision
        assert outcome.finished


# --- the file --------------------------------------------------------------------------------


def test_the_finished_file_is_an_adapter_with_its_record(plain_run: Path, root: Path) -> None:
    adapter = read_adapter(plain_run / "adapter.safetensors")
    info = Dataset(root / "data", train_world.config(root).filters).info
    config = adapter.config
    assert (config.training_step, config.recogniser, config.clip_model) == (
        4, "test/rec", "microworld",
    )  # fmt: skip
    assert config.dataset_fingerprint == info.fingerprint
    assert config.base_model == "unet.safetensors"
    assert (config.context_width, config.clip_width) == (train_world.CONTEXT, 96)


def test_the_number_format_of_the_file_is_chosen(settings: Any) -> None:
    outcome = loop.train(settings(run={"steps": 1, "dtype": "bfloat16"}))
    header = read_header(outcome.adapter)
    assert {entry.dtype for entry in header.tensors.values()} == {"BF16"}


def test_a_new_run_goes_on_from_an_adapter(plain_run: Path, settings: Any) -> None:
    path = str(plain_run / "adapter.safetensors")
    _, adapter = parts(settings(adapter={"start_from": path}))
    wanted = read_adapter(path).state_dict()
    assert all(torch.equal(t, wanted[n]) for n, t in adapter.state_dict().items())
    with pytest.raises(ModelMismatchError, match="face_tokens: 4, now 3"):
        parts(settings(adapter={"start_from": path, "face_tokens": 3}))


# --- resuming --------------------------------------------------------------------------------


def test_the_last_k_checkpoints_are_kept_and_leftovers_go(settings: Any) -> None:
    config = settings(run={"steps": 6}, checkpoints={"every": 1, "keep": 2})
    leftover = state.checkpoint_folder(config) / ".step-00000009.part"
    leftover.mkdir(parents=True)
    loop.train(config)
    names = sorted(path.name for path in state.checkpoint_folder(config).iterdir())
    assert names == ["step-00000005", "step-00000006"]


def test_a_run_with_other_settings_is_not_resumed(plain_run: Path, root: Path) -> None:
    def again(**sections: Any) -> None:
        run = {"steps": 4, **sections.pop("run", {})}
        loop.train(train_world.config(root, "plain", run=run, **sections))

    with pytest.raises(ResumeError, match="optimiser.rate: 0.001 then, 0.01 now"):
        again(optimiser={"rate": 0.01})
    with pytest.raises(ResumeError, match="run.seed: 7 then, 8 now"):
        again(run={"seed": 8})
    again(checkpoints={"every": 3}, log={"every": 7}, data={"workers": 1})  # these are free


def test_a_run_from_before_an_option_existed_is_resumed(
    plain_run: Path, root: Path, tmp_path: Path
) -> None:
    config = train_world.config(root, "plain", run={"steps": 4})
    record = state.read_record(state.find_checkpoint(config, "auto") or tmp_path)
    older = {
        **record.config,
        "objective": {k: v for k, v in record.config["objective"].items() if k != "face_weight"},
    }
    assert record.following(dataclasses.replace(record, config=older), tmp_path) == record
    other = {**record.config, "objective": {**record.config["objective"], "face_weight": 1.0}}
    with pytest.raises(ResumeError, match="objective.face_weight: 0.0 then, 1.0 now"):
        dataclasses.replace(record, config=other).following(
            dataclasses.replace(record, config=older), tmp_path
        )


def test_a_changed_run_is_resumed_when_asked_with_the_optimisers_state(
    plain_run: Path, settings: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(plain_run, tmp_path / "run")
    changes: dict[str, Any] = {
        "run": {"steps": 6},
        "optimiser": {"rate": 5e-4, "weight_decay": 0.5, "batch": 3, "ema": 0.5},
        "filters": {"min_similarity": 0.4},
    }
    with pytest.raises(ResumeError, match="--resume-changed"):
        loop.train(settings(**changes))
    assert "going on from" in dry_run(settings(**changes), changed=True)
    assert loop.train(settings(**changes), changed=True).step == 6
    said = caplog.text
    for words in (
        "optimiser.rate: 0.001 then, 0.0005 now",
        "optimiser.batch: 2 then, 3 now",
        "filters.min_similarity: 0.5 then, 0.4 now",
    ):
        assert words in said
    last = state.checkpoints(tmp_path / "run" / "checkpoints")[-1]
    values = torch.load(last / state.STATE, weights_only=True)["optimiser"]
    assert {int(entry["step"]) for entry in values["state"].values()} == {6}  # 4 and 2, not 2
    assert values["param_groups"][0]["weight_decay"] == 0.5
    (change,) = json.loads((last / state.CONFIG).read_text(encoding="utf-8"))["changes"]
    assert change["step"] == 4 and "optimiser.rate: 0.001 then, 0.0005 now" in change["changed"]
    # From here on these are the run's settings, and the change stays on record.
    changes["run"] = {"steps": 7}
    assert loop.train(settings(**changes)).step == 7
    last = state.checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert state.read_record(last).changes == (change,)


def test_a_changed_run_repeats_no_draw_and_resumes_exactly(
    plain_run: Path, settings: Any, tmp_path: Path
) -> None:
    """With another batch the same numbers belong to other steps: their draws would come again."""
    for name in ("whole", "part"):
        shutil.copytree(plain_run, tmp_path / name)
    changes: dict[str, Any] = {"optimiser": {"batch": 1}, "checkpoints": {"every": 100}}
    whole = loop.train(settings("whole", run={"steps": 7}, **changes), changed=True)
    loop.train(settings("part", run={"steps": 5}, **changes), changed=True)
    part = loop.train(settings("part", run={"steps": 7}, **changes))
    assert train_world.bits(whole.adapter)[0] == train_world.bits(part.adapter)[0]
    config = settings(**changes)
    plan = Plan(config, Dataset(config.data.folder, config.filters), 1)

    def draws() -> list[Any]:
        return [plan.choice(n) for n in range(20)]

    before, noise, crop = draws(), plan.noise(4), plan.crop(0, 0)
    plan.redraws = 1
    assert [c.timestep for c in draws()] != [c.timestep for c in before]
    assert not torch.equal(plan.noise(4), noise)
    assert plan.crop(0, 0) == crop  # its latent lies in the cache
    plan.redraws = 0
    assert draws() == before


def test_a_change_that_the_weights_do_not_fit_is_refused_even_so(
    plain_run: Path, settings: Any, tmp_path: Path
) -> None:
    shutil.copytree(plain_run, tmp_path / "run")
    for sections in (
        {"encoder": {"embedding": "raw"}},
        {"adapter": {"face_tokens": 2}},
        {"model": {"unet": "microworld"}},
    ):
        with pytest.raises(ResumeError, match="set it back"):
            loop.train(settings(run={"steps": 5}, **sections), changed=True)


def test_a_run_that_never_changed_is_written_as_ever(plain_run: Path) -> None:
    last = state.checkpoints(plain_run / "checkpoints")[-1]
    values = json.loads((last / state.CONFIG).read_text(encoding="utf-8"))
    assert set(values) == {"config", "fingerprints", "step", "world"}


def test_a_run_on_other_data_is_not_resumed(plain_run: Path, settings: Any, tmp_path: Path) -> None:
    other = train_world.write_dataset(tmp_path / "other", people=5)
    shutil.copytree(plain_run, tmp_path / "run")
    with pytest.raises(ResumeError, match="the dataset has changed"):
        loop.train(settings(run={"steps": 4}, data={"folder": str(other)}))


def test_resume_words(plain_run: Path, root: Path, settings: Any, tmp_path: Path) -> None:
    config = train_world.config(root, "plain", run={"steps": 4})
    assert state.find_checkpoint(config, "auto").name == "step-00000004"
    with pytest.raises(ResumeError, match="holds 2 checkpoints"):
        state.find_checkpoint(config, "none")
    with pytest.raises(ResumeError, match="is no checkpoint"):
        state.find_checkpoint(config, str(tmp_path))
    assert state.find_checkpoint(settings(), "auto") is None
    # Any earlier checkpoint can be gone back to, and ends in the same file.
    wanted = train_world.bits(plain_run / "adapter.safetensors")
    copied = settings(run={"steps": 4}, checkpoints={"every": 2})
    outcome = loop.train(copied, str(plain_run / "checkpoints" / "step-00000002"))
    assert train_world.bits(outcome.adapter) == wanted


def test_a_damaged_checkpoint_is_named(plain_run: Path, settings: Any, tmp_path: Path) -> None:
    shutil.copytree(plain_run, tmp_path / "run")
    broken = tmp_path / "run" / "checkpoints" / "step-00000004" / state.STATE
    broken.write_bytes(broken.read_bytes()[:1000])
    config = settings(run={"steps": 5}, checkpoints={"every": 2})
    with pytest.raises(ResumeError, match="step-00000004: the checkpoint is damaged"):
        loop.train(config)
    shutil.rmtree(broken.parent)
    assert loop.train(config).step == 5


def no_list(values: Any) -> Any:
    return [values]


def other_groups(values: Any) -> Any:
    values["optimiser"]["param_groups"] *= 2
    return values


def first_moment(value: Any) -> Any:
    def damage(values: Any) -> Any:
        state_of_one = values["optimiser"]["state"][0]
        if value is None:
            del state_of_one["exp_avg"]
        else:
            state_of_one["exp_avg"] = value(state_of_one["exp_avg"])
        return values

    return damage


def group_entry(name: str, value: Any) -> Any:
    def damage(values: Any) -> Any:
        values["optimiser"]["param_groups"][0][name] = value
        return values

    return damage


def no_state(values: Any) -> Any:
    values["optimiser"]["state"] = {}
    return values


def other_shapes(values: Any) -> Any:
    for state_of_one in values["optimiser"]["state"].values():
        state_of_one["exp_avg"] = torch.zeros(3)
    return values


@pytest.mark.parametrize(
    "damage",
    [
        no_list,
        lambda values: {},
        lambda values: {**values, "optimiser": {"state": {}}},
        lambda values: {**values, "optimiser": {"state": [], "param_groups": {}}},
        other_groups,
        other_shapes,
        no_state,
        first_moment(None),
        first_moment(lambda _: "text"),
        first_moment(lambda tensor: tensor.to_sparse()),
        first_moment(lambda tensor: tensor.to(torch.complex64)),
        first_moment(lambda tensor: tensor * float("nan")),
        group_entry("amsgrad", True),
        group_entry("betas", 3),
        group_entry("eps", None),
    ],
)
def test_a_state_of_something_else_is_named(
    plain_run: Path, settings: Any, tmp_path: Path, damage: Any
) -> None:
    shutil.copytree(plain_run, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-00000004" / state.STATE
    torch.save(damage(torch.load(path, weights_only=True)), path)
    with pytest.raises(ResumeError, match="step-00000004: the checkpoint is damaged"):
        loop.train(settings(run={"steps": 5}, checkpoints={"every": 2}))


@pytest.mark.parametrize(
    "damage",
    [
        {"config": []},
        {"config": {"run": None}},
        {"fingerprints": []},
        {"fingerprints": {"unet": 1}},
        {"step": "4"},
        {"step": -5},
        {"step": True},
        {"world": "one"},
        {"validated": []},
        {"changes": [1]},
        {"changes": [{"changed": "text"}]},
        {"changes": 3},
        {"more": 1},
    ],
)
def test_a_record_of_something_else_is_named(
    plain_run: Path, settings: Any, tmp_path: Path, damage: dict[str, Any]
) -> None:
    shutil.copytree(plain_run, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-00000004" / state.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **damage}), "utf-8")
    with pytest.raises(ResumeError, match="step-00000004: is no checkpoint of this trainer"):
        loop.train(settings(run={"steps": 5}, checkpoints={"every": 2}))


def test_a_full_disk_keeps_the_checkpoint_before(
    monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    config = settings(run={"steps": 4}, checkpoints={"every": 1})
    save, calls = torch.save, []

    def fill_up(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*args)

    monkeypatch.setattr(torch, "save", fill_up)
    with pytest.raises(DiskFullError, match="disk is full"):
        loop.train(config)
    folder = state.checkpoint_folder(config)
    assert [path.name for path in sorted(folder.iterdir())] == ["step-00000001", "step-00000002"]
    assert loop.train(config).finished


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on file sizes")
def test_a_checkpoint_that_really_fails_midway_is_a_full_disk(settings: Any) -> None:
    """torch says it by a RuntimeError about positions, safetensors by an error of its own."""
    import resource

    config = settings(run={"steps": 2}, checkpoints={"every": 1})
    loop.train(settings("whole", run={"steps": 1}))
    (whole,) = state.checkpoints(state.checkpoint_folder(settings("whole")))
    sizes = [(whole / name).stat().st_size for name in (state.ADAPTER, state.STATE)]
    assert sizes[0] < sizes[1]
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (sizes[0] // 2, (sizes[0] + sizes[1]) // 2):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
            with pytest.raises(DiskFullError, match="step-00000001"):
                loop.train(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(state.checkpoint_folder(config).iterdir())
    assert loop.train(config).finished


def test_two_runs_on_one_output_are_refused(
    monkeypatch: pytest.MonkeyPatch, settings: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr("trainer.files._WAIT", 0.2)
    config = settings()
    with locked(tmp_path / "run", "training"):
        with pytest.raises(BusyError, match="run: another training is writing"):
            loop.train(config)
        assert not (tmp_path / "run" / "checkpoints").exists()
    assert loop.train(config).finished


def test_an_output_that_is_a_file_is_named(settings: Any, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UnreadableError, match="expected a folder"):
        loop.train(settings())


def test_asked_to_stop_while_caches_fill_it_goes_on_from_what_is_there(
    monkeypatch: pytest.MonkeyPatch, settings: Any, tmp_path: Path
) -> None:
    config = settings(data={"cache": str(tmp_path / "cache")})
    encode, asked = Autoencoder.encode, []

    def encode_and_ask(self: Autoencoder, pixels: torch.Tensor) -> torch.Tensor:
        asked.append(len(pixels))
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(self, pixels)

    monkeypatch.setattr(Autoencoder, "encode", encode_and_ask)
    outcome = loop.train(config)
    assert (outcome.step, outcome.finished) == (0, False)
    assert len(asked) == 2
    photos = len(Dataset(config.data.folder, config.filters))
    assert loop.train(config).finished
    assert len(asked) == photos  # none was encoded twice


# --- refusing --------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_before_the_step_and_names_the_sample(
    monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    config = settings(run={"steps": 9}, checkpoints={"every": 1})
    losses = DenoisingLoss.losses

    def spoilt(self: DenoisingLoss, output: Any, batch: Any) -> Any:
        return tuple(
            torch.where(batch["number"] == 5, loss + float("nan"), loss)
            for loss in losses(self, output, batch)
        )

    monkeypatch.setattr(DenoisingLoss, "losses", spoilt)
    with pytest.raises(NonFiniteError) as caught:
        loop.train(config)
    dataset = Dataset(config.data.folder, config.filters)
    named = Plan(config, dataset, config.optimiser.batch).choice(5).describe(dataset)
    assert named in str(caught.value)
    last = state.checkpoints(state.checkpoint_folder(config))[-1]
    assert last.name == "step-00000002"
    assert str(last) in str(caught.value)
    assert all(t.isfinite().all() for t in read_adapter(last / state.ADAPTER).state_dict().values())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cache_with_a_number_that_is_none_is_named_and_computed_again(
    settings: Any, tmp_path: Path, workers: int
) -> None:
    """As an older release wrote them."""
    config = settings(data={"cache": str(tmp_path / "cache"), "workers": workers})
    assert filling.fill_caches(config)
    (pack,) = Caches.below(config).latents.folder.glob("*.safetensors")
    save_file({k: t + float("nan") for k, t in load_file(pack).items()}, pack)
    with pytest.raises(NotFiniteError, match=f"{pack.name}.*holds NaN.*Delete the file"):
        loop.train(config)
    pack.unlink()
    assert loop.train(config).finished


def test_an_autoencoder_that_overflows_is_named_and_nothing_is_cached(
    settings: Any, tmp_path: Path
) -> None:
    vae = tmp_path / "vae.safetensors"
    weights = {name: tensor.clone() for name, tensor in files.read_weights(files.VAE).items()}
    last = max((n for n in weights if n.startswith("taesd_encoder")), key=_layer)
    weights[last] += 1e9
    save_file(weights, vae)
    config = settings(model={"vae": str(vae)}, data={"cache": str(tmp_path / "cache")})
    with pytest.raises(NotCachedError, match=r"autoencoder gives NaN.*photo .* in .*00000\.tar"):
        loop.train(config)
    assert not list((tmp_path / "cache" / "latents").glob("*"))
    weights[last] += float("nan")
    save_file(weights, vae)
    with pytest.raises(NotFiniteError, match="vae.safetensors: .*NaN"):
        loop.train(config)


def _layer(name: str) -> tuple[int, str]:
    return int(name.split(".")[1]), name


def test_a_norm_that_is_no_number_stops_before_the_step(
    monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("inf")))
    with pytest.raises(NonFiniteError, match=r"Step 1: the gradient norm is inf.*sample 0 .*1 "):
        loop.train(settings())


def test_eight_bit_adam_without_its_package_is_named(settings: Any) -> None:
    with pytest.raises(MissingPackageError, match="bitsandbytes"):
        loop.train(settings(optimiser={"kind": "adamw8bit"}))


def test_eight_bit_adam_gets_the_options_and_resumes(
    monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    """With a stand-in for the package: what is ours is the hand-over and the checkpoint."""
    made = []

    class AdamW8bit(torch.optim.AdamW):
        def __init__(self, parameters: Any, **options: Any) -> None:
            made.append(options)
            super().__init__(parameters, **options)

    package = SimpleNamespace(optim=SimpleNamespace(AdamW8bit=AdamW8bit))
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    options = {"kind": "adamw8bit", "rate": 2e-4, "weight_decay": 0.02}
    loop.train(settings("a", run={"steps": 1}, optimiser=options))
    resumed = loop.train(settings("a", run={"steps": 3}, optimiser=options))
    whole = loop.train(settings("b", run={"steps": 3}, optimiser=options))
    expected = {"lr": 2e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.02}
    assert made == [expected] * 3
    assert train_world.bits(resumed.adapter) == train_world.bits(whole.adapter)


# --- the objective ---------------------------------------------------------------------------


def batch_at(*timesteps: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (len(timesteps), 4, 8, 8)
    return {
        "latent": torch.randn(shape, generator=generator),
        "noise": torch.randn(shape, generator=generator),
        "timestep": torch.tensor(timesteps),
    }


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_the_right_answer_has_no_loss(prediction: Any) -> None:
    schedule = NoiseSchedule(prediction=prediction)
    objective, batch = DenoisingLoss(schedule, 0.0, torch.device("cpu")), batch_at(1, 500, 999)
    noisy = objective.noisy(batch)
    alpha = schedule.alphas_cumprod[batch["timestep"]].float().view(-1, 1, 1, 1)
    # The clean latent that the sampler would read off the right answer is the true one.
    sigma = ((1 - alpha) / alpha).sqrt()
    answer = batch["noise"] if prediction == "epsilon" else (
        alpha.sqrt() * batch["noise"] - (1 - alpha).sqrt() * batch["latent"]
    )  # fmt: skip
    weighted, plain = objective.losses(answer, batch)
    assert plain.max() < 1e-10
    assert weighted.max() < 1e-10
    clean = schedule.denoised(noisy / alpha.sqrt(), answer, sigma)
    torch.testing.assert_close(clean, batch["latent"], rtol=1e-3, atol=2e-3)


def test_min_snr_weights() -> None:
    timesteps = (0, 300, 999)
    alpha = NoiseSchedule().alphas_cumprod[list(timesteps)].float()
    snr = alpha / (1 - alpha)
    batch = batch_at(*timesteps)
    output = torch.zeros_like(batch["noise"])
    for prediction, over in (("epsilon", snr), ("v", snr + 1)):
        objective = DenoisingLoss(NoiseSchedule(prediction=prediction), 5.0, torch.device("cpu"))
        weighted, plain = objective.losses(output, batch)
        torch.testing.assert_close(weighted / plain, snr.clamp(max=5.0) / over)


def test_face_weight() -> None:
    """An error in the middle of the face counts more, one far from it less; none at 0."""
    landmarks = torch.tensor([[[2.0, 2.0], [4.0, 2.0], [3.0, 3.0], [2.0, 4.0], [4.0, 4.0]]])
    batch = {**batch_at(500), "face_bell": face_bell(landmarks, 8, 8)}
    assert batch["face_bell"].shape == (1, 1, 8, 8)
    assert float(batch["face_bell"][0, 0, 3, 3]) == pytest.approx(1.0, abs=1e-6)
    assert float(batch["face_bell"].max()) == pytest.approx(1.0, abs=1e-6)
    found = {}
    for place in ((3, 3), (7, 7)):
        output = batch["noise"].clone()
        output[0, :, place[0], place[1]] += 1.0
        for weight in (0.0, 8.0):
            objective = DenoisingLoss(NoiseSchedule(), 0.0, torch.device("cpu"), weight)
            weighted, plain = objective.losses(output, batch)
            found[place, weight] = float(weighted[0])
            torch.testing.assert_close(plain, torch.tensor([1 / 64]))
    assert [found[place, 0.0] for place in ((3, 3), (7, 7))] == pytest.approx([1 / 64] * 2)
    assert found[(3, 3), 8.0] == pytest.approx(9 * found[(7, 7), 8.0], rel=1e-2)
    # Over all places the weights are 1 on average: the rate needs no other value.
    objective = DenoisingLoss(NoiseSchedule(), 0.0, torch.device("cpu"), 8.0)
    weighted, _ = objective.losses(batch["noise"] + 1.0, batch)
    torch.testing.assert_close(weighted, torch.ones(1))


def test_rates(settings: Any) -> None:
    options = settings(
        run={"steps": 110},
        optimiser={"rate": 1.0, "warmup": 10, "schedule": "cosine", "final_rate": 0.1},
    ).optimiser
    assert options.rate_at(0, 110) == pytest.approx(1 / 11)
    assert options.rate_at(9, 110) == pytest.approx(10 / 11)
    assert options.rate_at(10, 110) == pytest.approx(1.0)
    assert options.rate_at(109, 110) == pytest.approx(0.1)
    fixed = settings(optimiser={"rate": 0.5}).optimiser
    assert {fixed.rate_at(step, 3) for step in range(3)} == {0.5}


# --- options that change the run -------------------------------------------------------------


def test_entangled_training_reads_the_captions(settings: Any, tmp_path: Path, root: Path) -> None:
    """On the embedded model, whose text encoders fit its UNet."""
    config = settings(
        run={"steps": 2},
        model={"unet": "microworld"},
        objective={"mode": "entangled", "drop_text": 0.5},
        data={"cache": str(tmp_path / "cache"), "crops_per_photo": 1},
    )
    assert loop.train(config).finished
    caches = Caches.below(config)
    keys = Keys(config=config, fingerprints=filling.fingerprints_of(config))
    captions = {c for c in Dataset(root / "data", config.filters).table["caption"].to_pylist()}
    assert caches.text.missing([keys.text(c) for c in ("", *captions)]) == []
    context = caches.text.read(keys.text("photo 1 of a person"))
    assert context.shape == (77, 128)
    assert not torch.equal(context, caches.text.read(keys.text("")))


def test_the_empty_prompts_pooled_text_is_all_that_is_read_of_text(
    settings: Any, tmp_path: Path
) -> None:
    config = settings(
        run={"steps": 1},
        model={"unet": "microworld"},
        data={"cache": str(tmp_path / "cache"), "crops_per_photo": 1},
        objective={"pooled": "empty"},
    )
    loop.train(config)
    keys = Keys(config=config, fingerprints=filling.fingerprints_of(config))
    caches = Caches.below(config)
    dataset = Dataset(config.data.folder, config.filters)
    captions = sorted({*dataset.table["caption"].to_pylist()} - {""})
    texts = [keys.text(caption) for caption in captions]
    assert texts and caches.text.missing([keys.text(""), *texts]) == texts
    sample = Samples(Plan(config, dataset, 2), keys, caches)[0]
    assert "context" not in sample
    assert torch.equal(sample["pooled"], caches.text.read(f"{keys.text('')}.pooled"))
    assert sample["pooled"].abs().max() > 0


def test_every_option_changes_the_weights(settings: Any) -> None:
    """Switched on, each of these leads elsewhere; none is read and forgotten."""
    variants: dict[str, dict[str, Any]] = {
        "none": {},
        "min_snr": {"objective": {"min_snr": 1.0}},
        "noise_offset": {"objective": {"noise_offset": 0.3}},
        "face_weight": {"objective": {"face_weight": 8.0}},
        "drop_identity": {"objective": {"drop_identity": 1.0}},
        "prediction": {"model": {"prediction": "v"}},
        "zero_terminal_snr": {"model": {"zero_terminal_snr": True}},
        "seed": {"run": {"seed": 8}},
        "embedding": {"encoder": {"embedding": "raw"}},
        "accumulation": {"optimiser": {"accumulation": 2}},
        "clip_norm": {"optimiser": {"clip_norm": 1e-6, "epsilon": 1e-3}},
        "weight_decay": {"optimiser": {"weight_decay": 0.9}},
        "betas": {"optimiser": {"beta1": 0.1}},
        "ema": {"optimiser": {"ema": 0.9}},
    }
    found = {}
    for name, sections in variants.items():
        run = {"steps": 2, **sections.pop("run", {})}
        outcome = loop.train(settings(name, run=run, **sections))
        tensors = read_adapter(outcome.adapter).state_dict()
        found[name] = torch.cat([t.flatten() for t in tensors.values()])
    same = [n for n, w in found.items() if n != "none" and torch.equal(w, found["none"])]
    assert same == []


def test_gradient_checkpointing_gives_the_same_weights(plain_run: Path, settings: Any) -> None:
    config = settings(run={"steps": 4}, optimiser={"checkpointing": True})
    weights = read_adapter(loop.train(config).adapter).state_dict()
    for name, tensor in read_adapter(plain_run / "adapter.safetensors").state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4)


# --- logs and previews -----------------------------------------------------------------------


class EveryoneAlike:
    """A recogniser that finds a face in every other picture, always the same one."""

    name = "of the test"

    def __init__(self) -> None:
        self.calls = 0
        self.answer = torch.randn(512, generator=torch.Generator().manual_seed(1))

    def read(self, picture: torch.Tensor) -> ReadFace | None:
        self.calls += 1
        assert picture.shape == (64, 64, 3)
        return ReadFace(embedding=self.answer, crop=picture) if self.calls % 2 else None


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    found.Reload()
    return found


def test_logs_and_previews_and_neither_changes_the_weights(
    plain_run: Path, settings: Any, tmp_path: Path
) -> None:
    recogniser = EveryoneAlike()
    config = settings(
        run={"steps": 4},
        log={"trackers": ["tensorboard"], "every": 2, "bands": 2},
        previews={"every": 2, "steps": 2, "people": 2},
        checkpoints={"every": 2},
    )
    outcome = loop.train(config, recogniser=recogniser)
    wanted = train_world.bits(plain_run / "adapter.safetensors")
    assert train_world.bits(outcome.adapter) == wanted
    found = events(tmp_path / "run" / "logs")
    tags = set(found.Tags()["scalars"])
    assert {"loss/all", "gradient_norm", "images_per_second", "rate"} <= tags
    assert {"loss/timesteps_000_to_499", "loss/timesteps_500_to_999"} & tags
    assert [entry.step for entry in found.Scalars("loss/all")] == [2, 4]
    assert found.Scalars("gradient_norm")[0].value > 0
    pictures = found.Tags()["images"]
    assert pictures == ["preview/person 5/identity stream alone", "preview/sheet"]
    for name in pictures:
        assert [entry.step for entry in found.Images(name)] == [2, 4]
    assert [e.value for e in found.Scalars("likeness/detected")] == [1.0, 0.0]
    row = Dataset(config.data.folder, config.filters, "held_out")
    reference = torch.from_numpy(row.face(0))
    cosine = torch.cosine_similarity(recogniser.answer, reference, dim=0)
    values = [e.value for e in found.Scalars("likeness/zero_filled")]
    assert values == pytest.approx([float(cosine), 0.0], abs=1e-5)


def test_settings_are_kept_with_a_checkpoint(plain_run: Path) -> None:
    record = json.loads(
        (plain_run / "checkpoints" / "step-00000004" / state.CONFIG).read_text(encoding="utf-8")
    )
    assert record["config"]["optimiser"]["rate"] == 1e-3
    assert set(record["fingerprints"]) == {"dataset", "unet", "vae", "clip", "text"}
