"""Optimisers by name: each learns, takes the memory foretold, and resumes to the same bits."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infinite_id_core.errors import MissingPackageError
from infinite_id_core.files.adapters import read_adapter
from trainer import inspect
from trainer.config import Optimiser, TrainConfig
from trainer.errors import ConfigValueError, ResumeError
from trainer.train import loop, state
from trainer.train.checks import build_meta
from trainer.train.estimate import dry_run, estimate_memory
from trainer.train.optimisers import build_optimiser, state_bytes, step_size

from .. import train_world

Make = Callable[..., TrainConfig]
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"kind": "adamw"},
    "adafactor": {"kind": "adafactor"},
    "prodigy": {"kind": "prodigy", "rate": 1.0},
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root() -> Path:
    return train_world.shared()


@pytest.fixture
def make(root: Path, tmp_path: Path) -> Make:
    def settings(name: str = "run", **sections: Any) -> TrainConfig:
        run = {"output": str(tmp_path / name), **sections.pop("run", {})}
        return train_world.config(root, run=run, **sections)

    return settings


def learned(steps: int, **options: Any) -> tuple[Any, list[torch.Tensor], float]:
    """A matrix and a bias brought towards ones; the optimiser, the two, and the last loss."""
    torch.manual_seed(0)
    parts = [torch.nn.Parameter(torch.randn(*shape)) for shape in ((16, 48), (48,))]
    optimiser = build_optimiser(Optimiser(**options), parts, CPU)
    loss = torch.zeros(())
    for _ in range(steps):
        optimiser.zero_grad()
        loss = sum(((p - 1.0).square().mean() for p in parts), torch.zeros(()))
        loss.backward()
        optimiser.step()
    return optimiser, parts, float(loss.detach())


@pytest.mark.parametrize("kind", list(OPTIONS))
def test_each_learns_a_plain_problem(kind: str) -> None:
    options = {"rate": 1e-2, **OPTIONS[kind]}
    before, after = learned(1, **options)[2], learned(400, **options)[2]
    assert after < 0.05 * before


@pytest.mark.parametrize("kind", list(OPTIONS))
def test_the_memory_foretold_is_what_the_state_takes(kind: str) -> None:
    optimiser, parts, _ = learned(1, **OPTIONS[kind])
    tensors = [t for entry in optimiser.state.values() for t in entry.values()]
    sizes = [t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor)]
    taken = sum(size for size in sizes if size > 4)  # but for single numbers
    assert taken == state_bytes(Optimiser(**OPTIONS[kind]).kind, parts)


def test_the_estimate_knows_each_optimiser(make: Make) -> None:
    configs = {kind: make(optimiser=options) for kind, options in OPTIONS.items()}
    configs["adamw8bit"] = make(optimiser={"kind": "adamw8bit"})
    unet = build_meta(configs["adamw"])
    found = {kind: estimate_memory(config, unet) for kind, config in configs.items()}
    assert found["adamw"].state == 8 * found["adamw"].parameters
    states = [found[kind].state for kind in ("adafactor", "adamw8bit", "adamw", "prodigy")]
    assert states == sorted(set(states))
    rest = {estimate.learning - estimate.state for estimate in found.values()}
    assert len(rest) == 1


def test_the_rate_is_obeyed(make: Make) -> None:
    """Each optimiser moves weights as far as its rate says, and not at all at a tiny one."""
    for kind, high, low in (("adafactor", 1e-3, 1e-5), ("prodigy", 1.0, 0.1)):
        moved = []
        for rate in (high, low):
            torch.manual_seed(0)
            before = torch.randn(16, 48)
            _, parts, _ = learned(3, kind=kind, rate=rate, weight_decay=0.0)
            moved.append(float((parts[0].detach() - before).norm()))
        assert moved[1] == pytest.approx(moved[0] * low / high, rel=0.1), kind


def test_the_rate_that_prodigy_finds_is_what_is_logged() -> None:
    optimiser, _, _ = learned(100, **OPTIONS["prodigy"])
    found = optimiser.param_groups[0]["d"]
    assert found > 1e-4  # it began at 1e-6
    assert step_size(optimiser, 0.5) == 0.5 * found
    assert step_size(learned(1, kind="adafactor")[0], 0.5) == 0.5


def test_prodigy_writes_nothing_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    learned(1, **OPTIONS["prodigy"])
    assert capsys.readouterr().out == ""


# --- runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(OPTIONS))
def test_interrupted_is_uninterrupted_bit_for_bit(make: Make, kind: str, tmp_path: Path) -> None:
    def settings(name: str, steps: int) -> TrainConfig:
        options = {**OPTIONS[kind], "warmup": 1}
        return make(name, run={"steps": steps}, optimiser=options)

    whole = loop.train(settings("whole", 6)).adapter
    weights = []
    for steps in (2, 3, 6):
        resumed = loop.train(settings("parts", steps)).adapter
        assert resumed is not None
        weights.append(read_adapter(resumed).state_dict())
    assert whole is not None
    assert train_world.bits(resumed) == train_world.bits(whole)
    assert all(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    last = state.checkpoints(tmp_path / "parts" / "checkpoints")[-1]
    assert inspect.main([str(last)]) == 0


@pytest.mark.parametrize("kind", ["adafactor", "prodigy"])
def test_another_optimiser_does_not_go_on_even_when_asked(make: Make, kind: str) -> None:
    loop.train(make(run={"steps": 1}))
    other = make(run={"steps": 2}, optimiser=OPTIONS[kind])
    for go_on in (dry_run, loop.train):
        with pytest.raises(ResumeError, match=f"optimiser.kind: 'adamw' then, '{kind}' now.*set"):
            go_on(other, changed=True)


def test_a_changed_rate_goes_on_with_what_prodigy_has_found(make: Make, tmp_path: Path) -> None:
    loop.train(make(run={"steps": 4}, optimiser=OPTIONS["prodigy"]))
    changed = make(run={"steps": 5}, optimiser={**OPTIONS["prodigy"], "rate": 0.5})
    loop.train(changed, changed=True)
    found = [
        torch.load(path / state.STATE, weights_only=True)["optimiser"]["param_groups"][0]
        for path in state.checkpoints(tmp_path / "run" / "checkpoints")
    ]
    assert [group["k"] for group in found] == [4, 5]
    assert [group["lr"] for group in found] == [1.0, 0.5]
    assert found[1]["d_max"] >= found[0]["d_max"]
    assert 0.0 != found[0]["d_numerator"] != found[1]["d_numerator"]


def test_a_missing_package_is_named_by_the_dry_run_too(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    for start in (dry_run, loop.train):
        with pytest.raises(MissingPackageError, match="prodigyopt.*optimiser.kind = 'prodigy'"):
            start(make(optimiser=OPTIONS["prodigy"]))


def test_a_rate_for_adam_is_refused_with_prodigy() -> None:
    with pytest.raises(ConfigValueError, match=r"0.0001 is a factor.*optimiser\.rate = 1"):
        Optimiser(kind="prodigy")
    assert dataclasses.replace(Optimiser(), kind="adafactor").rate == 1e-4


def test_adamw_is_torchs_own() -> None:
    optimiser, _, _ = learned(1, rate=2e-4, weight_decay=0.02)
    assert type(optimiser) is torch.optim.AdamW
    group = optimiser.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (2e-4, (0.9, 0.999), 1e-8)
    assert group["weight_decay"] == 0.02
