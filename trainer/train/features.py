"""What the frozen encoders say of the photos, computed once and kept in the caches.

Photos are decoded, cut and aligned in worker processes; the encoders run here. Each process of a
run computes its part. A killed run loses at most one unwritten pack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from infinite_id_core.encoders.clip_vision import hidden_states
from infinite_id_core.errors import FileError
from infinite_id_core.faces.align import CROP_SIZE, align

from ..config import TrainConfig
from ..data_index import Dataset, Row
from ..errors import NotCachedError
from ..models.image_encoder import clip_fingerprint, load_image_encoder
from ..models.text import load_text_encoders, text_fingerprint
from ..models.vae import load_vae, vae_fingerprint
from ..shards import SHARDS
from .cache import PACK, FeatureCache, finite
from .samples import Caches, Fingerprints, Keys, Plan
from .validation_set import ValidationPlan
from .workers import batches, leave_signals, refused

Progress = Callable[[str, Iterable[Any], int], Iterable[Any]]
"""``(label, things, how many)`` -> the same things, with a bar."""

_CAPTIONS = 16  # encoded at a time


def fingerprints_of(config: TrainConfig) -> Fingerprints:
    """Of all models whose outputs are cached; no weights are loaded."""
    return Fingerprints(
        vae=vae_fingerprint(config.model.vae_source),
        clip=clip_fingerprint(config.encoder.clip_model, config.encoder.clip_weights),
        text=text_fingerprint(config.model.text_source) if config.objective.reads_text else "",
    )


# --- photos ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PhotoJob:
    """What is missing of one photo."""

    row: int
    crops: tuple[int, ...]
    """Which crops' latents."""
    clip: bool


def photo_jobs(plan: Plan, keys: Keys, caches: Caches, rows: Sequence[int]) -> list[PhotoJob]:
    """All that is missing for ``rows`` of the plan's dataset as targets and references."""
    jobs = []
    for number in rows:
        row = plan.dataset.row(number)
        crops = range(plan.config.data.crops_per_photo)
        wanted = {keys.latent(row, plan.crop(number, k)): k for k in crops}
        # All crops of a photo or none: batches, and so every bit, are the same after a restart.
        missing = bool(caches.latents.missing(wanted))
        clip = bool(caches.clip.missing([keys.clip(row)]))
        if missing or clip:
            which = tuple(wanted.values()) if missing else ()
            jobs.append(PhotoJob(row=number, crops=which, clip=clip))
    return jobs


class JobPictures(torch.utils.data.Dataset[dict[str, Any]]):
    """Job number -> its pictures; runs in worker processes."""

    def __init__(self, plan: Plan, jobs: Sequence[PhotoJob]) -> None:
        self.plan = plan
        self.jobs = jobs

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``pixels [crops, 3, H, W]`` and ``face [S, S, 3]``, or None; or ``refused``."""
        job = self.jobs[index]
        try:
            photo = self.plan.dataset.photo(job.row)
        except FileError as error:
            return refused(error)
        crops = [self.plan.crop(job.row, k).cut(photo) for k in job.crops]
        face = aligned_face(self.plan, job.row, photo) if job.clip else None
        return {
            "job": job,
            "pixels": torch.stack([_pixels(c).permute(2, 0, 1) for c in crops]) if crops else None,
            "face": face,
        }


def aligned_face(plan: Plan, row: int, photo: Image.Image) -> Tensor:
    """FA as the nodes do it: ``[224, 224, 3]`` in [0, 1]."""
    landmarks = np.asarray(plan.dataset.row(row).landmarks, dtype=np.float64)
    return align(_pixels(photo), landmarks, CROP_SIZE, plan.config.encoder.padding)


def _pixels(picture: Image.Image) -> Tensor:
    """``[H, W, 3]`` in [0, 1]."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255.0)


# --- computing -------------------------------------------------------------------------------


def compute_missing(
    plan: Plan,
    keys: Keys,
    caches: Caches,
    device: torch.device,
    *,
    held_out: Plan | None = None,
    validation: ValidationPlan | None = None,
    part: tuple[int, int] = (0, 1),
    progress: Progress,
) -> int:
    """Fill the caches for training, for the previews' references and for validation.

    ``part`` is (this process, how many). Returns how many tensors were made. Raises what loading
    the encoders and reading the shards raises, ``NotCachedError``, ``DiskFullError``.
    """
    rank, world = part
    jobs = photo_jobs(plan, keys, caches, range(len(plan.dataset)))[rank::world]
    label = "latents and identity features"
    made = _compute_photos(plan, keys, caches, jobs, device, progress, label)
    shown = validation or held_out
    if shown is not None:
        missing = held_out_jobs(held_out, validation, keys, caches)
        missing, label = missing[rank::world], f"{label} of people held out"
        made += _compute_photos(shown, keys, caches, missing, device, progress, label)
    if plan.config.objective.reads_text:
        captions = [] if validation is None else _captions(validation, sorted(validation.targets))
        made += _compute_captions(plan, captions, keys, caches, device, part, progress)
    return made


