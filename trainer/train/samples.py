"""What sample number n is: person, reference, target, crop, drops, timestep, noise.

All of it is a function of (seed, n). The samples of one optimiser step share a bucket, so that
they stack; a bucket is drawn as often as targets fall into it, and then people and photos so that
over all buckets every person counts alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from infinite_id_core.errors import FileError
from infinite_id_core.method.face_clip import CLIP_TOKENS
from infinite_id_core.sdxl.schedule import TIMESTEPS

from ..config import TrainConfig
from ..data_index import Dataset, Row
from ..errors import NoPairsError
from ..models.text import TOKENS
from .cache import FeatureCache, key_of
from .crops import Bucket, Crop, buckets, draw_crop, nearest_bucket
from .draws import Purpose, generator
from .objective import face_bell
from .workers import is_refused, leave_signals, refused

LATENT_CHANNELS = 4
LATENT_STRIDE = 8  # pixels per latent pixel
_TRIES = 1000  # draws before a dataset counts as having no pairs


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One sample's discrete choices."""

    number: int
    identity: str
    reference: int
    target: int
    """Row numbers of the dataset."""
    crop: int
    """Which of the target's crops."""
    drop_identity: bool
    drop_text: bool
    timestep: int

    def describe(self, dataset: Dataset) -> str:
        """For messages: the sample, its person and the keys of both photos."""
        reference, target = dataset.row(self.reference), dataset.row(self.target)
        return (
            f"sample {self.number} ({self.identity}: reference {reference.key}, target "
            f"{target.key}, timestep {self.timestep})"
        )


