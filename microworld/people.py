"""Synthetic people as photos: a folder each for `python -m trainer prepare`, and references."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from .captions import caption
from .portraits import (
    BACKGROUNDS,
    HELD_OUT_SEEDS,
    TRAIN_SEEDS,
    Attributes,
    Identity,
    Nuisance,
    Picture,
    render,
)

# Two people who are told apart at a glance, and where each stands.
REFERENCES = (
    (HELD_OUT_SEEDS[400], "garden"),  # pale, long red hair
    (HELD_OUT_SEEDS[483], "library"),  # brown, short dark hair
)


def reference_picture(number: int = 0, size: int = 256) -> Picture:
    """A plain portrait of somebody whom no training has seen: what demo and screenshots show.

    0 and 1 are `REFERENCES`; further numbers are whoever comes. Returns uint8 [size, size, 3] RGB.
    """
    if number < len(REFERENCES):
        seed, scene = REFERENCES[number]
        background = BACKGROUNDS.index(scene)
    else:
        seed, background = HELD_OUT_SEEDS[number], number % len(BACKGROUNDS)
    plain = Attributes(background=background, style=0, expression=0, accessory=0)
    return render(Identity.from_seed(seed), plain, size=size)


def write_people(
    folder: Path,
    people: int,
    photos: int,
    *,
    size: int = 256,
    held_out: bool = False,
    style: int | None = None,
    progress: bool = False,
) -> Path:
    """Draw `photos` pictures of each of `people`: `person_00012/3.png`, its caption beside it.

    Training people, or those kept out of all training; in one `style` (an index into STYLES) or in
    all. The same arguments give the same bytes on one machine. `progress` shows a bar.
    """
    seeds = (HELD_OUT_SEEDS if held_out else TRAIN_SEEDS)[:people]
    for seed in tqdm(seeds, desc="people", unit=" people", disable=not progress):
        place = folder / f"person_{seed:05d}"
        place.mkdir(parents=True, exist_ok=True)
        identity = Identity.from_seed(seed)
        for number in range(photos):
            rng = np.random.default_rng([seed, number])
            attributes = Attributes.sample(rng, style=style)
            picture = render(identity, attributes, Nuisance.sample(rng), size)
            Image.fromarray(picture).save(place / f"{number}.png")
            text = caption(attributes, rng, identity)
            (place / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder


def contact_sheet(people: int = 8, pictures: int = 10, seed: int = 0) -> Picture:
    """People in rows: first a plain photo, then each in random scenes, style by style."""
    rng = np.random.default_rng(seed)
    rows = []
    for person in range(people):
        identity = Identity.from_seed(person)
        row = [render(identity, Attributes(background=0, style=0, expression=0, accessory=0))]
        for column in range(1, pictures):
            drawn = Attributes(
                background=int(rng.integers(8)),
                style=(column - 1) // 2 % 4,
                expression=int(rng.integers(3)),
                accessory=int(rng.integers(4)),
            )
            row.append(render(identity, drawn, Nuisance.sample(rng)))
        rows.append(np.concatenate(row, axis=1))
    return np.concatenate(rows, axis=0)
