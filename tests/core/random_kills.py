"""``kill -9`` at random moments of ``prepare`` and of ``train``: resumed, they give the same bytes.

    python -m tests.core.random_kills [--kills 10] [--seed 0] [--only prepare|train]

Too slow for the suite, which kills at chosen moments. Each kill gets a folder of its own: the
process dies somewhere between its first file and the time an uninterrupted run takes, and is
killed again where it had ended by then. Exit status 1 where any byte differs.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import prepare_world, train_world

STEPS, EVERY = 40, 3


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command that can be killed and given again."""

    name: str
    arguments: Callable[[Path], Sequence[str]]
    """Of ``python -m trainer``, for a folder to work in."""
    sign: str
    """Below the folder: it is there once the work has begun."""
    result: Callable[[Path], dict[str, str]]
    """Hashes of what it makes, by name."""


def start(job: Job, folder: Path) -> subprocess.Popen[bytes]:
    """The command in a process of its own; what it says goes to ``log.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "trainer", *job.arguments(folder)]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(words, cwd=train_world.ROOT, stdout=log, stderr=log)


def finish(job: Job, folder: Path) -> None:
    """Run the command to its end."""
    status = start(job, folder).wait()
    assert status == 0, (folder / "log.txt").read_text(encoding="utf-8")


def begun(job: Job, folder: Path, process: subprocess.Popen[bytes]) -> float:
    """When the work began."""
    while not (folder / job.sign).exists() and process.poll() is None:
        time.sleep(0.005)
    return time.monotonic()


def kill_and_resume(job: Job, folder: Path, seconds: float, chance: random.Random) -> float:
    """Kill the command within ``seconds`` of its work, then let it finish. Returns the moment."""
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        process = start(job, folder)
        first = begun(job, folder, process)
        moment = chance.uniform(0.0, seconds)
        time.sleep(max(0.0, first + moment - time.monotonic()))
        process.kill()
        if process.wait() == -signal.SIGKILL:
            break
    finish(job, folder)
    return moment


def check(job: Job, root: Path, kills: int, chance: random.Random) -> int:
    """How many of the kills changed the result."""
    whole = root / job.name / "whole"
    process = start(job, whole)
    first = begun(job, whole, process)
    assert process.wait() == 0, (whole / "log.txt").read_text(encoding="utf-8")
    seconds, wanted = time.monotonic() - first, job.result(whole)
    print(f"{job.name}: {seconds:.1f} s of work, {len(wanted)} results", flush=True)
    wrong = 0
    for number in range(kills):
        folder = root / job.name / f"killed-{number}"
        moment = kill_and_resume(job, folder, seconds, chance)
        found = job.result(folder)
        differ = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
        wrong += bool(differ)
        print(f"  killed after {moment:.2f} s: {', '.join(differ) or 'the same'}", flush=True)
    return wrong


def hashes(folder: Path, *patterns: str) -> dict[str, str]:
    """SHA-256 of files below a folder."""
    files = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def prepare_job(root: Path) -> Job:
    """Five people's photos, two processes."""
    people, pack = prepare_world.make_people(root / "people"), prepare_world.make_pack(root)

    def arguments(folder: Path) -> Sequence[str]:
        return [
            "prepare", str(people), str(folder / "set"), "--face-models", str(pack),
            "--detector-size", "256", "--min-detection", "0.6", "--held-out", "0.4",
            "--workers", "2", "--threads", "1", "--provider", "cpu", "--no-progress",
            "--no-report",
        ]  # fmt: skip

    def result(folder: Path) -> dict[str, str]:
        return hashes(folder / "set", "index.parquet", "shards/*")

    return Job(name="prepare", arguments=arguments, sign="set/work", result=result)


def train_job(root: Path) -> Job:
    """Caches filled and some steps made, two data workers."""
    world = train_world.world(root / "world")

    def arguments(folder: Path) -> Sequence[str]:
        settings = train_world.config(
            world,
            run={"output": str(folder / "run"), "steps": STEPS},
            data={"workers": 2, "cache": str(folder / "cache")},
            optimiser={"batch": 1, "accumulation": 2, "ema": 0.9, "schedule": "cosine"},
            checkpoints={"every": EVERY, "keep": 2},
        )
        return ["train", "--config", str(train_world.write_config(folder / "c.toml", settings))]

    def result(folder: Path) -> dict[str, str]:
        last = f"checkpoints/step-{STEPS:08d}"
        files = hashes(folder / "run", "adapter.safetensors", f"{last}/*.safetensors")
        return {
            **{name: str(train_world.bits(folder / "run" / name)) for name in files},
            "state.pt": state_of(folder / "run" / last / "state.pt"),
        }

    return Job(name="train", arguments=arguments, sign="cache", result=result)


def state_of(path: Path) -> str:
    """A hash of every number in the optimiser's state."""
    import torch

    digest = hashlib.sha256()
    values = torch.load(path, weights_only=True)["optimiser"]["state"]
    for number in sorted(values):
        for name, value in sorted(values[number].items()):
            digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("prepare", "train"))
    values = parser.parse_args()
    chance = random.Random(values.seed)
    with tempfile.TemporaryDirectory(prefix="infinite-id-kills-") as name:
        root = Path(name)
        jobs = [job(root) for job in (prepare_job, train_job)]
        wrong = sum(
            check(job, root, values.kills, chance)
            for job in jobs
            if values.only in (None, job.name)
        )
    print("every byte is the same" if not wrong else f"{wrong} kills changed the result")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
