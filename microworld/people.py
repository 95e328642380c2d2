"""A made set of people as a folder of photos per person, for `python -m trainer prepare`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from .captions import caption
from .portraits import HELD_OUT_SEEDS, TRAIN_SEEDS, Attributes, Identity, Nuisance, render


def write_people(
    folder: Path, people: int, photos: int, *, size: int = 256, held_out: bool = False
) -> Path:
    """Draw `photos` pictures of each of `people`: `person_00012/3.png`, its caption beside it.

    Training people, or those kept out of all training. The same arguments give the same bytes.
    """
    seeds = (HELD_OUT_SEEDS if held_out else TRAIN_SEEDS)[:people]
    for seed in seeds:
        place = folder / f"person_{seed:05d}"
        place.mkdir(parents=True, exist_ok=True)
        identity = Identity.from_seed(seed)
        for number in range(photos):
            rng = np.random.default_rng([seed, number])
            attributes = Attributes.sample(rng)
            picture = render(identity, attributes, Nuisance.sample(rng), size)
            Image.fromarray(picture).save(place / f"{number}.png")
            text = caption(attributes, rng, identity)
            (place / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder
