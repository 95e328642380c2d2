"""Pictures in rows and columns, labelled, as one picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from infinite_id_core.files.atomic import replacing

from .errors import disk_errors

_GAP, _PAPER, _INK, _EMPTY = 4, "white", (40, 40, 40), (225, 225, 225)


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """One picture of a sheet, and what stands below it."""

    picture: Image.Image | None
    """A grey square where it is None."""
    label: str = ""


def draw_sheet(heads: Sequence[str], rows: Sequence[Sequence[Cell]], side: int) -> Image.Image:
    """``rows`` of cells, below a line of ``heads``: one for each column.

    ``side``: pixels of a cell, in whose middle its whole picture is shown.
    """
    step = side + _GAP
    size = max(10, side // 11)
    font = ImageFont.load_default(size=size)
    line = max(12, side // 9)
    letters = max(6, round(side / (size * 0.52)))  # in a column's width
    wrapped = [textwrap.wrap(head, letters)[:4] or [""] for head in heads]
    top = _GAP + line * max(map(len, wrapped)) + _GAP
    sheet = Image.new("RGB", (_GAP + step * len(heads), top + (step + line) * len(rows)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(wrapped):
        draw.multiline_text(
            (_GAP + step * column, _GAP), "\n".join(lines), _INK, font, spacing=line // 6
        )
    for number, cells in enumerate(rows):
        y = top + (step + line) * number
        for column, cell in enumerate(cells):
            x = _GAP + step * column
            sheet.paste(_in_the_middle(cell.picture, side), (x, y))
            draw.text((x, y + side), cell.label[:letters], _INK, font)
    return sheet


def _in_the_middle(picture: Image.Image | None, side: int) -> Image.Image:
    square = Image.new("RGB", (side, side), _EMPTY)
    if picture is not None:
        small = picture.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        square.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    return square


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG atomically. Raises ``DiskFullError``."""
    with disk_errors(path), replacing(path) as temporary:
        image.save(temporary, "PNG", optimize=True)
