"""Identities: encode, mix, save."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io, ui

from ..infinite_id_core.encoders.clip_vision import ClipVision
from ..infinite_id_core.encoders.encode import (
    COMBINE,
    Combine,
    EncodeOptions,
    encode_faces,
    parse_weights,
)
from ..infinite_id_core.encoders.references import read_references, references_of
from ..infinite_id_core.errors import OptionError, shown
from ..infinite_id_core.faces.align import AlignedFace
from ..infinite_id_core.files.store import IF_EXISTS, IfExists, save_identity
from ..infinite_id_core.method.face_clip import CLIP_LAYER, EMBEDDING, ClipLayer, Embedding
from ..infinite_id_core.method.identity import Identity, interpolate, stack
from . import folders
from .face import Faces
from .inputs import checked
from .models import Adapter, IdentityType

if TYPE_CHECKING:
    from ..infinite_id_core.hosts.comfyui_adapter import LoadedAdapter

MIX = ("stack", "interpolate")


class InfiniteIDEncode(io.ComfyNode):
    """Aligned faces to an identity."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfiniteIDEncode",
            display_name="Infinite-ID Encode",
            category="Infinite-ID/advanced",
            description="Reads who is in the reference pictures: an identity for Apply, Mix or "
            "Save.",
            inputs=[
                Faces.Input("faces", tooltip="From Infinite-ID Align Face."),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="The image encoder the adapter was trained with (ViT-H-14: 1280 wide, "
                    "ViT-bigG-14: 1664), from Load CLIP Vision or Infinite-ID Load open_clip. A "
                    "few families need none.",
                ),
                Adapter.Input(
                    "adapter",
                    optional=True,
                    tooltip="Connected, it says what is read and how: crop, layer, embedding. The "
                    "two settings at the bottom are then not used.",
                ),
                io.Combo.Input(
                    "combine",
                    options=list(COMBINE),
                    default="stack",
                    tooltip="Several references: all of them side by side (stack), or their mean "
                    "as one (average, faster).",
                ),
                io.String.Input(
                    "weights",
                    default="",
                    optional=True,
                    tooltip="How much each reference counts, such as '1, 0.5'. Empty: all alike.",
                ),
                io.Combo.Input(
                    "clip_layer",
                    options=list(CLIP_LAYER),
                    default="last",
                    optional=True,
                    tooltip="Which hidden layer is read. Keep what the adapter names.",
                ),
                io.Combo.Input(
                    "embedding",
                    options=list(EMBEDDING),
                    default="normed",
                    optional=True,
                    tooltip="The face embedding brought to length 1, or as it is. Keep what the "
                    "adapter names.",
                ),
            ],
            outputs=[IdentityType.Output(display_name="identity", tooltip="Who the person is.")],
        )

    @classmethod
    @checked
    def execute(
        cls,
        faces: tuple[AlignedFace, ...],
        clip_vision: ClipVision | None = None,
        combine: Combine = "stack",
        weights: str = "",
        clip_layer: ClipLayer = "last",
        embedding: Embedding = "normed",
        adapter: LoadedAdapter | None = None,
    ) -> io.NodeOutput:
        options = EncodeOptions(
            combine=combine,
            weights=parse_weights(weights),
            clip_layer=clip_layer,
            embedding=embedding,
        )
        if adapter is not None:
            found, adapters = references_of(faces), [adapter.adapter]
            identity = read_references(
                found, adapters, clip_vision, combine=combine, weights=options.weights
            )
            return io.NodeOutput(identity)
        if clip_vision is None:
            raise OptionError(
                "Connect clip_vision; or an adapter that reads none, which says so itself."
            )
        return io.NodeOutput(encode_faces(faces, clip_vision, options))


class InfiniteIDMix(io.ComfyNode):
    """Two identities in one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfiniteIDMix",
            display_name="Infinite-ID Mix",
            category="Infinite-ID/advanced",
            description="Makes one person out of two, or adds more references of one person.",
            inputs=[
                IdentityType.Input("identity_a", tooltip="The first person."),
                IdentityType.Input("identity_b", tooltip="The second person."),
                io.Combo.Input(
                    "mode",
                    options=list(MIX),
                    default="stack",
                    tooltip="Both side by side, and the model takes from each (stack), or a "
                    "straight line between the two (interpolate).",
                ),
                io.Float.Input(
                    "ratio",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="0 is the first person, 1 the second, 0.5 half of each.",
                ),
            ],
            outputs=[IdentityType.Output(display_name="identity", tooltip="The mixed identity.")],
        )

    @classmethod
    @checked
    def execute(
        cls, identity_a: Identity, identity_b: Identity, mode: str, ratio: float
    ) -> io.NodeOutput:
        if mode not in MIX:
            raise OptionError(f"mode must be one of {', '.join(MIX)}; got {shown(mode)}.")
        # At the ends only one of them is left, in either mode; a weight must be positive.
        if mode == "interpolate" or ratio in (0.0, 1.0):
            return io.NodeOutput(interpolate(identity_a, identity_b, ratio))
        # Twice the share: at the middle each counts as it did before.
        weights = [2.0 * (1.0 - ratio), 2.0 * ratio]
        return io.NodeOutput(stack([identity_a, identity_b], weights))


class InfiniteIDSaveIdentity(io.ComfyNode):
    """Writes an identity file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfiniteIDSaveIdentity",
            display_name="Infinite-ID Save Identity",
            category="Infinite-ID",
            description="Writes the identity to models/infinite_id_identities, for use without "
            "the photo. The file is biometric data: keep and share it as such.",
            inputs=[
                IdentityType.Input("identity", tooltip="From Infinite-ID Encode or Mix."),
                io.String.Input(
                    "name",
                    default="person",
                    tooltip="Name of the file, without folders: letters, digits, spaces, - _ . "
                    "( ) +",
                ),
                io.Combo.Input(
                    "if_exists",
                    options=list(IF_EXISTS),
                    default="keep both",
                    tooltip="Where the name is taken: number the new file (keep both), replace "
                    "the old one (overwrite), or stop (error).",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="file", tooltip="Name of the written file, for Load Identity."
                )
            ],
            is_output_node=True,
        )

    @classmethod
    @checked
    def execute(cls, identity: Identity, name: str, if_exists: IfExists) -> io.NodeOutput:
        path = save_identity(identity, folders.identity_folder(), name, if_exists)
        return io.NodeOutput(path.name, ui=ui.PreviewText(f"Saved {path.name}"))


NODES: list[type[io.ComfyNode]] = [
    InfiniteIDEncode,
    InfiniteIDMix,
    InfiniteIDSaveIdentity,
]
