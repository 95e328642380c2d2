"""Pieces for the tests of `side_by_side`: their processes import this and nothing heavy."""

from __future__ import annotations

import json
import time
from pathlib import Path


def make(name: str, folder: Path, threads: int) -> None:
    """A piece that says what was there when it began; `folder/broken` names one that fails."""
    broken = folder / "broken"
    if broken.exists() and broken.read_text() == name:
        raise RuntimeError(f"no {name} today")
    print("making", name)
    there = sorted(path.stem for path in folder.glob("*.made"))
    time.sleep(0.15)
    (folder / f"{name}.made").write_text(json.dumps([threads, there]))


def meet(name: str, folder: Path, threads: int) -> None:
    """Waits for the other piece; fails if it never comes."""
    (folder / f"{name}.here").touch()
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*.here"))) < 2:
        if time.monotonic() > deadline:
            raise TimeoutError(name)
        time.sleep(0.05)
