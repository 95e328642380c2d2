"""The rendered training set that all models share, made once and read from disk.

6000 people, four pictures each: enough people that nothing learns them by heart, and pairs of one
person for whatever learns identity.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from microworld.config import IMAGE_SIZE
from microworld.portraits import (
    Attributes,
    Identity,
    Nuisance,
    Picture,
    face_box,
    face_landmarks,
    render,
)

from .data import generator
from .loop import load_checkpoint, save_atomic

PEOPLE = 6000
EACH = 4
_SHARD = 200  # people


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """N = PEOPLE * EACH pictures; those of person p are rows p * EACH to (p + 1) * EACH."""

    pictures: torch.Tensor  # uint8 [N, 128, 128, 3]
    seeds: torch.Tensor  # [N], of Identity.from_seed
    traits: torch.Tensor  # float [N, 12]
    attributes: torch.Tensor  # int [N, 4]
    ids: torch.Tensor  # int [N, 6]: SDXL's sizes and crops
    landmarks: torch.Tensor  # float [N, 5, 2] pixels
    boxes: torch.Tensor  # float [N, 4] pixels

    def __len__(self) -> int:
        return len(self.seeds)


def photographed(
    identity: Identity, attributes: Attributes, nuisance: Nuisance, rng: np.random.Generator
) -> tuple[Picture, list[int]]:
    """A portrait as a data set would hold it, with SDXL's ids.

    Some originals are smaller than the picture (and look it), some are cropped off centre.
    Returns uint8 [128, 128, 3] and (height, width, top, left, target height, target width).
    """
    kind = rng.random()
    if kind < 0.1:
        small = int(rng.integers(56, 112))
        picture = render(identity, attributes, nuisance, IMAGE_SIZE)
        image = Image.fromarray(picture).resize((small, small), Image.Resampling.BOX)
        picture = np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR))
        return picture, [small, small, 0, 0, IMAGE_SIZE, IMAGE_SIZE]
    if kind < 0.2:
        size = IMAGE_SIZE + int(rng.integers(8, 33))
        top, left = rng.integers(0, size - IMAGE_SIZE + 1, size=2).tolist()
        picture = render(identity, attributes, nuisance, size)
        picture = picture[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
        return picture, [size, size, top, left, IMAGE_SIZE, IMAGE_SIZE]
    picture = render(identity, attributes, nuisance, IMAGE_SIZE)
    return picture, [IMAGE_SIZE, IMAGE_SIZE, 0, 0, IMAGE_SIZE, IMAGE_SIZE]


def pictures(folder: Path) -> Pictures:
    """Render what is missing and read the whole set."""
    shards = []
    for shard in tqdm(range(PEOPLE // _SHARD), desc="pictures"):
        path = folder / "pictures" / f"{shard:04d}.pt"
        if not path.exists():
            save_atomic(path, _shard(shard))
        shards.append(load_checkpoint(path))
    return Pictures(**{key: torch.cat([s[key] for s in shards]) for key in shards[0]})


def _shard(shard: int) -> dict[str, torch.Tensor]:
    rng = generator("pictures", shard)
    rows: dict[str, list[Any]] = {name: [] for name in Pictures.__dataclass_fields__}
    for person in range(shard * _SHARD, (shard + 1) * _SHARD):
        identity = Identity.from_seed(person)
        for _ in range(EACH):
            attributes, nuisance = Attributes.sample(rng), Nuisance.sample(rng)
            picture, ids = photographed(identity, attributes, nuisance, rng)
            top, left = ids[2], ids[3]
            size = max(ids[0], IMAGE_SIZE)
            rows["pictures"].append(picture)
            rows["seeds"].append(person)
            rows["traits"].append(identity.as_array())
            rows["attributes"].append(astuple(attributes))
            rows["ids"].append(ids)
            rows["landmarks"].append(face_landmarks(identity, nuisance, size) - (left, top))
            rows["boxes"].append(face_box(identity, nuisance, size) - (left, top, left, top))
    return {name: _tensor(values) for name, values in rows.items()}


def _tensor(values: list[Any]) -> torch.Tensor:
    array: NDArray[Any] = np.stack(values) if not isinstance(values[0], int) else np.array(values)
    return torch.from_numpy(array.astype(np.float32) if array.dtype == np.float64 else array)
