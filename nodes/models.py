"""Every loader: face models, open_clip's image encoder, the adapter, a saved identity."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from ..infinite_id_core.encoders.open_clip import load_open_clip, open_clip_models
from ..infinite_id_core.errors import OptionError, shown
from ..infinite_id_core.faces.pack import DETECTOR_SIZE, PROVIDERS, Provider, load_face_models
from ..infinite_id_core.files.identities import read_identity
from . import embedded, folders
from .embedded import EMBEDDED
from .inputs import checked

KNOWN_PACKS = ("buffalo_l", "antelopev2")
NO_FILE = "none (embedded)"

# The type name of the InstantID and PuLID packs: their loaders fit our nodes, and ours theirs.
FaceAnalysis = io.Custom("FACEANALYSIS")
Adapter = io.Custom("INFINITE_ID_ADAPTER")
IdentityType = io.Custom("IDENTITY")


class InfiniteIDFaceModelLoader(io.ComfyNode):
    """A face model pack (detector and recogniser)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        packs = [*folders.face_packs(), EMBEDDED]
        return io.Schema(
            node_id="InfiniteIDFaceModelLoader",
            display_name="Infinite-ID Load Face Models",
            category="Infinite-ID/advanced",
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
    def execute(cls, pack: str, provider: Provider, detector_size: int) -> io.NodeOutput:
        if pack == EMBEDDED:
            return io.NodeOutput(embedded.face_models(provider, detector_size))
        roots = folders.insightface_roots()
        return io.NodeOutput(load_face_models(pack, roots, provider, detector_size))


class InfiniteIDOpenClipLoader(io.ComfyNode):
    """An image encoder from open_clip's own weights."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfiniteIDOpenClipLoader",
            display_name="Infinite-ID Load open_clip",
            category="Infinite-ID/advanced",
            description="Loads an image encoder from a file in models/clip_vision, in "
            "open_clip's or in transformers' naming.",
            inputs=[
                io.Combo.Input(
                    "model",
                    options=[EMBEDDED, *open_clip_models()],
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
        if model not in (None, EMBEDDED, *open_clip_models()):
            return str(_no_such_model(model))
        return model in (None, EMBEDDED) or folders.check(weights_file, _weights_path)

    @classmethod
    def fingerprint_inputs(
        cls, model: str | None = None, weights_file: str | None = None
    ) -> str | float:
        return EMBEDDED if model == EMBEDDED else folders.mark(weights_file, _weights_path)

    @classmethod
    @checked
    def execute(cls, model: str, weights_file: str) -> io.NodeOutput:
        from ..infinite_id_core.hosts.comfyui_open_clip import ManagedOpenClip

        if model == EMBEDDED:
            return io.NodeOutput(ManagedOpenClip(embedded.open_clip()))
        if model not in open_clip_models():
            raise _no_such_model(model)
        return io.NodeOutput(ManagedOpenClip(load_open_clip(model, _weights_path(weights_file))))


def _weights_path(name: str) -> Path:
    """The weights of a model. Raises as ``folders.clip_vision_path``, and ``OptionError``."""
    if name == NO_FILE:
        raise OptionError(
            "This model needs its weights: choose a .safetensors file of models/clip_vision, or "
            f"the model '{EMBEDDED}', which needs none."
        )
    return folders.clip_vision_path(name)


def _no_such_model(model: object) -> OptionError:
    known = ", ".join([EMBEDDED, *open_clip_models()])
    return OptionError(f"model must be one of {known}; got {shown(model)}.")


class InfiniteIDAdapterLoader(io.ComfyNode):
    """An adapter file from ``models/infinite_id``, or the embedded one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfiniteIDAdapterLoader",
            display_name="Infinite-ID Load Adapter",
            category="Infinite-ID/advanced",
            description="Loads an adapter: of Infinite-ID from models/infinite_id, of IP-Adapter, "
            "FaceID, InstantID or PuLID from models/ipadapter, instantid or pulid.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[EMBEDDED, *folders.adapter_files(), *folders.published_files()],
                    tooltip="An adapter file, told apart by its contents. "
                    f"'{EMBEDDED}' goes with the Micro Model node.",
                ),
            ],
            outputs=[Adapter.Output(display_name="adapter", tooltip="For Infinite-ID Apply.")],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return file == EMBEDDED or folders.check(file, folders.adapter_path_of)

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None) -> str | float:
        return EMBEDDED if file == EMBEDDED else folders.mark(file, folders.adapter_path_of)

    @classmethod
    @checked
    def execute(cls, file: str) -> io.NodeOutput:
        from ..infinite_id_core.hosts.comfyui_adapter import load_adapter

        if file == EMBEDDED:
            return io.NodeOutput(embedded.adapter())
        return io.NodeOutput(load_adapter(folders.adapter_path_of(file)))


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
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(read_identity(folders.identity_path(file)))


NODES: list[type[io.ComfyNode]] = [
    InfiniteIDFaceModelLoader,
    InfiniteIDOpenClipLoader,
    InfiniteIDAdapterLoader,
    InfiniteIDLoadIdentity,
]
