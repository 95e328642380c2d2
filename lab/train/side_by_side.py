"""Pieces of work that need each other, each in a process of its own, several at a time.

Light on imports: a child reads what its piece reads, no more.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

TIMES = "seconds.json"  # what each piece took, interrupted tries included
Make = Callable[[str, Path, int], None]


class PieceFailedError(RuntimeError):
    """A piece's process ended with an error; its log says which."""


def run(
    names: Sequence[str],
    needs: Mapping[str, Sequence[str]],
    make: Make,
    folder: Path,
    *,
    jobs: int,
    threads: int,
) -> None:
    """Call `make(name, folder, threads)` for every name once all that it needs is made.

    `jobs` at a time, each with its share of `threads` and a log, `folder/logs/<name>.log`;
    `folder/seconds.json` says what each took. Pieces that can start are started in the order of
    `names`, which holds all that they need. Raises PieceFailedError; what runs beside the failed
    piece is then ended.
    """
    done: set[str] = set()
    running: dict[str, multiprocessing.process.BaseProcess] = {}
    started: dict[str, float] = {}
    context = multiprocessing.get_context("spawn")
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with tqdm(total=len(names), desc="pieces", dynamic_ncols=True) as bar:
        try:
            while len(done) < len(names):
                for name in names:
                    free = len(running) < jobs and name not in done and name not in running
                    if free and done.issuperset(needs[name]):
                        share = max(1, threads // jobs)
                        process = context.Process(target=_child, args=(make, name, folder, share))
                        process.start()
                        running[name], started[name] = process, time.monotonic()
                time.sleep(0.5)
                bar.set_postfix_str(" | ".join(_last_line(folder, name) for name in running))
                for name in [n for n, process in running.items() if not process.is_alive()]:
                    code = running.pop(name).exitcode
                    _add_seconds(folder, name, time.monotonic() - started[name])
                    if code:
                        raise PieceFailedError(
                            f"{name} ended with status {code}; {_log(folder, name)} says why. The "
                            "same command goes on from what is made."
                        )
                    done.add(name)
                    bar.update()
        finally:
            for name, process in running.items():
                process.terminate()
                process.join()
                _add_seconds(folder, name, time.monotonic() - started[name])
    print(f"{len(names)} pieces, {(time.monotonic() - began) / 60:.0f} minutes; {folder / TIMES}")


def _child(make: Make, name: str, folder: Path, threads: int) -> None:
    """One piece, in its own process, all that it says in its log."""
    log = os.open(_log(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    make(name, folder, threads)


def _log(folder: Path, name: str) -> Path:
    return folder / "logs" / f"{name}.log"


def _last_line(folder: Path, name: str) -> str:
    """The end of a piece's log, where its progress bar is."""
    with contextlib.suppress(OSError):
        text = _log(folder, name).read_bytes()[-400:].decode(errors="replace")
        lines = [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
        if lines:
            return lines[-1][:60]
    return name


def _add_seconds(folder: Path, name: str, seconds: float) -> None:
    path = folder / TIMES
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known[name] = round(known.get(name, 0.0) + seconds, 1)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(known, indent=1), encoding="utf-8")
    part.replace(path)
