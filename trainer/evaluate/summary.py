"""What is reported of each method, and the files it is written to."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infinite_id_core.files.atomic import replacing
from infinite_id_core.files.cells import (
    code_cell,
    csv_cell,
    markdown_cell,
    shown_path,
    without_folders,
)
from infinite_id_core.scores.metrics import (
    BootstrapOptions,
    Interval,
    Scores,
    bootstrap_mean,
    zero_filled,
)

from ..errors import disk_errors
from .measure import Measured

Mask = NDArray[np.bool_]

_COLUMNS = ("method", "identity", "prompt", "category", "seed", "image", "reference", "status")

# Column of the table -> attribute of MethodSummary.
_TABLE = {
    "detected": "detected",
    "M_face (0 without a face)": "m_face_filled",
    "M_face (faces only)": "m_face",
    "CLIP-I (0 without a face)": "clip_i_filled",
    "CLIP-I (faces only)": "clip_i",
    "CLIP-T": "clip_t",
    "fidelity (Eq. 10)": "fidelity",
    "copy-paste": "copy_paste",
}


@dataclass(frozen=True, kw_only=True)
class MethodSummary:
    """Means of one method, each with its interval by identity."""

    method: str
    pictures: int
    """Those that could be read."""
    unreadable: int
    detected: Interval
    """Share of pictures with a face."""
    m_face_filled: Interval
    """A picture without a face counting 0."""
    m_face: Interval
    """Over pictures with a face."""
    clip_i_filled: Interval
    clip_i: Interval
    clip_t: Interval
    fidelity: Interval
    """Eq. 10, over pictures with a face."""
    copy_paste: Interval

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            name: value.to_json() if isinstance(value, Interval) else value
            for name, value in vars(self).items()
        }


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All methods of a run, whole and by category of prompt."""

    methods: tuple[MethodSummary, ...]
    categories: dict[str, tuple[MethodSummary, ...]]
    """Empty unless the pictures' prompts have categories."""


def summarise(measured: Measured, options: BootstrapOptions | None = None) -> Summary:
    """Means and intervals of every method of ``measured``, in the order they first appear."""
    methods = np.array([row.method for row in measured.rows])
    kinds = np.array([row.category for row in measured.rows])
    names = list(dict.fromkeys(methods.tolist()))

    def of(method: str, where: Mask) -> MethodSummary:
        return _summary(measured, method, where & (methods == method), options)

    everywhere = np.ones(len(methods), dtype=bool)
    return Summary(
        methods=tuple(of(name, everywhere) for name in names),
        categories={
            kind: tuple(of(name, kinds == kind) for name in names)
            for kind in dict.fromkeys(kinds.tolist())
            if kind
        },
    )


def _summary(
    measured: Measured, method: str, mine: Mask, options: BootstrapOptions | None
) -> MethodSummary:
    use = mine & measured.readable
    people = [row.identity for row, used in zip(measured.rows, use, strict=True) if used]

    def mean(scores: Scores) -> Interval:
        return bootstrap_mean(scores[use], people, options)

    clip = bool(measured.populations)
    unmeasured = np.full(len(mine), math.nan)
    return MethodSummary(
        method=method,
        pictures=int(use.sum()),
        unreadable=int((mine & ~measured.readable).sum()),
        detected=mean(measured.found.astype(np.float64)),
        m_face_filled=mean(zero_filled(measured.m_face)),
        m_face=mean(measured.m_face),
        clip_i_filled=mean(zero_filled(measured.clip_i) if clip else unmeasured),
        clip_i=mean(measured.clip_i),
        clip_t=mean(measured.clip_t),
        fidelity=mean(measured.fidelity),
        copy_paste=mean(measured.copy_paste),
    )


# --- files -----------------------------------------------------------------------------------


