"""IP-Adapter's families that read an image encoder alone: base, full, plus."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ...errors import WrongShapeError
from ...method.features import Reading
from ...method.ip_adapter import PooledTokens, StateTokens
from ...method.published import (
    ARCFACE,
    POOLED_ENCODERS,
    STATE_ENCODERS,
    WHOLE,
    pooled_reading,
    states_reading,
)
from ...method.records import PublishedRecord
from ...method.resampler import ImageResampler, PerceiverSizes
from ..adapter_options import AdapterOptions
from ..checked import Shapes
from .family import HEAD_WIDTH, Found, Plan, PublishedFormat, others_of

FACE_ASSUMED = (
    "the encoder sees the face alone; a file for composition or style wants the whole picture, "
    "and looks the same"
)


def cut_of(options: AdapterOptions, default: str = ARCFACE) -> str:
    """What the image encoder sees."""
    if options.whole_picture is None:
        return default
    return WHOLE if options.whole_picture else ARCFACE


def encoder_of(found: Found, options: AdapterOptions, known: Mapping[int, str], width: int) -> str:
    """The image encoder by the width that is read. Raises ``WrongShapeError`` for another."""
    encoder = options.image_encoder or known.get(width)
    if encoder is None:
        expected = ", ".join(f"{width} ({name})" for width, name in known.items())
        raise WrongShapeError(
            found.path, f"reads an image encoder {width} wide; expected {expected}. If it was made "
            "for another one, say which (image_encoder)."
        )  # fmt: skip
    return encoder


def states_of(found: Found, options: AdapterOptions, width: int, default: str) -> Reading:
    """The image encoder's hidden states."""
    encoder = encoder_of(found, options, STATE_ENCODERS, width)
    return states_reading(encoder, width, cut_of(options, default))


def perceiver_sizes(found: Found, prefix: str) -> PerceiverSizes:
    """Sizes of a perceiver by its tensors."""
    return PerceiverSizes(
        inputs=found.size(f"{prefix}proj_in.weight", 1),
        width=found.size(f"{prefix}proj_in.weight", 0),
        heads=found.multiple(
            f"{prefix}layers.0.0.to_q.weight", HEAD_WIDTH, "heads are 64 wide in all of them"
        ),
        depth=found.depth(f"{prefix}layers."),
        context_width=found.context_width,
    )


def image_record(
    found: Found, family: str, reading: Reading, options: AdapterOptions
) -> PublishedRecord:
    """The record of an adapter that reads no face."""
    said = options.whole_picture is not None or reading.cut == WHOLE
    assumed = () if said else (FACE_ASSUMED,)
    return PublishedRecord(
        context_width=found.context_width,
        family=family,
        encoder=words_of(reading),
        crop=crop_words(reading.cut),
        assumed=assumed,
        left_out=others_of(found),
    )


def words_of(reading: Reading) -> str:
    """An encoder and its output, in words."""
    return f"{reading.model}, {reading.output} {'x'.join(map(str, reading.shape))}"


def crop_words(cut: str) -> str:
    """What an encoder sees, in words."""
    return "the face" if cut == ARCFACE else cut


class Plus(PublishedFormat):
    """Plus, plus-face and composition: the same layers, trained on other pictures."""

    family = "IP-Adapter plus, plus-face or composition"

    def matches(self, shapes: Shapes) -> bool:
        return "latents" in shapes

    def plan(self, found: Found, options: AdapterOptions) -> Plan:
        sizes = perceiver_sizes(found, "")
        tokens = found.size("latents", 1, dimensions=3)
        reading = states_of(found, options, sizes.inputs, ARCFACE)
        return Plan(
            make_projector=partial(ImageResampler, reading, sizes, tokens),
            record=image_record(found, self.family, reading, options),
        )


class Full(PublishedFormat):
    """All 257 states as tokens; its authors published none for SDXL."""

    family = "IP-Adapter full"

    def matches(self, shapes: Shapes) -> bool:
        return "proj.3.weight" in shapes

    def plan(self, found: Found, options: AdapterOptions) -> Plan:
        width = found.size("proj.0.weight", 1)
        reading = states_of(found, options, width, ARCFACE)
        return Plan(
            make_projector=partial(StateTokens, reading, found.context_width),
            record=image_record(found, self.family, reading, options),
        )


class Base(PublishedFormat):
    """The projected class token as four tokens."""

    family = "IP-Adapter"

    def matches(self, shapes: Shapes) -> bool:
        return "proj.weight" in shapes

    def plan(self, found: Found, options: AdapterOptions) -> Plan:
        width = found.size("proj.weight", 1)
        encoder = encoder_of(found, options, POOLED_ENCODERS, width)
        tokens = found.multiple("proj.weight", found.context_width, "one for each token")
        reading = pooled_reading(encoder, width, cut_of(options, WHOLE))
        return Plan(
            make_projector=partial(PooledTokens, reading, tokens, found.context_width),
            record=image_record(found, self.family, reading, options),
        )
