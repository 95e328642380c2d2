"""Eq. 9-11 of the paper and the statistics they are reported with, as pure functions.

Shapes: ``n`` pictures, ``D`` the width of an embedding. Embeddings are tensors or arrays; scores
are float64 arrays ``[n]`` in which NaN stands for "not measured" (no face, no prompt).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..errors import OptionError

Scores = NDArray[np.float64]
Embeddings = Tensor | NDArray[Any]
Unit = Literal["identity", "image"]
UNIT: tuple[Unit, ...] = get_args(Unit)

_SMALLEST_ANGLE = 1e-6  # radians: two photos closer than this are one photo
_DRAWS = 2**22  # resampled units held at a time


# --- Eq. 9 and 11 ----------------------------------------------------------------------------


def cosine(a: Embeddings, b: Embeddings) -> Scores:
    """cos(a, b) row by row: ``[n, D]`` and ``[n or 1, D]`` -> ``[n]``.

    A row that holds NaN, or has length 0, gives NaN. Raises ``OptionError`` where the shapes do
    not fit.
    """
    a, b = _rows(a), _rows(b)
    if a.shape[1] != b.shape[1] or (len(b) not in (1, len(a))):
        raise OptionError(
            f"Expected embeddings [n, D] and [n or 1, D], got {list(a.shape)} and {list(b.shape)}. "
            "Both sides must come from the same encoder."
        )
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines: Scores = np.clip((a * b).sum(axis=1) / lengths, -1.0, 1.0)
    return cosines


def m_face(generated: Embeddings, reference: Embeddings) -> Scores:
    """M_FaceNet of Eq. 9: cos(E_face(FA(I_gen)), E_face(FA(I_id))), shapes as in ``cosine``.

    Named for the task, not for FaceNet: any recogniser may be E_face, and absolute values differ
    between recognisers.
    """
    return cosine(generated, reference)


def clip_i(generated: Embeddings, reference: Embeddings) -> Scores:
    """CLIP-I of Eq. 9: cos(E_clip(FA(I_gen)), E_clip(FA(I_id))), face crop against face crop."""
    return cosine(generated, reference)


def clip_t(picture: Embeddings, prompt: Embeddings) -> Scores:
    """CLIP-T of Eq. 11: cos(E_clip(I_gen), E_text(P)), the whole picture against its prompt.

    A cosine; torchmetrics' CLIPScore is 100 times this.
    """
    return cosine(picture, prompt)


# --- Eq. 10 ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Population:
    """The set that mu and sigma of Eq. 10 were taken over. The paper does not name its own."""

    over: str
    """In words, e.g. "all pictures with a face, of all methods of this run"."""
    count: int
    mean: float
    deviation: float
    """Of the whole set (divided by n, not n - 1)."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def population_of(scores: ArrayLike, over: str) -> Population:
    """mu and sigma of the measured ``scores [n]``. Raises ``OptionError`` where none is."""
    found = detected_only(scores)
    if not len(found):
        raise OptionError(f"Eq. 10 needs at least one measured score; {over}: none.")
    # Equal scores: numpy's deviation of them is rounding, and a z-score of it would be noise.
    deviation = float(found.std()) if np.ptp(found) > 0.0 else 0.0
    return Population(over=over, count=len(found), mean=float(found.mean()), deviation=deviation)


def z_score(scores: ArrayLike, population: Population) -> Scores:
    """(x - mu) / sigma ``[n]``; 0 for all where the population does not vary."""
    x = np.asarray(scores, dtype=np.float64)
    if population.deviation == 0.0:
        return np.where(np.isnan(x), np.nan, 0.0)
    return (x - population.mean) / population.deviation


def identity_fidelity(
    face: ArrayLike, clip: ArrayLike, face_population: Population, clip_population: Population
) -> Scores:
    """Eq. 10: mean(z-score(M_face), z-score(CLIP-I)) of each picture, ``[n]``.

    Comparable only between scores that used the same populations.
    """
    return (z_score(face, face_population) + z_score(clip, clip_population)) / 2.0


# --- pictures without a face -----------------------------------------------------------------


def zero_filled(scores: ArrayLike, *, clamp_negatives: bool = False) -> Scores:
    """A picture without a face counts 0, ``[n]``; ``clamp_negatives`` also lifts negative scores
    to 0 (both as FastComposer's evaluation does)."""
    filled = np.nan_to_num(np.asarray(scores, dtype=np.float64), nan=0.0)
    return np.maximum(filled, 0.0) if clamp_negatives else filled


