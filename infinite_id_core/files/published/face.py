"""Families that read a face embedding: FaceID, its plus and portrait models, InstantID."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

from ...method.face_clip import CLIP, FACE, FACE_WIDTH
from ...method.features import NORMED, Reading
from ...method.ip_adapter import FaceSizes, FaceStateTokens, FaceTokens
from ...method.published import ANTELOPE, ARCFACE, BUFFALO, WHOLE, face_reading
from ...method.records import PublishedRecord
from ...method.resampler import FaceResampler
from ..adapter_options import AdapterOptions
from ..checked import Shapes
from ..system import open_regular, reading
from ..tensor_file import TensorFile
from .family import Found, Plan, PublishedFormat, others_of
from .image import crop_words, perceiver_sizes, states_of, words_of

# The one published file that says by its hash what its layers do not.
UNNORM_BYTES = 1_009_523_411
UNNORM_SHA256 = "220bb86e205393a3d0411631cb473caddbf35fd371be2905ca9008818170db55"
_PIECE = 2**24  # bytes that are hashed at a time
_PORTRAIT_TOKENS = 16


def face_of(options: AdapterOptions, recogniser: str, *, normed: bool) -> Reading:
    """The face embedding that a family reads, unless another is named."""
    if options.embedding is not None:
        normed = options.embedding == NORMED
    return face_reading(options.recogniser or recogniser, normed=normed)


def face_words(face: Reading) -> str:
    """A recogniser and its output, in words."""
    return f"{face.model}, {face.output}"


def _sizes(found: Found) -> FaceSizes:
    return FaceSizes(
        inputs=found.size("proj.0.weight", 1),
        hidden=found.size("proj.0.weight", 0),
        tokens=found.multiple("proj.2.weight", found.context_width, "one for each token"),
        context_width=found.context_width,
    )


class FaceId(PublishedFormat):
    """FaceID and portrait: an embedding of unit length as 4 or 16 tokens."""

    family = "IP-Adapter FaceID or portrait"

    def matches(self, shapes: Shapes) -> bool:
        return shapes.get("proj.0.weight", ())[1:] == (FACE_WIDTH,) and "norm.weight" in shapes

    def plan(self, found: Found, options: AdapterOptions) -> Plan:
        sizes = _sizes(found)
        face = face_of(options, BUFFALO, normed=True)
        portrait = sizes.tokens == _PORTRAIT_TOKENS and not found.low_rank
        return Plan(
            make_projector=partial(FaceTokens, face, sizes),
            record=PublishedRecord(
                context_width=found.context_width,
                family=f"IP-Adapter FaceID{' portrait' * portrait}",
                recogniser=face_words(face),
                left_out=others_of(found),
            ),
        )


class FaceIdPlus(PublishedFormat):
    """FaceID plus version 2; ConsistentID has the same layers beside its own for the prompt."""

    family = "IP-Adapter FaceID plus v2 or ConsistentID"

    def matches(self, shapes: Shapes) -> bool:
        return "perceiver_resampler.proj_in.weight" in shapes

    def plan(self, found: Found, options: AdapterOptions) -> Plan:
        consistent = "FacialEncoder" in found.parts.others
        face = face_of(options, BUFFALO, normed=True)
        perceiver = perceiver_sizes(found, "perceiver_resampler.")
        states = states_of(found, options, perceiver.inputs, WHOLE if consistent else ARCFACE)
        shortcut = options.shortcut if options.plus_version == 2 else None
        return Plan(
            make_projector=partial(
                FaceStateTokens, {FACE: face, CLIP: states}, _sizes(found), perceiver, shortcut
            ),
            record=PublishedRecord(
                context_width=found.context_width,
                family="ConsistentID, as the FaceID plus v2 in it" if consistent
                else f"IP-Adapter FaceID plus v{options.plus_version}",
                encoder=words_of(states),
                recogniser=face_words(face),
                crop=crop_words(states.cut),
                left_out=others_of(found),
            ),
        )  # fmt: skip


class FaceIdResampler(PublishedFormat):
    """InstantID and portrait-unnorm: a raw embedding through a resampler."""

    family = "InstantID or IP-Adapter FaceID portrait-unnorm"

    def matches(self, shapes: Shapes) -> bool:
        return "latents" in shapes and shapes.get("proj_in.weight", ())[1:] == (FACE_WIDTH,)

    def plan(self, found: Found, options: AdapterOptions) -> Plan:
        unnorm = options.recogniser is None and _is_published_unnorm(found.file)
        face = face_of(options, BUFFALO if unnorm else ANTELOPE, normed=False)
        families = {ANTELOPE: "InstantID", BUFFALO: "IP-Adapter FaceID portrait-unnorm"}
        assumed = () if unnorm or options.recogniser else (
            "InstantID's recogniser; portrait-unnorm looks the same and wants buffalo_l",
        )  # fmt: skip
        tokens = found.size("latents", 1, dimensions=3)
        return Plan(
            make_projector=partial(
                FaceResampler, face, perceiver_sizes(found, ""), tokens, options.references
            ),
            record=PublishedRecord(
                context_width=found.context_width,
                family=families.get(face.model, self.family),
                recogniser=face_words(face),
                assumed=assumed,
                left_out=others_of(found),
            ),
        )


def _is_published_unnorm(file: TensorFile) -> bool:
    """Whether it is portrait-unnorm as published, to the byte."""
    return file.size == UNNORM_BYTES and _sha256(file.path) == UNNORM_SHA256


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with reading(path), open_regular(path) as file:
        while data := file.read(_PIECE):
            digest.update(data)
    return digest.hexdigest()
