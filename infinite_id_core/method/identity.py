"""An identity: the features of one or more reference photos, independent of any adapter."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..errors import IdentityMismatchError, OptionError, shown
from .features import NORMED, Feature, Reading, check_readings, refuse_differences

_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}", re.ASCII)


@dataclass(frozen=True, kw_only=True, eq=False)
class Identity:
    """Features of ``n`` references (Eq. 4, before the projector). Raises ``OptionError``."""

    features: Mapping[str, Feature]
    """By name, of n references each; the paper's are ``face`` and ``clip`` (``face_clip.py``)."""
    weight: Tensor
    """``[n]`` float32, positive: how often each reference counts."""
    name: str = ""
    """A label for people; no meaning to the method."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", dict(self.features))
        check_names(self.features)
        counts = {name: feature.references for name, feature in self.features.items()}
        if set(counts.values()) != {self.weight.numel()} or self.weight.ndim != 1:
            raise OptionError(
                "An identity needs as many references of each feature as weights [n]; got "
                f"{counts} and weights {list(self.weight.shape)}."
            )
        check_weights(self.weight)

    def __getitem__(self, name: str) -> Feature:
        """A feature by its name. Raises ``IdentityMismatchError`` where it has none of it."""
        if name not in self.features:
            raise IdentityMismatchError(
                f"This identity has no {name!r}, only {', '.join(sorted(self.features))}. Make the "
                "identity again, with the encoders that the adapter names."
            )
        return self.features[name]

    def fitting(self, name: str, wanted: Reading) -> Feature | None:
        """The feature ``name``; or, where it does not fit, another that was read as ``wanted``.

        None where there is neither.
        """
        own = self.features.get(name)
        found = [f for f in (own, *self.features.values()) if f is not None]
        fits = (f for f in found if f.reading.towards(wanted) == wanted)
        return next(fits, own)

    def read_as(self, name: str, wanted: Reading) -> Feature:
        """A feature as ``wanted`` reads it: that of this ``name``, else any that fits.

        Raises ``IdentityMismatchError``.
        """
        return (self.fitting(name, wanted) or self[name]).read_as(wanted)

    @property
    def references(self) -> int:
        """Number of reference photos, n."""
        return self.weight.shape[0]

    @property
    def readings(self) -> dict[str, Reading]:
        """How each feature was read."""
        return {name: feature.reading for name, feature in self.features.items()}


def check_names(names: Collection[str]) -> None:
    """Raise ``OptionError`` where there is no feature, or one of a name that files cannot have."""
    wrong = [shown(name) for name in names if not _NAME.fullmatch(name)]
    if wrong or not names:
        raise OptionError(
            "An identity needs features with names of at most 32 small letters, digits and _, "
            f"starting with a letter; got {', '.join(wrong[:3]) or 'none'}."
        )


def check_weights(weight: Tensor) -> None:
    """Raise ``OptionError`` where a reference's weight is not a positive number."""
    if not bool((weight > 0).all()) or not bool(weight.isfinite().all()):
        raise OptionError(
            f"Reference weights must be positive numbers; got {weight.tolist()}. Leave a "
            "reference out instead of giving it weight 0."
        )


def select(identity: Identity, references: Sequence[int]) -> Identity:
    """Some of the references, by number from 0. Raises ``OptionError`` where one is not there."""
    if not references or not all(0 <= number < identity.references for number in references):
        raise OptionError(
            f"references must be numbers from 0 to {identity.references - 1}, got "
            f"{list(references)}."
        )
    chosen = torch.tensor(references)
    features = {
        name: replace(feature, value=feature.value[chosen.to(feature.value.device)])
        for name, feature in identity.features.items()
    }
    return replace(identity, features=features, weight=identity.weight[chosen])


def stack(identities: Sequence[Identity], weights: Sequence[float] | None = None) -> Identity:
    """Identity mixing by stacking (A.3): all references side by side.

    ``weights`` scales each identity's references; nobody (``null``) is the first identity's.
    Raises ``IdentityMismatchError`` where the encoders differ, ``OptionError`` for an empty list
    or weights that are not positive.
    """
    first = _same_encoders(identities)
    scale = [1.0] * len(identities) if weights is None else list(weights)
    if len(scale) != len(identities):
        raise OptionError(f"{len(identities)} identities need as many weights, got {len(scale)}.")
    features = {
        name: replace(feature, value=torch.cat([i.features[name].value for i in identities]))
        for name, feature in first.features.items()
    }
    return Identity(
        features=features,
        weight=torch.cat([i.weight * s for i, s in zip(identities, scale, strict=True)]),
        name=" + ".join(i.name for i in identities if i.name),
    )


def average(identity: Identity) -> Identity:
    """The weighted mean of all references as one reference: ``n`` -> 1.

    An embedding is brought back to unit length where its reading says ``normed``, and to the
    references' mean length where ``raw``.
    """
    share = identity.weight / identity.weight.sum()
    features = {name: _mean(feature, share) for name, feature in identity.features.items()}
    return replace(identity, features=features, weight=torch.ones(1))


def interpolate(a: Identity, b: Identity, ratio: float) -> Identity:
    """Identity mixing by interpolation (A.3, Fig. 12): 0 gives ``a``, 1 gives ``b``.

    Linear between the features; several references are averaged first. Raises ``OptionError``
    for a ratio outside [0, 1], ``IdentityMismatchError`` where the encoders differ.
    """
    if not 0.0 <= ratio <= 1.0:
        raise OptionError(f"ratio must lie in [0, 1] (0 = first, 1 = second person), got {ratio}.")
    _same_encoders([a, b])
    if ratio in (0.0, 1.0):
        return a if ratio == 0.0 else b
    return average(stack([average(a), average(b)], [1.0 - ratio, ratio]))


def check_match(
    left_name: str, left: Mapping[str, object], right_name: str, right: Mapping[str, object]
) -> None:
    """Raise ``IdentityMismatchError`` naming both sides of every entry that differs."""
    wrong = [(key, left[key], right.get(key)) for key in left if left[key] != right.get(key)]
    refuse_differences(left_name, right_name, wrong)


def _same_encoders(identities: Sequence[Identity]) -> Identity:
    if not identities:
        raise OptionError("At least one identity is needed, got none.")
    first, *others = identities
    names = "first identity", "second identity"
    for other in others:
        check_readings(names[0], first.readings, names[1], other.readings)
        check_readings(names[1], other.readings, names[0], first.readings)
    return first


def _mean(feature: Feature, share: Tensor) -> Feature:
    """The mean reference by ``share [n]``, computed in float32."""
    value = feature.value.float()
    mean = (value * share.view(-1, *[1] * (value.ndim - 1))).sum(0, keepdim=True)
    if feature.reading.is_embedding:
        normed = feature.reading.output == NORMED
        length = 1.0 if normed else float((value.norm(dim=1) * share).sum())
        mean = normalize(mean, dim=1) * length
    return replace(feature, value=mean.to(feature.value))
