"""Identities: encode, mix, save, load; and the open_clip encoder."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io, ui

from ..infinite_id_core.encoders import encoders
from ..infinite_id_core.errors import OptionError, shown
from ..infinite_id_core.files import checkpoint, store
from ..infinite_id_core.method.identity import CLIP_LAYER, EMBEDDING, interpolate, stack
from . import folders
from .face import EMBEDDED, Faces
from .inputs import checked

NO_FILE = "none (embedded)"
MIX = ("stack", "interpolate")
IdentityType = io.Custom("IDENTITY")


class InfiniteIDEncode(io.ComfyNode):
    """Aligned faces to an identity."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfiniteIDEncode",
            display_name="Infinite-ID Encode",
            category="Infinite-ID",
            description="Reads who is in the reference pictures: an identity for Apply, Mix or "
            "Save.",
            inputs=[
                Faces.Input("faces", tooltip="From Infinite-ID Align Face."),
                io.ClipVision.Input(
                    "clip_vision",
                    tooltip="The image encoder the adapter was trained with (ViT-H-14: 1280 wide, "
                    "ViT-bigG-14: 1664), from Load CLIP Vision or Infinite-ID Load open_clip.",
                ),
                io.Combo.Input(
                    "combine",
                    options=list(encoders.COMBINE),
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
        cls, faces, clip_vision, combine, weights="", clip_layer="last", embedding="normed"
    ) -> io.NodeOutput:
        options = encoders.EncodeOptions(
            combine=combine,
            weights=encoders.parse_weights(weights),
            clip_layer=clip_layer,
            embedding=embedding,
        )
        return io.NodeOutput(encoders.embed(faces, clip_vision, options))


class InfiniteIDOpenClipLoader(io.ComfyNode):
    """An image encoder from open_clip's own weights."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfiniteIDOpenClipLoader",
            display_name="Infinite-ID Load open_clip",
            category="Infinite-ID",
            description="Loads an image encoder from a file in models/clip_vision, in "
            "open_clip's or in transformers' naming.",
            inputs=[
                io.Combo.Input(
                    "model",
                    options=[EMBEDDED, *encoders.open_clip_models()],
                    tooltip="The kind of model the file holds. "
                    f"'{EMBEDDED}' goes with the Micro Model node and needs no file.",
                ),
                io.Combo.Input(
                    "weights_file",
                    options=[NO_FILE, *folders.clip_vision_files()],
                    tooltip="A .safetensors file in models/clip_vision.",
                ),
            ],
            outputs=[
                io.ClipVision.Output(
                    display_name="clip_vision", tooltip="Fits wherever a CLIP vision model fits."
                )
            ],
        )

    @classmethod
    def validate_inputs(
        cls, model: str | None = None, weights_file: str | None = None
    ) -> bool | str:
        if model not in (None, EMBEDDED, *encoders.open_clip_models()):
            return str(_no_such_model(model))
        return model in (None, EMBEDDED) or folders.check(weights_file, _weights_path)

    @classmethod
    def fingerprint_inputs(
        cls, model: str | None = None, weights_file: str | None = None
    ) -> str | float:
        return EMBEDDED if model == EMBEDDED else folders.mark(weights_file, _weights_path)

    @classmethod
    @checked
    def execute(cls, model, weights_file) -> io.NodeOutput:
        from . import clip_vision

        if model == EMBEDDED:
            return io.NodeOutput(clip_vision.load_embedded())
        if model not in encoders.open_clip_models():
            raise _no_such_model(model)
        return io.NodeOutput(clip_vision.load(model, _weights_path(weights_file)))


def _weights_path(name: str) -> Path:
    """The weights of a model. Raises as ``folders.clip_vision_path``, and ``OptionError``."""
    if name == NO_FILE:
        raise OptionError(
            "This model needs its weights: choose a .safetensors file of models/clip_vision, or "
            f"the model '{EMBEDDED}', which needs none."
        )
    return folders.clip_vision_path(name)


def _no_such_model(model: object) -> OptionError:
    known = ", ".join([EMBEDDED, *encoders.open_clip_models()])
    return OptionError(f"model must be one of {known}; got {shown(model)}.")


class InfiniteIDMix(io.ComfyNode):
    """Two identities in one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfiniteIDMix",
            display_name="Infinite-ID Mix",
            category="Infinite-ID",
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
    def execute(cls, identity_a, identity_b, mode, ratio) -> io.NodeOutput:
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
                    options=list(store.IF_EXISTS),
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
    def execute(cls, identity, name, if_exists) -> io.NodeOutput:
        path = store.save_identity(identity, folders.identity_folder(), name, if_exists)
        return io.NodeOutput(path.name, ui=ui.PreviewText(f"Saved {path.name}"))


class InfiniteIDLoadIdentity(io.ComfyNode):
    """Reads an identity file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfiniteIDLoadIdentity",
            display_name="Infinite-ID Load Identity",
            category="Infinite-ID",
            description="Loads a saved identity from models/infinite_id_identities; no photo, no "
            "face models and no image encoder are needed.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=folders.identity_files(),
                    tooltip="A file written by Infinite-ID Save Identity.",
                )
            ],
            outputs=[IdentityType.Output(display_name="identity", tooltip="Who the person is.")],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return folders.check(file, folders.identity_path)

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None) -> str | float:
        return folders.mark(file, folders.identity_path)

    @classmethod
    @checked
    def execute(cls, file) -> io.NodeOutput:
        return io.NodeOutput(checkpoint.read_identity(folders.identity_path(file)))


NODES: list[type[io.ComfyNode]] = [
    InfiniteIDEncode,
    InfiniteIDOpenClipLoader,
    InfiniteIDMix,
    InfiniteIDSaveIdentity,
    InfiniteIDLoadIdentity,
]
