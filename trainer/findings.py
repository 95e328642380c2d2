"""What ``inspect`` found in a file, and how it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infinite_id_core.errors import printable

_SHOWN = 20  # problems of one kind


@dataclass(kw_only=True)
class Findings:
    """What was found in one file."""

    kind: str
    facts: dict[str, Any] = field(default_factory=dict)
    """Single values, in the order to show them."""
    tables: dict[str, list[tuple[Any, ...]]] = field(default_factory=dict)
    """Rows by title; the first row is the heading."""
    problems: list[str] = field(default_factory=list)
    """Empty where the file is sound."""


def in_short(problems: Sequence[str]) -> list[str]:
    """The first problems of one kind, and how many more there are."""
    more = len(problems) - _SHOWN
    return [*problems[:_SHOWN], *([f"and {more} more."] if more > 0 else [])]


def as_text(path: Path, findings: Findings) -> str:
    """Findings as a page of text for a terminal."""
    lines = [f"{path}: {findings.kind}"]
    width = max((len(name) for name in findings.facts), default=0)
    lines += [
        f"  {printable(name):{width}}  {_value(value)}" for name, value in findings.facts.items()
    ]
    for title, rows in findings.tables.items():
        lines += ["", f"{title}:"]
        texts = [[_value(cell) for cell in row] for row in rows]
        widths = [max(len(row[i]) for row in texts) for i in range(len(texts[0]))]
        for row in texts:
            cells = (f"{t:{w}}" if i == 0 else f"{t:>{w}}" for i, (t, w) in enumerate(
                zip(row, widths, strict=True)))  # fmt: skip
            lines.append("  " + "  ".join(cells))
    lines += ["", "health: " + ("sound" if not findings.problems else "PROBLEMS")]
    lines += [f"  - {printable(problem)}" for problem in findings.problems]
    return "\n".join(lines)


def _value(value: Any) -> str:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if whole else printable(str(value))
