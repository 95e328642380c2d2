"""A training that fails ends: every process of it, within seconds, with the reason shown."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from .. import train_world

SCRIPT = Path(__file__).with_name("failing_train.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SECONDS = 10.0


def crowding() -> float:
    """How many times longer than alone a process takes on this machine just now, at least 1."""
    wall, own = time.monotonic(), time.process_time()
    while time.process_time() - own < 0.3:
        pass
    return max(1.0, (time.monotonic() - wall) / 0.3)


def run(
    tmp_path: Path, *launcher: str, rank: int = 0, kind: str = "plain", workers: int = 0
) -> tuple[float, subprocess.CompletedProcess[str]]:
    """A run of 500 steps that fails in the third: seconds until all of it was gone, and what it
    printed. Every process holds the pipes, so that none can be left over unnoticed."""
    root = train_world.shared()
    settings = train_world.config(
        root,
        run={"output": str(tmp_path / "run"), "steps": 500},
        data={"workers": workers},
    )
    file, mark = train_world.write_config(tmp_path / "config.toml", settings), tmp_path / "mark"
    words = [*launcher, str(SCRIPT), str(rank), kind, str(mark), "train", "--config", str(file)]
    ended = subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert mark.exists(), ended.stderr
    return time.time() - float(mark.read_text(encoding="utf-8")), ended


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_any_exception_ends_the_run_with_its_workers(tmp_path: Path, workers: int) -> None:
    seconds, ended = run(tmp_path, workers=workers)
    assert ended.returncode == 1
    assert "ZeroDivisionError: a fault of the test" in ended.stderr
    assert seconds < SECONDS * crowding()


def test_out_of_memory_comes_with_the_dry_runs_advice(tmp_path: Path) -> None:
    from trainer.train.memory import LESS_MEMORY

    seconds, ended = run(tmp_path, kind="memory", workers=1)
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("MemoryFullError: ") and "CUDA out of memory" in last
    assert LESS_MEMORY in last
    assert seconds < SECONDS * crowding()


@pytest.mark.parametrize("rank", [0, 1])
def test_under_torchrun_an_exception_on_one_rank_ends_both(tmp_path: Path, rank: int) -> None:
    seconds, ended = run(tmp_path, *TORCHRUN, rank=rank, workers=1)
    assert ended.returncode != 0
    assert "ZeroDivisionError: a fault of the test" in ended.stderr
    assert "RankLostError" in ended.stderr
    assert seconds < SECONDS * crowding()


def test_a_fellow_that_waits_for_a_failed_one_ends_though_nothing_wakes_it(tmp_path: Path) -> None:
    """As where the communication library notices nothing: the other rank waits and waits."""
    words = [*TORCHRUN, str(Path(__file__).with_name("waiting_fellow.py"))]
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert ended.returncode != 0
    assert "RankLostError: Process 0 failed with ZeroDivisionError: of the test." in ended.stderr
    assert time.monotonic() - started < 100  # the fellow waits for ten minutes


@pytest.mark.parametrize(
    ("told", "advice"),
    [
        ("DataLoader worker (pid 12) is killed by signal: Killed. ", "fewer data.workers"),
        ("DataLoader worker (pid(s) 12) exited unexpectedly", "fewer data.workers"),
        ("DataLoader worker (pid 12) is killed by signal: Bus error. It is", "--shm-size"),
    ],
)
def test_a_reader_that_the_system_ended_is_named(told: str, advice: str) -> None:
    from trainer.errors import WorkerDiedError
    from trainer.train.workers import batches

    def lost() -> Iterator[dict[str, torch.Tensor]]:
        yield {"number": torch.zeros(1)}
        raise RuntimeError(told)

    with pytest.raises(WorkerDiedError, match=advice), batches(lost()) as read:
        list(read)


def test_a_killed_reader_ends_the_run_by_name(tmp_path: Path) -> None:
    seconds, ended = run(tmp_path, kind="killed", workers=1)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("WorkerDiedError: ")
    assert "goes on from the last checkpoint" in ended.stderr
    assert seconds < SECONDS * crowding()


def test_memory_that_is_full_before_the_first_step_has_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infinite_id_core.errors import InfiniteIDError
    from trainer.train import loop
    from trainer.train.memory import LESS_MEMORY

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    monkeypatch.setattr(loop, "prepare_unet", full)
    config = train_world.config(train_world.shared(), run={"output": str(tmp_path / "run")})
    with pytest.raises(InfiniteIDError, match="loading the models.*CUDA out of memory") as caught:
        loop.train(config)
    assert LESS_MEMORY in str(caught.value)


@pytest.mark.parametrize(
    ("number", "name"), [(errno.ENOSPC, "DiskFullError"), (errno.EACCES, "NotWrittenError")]
)
def test_generate_names_the_picture_that_it_cannot_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, name: str
) -> None:
    from infinite_id_core.errors import NotWrittenError
    from trainer.generate import save_png

    def refuse(_picture: object, path: Path, _format: str) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("PIL.Image.Image.save", refuse)
    with pytest.raises(NotWrittenError) as caught:
        save_png(torch.zeros(3, 8, 8), tmp_path / "picture.png")
    assert type(caught.value).__name__ == name
    assert "picture.png" in str(caught.value) and ".part" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_generate_names_a_full_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainer import generate
    from trainer.__main__ import main

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(generate, "load_painter", full)
    assert main(["generate", "--prompt", "a photo", "--device", "cpu"]) == 1
    said = capsys.readouterr().err
    assert "MemoryFullError: While making pictures" in said and "--width" in said
