"""All previews of a step as one picture: a row a person, the reference first, then each prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..sheets import Cell, draw_sheet


@dataclass(frozen=True, kw_only=True, eq=False)
class Preview:
    """One picture."""

    person: str
    prompt: str
    picture: Tensor
    """``[3, H, W]`` in [0, 1]."""
    cosine: float | None
    """To the reference; None where no face was found or none was looked for."""

    @property
    def name(self) -> str:
        """For the log."""
        return f"{self.person}/{self.prompt}"


def preview_sheet(
    previews: Sequence[Preview],
    references: Mapping[str, Image.Image],
    prompts: Sequence[str],
    side: int,
    scored: bool = False,
) -> Image.Image:
    """``references``: each person's photo, in the order of the rows; ``prompts``: of the columns.

    ``side``: pixels of a picture. ``scored``: the cosine to the reference stands below each.
    """
    found = {(preview.person, preview.prompt): preview for preview in previews}
    rows = []
    for person, photo in references.items():
        made = [found.get((person, prompt)) for prompt in prompts]
        rows.append([Cell(picture=photo, label=person), *(_cell(p, scored) for p in made)])
    return draw_sheet(["reference", *prompts], rows, side)


def as_tensor(image: Image.Image) -> Tensor:
    """``[3, H, W]`` in [0, 1]."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0).permute(2, 0, 1)


def _cell(preview: Preview | None, scored: bool) -> Cell:
    if preview is None:
        return Cell(picture=None)
    pixels = (preview.picture.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    score = "no face" if preview.cosine is None else f"cosine {preview.cosine:.2f}"
    return Cell(picture=Image.fromarray(pixels), label=score if scored else "")
