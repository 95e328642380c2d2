"""The short way: a loader that finds what an adapter needs, and a person in a model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui
from torch import Tensor

from ..infinite_id_core.encoders.clip_vision import ClipVision
from ..infinite_id_core.encoders.eva import EvaVision
from ..infinite_id_core.encoders.references import (
    ImageEncoder,
    file_of_encoder,
    image_encoder_of,
    needs_face,
    recogniser_of,
)
from ..infinite_id_core.encoders.tower_files import encoder_of_file
from ..infinite_id_core.errors import (
    FaceModelError,
    InfiniteIDError,
    MissingModelsError,
    OptionError,
    shown,
)
from ..infinite_id_core.faces.pack import load_face_models, recogniser_name
from ..infinite_id_core.faces.pulid import parsing_told
from ..infinite_id_core.files.adapter_options import AdapterOptions
from ..infinite_id_core.files.adapters import family_of
from ..infinite_id_core.marks import mark_of
from ..infinite_id_core.method.attention import MAX_STRENGTH, STREAM_PRESETS
from ..infinite_id_core.method.low_rank import MAX_LOW_RANK_STRENGTH, LowRankRows, LowRankUse
from ..infinite_id_core.method.merging import MERGING
from ..infinite_id_core.method.published import EVA_CLIP
from . import embedded, folders
from .embedded import EMBEDDED
from .inputs import checked
from .kit import Kit
from .models import IdentityType
from .page import KEEPS_PREVIEW, found_by

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from ..infinite_id_core.hosts.comfyui_adapter import LoadedAdapter

AUTO = "auto"
READS = (AUTO, "face", "whole picture")
LORA: dict[str, LowRankRows] = {
    AUTO: "auto",
    "identity rows": "identity",
    "all rows": "all",
    "off": "off",
}

KitType = io.Custom("INFINITE_ID")


class InfiniteIDLoader(io.ComfyNode):
    """An adapter of any family, with the encoders that it needs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        listed = [f"{name} [{_family(name)}]" for name in _listed()]
        return io.Schema(
            node_id="InfiniteIDLoader",
            display_name="Infinite-ID Loader",
            category="Infinite-ID",
            description="Loads an adapter (Infinite-ID, IP-Adapter, FaceID, InstantID) and finds "
            "the image encoder and the face models that it needs. What it found stands on the "
            "node.",
            inputs=[
                io.Combo.Input(
                    "adapter",
                    options=[EMBEDDED, *listed],
                    tooltip="A file of models/infinite_id, ipadapter, instantid or pulid, told "
                    "apart by its contents.",
                ),
                io.Combo.Input(
                    "image_encoder",
                    options=[AUTO, *folders.encoder_files()],
                    default=AUTO,
                    tooltip="'auto' finds the file in models/clip_vision by its contents.",
                ),
                io.Combo.Input(
                    "face_models",
                    options=[AUTO, *folders.face_packs()],
                    default=AUTO,
                    tooltip="'auto' takes the pack that the adapter was trained with.",
                ),
                io.Combo.Input(
                    "reads",
                    options=list(READS),
                    default=AUTO,
                    tooltip="What the image encoder sees. A plus file for faces and one for whole "
                    "pictures look the same: 'auto' takes the face.",
                ),
                io.Combo.Input(
                    "lora",
                    options=list(LORA),
                    default=AUTO,
                    tooltip="FaceID files hold a LoRA. It changes the whole model, as its authors "
                    "run it (all rows), or only what paints the person, so that the prompt stays "
                    "the plain model's (identity rows). 'auto': all rows in one stream, identity "
                    "rows in two.",
                ),
                io.Float.Input(
                    "lora_strength",
                    default=1.0,
                    min=0.0,
                    max=MAX_LOW_RANK_STRENGTH,
                    step=0.05,
                    tooltip="How strongly the LoRA acts. 0 is off.",
                ),
                io.Combo.Input(
                    "pulid_mode",
                    options=[AUTO, *MERGING],
                    default=AUTO,
                    optional=True,
                    tooltip="How a PuLID file adds the person in one stream, by the names that "
                    "PuLID's users know. 'auto': as its authors run each version. Two streams "
                    "do not need it.",
                ),
            ],
            outputs=[KitType.Output(display_name="infinite_id", tooltip="For Infinite-ID Person.")],
            **found_by("faceid", "ipadapter", "instantid", "load adapter", "reference"),
        )

    @classmethod
    def validate_inputs(
        cls,
        adapter: str | None = None,
        image_encoder: str | None = None,
        face_models: str | None = None,
    ) -> bool | str:
        given = (
            (adapter, EMBEDDED, folders.any_adapter_path),
            (image_encoder, AUTO, folders.clip_vision_path),
            (face_models, AUTO, folders.face_pack_path),
        )
        wrong = [folders.check(name, find) for name, usual, find in given if name != usual]
        return next((problem for problem in wrong if problem is not True), True)

    @classmethod
    def fingerprint_inputs(cls, adapter: str | None = None, **settings: object) -> str | float:
        return EMBEDDED if adapter == EMBEDDED else folders.mark(adapter, folders.any_adapter_path)

    @classmethod
    @checked
    def execute(
        cls,
        adapter: str,
        image_encoder: str,
        face_models: str,
        reads: str,
        lora: str,
        lora_strength: float,
        pulid_mode: str = AUTO,
    ) -> io.NodeOutput:
        from ..infinite_id_core.hosts.comfyui_adapter import load_adapter

        _check("reads", reads, READS)
        _check("lora", lora, LORA)
        _check("pulid_mode", pulid_mode, (AUTO, *MERGING))
        if adapter == EMBEDDED:
            return _loaded(_embedded())
        analysis = None if face_models == AUTO else _face_models(face_models)
        options = AdapterOptions(
            recogniser=None if analysis is None else recogniser_name(analysis),
            whole_picture=None if reads == AUTO else reads == READS[2],
            pulid_mode=None if pulid_mode == AUTO else pulid_mode,
        )
        loaded = load_adapter(folders.any_adapter_path(adapter), options)
        missing: list[str] = []
        kit = Kit(
            adapter=loaded,
            face_analysis=analysis or _wanted_faces(loaded, missing),
            clip_vision=_wanted_encoder(loaded, image_encoder, missing),
            low_rank=LowRankUse(rows=LORA[lora], strength=lora_strength),
        )
        if missing:
            raise MissingModelsError(
                f"{adapter.partition(' [')[0]} needs {len(missing)} more: {'; '.join(missing)}. "
                "Nothing is downloaded: put each into its folder and press R in ComfyUI."
            )
        return _loaded(kit)


