"""The launchers that the documentation names start the same run as ``python -m trainer``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .. import train_world

LAUNCHERS = {
    # torchrun and accelerate are these modules' console scripts.
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m"],
    "accelerate launch": [
        "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
        "--mixed_precision", "fp16", "--dynamo_backend", "no", "-m",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def alone() -> Any:
    """The weights of a run without a launcher, on one thread like theirs."""
    child = train_world.Child(train_world.config(train_world.shared(), "alone"))
    assert child.wait() == 0, child.text()
    return train_world.bits(train_world.shared() / "alone" / "adapter.safetensors")


@pytest.mark.parametrize("name", list(LAUNCHERS))
def test_a_launcher_changes_nothing(name: str, alone: Any) -> None:
    """Not even accelerate's own precision: the configuration alone decides."""
    output = name.replace(" ", "-")
    settings = train_world.config(train_world.shared(), output)
    folder = Path(settings.run.output)
    folder.mkdir(parents=True)
    path = train_world.write_config(folder / "config.toml", settings)
    words = [sys.executable, "-m", *LAUNCHERS[name], "trainer", "train", "--config", str(path)]
    run = subprocess.run(
        words,
        cwd=train_world.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == str(folder / "adapter.safetensors")
    assert train_world.bits(folder / "adapter.safetensors") == alone
