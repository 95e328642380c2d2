"""What scores cannot say: contact sheets, and the scatter of Fig. 6."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from infinite_id_core.errors import OptionError
from infinite_id_core.files.atomic import replacing
from infinite_id_core.packages import require

from ..errors import disk_errors
from ..prepare.photo import PhotoError, read_pixels
from ..sheets import Cell, draw_sheet
from .manifest import Row
from .summary import MethodSummary


@dataclasses.dataclass(frozen=True, kw_only=True)
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
    table = []
    for identity, reference in people:
        pictures = [reference, *(first.get((identity, reference, prompt)) for prompt in prompts)]
        cells = [Cell(picture=_thumbnail(path, options.side)) for path in pictures]
        table.append([dataclasses.replace(cells[0], label=identity), *cells[1:]])
    return draw_sheet(["reference", *prompts], table, options.side)


def _thumbnail(path: Path | None, side: int) -> Image.Image | None:
    if path is None:
        return None
    try:
        return Image.fromarray(read_pixels(path, max_side=side))
    except PhotoError:
        return None


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