def _check(name: str, value: str, allowed: Collection[str]) -> None:
    """The floor's ComfyUI takes any text for a choice."""
    if value not in allowed:
        raise OptionError(f"{name} must be one of {', '.join(allowed)}; got {shown(value)}.")


def _loaded(kit: Kit) -> io.NodeOutput:
    module = kit.adapter.adapter
    lines = [module.config.summary]
    if module.low_rank_parts:
        lines.append(f"LoRA: {_told(kit.low_rank)}")
    if isinstance(kit.clip_vision, EvaVision) and parsing_told():
        lines.append(parsing_told())
    return io.NodeOutput(kit, ui=ui.PreviewText("\n".join(lines)))


def _told(use: LowRankUse) -> str:
    if use.rows == "off" or not use.strength:
        return "off"
    rows = {"auto": "all rows in one stream, identity rows in two", "all": "all rows"}
    return f"{use.strength:g}, {rows.get(use.rows, 'identity rows')}"


def _embedded() -> Kit:
    from ..infinite_id_core.hosts.comfyui_open_clip import ManagedOpenClip

    return Kit(
        adapter=embedded.adapter(),
        face_analysis=embedded.face_models("auto", 640),
        clip_vision=ManagedOpenClip(embedded.open_clip()),
    )


def _wanted_faces(adapter: LoadedAdapter, missing: list[str]) -> Any | None:
    """The face models that an adapter names; None where it needs none, or they are missing."""
    if not needs_face([adapter.adapter]):
        return None
    pack = (recogniser_of(adapter.adapter) or "buffalo_l").partition("/")[0]
    try:
        return _face_models(pack)
    except FaceModelError:
        missing.append(f"the face models {pack} (models/insightface/models/{pack}/*.onnx)")
        return None


