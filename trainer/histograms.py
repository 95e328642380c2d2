"""How the photos of a dataset are spread: numbers for pages, and bars for terminals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from .config import Data
from .train.crops import buckets, nearest_bucket

_BINS = 10
_WIDTH = 40  # characters of the longest bar


def distributions(table: pa.Table) -> dict[str, NDArray[Any]]:
    """What decides how well a set trains: values by what they are of. ``table``: ``SCHEMA``."""
    short = np.minimum(table["width"].to_numpy(), table["height"].to_numpy())
    return {
        "photos of a person": photos_of_people(table),
        "short side of the face, px": table["face_size"].to_numpy(),
        "short side of the photo, px": short,
        "faces in a photo": table["faces"].to_numpy(),
    }


def photos_of_people(table: pa.Table) -> NDArray[np.int64]:
    """How many photos each person has."""
    return np.array(list(Counter(table["identity"].to_pylist()).values()), dtype=np.int64)


def people_of_splits(table: pa.Table) -> dict[str, int]:
    """How many people are trained on, and how many are held out."""
    people = set(zip(table["identity"].to_pylist(), table["split"].to_pylist(), strict=True))
    splits = Counter(split for _, split in people)
    return {split: splits[split] for split in ("train", "held_out")}


def bucket_counts(table: pa.Table, data: Data) -> dict[tuple[int, int], int]:
    """Photos by the size (height, width) they are trained at."""
    choices = buckets(data)
    sizes = Counter(zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True))
    counts: Counter[int] = Counter()
    for (width, height), count in sizes.items():
        counts[nearest_bucket(width, height, choices)] += count
    return {choices[n]: counts[n] for n in sorted(counts)}


def spread(table: pa.Table) -> dict[str, tuple[float, ...]]:
    """Smallest, quartiles and largest of each of ``distributions``."""
    return {
        name: tuple(float(value) for value in np.percentile(values, (0, 25, 50, 75, 100)))
        for name, values in distributions(table).items()
    }


# --- as text ---------------------------------------------------------------------------------


def data_report(table: pa.Table, data: Data) -> str:
    """People, photos of a person, sizes of faces and buckets, in bars.

    ``table``: photos of all splits that pass the filters. What follows the people is of those to
    train on.
    """
    learned = table.filter(pc.equal(table["split"], "train"))
    people = {name.replace("_", " "): count for name, count in people_of_splits(table).items()}
    found = distributions(learned)
    faces = found["short side of the face, px"]
    sizes = {
        f"{width} x {height}": count
        for (height, width), count in bucket_counts(learned, data).items()
    }
    photos = found["photos of a person"]
    parts = [
        bars("people", people),
        bars("people by their photos", doubling(photos)),
        bars("photos by the short side of the face, px", binned(faces)),
        bars(f"photos by bucket, px (each gives {data.crops_per_photo} crops)", sizes),
    ]
    return "\n\n".join(parts)


def bars(title: str, counts: Mapping[str, int]) -> str:
    """Lines of text: the title, and a bar for each count."""
    names = max(map(len, counts), default=0)
    most = max(counts.values(), default=0)
    numbers = len(f"{most:,}")
    lines = [
        f"  {name:>{names}}  {count:>{numbers},}  {'#' * _length(count, most)}".rstrip()
        for name, count in counts.items()
    ]
    return "\n".join([title, *lines])


def binned(values: NDArray[Any], bins: int = _BINS) -> dict[str, int]:
    """How many values lie in each of at most ``bins`` ranges, equally wide, in whole numbers."""
    if not len(values):
        return {}
    whole = np.floor(values).astype(np.int64)
    low, high = int(whole.min()), int(whole.max())
    width = math.ceil((high - low + 1) / bins)
    return _counted(whole, list(range(low, high + 1, width)), high)


def doubling(values: NDArray[np.int64]) -> dict[str, int]:
    """How many values lie in 1, 2-3, 4-7, ...: for counts, a few of which are large."""
    if not len(values):
        return {}
    low, high = int(values.min()), int(values.max())
    starts = [2**n for n in range(high.bit_length()) if 2 ** (n + 1) > low]
    return _counted(values, starts, 2 ** high.bit_length() - 1)


def _counted(values: NDArray[np.int64], starts: list[int], high: int) -> dict[str, int]:
    """``starts``: of the ranges; ``high``: the last one's end."""
    ends = [start - 1 for start in starts[1:]] + [high]
    places = np.bincount(np.searchsorted(starts, values, side="right") - 1, minlength=len(starts))
    names = [
        str(start) if start == end else f"{start}-{end}"
        for start, end in zip(starts, ends, strict=True)
    ]
    return {name: int(count) for name, count in zip(names, places, strict=True)}


def _length(count: int, most: int) -> int:
    """Characters of a bar: at least one for anything that is there."""
    return 0 if not count else max(1, round(_WIDTH * count / most))
