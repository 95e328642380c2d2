"""A feature: what one model reads of reference photos, and a record of how it was read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..errors import IdentityMismatchError, OptionError

MAX_WIDTH = 2**14  # far above any encoder's; what a file claims is checked before it is read
MAX_DIMENSIONS = 4

NORMED, RAW = "normed", "raw"

# How people know the readings of the paper's two features: model, output, width.
_WORDS = {
    "face": ("recogniser", "embedding", "face_width"),
    "clip": ("clip_model", "clip_layer", "clip_width"),
}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a feature was read; equal readings fit each other. Raises ``OptionError``."""

    model: str
    """The encoder, e.g. ``buffalo_l/w600k_r50`` or ``ViT-H-14``."""
    output: str
    """Which of its outputs: ``normed``, ``raw``, ``last``, ``penultimate``, ``pooled``, ..."""
    shape: tuple[int, ...]
    """Of one reference, e.g. ``(512,)`` or ``(257, 1280)``."""
    cut: str = ""
    """How the face was cut out; empty: as Align Face cuts it."""

    def __post_init__(self) -> None:
        fits = 1 <= len(self.shape) <= MAX_DIMENSIONS
        if not fits or not all(type(n) is int and 1 <= n <= MAX_WIDTH for n in self.shape):
            raise OptionError(
                f"The shape of one reference must be 1 to {MAX_DIMENSIONS} whole numbers in "
                f"[1, {MAX_WIDTH}], got {list(self.shape)}."
            )

    @property
    def is_embedding(self) -> bool:
        """Whether it is one vector of which the direction says who it is."""
        return self.output in (NORMED, RAW) and len(self.shape) == 1

    def towards(self, wanted: Reading) -> Reading:
        """What this reading can be turned into on the way to ``wanted``: normed follows from raw,
        nothing else from anything."""
        if self.is_embedding and (self.output, wanted.output) == (RAW, NORMED):
            return replace(self, output=NORMED)
        return self


@dataclass(frozen=True, kw_only=True, eq=False)
class Feature:
    """One feature of ``n`` references. Raises ``OptionError`` where the shapes disagree."""

    reading: Reading
    value: Tensor
    """``[n, *reading.shape]``"""
    null: Tensor | None = None
    """What stands for nobody, ``[*reading.shape]``; None: zeros."""

    def __post_init__(self) -> None:
        shape = self.reading.shape
        found = [list(x.shape) for x in (self.value, self.null) if x is not None]
        wrong_null = self.null is not None and self.null.shape != shape
        if not self.references or self.value.shape[1:] != shape or wrong_null:
            raise OptionError(
                f"A feature read as {list(shape)} needs a value [n, {', '.join(map(str, shape))}] "
                f"with n >= 1, and a null of {list(shape)} if any; got {found}."
            )

    @property
    def references(self) -> int:
        """Number of reference photos, n."""
        return self.value.shape[0] if self.value.ndim else 0

    def null_value(self) -> Tensor:
        """Nobody, as one reference: ``[1, *reading.shape]``."""
        if self.null is None:
            return torch.zeros_like(self.value[:1])
        return self.null[None].to(self.value)

    def read_as(self, wanted: Reading) -> Feature:
        """The feature as ``wanted`` reads it. Raises ``IdentityMismatchError`` where it cannot be
        had from this one."""
        reading = self.reading.towards(wanted)
        check_readings("wanted", {"feature": wanted}, "found", {"feature": reading})
        if reading == self.reading:
            return self
        null = None if self.null is None else normalize(self.null.float(), dim=-1)
        return Feature(reading=reading, value=normalize(self.value.float(), dim=-1), null=null)


# --- what fits what --------------------------------------------------------------------------

Difference = tuple[str, object, object]


def check_readings(
    left_name: str, left: Mapping[str, Reading], right_name: str, right: Mapping[str, Reading]
) -> None:
    """Raise ``IdentityMismatchError`` where a feature of ``left`` is not, or is another, in
    ``right``. What ``right`` has besides does not matter."""
    found = [
        difference
        for name, reading in left.items()
        for difference in _differences(name, reading, right.get(name))
    ]
    refuse_differences(left_name, right_name, found)


def refuse_differences(left_name: str, right_name: str, differences: list[Difference]) -> None:
    """Raise ``IdentityMismatchError`` naming both sides of each difference, if there is one."""
    if differences:
        pairs = "; ".join(
            f"{what}: {left_name} has {left!r}, {right_name} has {right!r}"
            for what, left, right in differences
        )
        raise IdentityMismatchError(
            f"These were made with different encoders. {pairs}. Use the same face model and image "
            "encoder on both sides (make the identity again with the ones the adapter names)."
        )


def _differences(name: str, left: Reading, right: Reading | None) -> Iterator[Difference]:
    if right is None:
        yield name, f"{left.output} of {left.model}, {list(left.shape)}", None
        return
    general = (f"{name} model", f"{name} output", f"{name} width")
    model, output, width = _WORDS.get(name, general)
    entries: list[Difference] = [
        (model, left.model, right.model),
        (output, left.output, right.output),
        (f"{name} cut", left.cut, right.cut),
    ]
    if left.shape[:-1] == right.shape[:-1]:
        entries.append((width, left.shape[-1], right.shape[-1]))
    else:
        entries.append((f"{name} shape", list(left.shape), list(right.shape)))
    yield from (entry for entry in entries if entry[1] != entry[2])
