"""PuLID for SDXL, versions 1 and 1.1."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ...errors import WrongShapeError
from ...method.face_clip import FACE, FACE_WIDTH
from ...method.features import Reading
from ...method.merging import MERGING, PULID_V11, Merging
from ...method.published import ANTELOPE, EVA, PULID_CUT, pulid_readings
from ...method.pulid import IdEncoder, IdFormer, IdFormerSizes, PulidSizes
from ...method.records import PublishedRecord
from ..adapter_options import AdapterOptions
from ..checked import Shapes
from .face import face_of, face_words
from .family import HEAD_WIDTH, Found, Plan, PublishedFormat, others_of


def _needs(found: Found, options: AdapterOptions, first: str) -> dict[str, Reading]:
    """What it reads; ``first`` is the layer that reads face and image encoder side by side."""
    both = found.size(first, 1)
    if both <= FACE_WIDTH:
        raise WrongShapeError(
            found.path, f"{found.parts.prefix}{first} reads {both} numbers; expected more than the "
            f"{FACE_WIDTH} of a face embedding, which it reads with the image encoder's."
        )  # fmt: skip
    levels = found.size("mapping_0.0.weight", 1)
    needs = pulid_readings(ANTELOPE, both - FACE_WIDTH, levels)
    return {**needs, FACE: face_of(options, ANTELOPE, normed=False)}


def _record(found: Found, family: str, needs: Mapping[str, Reading]) -> PublishedRecord:
    return PublishedRecord(
        context_width=found.context_width,
        family=family,
        encoder=f"{needs[EVA].model}, its head's output and the states at five depths",
        recogniser=face_words(needs[FACE]),
        crop=f"{PULID_CUT}: a 512 px crop in grey, on white where the background can be found",
        left_out=others_of(found),
    )


def _merging(options: AdapterOptions, usual: Merging) -> Merging:
    return usual if options.pulid_mode is None else MERGING[options.pulid_mode]


class Pulid11(PublishedFormat):
    """All photos in one pass, 32 tokens."""

    family = "PuLID v1.1"

    def matches(self, shapes: Shapes) -> bool:
        return "id_embedding_mapping.0.weight" in shapes

    def plan(self, found: Found, options: AdapterOptions) -> Plan:
        first = "id_embedding_mapping.0.weight"
        needs = _needs(found, options, first)
        width = found.size("latents", 2, dimensions=3)
        sizes = IdFormerSizes(
            inputs=found.size(first, 1),
            level_width=found.size("mapping_0.0.weight", 1),
            hidden=found.size(first, 0),
            id_tokens=found.multiple("id_embedding_mapping.6.weight", width, "one for each token"),
            context_width=found.context_width,
            width=width,
            heads=found.multiple("layers.0.0.to_q.weight", HEAD_WIDTH, "heads are 64 wide"),
            depth=found.depth("layers."),
            tokens=found.size("latents", 1, dimensions=3),
        )
        if sizes.depth % 5:
            raise WrongShapeError(
                found.path, f"has {sizes.depth} perceiver layers; expected as many for each of the "
                "five levels."
            )  # fmt: skip
        return Plan(
            make_projector=partial(IdFormer, needs, sizes, merging=_merging(options, PULID_V11)),
            record=_record(found, self.family, needs),
        )


class Pulid1(PublishedFormat):
    """Ten tokens for each photo."""

    family = "PuLID v1"

    def matches(self, shapes: Shapes) -> bool:
        return "body.0.weight" in shapes and "mapping_patch_0.0.weight" in shapes

    def plan(self, found: Found, options: AdapterOptions) -> Plan:
        needs = _needs(found, options, "body.0.weight")
        context = found.context_width
        sizes = PulidSizes(
            inputs=found.size("body.0.weight", 1),
            level_width=found.size("mapping_0.0.weight", 1),
            hidden=found.size("body.0.weight", 0),
            id_tokens=found.multiple("body.6.weight", context, "one for each token"),
            context_width=context,
        )
        return Plan(
            make_projector=partial(
                IdEncoder, needs, sizes, merging=_merging(options, MERGING["fidelity"])
            ),
            record=_record(found, self.family, needs),
        )
