"""SDXL's UNet as diffusers' module, from what people have on disk, offline.

A single safetensors file in ComfyUI's (ldm) naming says everything about its UNet but the width
of an attention head: depths, widths and context are read off tensor names and shapes, so a full
SDXL, a pruned one and a toy all load. A diffusers folder brings its own configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infinite_id_core.errors import FileMissingError, NotSDXLError, WrongFormatError
from infinite_id_core.sdxl.schedule import NoiseSchedule

from ..files import read_json, sampled_sha256
from .source import Source, source_of
from .unet_names import HEAD_WIDTH, Shapes, check_inputs, check_shapes, empty_unet, unet_config

SIZE_IDS = 6


@dataclass(frozen=True, kw_only=True)
class LoadedUNet:
    """A frozen UNet and what its file says of it."""

    unet: Any
    """``UNet2DConditionModel``, in eval mode, without gradients."""
    schedule: NoiseSchedule
    name: str
    """For the adapter's record: the file or folder name."""
    fingerprint: str
    """Changes when the weights do; 64 hex digits."""

    @property
    def context_width(self) -> int:
        """C, the width of the text tokens."""
        return int(self.unet.config.cross_attention_dim)

    @property
    def pooled_width(self) -> int:
        """Width of the pooled text."""
        config = self.unet.config
        ids = SIZE_IDS * config.addition_time_embed_dim
        return int(config.projection_class_embeddings_input_dim - ids)


@dataclass(frozen=True, kw_only=True)
class UNetFile:
    """A single file's UNet by its header alone; no tensor has been read."""

    prefix: str
    """Before ldm's names, e.g. ``model.diffusion_model.``."""
    config: dict[str, Any]
    """Of diffusers' ``UNet2DConditionModel``."""
    names: dict[str, str]
    """ldm name -> diffusers name."""
    schedule: NoiseSchedule


def load_unet(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    head_width: int = HEAD_WIDTH,
    schedule: NoiseSchedule | None = None,
) -> LoadedUNet:
    """The UNet of a single safetensors file, a diffusers folder, or ``"microworld"``.

    ``schedule`` None takes what the source says. Raises ``NotSDXLError``, subclasses of
    ``FileError``.
    """
    place = source_of(source, "unet")
    load = _load_folder if place.is_folder else _load_file
    unet, found = load(place, dtype, head_width)
    return LoadedUNet(
        unet=unet.eval().requires_grad_(False),
        schedule=schedule or found,
        name=place.name,
        fingerprint=unet_fingerprint(source),
    )


def describe_unet(source: str | Path, *, head_width: int = HEAD_WIDTH) -> dict[str, Any]:
    """diffusers' configuration of a UNet without reading its weights. Raises as ``load_unet``."""
    place = source_of(source, "unet")
    if place.is_folder:
        return _folder_config(_unet_folder(place.path))
    return _described(place.path, place.shapes(), place.head_width(head_width)).config


def unet_name(source: str | Path) -> str:
    """For the adapter's record: the file's or folder's name, or ``microworld``."""
    return source_of(source, "unet").name


def unet_fingerprint(source: str | Path) -> str:
    """Changes when the weights do; without loading them. Raises ``FileMissingError``."""
    place = source_of(source, "unet")
    if not place.is_folder:
        return sampled_sha256(place.path)
    return sampled_sha256(*_folder_weights(_unet_folder(place.path)))


def _folder_weights(place: Path) -> list[Path]:
    weights = sorted(place.glob("*.safetensors"))
    if not weights:
        raise FileMissingError(place, "holds no .safetensors file.")
    return weights


# --- single files ----------------------------------------------------------------------------


def _described(path: Path, found: Shapes, head_width: int) -> UNetFile:
    end = "input_blocks.0.0.weight"
    ends = [name for name in found if name.endswith(end)]
    if len(ends) != 1:
        hint = (
            "It looks like diffusers' naming: give the folder with its config.json instead."
            if any(name.startswith(("conv_in.", "down_blocks.")) for name in found)
            else "Expected an SDXL checkpoint or UNet as ComfyUI loads it."
        )
        raise NotSDXLError(f"{path}: no UNet was found among its {len(found)} tensors. {hint}")
    prefix = ends[0].removesuffix(end)
    # A bare UNet file may hold marks beside the network; a checkpoint holds whole other models.
    shapes = {
        name.removeprefix(prefix): shape
        for name, shape in found.items()
        if name.startswith(prefix) and name.removeprefix(prefix) not in _MARKS
    }
    marks = {name.removeprefix(prefix) for name in found} & set(_MARKS)
    try:
        config = unet_config(shapes, head_width)
        names = check_shapes(config, shapes)
        check_inputs(config)
    except NotSDXLError as error:
        raise NotSDXLError(f"{path}: {error}") from error
    return UNetFile(prefix=prefix, config=config, names=names, schedule=_schedule_of(marks))


_MARKS = ("v_pred", "ztsnr")  # empty tensors by which files say how they were trained


def _schedule_of(marks: set[str]) -> NoiseSchedule:
    return NoiseSchedule(
        prediction="v" if "v_pred" in marks else "epsilon",
        zero_terminal_snr="ztsnr" in marks,
    )


def _load_file(place: Source, dtype: torch.dtype, head_width: int) -> tuple[Any, NoiseSchedule]:
    with place.opened() as file:
        described = _described(place.path, file.shapes, place.head_width(head_width))
        unet = empty_unet(described.config)
        state = {
            name: file.tensor(described.prefix + ldm, dtype)
            for ldm, name in described.names.items()
        }
        unet.load_state_dict(state, assign=True)
    return unet, described.schedule


# --- diffusers folders -----------------------------------------------------------------------


def _unet_folder(folder: Path) -> Path:
    for candidate in (folder / "unet", folder):
        if (candidate / "config.json").is_file():
            return candidate
    raise FileMissingError(
        folder, "expected a diffusers folder with unet/config.json (or config.json) in it."
    )


def _folder_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("addition_embed_type") != "text_time":
        raise NotSDXLError(
            f"{folder}: expected the UNet of an SDXL model (addition_embed_type 'text_time'), "
            f"found {config.get('addition_embed_type') if isinstance(config, dict) else config!r}."
        )
    try:
        check_inputs(config)
    except NotSDXLError as error:
        raise NotSDXLError(f"{folder}: {error}") from error
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _load_folder(place: Source, dtype: torch.dtype, _: int) -> tuple[Any, NoiseSchedule]:
    import diffusers

    folder = _unet_folder(place.path)
    _folder_config(folder)
    _folder_weights(folder)
    model: Any = diffusers.UNet2DConditionModel
    unet = model.from_pretrained(
        folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True
    )
    return unet, _folder_schedule(place.path)


def _folder_schedule(folder: Path) -> NoiseSchedule:
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return NoiseSchedule()
    values = read_json(path)
    if not isinstance(values, dict):
        raise WrongFormatError(path, "is not a scheduler's configuration, a JSON object.")
    return NoiseSchedule(
        prediction="v" if values.get("prediction_type") == "v_prediction" else "epsilon",
        zero_terminal_snr=bool(values.get("rescale_betas_zero_snr", False)),
    )
