"""Faces of reference pictures: found, numbered, chosen and aligned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from ..infinite_id_core.errors import FaceError
from ..infinite_id_core.faces.align import DEFAULT_PADDING
from ..infinite_id_core.faces.find import (
    CHOOSE,
    IF_NO_FACE,
    ORDER,
    Choose,
    FaceOptions,
    FoundFaces,
    IfNoFace,
    Order,
    choose_in_batch,
    detect_in_batch,
    nothing_wanted_message,
)
from ..infinite_id_core.faces.preview import numbered_previews
from .inputs import checked
from .models import FaceAnalysis
from .page import KEEPS_PREVIEW, show_before_failing

Faces = io.Custom("INFINITE_ID_FACES")


def choice_inputs() -> list[io.Input]:
    """Which of the faces found are wanted."""
    return [
        io.Combo.Input(
            "choose",
            options=list(CHOOSE),
            default="largest",
            tooltip="Which face of each picture: the largest, the one with the number below, or "
            "all.",
        ),
        io.Int.Input(
            "index",
            default=0,
            min=0,
            max=999,
            tooltip="For 'index': the face's number in the preview, counted from 0.",
        ),
        io.Combo.Input(
            "order",
            options=list(ORDER),
            default=ORDER[0],
            tooltip="How the faces of a picture are numbered. 'size' and 'score' start with the "
            "largest and the surest.",
        ),
    ]


class InfiniteIDAlignFace(io.ComfyNode):
    """Finds, chooses and aligns faces."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfiniteIDAlignFace",
            display_name="Infinite-ID Align Face",
            category="Infinite-ID/advanced",
            description="Finds the faces in reference pictures, takes the wanted ones and cuts "
            "them out upright. The preview numbers every face it found.",
            inputs=[
                FaceAnalysis.Input(
                    "face_analysis",
                    tooltip="From Infinite-ID Load Face Models, or the InstantID or PuLID pack.",
                ),
                io.Image.Input(
                    "image", tooltip="One or more reference pictures (a batch of one person)."
                ),
                *choice_inputs(),
                io.Float.Input(
                    "padding",
                    default=DEFAULT_PADDING,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much is shown around the face: 0 cuts at brows and chin, 0.25 "
                    "shows the hair. Keep the value the adapter was trained with.",
                ),
                io.Combo.Input(
                    "if_no_face",
                    options=list(IF_NO_FACE),
                    default="error",
                    tooltip="A picture without a face, or without one of this index, stops the "
                    "run (error), or is left out (skip), as for video frames.",
                ),
            ],
            outputs=[
                Faces.Output(display_name="faces", tooltip="For Infinite-ID Encode."),
                io.Image.Output(display_name="crops", tooltip="The chosen faces, upright."),
                io.Image.Output(
                    display_name="preview", tooltip="The pictures with numbered faces."
                ),
                io.Int.Output(display_name="count", tooltip="How many faces were chosen."),
            ],
            **KEEPS_PREVIEW,
        )

    @classmethod
    @checked
    def execute(
        cls,
        face_analysis: Any,
        image: Tensor,
        choose: Choose,
        index: int,
        order: Order,
        padding: float,
        if_no_face: IfNoFace,
    ) -> io.NodeOutput:
        options = FaceOptions(choose=choose, index=index, order=order, padding=padding)
        detected = detect_in_batch(face_analysis, image, order)
        found = _chosen(cls, face_analysis, image, detected, options, if_no_face)
        preview = numbered_previews(image, found)
        count = sum(len(frame.chosen) for frame in found)
        outputs = (*_faces_and_crops(found, options), preview, count)
        return io.NodeOutput(*outputs, ui=ui.PreviewImage(preview, cls=cls))


def _chosen(
    cls: type[io.ComfyNode],
    app: Any,
    images: Tensor,
    detected: Sequence[FoundFaces],
    options: FaceOptions,
    if_no_face: IfNoFace,
) -> tuple[FoundFaces, ...]:
    """``choose_in_batch``; where it fails, the numbers on the node tell what to choose instead."""
    try:
        return choose_in_batch(app, images, detected, options, if_no_face)
    except FaceError:
        show_before_failing(lambda: ui.PreviewImage(numbered_previews(images, detected), cls=cls))
        raise


def _faces_and_crops(found: Sequence[FoundFaces], options: FaceOptions) -> tuple[Any, Any]:
    """The chosen faces, and their crops ``[n, S, S, 3]``."""
    faces = tuple(chosen for frame in found for chosen in frame.chosen)
    if not faces:  # all skipped: what follows does not run, and says why
        nothing = ExecutionBlocker(nothing_wanted_message(found, options))
        return nothing, nothing
    return faces, torch.stack([chosen.crop for chosen in faces])


NODES: list[type[io.ComfyNode]] = [InfiniteIDAlignFace]
