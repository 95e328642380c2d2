"""Face models, aligned faces, and the detail pass for small faces."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from ..infinite_id_core.errors import FaceError
from ..infinite_id_core.faces import detail
from ..infinite_id_core.faces.align import DEFAULT_PADDING
from ..infinite_id_core.faces.find import (
    CHOOSE,
    IF_NO_FACE,
    ORDER,
    FaceOptions,
    choose_in_batch,
    detect_in_batch,
    nothing_wanted_message,
)
from ..infinite_id_core.faces.pack import DETECTOR_SIZE, PROVIDERS, load_face_models
from ..infinite_id_core.faces.preview import numbered_previews
from ..microworld import files as micro_files
from . import folders
from .inputs import checked
from .page import KEEPS_PREVIEW, show_before_failing

EMBEDDED = "microworld (embedded)"
KNOWN_PACKS = ("buffalo_l", "antelopev2")

# The type name of the InstantID and PuLID packs: their loaders fit our nodes, and ours theirs.
FaceAnalysis = io.Custom("FACEANALYSIS")
Faces = io.Custom("INFINITE_ID_FACES")
Region = io.Custom("INFINITE_ID_REGION")


def _choice_inputs() -> list[io.Input]:
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


class InfiniteIDFaceModelLoader(io.ComfyNode):
    """A face model pack (detector and recogniser)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        packs = [*folders.face_packs(), EMBEDDED]
        return io.Schema(
            node_id="InfiniteIDFaceModelLoader",
            display_name="Infinite-ID Load Face Models",
            category="Infinite-ID",
            description="Loads the models that find and recognise faces, from "
            "models/insightface/models/<pack>. Nothing is downloaded.",
            inputs=[
                io.Combo.Input(
                    "pack",
                    options=list(dict.fromkeys([*packs, *KNOWN_PACKS])),
                    tooltip="The folder with detector and recogniser. Use the pack your adapter "
                    f"was trained with. '{EMBEDDED}' goes with the Micro Model node.",
                ),
                io.Combo.Input(
                    "provider",
                    options=list(PROVIDERS),
                    default="auto",
                    tooltip="What onnxruntime computes on. 'auto' takes the best there is.",
                ),
                io.Int.Input(
                    "detector_size",
                    default=DETECTOR_SIZE,
                    min=64,
                    max=4096,
                    step=32,
                    tooltip="Pixels at which faces are searched. Larger finds smaller faces in "
                    "large pictures; other sizes are tried anyway where none is found.",
                ),
            ],
            outputs=[
                FaceAnalysis.Output(
                    display_name="face_analysis",
                    tooltip="Fits the InstantID and PuLID packs as well.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, pack: str | None = None) -> bool | str:
        return pack == EMBEDDED or folders.check(pack, folders.face_pack_path)

    @classmethod
    def fingerprint_inputs(cls, pack: str | None = None, **settings: object) -> str | float:
        return EMBEDDED if pack == EMBEDDED else folders.mark(pack, folders.face_pack_path)

    @classmethod
    @checked
    def execute(cls, pack, provider, detector_size) -> io.NodeOutput:
        roots = folders.insightface_roots()
        if pack == EMBEDDED:
            pack, roots = micro_files.INSIGHTFACE_PACK, [micro_files.INSIGHTFACE_ROOT]
        return io.NodeOutput(load_face_models(pack, roots, provider, detector_size))


class InfiniteIDAlignFace(io.ComfyNode):
    """Finds, chooses and aligns faces."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfiniteIDAlignFace",
            display_name="Infinite-ID Align Face",
            category="Infinite-ID",
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
                *_choice_inputs(),
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
        cls, face_analysis, image, choose, index, order, padding, if_no_face
    ) -> io.NodeOutput:
        options = FaceOptions(choose=choose, index=index, order=order, padding=padding)
        found = detect_in_batch(face_analysis, image, order)
        try:
            found = choose_in_batch(face_analysis, image, found, options, if_no_face)
        except FaceError:  # the numbers tell what to choose instead
            seen = found
            show_before_failing(lambda: ui.PreviewImage(numbered_previews(image, seen), cls=cls))
            raise
        faces = tuple(chosen for frame in found for chosen in frame.chosen)
        preview = numbered_previews(image, found)
        shown = ui.PreviewImage(preview, cls=cls)
        if not faces:  # all skipped: what follows does not run, and says why
            nothing = ExecutionBlocker(nothing_wanted_message(found, options))
            return io.NodeOutput(nothing, nothing, preview, 0, ui=shown)
        crops = torch.stack([chosen.crop for chosen in faces])
        return io.NodeOutput(faces, crops, preview, len(faces), ui=shown)


class InfiniteIDFaceCrop(io.ComfyNode):
    """Cuts out the surroundings of faces for a detail pass."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfiniteIDFaceCrop",
            display_name="Infinite-ID Face Crop (detail pass)",
            category="Infinite-ID",
            description="Cuts a square around a small face and enlarges it, so that it can be "
            "painted again in detail. Infinite-ID Face Paste puts it back.",
            inputs=[
                FaceAnalysis.Input(
                    "face_analysis",
                    tooltip="From Infinite-ID Load Face Models, or the InstantID or PuLID pack.",
                ),
                io.Image.Input("image", tooltip="The picture whose faces are too small."),
                *_choice_inputs(),
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
        cls, face_analysis, image, choose, index, order, padding, size, if_no_face="error"
    ) -> io.NodeOutput:
        options = FaceOptions(choose=choose, index=index, order=order)
        found = detect_in_batch(face_analysis, image, order)
        crop, mask, region = detail.crop_faces(image, found, options, padding, size, if_no_face)
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
            category="Infinite-ID",
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
    def check_lazy_status(cls, region=None, **others: object) -> list[str]:
        # Without a crop there is nothing to paint, and what would paint it does not run.
        return ["crop"] if getattr(region, "squares", ()) else []

    @classmethod
    @checked
    def execute(cls, image, crop, region, feather) -> io.NodeOutput:
        return io.NodeOutput(detail.paste_squares(image, crop, region, feather))


NODES: list[type[io.ComfyNode]] = [
    InfiniteIDFaceModelLoader,
    InfiniteIDAlignFace,
    InfiniteIDFaceCrop,
    InfiniteIDFacePaste,
]
