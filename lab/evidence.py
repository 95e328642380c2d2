"""What the ablations' scores say: tables with intervals, curves of the sweeps, a contact sheet."""

from __future__ import annotations

import csv
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from infinite_id_core.scores.metrics import Interval, bootstrap_mean
from microworld.captions import plain_caption
from microworld.portraits import ATTRIBUTE_NAMES

from .ablations import DEFAULTS, PIECE, PROMPTS, ROWS, Row, photos_of, piece_path, prompts_of

Line = Mapping[str, str]

FULL = "full method"
SHEET_PEOPLE, SHEET_PROMPTS = 8, 6


def read_scores(path: Path) -> dict[str, list[dict[str, str]]]:
    """The lines of `ablations.score`'s file by row, in the file's order."""
    by_row: dict[str, list[dict[str, str]]] = {}
    with path.open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            by_row.setdefault(line["row"], []).append(line)
    return by_row


def mean(lines: Sequence[Line], column: str) -> Interval:
    """Mean and 95 % interval of a column, people resampled.

    A picture without a face has likeness 0; without a crop its CLIP-I is not counted.
    `prompt` is the share of the four attributes that are right.
    """
    blank = "nan" if column == "clip_i" else "0"
    values = [_kept(line) if column == "prompt" else float(line[column] or blank) for line in lines]
    return bootstrap_mean(values, [line["person"] for line in lines])


def _kept(line: Line) -> float:
    return float(np.mean([int(line[f"{name}_right"]) for name in ATTRIBUTE_NAMES]))


def write(folder: Path, scores: Path) -> None:
    """Beside `scores`: the table, and curves, comparison and contact sheet where there are any.

    `folder` holds the pictures, as `ablations.make` left them.
    """
    by_row = read_scores(scores)
    scores.with_suffix(".md").write_text(table(by_row), encoding="utf-8")
    rows = [ROWS[name] for name in by_row]
    if any(row.curve for row in rows):
        curves(by_row, scores.with_name(f"{scores.stem}_curves.png"))
    compared = [row for row in rows if row.curve is None]
    if len(compared) > 1:
        comparison(folder, compared, scores.with_name(f"{scores.stem}_comparison.png"))
    if FULL in by_row:
        sheet(folder, ROWS[FULL], scores.with_name("people_and_prompts.png"))


def table(by_row: Mapping[str, Sequence[Line]]) -> str:
    """A Markdown table, a line a row: means and 95 % intervals."""
    rows = [
        "| row | pictures | likeness | CLIP-I | prompt attributes | style, on style prompts "
        "| CLIP-T | faces found |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, lines in by_row.items():
        styled = [line for line in lines if line["style"] != "photo"]
        cells = [
            name,
            str(len(lines)),
            shown(mean(lines, "likeness")),
            shown(mean(lines, "clip_i")),
            shown(mean(lines, "prompt")),
            shown(mean(styled, "style_right")),
            shown(mean(lines, "clip_t")),
            f"{mean(lines, 'found').mean:.3f}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def shown(interval: Interval) -> str:
    """`0.512 [0.480, 0.541]`."""
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def curves(by_row: Mapping[str, Sequence[Line]], out: Path) -> Path:
    """Likeness and prompt attributes along every sweep that has points; bars are 95 % intervals.

    The full method's point is taken over the sweep's people.
    """
    from matplotlib.figure import Figure

    points: dict[str, list[tuple[float, Sequence[Line]]]] = {}
    for name, lines in by_row.items():
        row = ROWS[name]
        if row.curve:
            points.setdefault(row.curve[0], []).append((row.curve[1], lines))
    for name, found in points.items():
        people = {line["person"] for _, lines in found for line in lines}
        own = [line for line in by_row.get(FULL, ()) if line["person"] in people]
        if own:
            found.append((DEFAULTS[name], own))
    wide = 3
    high = -(-len(points) // wide)
    figure = Figure(figsize=(4 * wide, 3.2 * high), dpi=100, layout="constrained")
    cells = figure.subplots(high, wide, squeeze=False).flatten()
    for axes, (name, found) in zip(cells, points.items(), strict=False):
        found.sort(key=lambda point: point[0])
        columns = {"likeness": "likeness", "prompt": "prompt attributes"}
        if name == "mixed with another":
            columns = {"likeness": "likeness to the first", "likeness_next": "to the second"}
        for column, label in columns.items():
            means = [mean(lines, column) for _, lines in found]
            values = np.array([m.mean for m in means])
            arms = np.array([[v - m.low, m.high - v] for m, v in zip(means, values, strict=True)])
            axes.errorbar(
                [x for x, _ in found], values, yerr=np.maximum(arms.T, 0), marker="o", capsize=2,
                markersize=4, linewidth=1, label=label,
            )  # fmt: skip
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    for axes in cells[len(points) :]:
        axes.set_axis_off()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png")
    return out


def sheet(folder: Path, row: Row, out: Path) -> Path:
    """People in rows, first the reference, then six prompts: the row's own pictures."""
    made = np.concatenate(
        [
            np.load(piece_path(folder, row, first))["pictures"]
            for first in range(0, SHEET_PEOPLE, PIECE)
        ]
    )
    side, gap, head = 128, 6, 34
    size = (side + (side + gap) * SHEET_PROMPTS + gap, (side + gap + head) * SHEET_PEOPLE)
    page = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(9)
    chosen = np.linspace(0, PROMPTS - 1, SHEET_PROMPTS).round().astype(int)
    for person in range(SHEET_PEOPLE):
        top = person * (side + gap + head)
        page.paste(Image.fromarray(photos_of(person, 1)[0]), (0, top))
        draw.text((2, top + side + 1), "reference", "black", font)
        for column, index in enumerate(chosen):
            left = side + gap + column * (side + gap)
            page.paste(Image.fromarray(made[person][index]), (left, top))
            words = plain_caption(prompts_of(person)[index])
            draw.text((left + 1, top + side + 1), textwrap.fill(words, 27), "black", font)
    return _saved(page, out)


def comparison(folder: Path, rows: Sequence[Row], out: Path, person: int = 0) -> Path:
    """One person in all prompts, a row of pictures for each way of sampling."""
    side, left = 128, 190
    page = Image.new("RGB", (left + side * PROMPTS, side * len(rows)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    first = person // PIECE * PIECE
    for number, row in enumerate(rows):
        made = np.load(piece_path(folder, row, first))["pictures"][person - first]
        draw.text((4, number * side + side // 2 - 8), textwrap.fill(row.name, 26), "black", font)
        page.paste(Image.fromarray(np.concatenate(list(made), axis=1)), (left, number * side))
    return _saved(page, out)


def _saved(page: Image.Image, out: Path) -> Path:
    """As a PNG of 256 colours: a third of the size, and no difference to be seen."""
    out.parent.mkdir(parents=True, exist_ok=True)
    page.convert("P", palette=Image.Palette.ADAPTIVE).save(out, optimize=True)
    return out
