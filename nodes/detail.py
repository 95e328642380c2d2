"""The detail pass for small faces: cut out, painted again large, put back."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from ..infinite_id_core.faces.detail import FaceRegion, crop_faces, paste_squares
from ..infinite_id_core.faces.find import (
    IF_NO_FACE,
    Choose,
    FaceOptions,
    IfNoFace,
    Order,
    detect_in_batch,
    nothing_wanted_message,
)
from .face import choice_inputs
from .inputs import checked
from .models import FaceAnalysis

Region = io.Custom("INFINITE_ID_REGION")


class InfiniteIDFaceCrop(io.ComfyNode):
    """Cuts out the surroundings of faces for a detail pass."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfiniteIDFaceCrop",
            display_name="Infinite-ID Face Crop (detail pass)",
            category="Infinite-ID/detail pass",
            description="Cuts a square around a small face and enlarges it, so that it can be "
            "painted again in detail. Infinite-ID Face Paste puts it back.",
            inputs=[
                FaceAnalysis.Input(
                    "face_analysis",
                    tooltip="From Infinite-ID Load Face Models, or the InstantID or PuLID pack.",
                ),
                io.Image.Input("image", tooltip="The picture whose faces are too small."),
                *choice_inputs(),
                io.Float.Input(
                    "padding",
                    default=0.5,
                    min=0.0,
                    max=3.0,
                    step=0.05,
                    tooltip="How much is cut out around the face, in parts of its size.",
                ),
                io.Int.Input(
                    "size",
                    default=1024,
                    min=64,
                    max=4096,
                    step=64,
                    tooltip="Side of the enlarged crop in pixels: what the model paints best "
                    "(1024 for SDXL, 128 for the Micro Model).",
                ),
                io.Combo.Input(
                    "if_no_face",
                    options=list(IF_NO_FACE),
                    default="error",
                    optional=True,
                    tooltip="A picture without a face, or without one of this index, stops the "
                    "run (error), or gives no crop (skip): Face Paste then leaves it as it is.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="crop", tooltip="The enlarged surroundings."),
                Region.Output(display_name="region", tooltip="For Infinite-ID Face Paste."),
                io.Mask.Output(
                    display_name="mask",
                    tooltip="The face within the crop, soft towards the edge; for Set Latent "
                    "Noise Mask.",
                ),
            ],
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
        size: int,
        if_no_face: IfNoFace = "error",
    ) -> io.NodeOutput:
        options = FaceOptions(choose=choose, index=index, order=order)
        found = detect_in_batch(face_analysis, image, order)
        crop, mask, region = crop_faces(image, found, options, padding, size, if_no_face)
        if not region.squares:  # all skipped: nothing to paint again, and Face Paste needs nothing
            crop = mask = ExecutionBlocker(nothing_wanted_message(found, options))
        return io.NodeOutput(crop, region, mask)


class InfiniteIDFacePaste(io.ComfyNode):
    """Puts the crops of Face Crop back."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfiniteIDFacePaste",
            display_name="Infinite-ID Face Paste (detail pass)",
            category="Infinite-ID/detail pass",
            description="Puts repainted crops back where Infinite-ID Face Crop cut them out, with "
            "a soft edge.",
            inputs=[
                io.Image.Input("image", tooltip="The picture that Face Crop read."),
                io.Image.Input("crop", lazy=True, tooltip="The repainted crop, of any size."),
                Region.Input("region", tooltip="From Infinite-ID Face Crop."),
                io.Float.Input(
                    "feather",
                    default=0.15,
                    min=0.0,
                    max=0.5,
                    step=0.01,
                    tooltip="Width of the soft edge, in parts of the crop's side.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The finished picture.")],
        )

    @classmethod
    def check_lazy_status(cls, region: Any = None, **others: object) -> list[str]:
        # Without a crop there is nothing to paint, and what would paint it does not run.
        return ["crop"] if getattr(region, "squares", ()) else []

    @classmethod
    @checked
    def execute(
        cls, image: Tensor, crop: Tensor | None, region: FaceRegion, feather: float
    ) -> io.NodeOutput:
        return io.NodeOutput(paste_squares(image, crop, region, feather))


NODES: list[type[io.ComfyNode]] = [InfiniteIDFaceCrop, InfiniteIDFacePaste]
