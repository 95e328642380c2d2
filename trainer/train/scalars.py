"""``scalars.csv``: the numbers of the log in a plain file, one to a line."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

from infinite_id_core.files.atomic import replacing

FILE = "scalars.csv"
_HEAD = ["step", "name", "value"]


class ScalarFile:
    """Lines of step, name and value. A resumed run goes on behind the step it resumes from."""

    def __init__(self, path: Path, first_step: int) -> None:
        """Lines after ``first_step`` are of steps that are made again: they go."""
        kept = [line for line in _lines(path) if int(line[0]) <= first_step]
        with replacing(path) as temporary:
            _write(temporary, "w", [_HEAD, *kept])
        self.path = path

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write some numbers of a step."""
        _write(self.path, "a", ([str(step), name, repr(v)] for name, v in values.items()))


def _lines(path: Path) -> list[list[str]]:
    """Whole lines of a file that a killed run may have left half a line in."""
    if not path.is_file():
        return []
    text = path.read_bytes().decode("utf-8", errors="replace")
    whole, _, _ = text.rpartition("\n")
    lines = list(csv.reader(whole.splitlines()))
    return [line for line in lines[1:] if len(line) == len(_HEAD) and line[0].isdecimal()]


def _write(path: Path, mode: str, lines: Iterable[list[str]]) -> None:
    with path.open(mode, newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