def detected_only(scores: ArrayLike) -> Scores:
    """The measured scores alone, ``[n] -> [m <= n]``."""
    values = np.asarray(scores, dtype=np.float64)
    found: Scores = values[~np.isnan(values)]
    return found


# --- copies ----------------------------------------------------------------------------------


def copy_paste(to_reference: ArrayLike, to_others: ArrayLike, between: ArrayLike) -> Scores:
    """How much more a picture is like the very reference photo than like other photos of the
    same person, ``[n]`` in [-1, 1].

    (angle to others - angle to reference) / angle between them, angles from cosines: 1 is a copy
    of the reference, 0 is no closer to it than to the others, below 0 is closer to the others.
    The measure of WithAnyone (2025) with the other photos as the target. ``between``: the
    reference's cosine to the other photos.
    """
    theta_reference, theta_others, theta = map(_angle, (to_reference, to_others, between))
    score: Scores = (theta_others - theta_reference) / np.maximum(theta, _SMALLEST_ANGLE)
    return np.clip(score, -1.0, 1.0)


def _angle(cosines: ArrayLike) -> Scores:
    return np.arccos(np.clip(np.asarray(cosines, dtype=np.float64), -1.0, 1.0))


# --- intervals -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BootstrapOptions:
    """Percentile bootstrap (Efron 1979). Raises ``OptionError``."""

    resamples: int = 2000
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if not 100 <= self.resamples <= 1_000_000:
            raise OptionError(f"resamples must lie in [100, 1000000], got {self.resamples}.")
        if not 0.5 <= self.level < 1.0:
            raise OptionError(f"level must lie in [0.5, 1), got {self.level}. 0.95 is usual.")


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its bootstrap interval. NaN where nothing was measured."""

    mean: float
    low: float
    """NaN where fewer than two units could be resampled."""
    high: float
    by: Unit
    """What was resampled: whole identities with all their pictures, or single pictures."""
    units: int
    """How many of them there are."""
    count: int
    """How many pictures were measured."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN becomes None, which JSON knows."""
        return {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in asdict(self).items()
        }


def bootstrap_mean(
    scores: ArrayLike,
    identities: Sequence[str] | None = None,
    options: BootstrapOptions | None = None,
) -> Interval:
    """The mean of the measured ``scores [n]`` with a seeded percentile interval.

    With ``identities`` (one name a picture) whole identities are resampled, as clusters: pictures
    of one person are not independent, so this is the interval to report for "another person".
    Without, single pictures are: what more pictures of the same people would give.
    """
    options = options or BootstrapOptions()
    values = np.asarray(scores, dtype=np.float64)
    if identities is not None and len(identities) != len(values):
        raise OptionError(f"Expected {len(values)} identities, one a score, got {len(identities)}.")
    found = ~np.isnan(values)
    by: Unit = "image" if identities is None else "identity"
    labels = np.arange(len(values)) if identities is None else np.asarray(identities)
    _, unit = np.unique(labels[found], return_inverse=True)
    sums = np.bincount(unit, values[found]).astype(np.float64)
    counts = np.bincount(unit).astype(np.float64)
    low, high = _percentiles(sums, counts, options) if len(sums) >= 2 else (math.nan, math.nan)
    mean = float(values[found].mean()) if found.any() else math.nan
    return Interval(mean=mean, low=low, high=high, by=by, units=len(sums), count=int(found.sum()))


def _percentiles(sums: Scores, counts: Scores, options: BootstrapOptions) -> tuple[float, float]:
    """Percentiles of the resampled means of units with these sums and counts of scores."""
    rng = np.random.default_rng(options.seed)
    means = []
    rows = max(1, _DRAWS // len(sums))
    for start in range(0, options.resamples, rows):
        shape = (min(rows, options.resamples - start), len(sums))
        drawn = rng.integers(len(sums), size=shape)
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    tail = 100.0 * (1.0 - options.level) / 2.0
    low, high = np.percentile(np.concatenate(means), [tail, 100.0 - tail])
    return float(low), float(high)


def _rows(x: Embeddings) -> Scores:
    if isinstance(x, Tensor):
        x = x.detach().cpu().float().numpy()
    rows = np.asarray(x, dtype=np.float64)
    if rows.ndim != 2:
        raise OptionError(f"Expected embeddings [n, D], got {list(rows.shape)}.")
    return rows