def held_out_jobs(
    held_out: Plan | None, validation: ValidationPlan | None, keys: Keys, caches: Caches
) -> list[PhotoJob]:
    """All that is missing for previews and validation. Both plans are of one dataset's people."""
    targets, references = set[int](), set[int]()
    plan = validation or held_out
    if plan is None:
        return []
    if held_out is not None:
        people = held_out.dataset.identities[: held_out.config.previews.people]
        references |= {reference_row(held_out.dataset, name) for name in people}
    if validation is not None:
        targets, references = targets | validation.targets, references | validation.references
    jobs = []
    for number in sorted(targets | references):
        row = plan.dataset.row(number)
        latent = number in targets and caches.latents.missing(
            [keys.latent(row, plan.crop(number, 0))]
        )
        clip = number in references and caches.clip.missing([keys.clip(row)])
        if latent or clip:
            jobs.append(PhotoJob(row=number, crops=(0,) if latent else (), clip=bool(clip)))
    return jobs


def _captions(plan: Plan, rows: Iterable[int]) -> list[str]:
    return [plan.dataset.row(row).caption for row in rows]


def reference_row(dataset: Dataset, identity: str) -> int:
    """The photo of a person that previews are made from: the one most like their centroid."""
    rows = dataset.rows_of(identity)
    return max(rows, key=lambda row: dataset.row(row).similarity)


def _compute_photos(
    plan: Plan,
    keys: Keys,
    caches: Caches,
    jobs: Sequence[PhotoJob],
    device: torch.device,
    progress: Progress,
    label: str,
) -> int:
    if not jobs:
        return 0
    vae = load_vae(plan.config.model.vae_source) if any(job.crops for job in jobs) else None
    encoder, clip = plan.config.encoder, None
    if any(job.clip for job in jobs):
        clip = load_image_encoder(encoder.clip_model, encoder.clip_weights)
    if vae is not None:
        vae.module.to(device)
    if clip is not None:
        clip.model.to(device)
    latents, states = _Pack(caches.latents), _Pack(caches.clip)
    loader: Any = torch.utils.data.DataLoader(
        JobPictures(plan, jobs),
        batch_size=None,
        num_workers=plan.config.data.workers,
        worker_init_fn=leave_signals,
    )
    with batches(loader) as photos:
        for pictures in progress(label, photos, len(jobs)):
            job: PhotoJob = pictures["job"]
            row = plan.dataset.row(job.row)
            if vae is not None and pictures["pixels"] is not None:
                encoded = vae.encode(pictures["pixels"].to(device)).half()
                _check_finite(encoded, "The autoencoder", "model.vae", _photo(plan, row))
                names = [keys.latent(row, plan.crop(job.row, k)) for k in job.crops]
                latents.add(dict(zip(names, encoded.cpu(), strict=True)))
            if clip is not None and pictures["face"] is not None:
                layer = plan.config.encoder.clip_layer
                encoded = hidden_states(clip, [pictures["face"]], layer)[0].half()
                _check_finite(
                    encoded, "The image encoder", "encoder.clip_weights", _photo(plan, row)
                )
                states.add({keys.clip(row): encoded})
    latents.close()
    states.close()
    return latents.count + states.count


def _compute_captions(
    plan: Plan,
    more: Sequence[str],
    keys: Keys,
    caches: Caches,
    device: torch.device,
    part: tuple[int, int],
    progress: Progress,
) -> int:
    captions = [""]
    if plan.config.objective.mode == "entangled":
        captions += dict.fromkeys([*plan.dataset.table["caption"].to_pylist(), *more])
    by_key = {keys.text(caption): caption for caption in captions}
    missing = caches.text.missing(by_key)[part[0] :: part[1]]
    if not missing:
        return 0
    encoders = load_text_encoders(plan.config.model.text_source).to(device)
    pack = _Pack(caches.text)
    parts = list(_batches(missing, _CAPTIONS))
    for batch in progress("captions", parts, len(parts)):
        prompt = encoders.encode([by_key[key] for key in batch])
        for key, context, pooled in zip(batch, prompt.context, prompt.pooled, strict=True):
            entries = {key: context.half().cpu(), f"{key}.pooled": pooled.half().cpu()}
            for tensor in entries.values():
                caption = f"the caption {by_key[key]!r}"
                _check_finite(tensor, "The text encoder", "model.text_encoders", caption)
            pack.add(entries)
    pack.close()
    return pack.count


def _photo(plan: Plan, row: Row) -> str:
    return f"photo {row.key} of {row.identity} in {plan.dataset.folder / SHARDS / row.shard}"


def _check_finite(tensor: Tensor, model: str, key: str, what: str) -> None:
    if not finite(tensor):
        raise NotCachedError(
            f"{model} gives NaN or infinity for {what}. Nothing of it was cached. The file in "
            f"{key} is damaged, or its numbers are too large for 16 bits: give another one."
        )


def _batches(things: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(things), size):
        yield things[start : start + size]


class _Pack:
    """Collects entries and writes them by the pack."""

    def __init__(self, cache: FeatureCache) -> None:
        self.cache = cache
        self.count = 0
        self._entries: dict[str, Tensor] = {}

    def add(self, entries: dict[str, Tensor]) -> None:
        """Entries that belong together; they go into one pack."""
        self._entries.update(entries)
        self.count += len(entries)
        if len(self._entries) >= PACK:
            self.close()

    def close(self) -> None:
        """Write what is left."""
        if self._entries:
            self.cache.write(self._entries)
            self._entries = {}