def _face_models(pack: str) -> Any:
    return load_face_models(pack, folders.insightface_roots())


def _wanted_encoder(adapter: LoadedAdapter, chosen: str, missing: list[str]) -> ImageEncoder | None:
    """The image encoder that an adapter names, found by contents; None as for faces."""
    wanted = image_encoder_of(adapter.adapter)
    if wanted is None:
        return None
    path = _encoder_file(wanted) if chosen == AUTO else folders.clip_vision_path(chosen)
    if path is None:
        missing.append(file_of_encoder(wanted))
        return None
    return _load_encoder(path)


def _encoder_file(wanted: str) -> Path | None:
    names = folders.encoder_files() if wanted == EVA_CLIP else folders.clip_vision_files()
    paths = (folders.clip_vision_path(name) for name in names)
    return next((path for path in paths if _encoder(path) == wanted), None)


def _load_encoder(path: Path) -> ImageEncoder:
    if _encoder(path) == EVA_CLIP:
        from ..infinite_id_core.hosts.comfyui_eva import load_managed_eva

        return load_managed_eva(path)
    import comfy.clip_vision

    loaded: ClipVision = comfy.clip_vision.load(str(path))
    return loaded


def _listed() -> Sequence[str]:
    try:
        return folders.all_adapter_files()
    except OSError:
        return ()


def _family(name: str) -> str:
    try:
        path = folders.any_adapter_path(name)
        return _family_at(path, mark_of(path))
    except InfiniteIDError:
        return "?"


@lru_cache(maxsize=512)
def _family_at(path: Path, _mark: object) -> str:
    return family_of(path)


def _encoder(path: Path) -> str | None:
    return _encoder_at(path, mark_of(path))


@lru_cache(maxsize=512)
def _encoder_at(path: Path, _mark: object) -> str | None:
    return encoder_of_file(path)


class InfiniteIDPerson(io.ComfyNode):
    """A person out of photos, in a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfiniteIDPerson",
            display_name="Infinite-ID Person",
            category="Infinite-ID",
            description="Makes the model paint the person of the photos while it follows the "
            "prompt. Chain several, each with a mask, for several people.",
            inputs=[
                io.Model.Input("model", tooltip="An SDXL model, or one that has a person."),
                KitType.Input("infinite_id", tooltip="From Infinite-ID Loader."),
                io.Image.Input("photos", tooltip="One or more photos of one person."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=MAX_STRENGTH,
                    step=0.05,
                    tooltip="How strongly the person shapes the picture. 0 leaves the model as "
                    "it was.",
                ),
                io.Combo.Input(
                    "preset",
                    options=list(STREAM_PRESETS),
                    default="balanced",
                    tooltip="What matters most: both (balanced), the face (likeness), the "
                    "prompt's style (style), or speed (one stream: as the adapter's authors run "
                    "it, at half the price).",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="When the person begins to take effect, as a part of the sampling.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="When the person stops taking effect. Ending early is faster.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where in the picture this person is. Nothing connected: everywhere.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For KSampler, or the next Person."),
                IdentityType.Output(
                    display_name="identity", tooltip="Who it is, for Save Identity or Score."
                ),
                io.Image.Output(display_name="preview", tooltip="The photos with numbered faces."),
            ],
            **KEEPS_PREVIEW,
            **found_by("faceid", "ipadapter", "instantid", "reference", "likeness", "portrait"),
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: ModelPatcher,
        infinite_id: Kit,
        photos: Tensor,
        strength: float,
        preset: str,
        start_percent: float,
        end_percent: float,
        mask: Tensor | None = None,
    ) -> io.NodeOutput:
        from ..infinite_id_core.hosts.comfyui import apply_identity

        _check("preset", preset, STREAM_PRESETS)
        identity, preview = infinite_id.person(photos)
        patched = apply_identity(
            model,
            infinite_id.adapter,
            identity,
            strength=strength,
            options=STREAM_PRESETS[preset],
            start_percent=start_percent,
            end_percent=end_percent,
            mask=mask,
            low_rank=infinite_id.low_rank,
        )
        return io.NodeOutput(patched, identity, preview, ui=ui.PreviewImage(preview, cls=cls))


NODES: list[type[io.ComfyNode]] = [InfiniteIDLoader, InfiniteIDPerson]
