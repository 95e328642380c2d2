"""What scores cannot say: contact sheets, and the scatter of Fig. 6."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from infinite_id_core.errors import OptionError
from infinite_id_core.files.checkpoint import replacing
from infinite_id_core.packages import require

from ..errors import disk_errors
from ..prepare.photo import PhotoError, read_pixels
from .manifest import Row
from .summary import MethodSummary

_GAP, _PAPER, _INK, _EMPTY = 4, "white", (40, 40, 40), (225, 225, 225)


@dataclass(frozen=True, kw_only=True)
class SheetOptions:
    """A contact sheet's size. Raises ``OptionError``."""

    people: int = 12
    prompts: int = 12
    side: int = 128
    """Pixels of a picture."""

    def __post_init__(self) -> None:
        if not (1 <= self.people <= 200 and 1 <= self.prompts <= 200 and 32 <= self.side <= 1024):
            raise OptionError(
                "A contact sheet has 1 to 200 people and prompts, and pictures of 32 to 1024 "
                f"pixels; got {self.people}, {self.prompts} and {self.side}."
            )


def contact_sheet(rows: Sequence[Row], options: SheetOptions | None = None) -> Image.Image:
    """People in rows, prompts in columns, each person's reference first; the first seed of each.

    ``rows``: of one method. A picture that is absent or unreadable is a grey square.
    """
    options = options or SheetOptions()
    people = list(dict.fromkeys((row.identity, row.reference) for row in rows))[: options.people]
    prompts = list(dict.fromkeys(row.prompt for row in rows))[: options.prompts]
    first: dict[tuple[str, Path, str], Path] = {}
    for row in rows:
        first.setdefault((row.identity, row.reference, row.prompt), row.image)
    side, step = options.side, options.side + _GAP
    font = ImageFont.load_default(size=max(10, side // 11))
    line = max(12, side // 9)
    letters = max(6, round(side / (max(10, side // 11) * 0.52)))  # in a column's width
    heads = ["reference", *prompts]
    wrapped = [textwrap.wrap(head, letters)[:4] or [""] for head in heads]
    top = _GAP + line * max(map(len, wrapped)) + _GAP
    sheet = Image.new("RGB", (_GAP + step * len(heads), top + (step + line) * len(people)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(wrapped):
        draw.multiline_text(
            (_GAP + step * column, _GAP), "\n".join(lines), _INK, font, spacing=line // 6
        )
    for number, (identity, reference) in enumerate(people):
        y = top + (step + line) * number
        pictures = [reference, *(first.get((identity, reference, prompt)) for prompt in prompts)]
        for column, path in enumerate(pictures):
            sheet.paste(_thumbnail(path, side), (_GAP + step * column, y))
        draw.text((_GAP, y + side), identity[:letters], _INK, font)
    return sheet


def _thumbnail(path: Path | None, side: int) -> Image.Image:
    """A square with the whole picture in its middle."""
    square = Image.new("RGB", (side, side), _EMPTY)
    if path is None:
        return square
    try:
        picture = Image.fromarray(read_pixels(path, max_side=side))
    except PhotoError:
        return square
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG atomically. Raises ``DiskFullError``."""
    with disk_errors(path), replacing(path) as temporary:
        image.save(temporary, "PNG", optimize=True)


def scatter(path: Path, methods: Sequence[MethodSummary]) -> bool:
    """Fig. 6: identity fidelity (Eq. 10) against CLIP-T, a point a method with its intervals.

    False, and nothing written, where no method has both. Raises ``MissingPackageError``.
    """
    shown = [m for m in methods if m.fidelity.count and m.clip_t.count]
    if not shown:
        return False
    figures = require("matplotlib.figure", "for the scatter plot", "matplotlib")
    figure = figures.Figure(figsize=(7, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for number, method in enumerate(shown):
        x, y = method.clip_t, method.fidelity
        axes.errorbar(
            x.mean, y.mean, xerr=_arms(x.mean, x.low, x.high), yerr=_arms(y.mean, y.low, y.high),
            fmt="os^Dv<>pP*"[number % 10], capsize=2, markersize=7, elinewidth=0.8,
            label=method.method.replace("$", r"\$"),
        )  # fmt: skip
    axes.set_xlabel("semantic consistency: CLIP-T")
    axes.set_ylabel("identity fidelity: mean z-score of M_face and CLIP-I")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with disk_errors(path), replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    return True


def _arms(mean: float, low: float, high: float) -> list[list[float]] | None:
    """Lengths of an error bar's two arms; a resampled mean may lie beside its interval."""
    if math.isnan(low):
        return None
    return [[max(0.0, mean - low)], [max(0.0, high - mean)]]
