"""Killed, asked to stop, or left by another rank: a resumed run ends as if nothing had been."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from trainer.config import TrainConfig
from trainer.train.loop import INTERRUPTED

from .. import train_world

STEPS, EVERY = 24, 4
posix = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX knows them")


@pytest.fixture(scope="module")
def root() -> Path:
    return train_world.shared()


def settings(root: Path, output: str, workers: int = 0, **sections: Any) -> TrainConfig:
    return train_world.config(
        root,
        output,
        run={"steps": STEPS},
        data={"workers": workers},
        optimiser={"batch": 1, "accumulation": 2, "ema": 0.9, "schedule": "cosine"},
        checkpoints={"every": EVERY, "keep": 2},
        **sections,
    )


def weights(root: Path, output: str) -> Any:
    return train_world.bits(root / output / "adapter.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(root: Path) -> Any:
    child = train_world.Child(settings(root, "uninterrupted"))
    assert child.wait() == 0, child.text()
    return weights(root, "uninterrupted")


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_kill_9_and_resume_give_the_same_bits(root: Path, uninterrupted: Any, workers: int) -> None:
    output = f"killed-{workers}"
    first = train_world.Child(settings(root, output, workers))
    first.wait_for_step(2 * EVERY)
    first.process.kill()
    assert first.wait() == -signal.SIGKILL
    assert not (root / output / "adapter.safetensors").exists()
    second = train_world.Child(settings(root, output, workers))
    assert second.wait() == 0, second.text()
    assert "Going on from" in second.text()
    assert weights(root, output) == uninterrupted


@posix
def test_sigterm_saves_the_step_it_is_in_and_resumes(root: Path, uninterrupted: Any) -> None:
    first = train_world.Child(settings(root, "asked", 3))
    first.wait_for_step(EVERY)
    time.sleep(0.05)  # into the steps between two checkpoints
    os.kill(first.process.pid, signal.SIGTERM)
    assert first.wait() == INTERRUPTED, first.text()
    saved = sorted(path.name for path in first.checkpoints.iterdir())
    assert f"step {int(saved[-1][-8:])}" in first.text()
    second = train_world.Child(settings(root, "asked", 1))
    assert second.wait() == 0, second.text()
    assert weights(root, "asked") == uninterrupted


def pair(root: Path, output: str) -> list[train_world.Child]:
    port = train_world.free_port()
    chosen = settings(root, output, 1)
    return [train_world.Child(chosen, rank=r, world=2, port=port) for r in range(2)]


def test_a_lost_rank_stops_the_other_by_name_and_both_resume(root: Path) -> None:
    whole = pair(root, "two-uninterrupted")
    assert [child.wait() for child in whole] == [0, 0], whole[0].text() + whole[1].text()
    lost = pair(root, "two-lost")
    lost[0].wait_for_step(2 * EVERY)
    lost[1].process.kill()
    assert lost[0].wait() == 1
    assert "RankLostError" in lost[0].text()
    again = pair(root, "two-lost")
    assert [child.wait() for child in again] == [0, 0], again[0].text() + again[1].text()
    assert weights(root, "two-lost") == weights(root, "two-uninterrupted")