def write_pictures(path: Path, measured: Measured) -> None:
    """A CSV with a line a picture; unmeasured scores are empty. Raises ``DiskFullError``.

    Paths start at the CSV's folder; of pictures elsewhere the last two parts are written.
    """
    scores = ("m_face", "clip_i", "clip_t", "fidelity", "copy_paste")
    columns = {name: getattr(measured, name) for name in scores}
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_COLUMNS, *scores])
    for i, row in enumerate(measured.rows):
        values = [columns[name][i] for name in scores]
        places = {n: shown_path(getattr(row, n), path.parent) for n in ("image", "reference")}
        known = {**vars(row), **places, "status": measured.status[i]}
        numbers = ["" if math.isnan(value) else f"{value:.6f}" for value in values]
        writer.writerow([*(csv_cell(known[name]) for name in _COLUMNS), *numbers])
    _write(path, text.getvalue())


def write_summary(
    folder: Path, measured: Measured, summary: Summary, settings: dict[str, Any]
) -> None:
    """``summary.json`` and ``summary.md``. Raises ``DiskFullError``."""
    settings = {name: _without_folders(value) for name, value in settings.items()}
    content = {
        "settings": settings,
        "recogniser": measured.recogniser,
        "populations": {name: p.to_json() for name, p in measured.populations.items()},
        "methods": [method.to_json() for method in summary.methods],
        "categories": {
            kind: [method.to_json() for method in methods]
            for kind, methods in summary.categories.items()
        },
        "unreadable": _shown(unreadable(measured), folder),
    }
    _write(folder / "summary.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    _write(folder / "summary.md", markdown(measured, summary, settings, folder))


def unreadable(measured: Measured) -> dict[str, str]:
    """Why, by picture."""
    listed = zip(measured.rows, measured.status, measured.readable, strict=True)
    return {str(row.image): status for row, status, readable in listed if not readable}


def _shown(pictures: dict[str, str], folder: Path) -> dict[str, str]:
    return {shown_path(path, folder): why for path, why in pictures.items()}


def _without_folders(value: Any) -> Any:
    """An option's value as a report shows it."""
    if isinstance(value, list):
        return [_without_folders(entry) for entry in value]
    return without_folders(value) if isinstance(value, str) else value


def markdown(
    measured: Measured, summary: Summary, settings: dict[str, Any], folder: Path = Path()
) -> str:
    """The report as Markdown; ``folder``: where it stands, for paths."""
    level = settings.get("level", 0.95)
    lines = [
        "# Scores",
        "",
        f"E_face: {code_cell(measured.recogniser)}. E_clip: "
        f"{code_cell(without_folders(str(settings.get('clip', 'none'))))}. Means with "
        f"{level:.0%} bootstrap intervals, whole identities resampled. Compare within this table "
        "only: absolute values differ between backbones.",
        "",
        *_table(summary.methods),
    ]
    for name, population in measured.populations.items():
        text = (
            f"z-scores of {name} (Eq. 10) over {population.over}: {population.count} pictures, "
            f"mean {population.mean:.4f}, deviation {population.deviation:.4f}."
        )
        lines += ["", text]
    for kind, methods in summary.categories.items():
        lines += ["", f"## {markdown_cell(kind)}", "", *_table(methods)]
    bad = _shown(unreadable(measured), folder)
    if bad:
        lines += ["", f"## Unreadable: {len(bad)}", ""]
        lines += [f"- {markdown_cell(path)}: {markdown_cell(why)}" for path, why in bad.items()]
    return "\n".join(lines) + "\n"


def _table(methods: Sequence[MethodSummary]) -> list[str]:
    """A row a method; columns that nobody has are left out."""
    columns = {
        title: name
        for title, name in _TABLE.items()
        if any(getattr(m, name).count for m in methods)
    }
    head = ["method", "pictures", *columns]
    rows = [
        [markdown_cell(m.method), str(m.pictures)]
        + [cell(getattr(m, name)) for name in columns.values()]
        for m in methods
    ]
    return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]


def cell(interval: Interval) -> str:
    """``0.512 [0.480, 0.544]``."""
    if math.isnan(interval.mean):
        return "-"
    if math.isnan(interval.low):
        return f"{interval.mean:.3f}"
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _write(path: Path, text: str) -> None:
    with disk_errors(path), replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