class Plan:
    """From sample numbers to choices. Safe in worker processes."""

    def __init__(self, config: TrainConfig, dataset: Dataset, global_batch: int) -> None:
        """``global_batch``: samples of one optimiser step, over all devices."""
        self.config = config
        self.dataset = dataset
        self.global_batch = global_batch
        self.redraws = 0
        """How often the run went on with other settings. Each time all is drawn from a seed of its
        own: numbers then stand for other steps, and the old draws would come again."""
        self.buckets = buckets(config.data)

    @property
    def seed(self) -> int:
        """Of what is drawn for a step or sample."""
        return self.config.run.seed if not self.redraws else _reseeded(self)

    @cached_property
    def bucket_of_row(self) -> NDArray[np.int64]:
        """Which bucket each row's crops have, by the photo's aspect."""
        table = self.dataset.table
        sizes = zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True)
        return np.array([nearest_bucket(w, h, self.buckets) for w, h in sizes], dtype=np.int64)

    @cached_property
    def shares(self) -> NDArray[np.float64]:
        """``[buckets, people]``: which part of each person's photos lies in each bucket."""
        shares = np.zeros((len(self.buckets), len(self.dataset.identities)))
        for column, name in enumerate(self.dataset.identities):
            rows = self.dataset.rows_of(name)
            counts = np.bincount(
                self.bucket_of_row[rows.start : rows.stop], minlength=len(self.buckets)
            )
            shares[:, column] = counts / len(rows)
        return shares

    @cached_property
    def bucket_weights(self) -> NDArray[np.float64]:
        """How often each bucket is drawn, up to a factor."""
        return cast(NDArray[np.float64], self.shares.sum(axis=1))

    def bucket_at(self, step: int) -> int:
        """The bucket of all samples of an optimiser step."""
        rng = generator(self.seed, step, Purpose.BUCKET)
        return _draw(self.bucket_weights, rng)

    def choice(self, number: int) -> Choice:
        """The choices of sample ``number``.

        Raises ``NoPairsError`` where a thousand draws give no person with an allowed pair.
        """
        seed, objective = self.seed, self.config.objective
        bucket = self.bucket_at(number // self.global_batch)
        rng = generator(seed, number, Purpose.CHOICE)
        identity, reference, target = self._pair(bucket, rng)
        drops = generator(seed, number, Purpose.DROP).random(2)
        return Choice(
            number=number,
            identity=identity,
            reference=reference,
            target=target,
            crop=int(rng.integers(self.config.data.crops_per_photo)),
            drop_identity=bool(drops[0] < objective.drop_identity),
            drop_text=bool(drops[1] < objective.drop_text),
            timestep=int(generator(seed, number, Purpose.TIMESTEP).integers(TIMESTEPS)),
        )

    def noise(self, number: int) -> Tensor:
        """Unit noise of a sample's latent ``[4, h, w]``, with the configured offset."""
        height, width = self.buckets[self.bucket_at(number // self.global_batch)]
        size = (LATENT_CHANNELS, height // LATENT_STRIDE, width // LATENT_STRIDE)
        rng = generator(self.seed, number, Purpose.NOISE)
        noise = rng.standard_normal(size, dtype=np.float32)
        offset = rng.standard_normal((LATENT_CHANNELS, 1, 1), dtype=np.float32)
        return torch.from_numpy(noise + self.config.objective.noise_offset * offset)

    def crop(self, row_number: int, which: int) -> Crop:
        """Crop ``which`` of a row's photo."""
        row = self.dataset.row(row_number)
        bucket: Bucket = self.buckets[self.bucket_of_row[row_number]]
        number = int(row.sha256[:15], 16) * 1000 + which
        return draw_crop(row, bucket, self.config.data, generator(
            self.config.run.seed, number, Purpose.CROP
        ))  # fmt: skip

    def _pair(self, bucket: int, rng: np.random.Generator) -> tuple[str, int, int]:
        weights = self.shares[bucket]
        for _ in range(_TRIES):
            name = self.dataset.identities[_draw(weights, rng)]
            pairs = [p for p in _pairs(self.dataset, name) if self.bucket_of_row[p[1]] == bucket]
            if pairs:
                reference, target = pairs[int(rng.integers(len(pairs)))]
                return name, reference, target
        filters = self.config.filters
        raise NoPairsError(
            f"{self.dataset.folder}: in {_TRIES} draws no person had two photos whose faces are "
            f"between {filters.min_pair_cosine} and {filters.max_pair_cosine} alike (cosine). "
            "Loosen filters.min_pair_cosine and max_pair_cosine, or prepare more photos."
        )


def _reseeded(plan: Plan) -> int:
    digest = hashlib.sha256(f"{plan.config.run.seed} {plan.redraws}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


@lru_cache(maxsize=50_000)
def _pairs(dataset: Dataset, identity: str) -> tuple[tuple[int, int], ...]:
    return dataset.pairs_of(identity)


def _draw(weights: NDArray[np.float64], rng: np.random.Generator) -> int:
    edges = np.cumsum(weights)
    return int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))


# --- cached tensors --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Fingerprints:
    """Of the frozen models whose outputs are cached."""

    vae: str
    clip: str
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Names of cached tensors: hashes of the photo, the model and the options."""

    config: TrainConfig
    fingerprints: Fingerprints

    def latent(self, row: Row, crop: Crop) -> str:
        """Of a crop's latent ``[4, h, w]``."""
        window = (crop.left, crop.top, crop.width, crop.height)
        return key_of("latent", row.sha256, self.fingerprints.vae, window, crop.bucket)

    def clip(self, row: Row) -> str:
        """Of a reference's E_clip hidden states ``[257, D]``."""
        encoder = self.config.encoder
        return key_of(
            "clip", row.sha256, row.landmarks, self.fingerprints.clip, encoder.clip_layer,
            encoder.padding,
        )  # fmt: skip

    def text(self, caption: str) -> str:
        """Of a caption's context ``[77, C]``; ``pooled`` is kept beside it."""
        return key_of("text", caption, self.fingerprints.text)


@dataclass(frozen=True, kw_only=True)
class Caches:
    """One folder per kind of tensor."""

    latents: FeatureCache
    clip: FeatureCache
    text: FeatureCache

    @classmethod
    def below(cls, config: TrainConfig) -> Caches:
        """The caches of a configuration."""
        folder = config.data.cache_folder
        return cls(
            latents=FeatureCache(folder / "latents"),
            clip=FeatureCache(folder / "clip"),
            text=FeatureCache(folder / "text"),
        )

    def refresh(self) -> None:
        """Look again at what other processes wrote."""
        for cache in (self.latents, self.clip, self.text):
            cache.refresh()


# --- the torch dataset -----------------------------------------------------------------------


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sample number -> tensors, from the caches."""

    def __init__(self, plan: Plan, keys: Keys, caches: Caches) -> None:
        self.plan = plan
        self.keys = keys
        self.caches = caches

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """See ``collate`` for the entries; shapes without the batch dimension. A file that cannot
        be read gives ``workers.refused``."""
        try:
            return self._sample(number)
        except FileError as error:
            return refused(error)

    def _sample(self, number: int) -> dict[str, Tensor]:
        choice, config = self.plan.choice(number), self.plan.config
        target, reference = (self.plan.dataset.row(n) for n in (choice.target, choice.reference))
        crop = self.plan.crop(choice.target, choice.crop)
        face = torch.from_numpy(self.plan.dataset.face(choice.reference))
        if config.encoder.embedding == "normed":
            face = normalize(face, dim=0)
        clip = self.caches.clip.read(self.keys.clip(reference), (CLIP_TOKENS, None))
        height, width = (side // LATENT_STRIDE for side in crop.bucket)
        latent = self.caches.latents.read(
            self.keys.latent(target, crop), (LATENT_CHANNELS, height, width)
        )
        sample = {
            "number": torch.tensor(number),
            "latent": latent.float(),
            "noise": self.plan.noise(number),
            "timestep": torch.tensor(choice.timestep),
            "size_ids": torch.tensor(crop.size_ids, dtype=torch.float32),
            # The null identity: zeros before the mappers.
            "face": torch.zeros_like(face) if choice.drop_identity else face,
            "clip": torch.zeros_like(clip) if choice.drop_identity else clip,
        }
        if config.objective.face_weight:
            sample["face_bell"] = _bell(target, crop)
        if config.objective.mode == "entangled":
            key = self.keys.text("" if choice.drop_text else target.caption)
            sample["context"] = self.caches.text.read(key, (TOKENS, None))
            sample["pooled"] = self.caches.text.read(f"{key}.pooled", (None,))
        elif config.objective.pooled == "empty":
            sample["pooled"] = self.caches.text.read(f"{self.keys.text('')}.pooled", (None,))
        return sample


def _bell(row: Row, crop: Crop) -> Tensor:
    """``face_bell`` of a crop's latent, ``[1, h, w]``."""
    points = crop.inside(np.asarray(row.landmarks, dtype=np.float64))
    # A latent pixel's middle is half its side from its corner.
    places = torch.from_numpy((points / LATENT_STRIDE - 0.5).astype(np.float32))
    height, width = crop.bucket
    return face_bell(places[None], height // LATENT_STRIDE, width // LATENT_STRIDE)[0]


def collate(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack samples: latent and noise ``[B, 4, h, w]``, timestep and number ``[B]``, size_ids
    ``[B, 6]``, face ``[B, 512]``, clip ``[B, 257, D]``; for entangled training context
    ``[B, 77, C]``; for it and for ``objective.pooled = "empty"`` pooled ``[B, P]``; with a face
    weight face_bell ``[B, 1, h, w]``. One refused sample stands for all."""
    for sample in samples:
        if is_refused(sample):
            return sample
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which samples of each step are this process's."""

    batch: int
    accumulation: int
    rank: int = 0
    world: int = 1

    @property
    def global_batch(self) -> int:
        """Samples of one optimiser step, over all processes."""
        return self.batch * self.accumulation * self.world

    def numbers(self, step: int) -> list[list[int]]:
        """Sample numbers of a step by forward pass."""
        first = step * self.global_batch + self.rank * self.batch
        starts = [first + micro * self.world * self.batch for micro in range(self.accumulation)]
        return [list(range(start, start + self.batch)) for start in starts]


class StepSampler(torch.utils.data.Sampler[list[int]]):
    """Sample numbers of every forward pass of this process, from one step to another."""

    def __init__(self, share: Share, first: int, last: int) -> None:
        self.share = share
        self.first = first
        self.last = last

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.last):
            yield from self.share.numbers(step)

    def __len__(self) -> int:
        return (self.last - self.first) * self.share.accumulation


def loader(samples: Samples, share: Share, first: int, last: int, workers: int) -> Any:
    """Batches of all forward passes of steps ``first`` to ``last``, in order."""
    return torch.utils.data.DataLoader(
        samples,
        batch_sampler=StepSampler(share, first, last),
        num_workers=workers,
        collate_fn=collate,
        prefetch_factor=2 if workers else None,
        worker_init_fn=leave_signals,
        pin_memory=torch.cuda.is_available(),
    )
