"""The samples of every evaluation: the same pairs, crops, noise and timesteps each time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..config import TrainConfig
from ..data_index import Dataset
from ..errors import TooFewPeopleError
from .bands import band_range
from .draws import Purpose, generator
from .samples import LATENT_CHANNELS, LATENT_STRIDE, Choice, Plan

Pair = tuple[str, int, int]
"""A person, and row numbers of the reference and the target."""


class ValidationPlan(Plan):
    """From sample numbers to choices, as ``Plan``, of held-out people: a pair in every band.

    Everything follows from ``validation.seed``; ``run.seed`` has no part in it, so that runs can
    be compared.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset) -> None:
        """Raises ``TooFewPeopleError``."""
        seeded = dataclasses.replace(config.run, seed=config.validation.seed)
        super().__init__(dataclasses.replace(config, run=seeded), dataset, global_batch=1)
        self.bands = config.validation.bands
        self.pairs = _pairs(self.config, dataset)

    def __len__(self) -> int:
        return len(self.pairs) * self.bands

    def band(self, number: int) -> int:
        """In which band of timesteps a sample lies."""
        return number % self.bands

    def choice(self, number: int) -> Choice:
        """The choices of sample ``number``; nothing is ever dropped."""
        identity, reference, target = self.pairs[number // self.bands]
        timesteps = band_range(self.band(number), self.bands)
        rng = generator(self.config.run.seed, number, Purpose.VALIDATION_TIMESTEP)
        return Choice(
            number=number,
            identity=identity,
            reference=reference,
            target=target,
            crop=0,
            drop_identity=False,
            drop_text=False,
            timestep=timesteps[int(rng.integers(len(timesteps)))],
        )

    def noise(self, number: int) -> Tensor:
        """Unit noise of a sample's latent ``[4, h, w]``; never with an offset."""
        height, width = self.buckets[self._bucket(number)]
        size = (LATENT_CHANNELS, height // LATENT_STRIDE, width // LATENT_STRIDE)
        rng = generator(self.config.run.seed, number, Purpose.VALIDATION_NOISE)
        return torch.from_numpy(rng.standard_normal(size, dtype=np.float32))

    @cached_property
    def targets(self) -> frozenset[int]:
        """Rows whose first crop is a target."""
        return frozenset(target for _, _, target in self.pairs)

    @cached_property
    def references(self) -> frozenset[int]:
        """Rows that are somebody's reference."""
        return frozenset(reference for _, reference, _ in self.pairs)

    def batches(self, size: int) -> list[list[int]]:
        """All sample numbers, in batches of one bucket: the same for any number of processes."""
        by_bucket: dict[int, list[int]] = {}
        for number in range(len(self)):
            by_bucket.setdefault(self._bucket(number), []).append(number)
        return [
            numbers[start : start + size]
            for _, numbers in sorted(by_bucket.items())
            for start in range(0, len(numbers), size)
        ]

    def _bucket(self, number: int) -> int:
        return int(self.bucket_of_row[self.pairs[number // self.bands][2]])


def _pairs(config: TrainConfig, dataset: Dataset) -> tuple[Pair, ...]:
    """``validation.pairs`` of each of the first ``validation.people`` who have any."""
    wanted, found, people = config.validation, list[Pair](), 0
    for number, name in enumerate(dataset.identities):
        if people == wanted.people:
            break
        pairs = dataset.pairs_of(name)
        people += bool(pairs)
        chosen = _some(pairs, wanted.pairs, config.run.seed, number)
        found += [(name, reference, target) for reference, target in chosen]
    if people < wanted.people:
        raise TooFewPeopleError(
            f"{dataset.folder}: validation.people is {wanted.people}, and of "
            f"{len(dataset.identities)} people held out with photos that pass the filters "
            f"{people} have a pair of them. Prepare the photos again with a larger --held-out "
            f"(finished parts are kept), set validation.people = {max(1, people)}, or "
            "validation.every = 0."
        )
    return tuple(found)


def _some(
    pairs: Sequence[tuple[int, int]], count: int, seed: int, person: int
) -> list[tuple[int, int]]:
    rng = generator(seed, person, Purpose.VALIDATION_PAIR)
    return [pairs[n] for n in rng.permutation(len(pairs))[:count]]
