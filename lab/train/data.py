"""Batches of rendered portraits, each a pure function of its generator's seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from microworld.config import IMAGE_SIZE
from microworld.portraits import Attributes, Identity, Nuisance, Picture, render


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One portrait with all that made it."""

    seed: int
    identity: Identity
    attributes: Attributes
    nuisance: Nuisance
    picture: Picture


def generator(name: str, *numbers: int) -> np.random.Generator:
    """A generator of its own for every purpose and step."""
    return np.random.default_rng([*name.encode(), *numbers])


def sample(
    rng: np.random.Generator,
    *,
    seed: int | None = None,
    people: int = 100_000,
    size: int = IMAGE_SIZE,
    held_out: bool = False,
) -> Sample:
    """A portrait of a training person (`seed`, or one of the first `people`)."""
    chosen = int(rng.integers(people)) if seed is None else seed
    identity = Identity.from_seed(chosen)
    attributes = Attributes.sample(rng, held_out=held_out)
    nuisance = Nuisance.sample(rng)
    return Sample(
        seed=chosen,
        identity=identity,
        attributes=attributes,
        nuisance=nuisance,
        picture=render(identity, attributes, nuisance, size),
    )


def to_tensor(pictures: list[Picture]) -> torch.Tensor:
    """uint8 [size, size, 3] pictures as float [B, 3, size, size] in [0, 1]."""
    # BHWC -> BCHW
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255.0
