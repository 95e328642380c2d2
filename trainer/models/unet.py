"""SDXL's UNet as diffusers' module, from what people have on disk, offline.

A single safetensors file in ComfyUI's (ldm) naming says everything about its UNet but the width
of an attention head: depths, widths and context are read off tensor names and shapes, so a full
SDXL, a pruned one and a toy all load. A diffusers folder brings its own configuration.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infinite_id_core.errors import FileMissingError, NotSDXLError, WrongFormatError
from infinite_id_core.files.safetensors_file import Header, SafetensorsFile, open_safetensors
from infinite_id_core.sdxl.layers import layers_from_ldm
from infinite_id_core.sdxl.schedule import NoiseSchedule

from ..files import read_json, sampled_sha256

HEAD_WIDTH = 64  # SDXL's; not in the tensors
MICROWORLD = "microworld"  # in place of a path: the embedded tiny models
_GROUPS = 32  # of every group norm of SDXL's UNet
_TIME_WIDTH = 256  # sine features of each of SDXL's six size and crop ids
SIZE_IDS = 6
_LATENT_CHANNELS = 4
_REFINER = (1280, 2560)  # its context and added widths; it has five ids, one an aesthetic score

Shapes = Mapping[str, Sequence[int]]


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

    path: Path
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
    if str(source) == MICROWORLD:
        loaded = _load_microworld(dtype)
    elif Path(source).is_dir():
        loaded = _load_folder(Path(source), dtype)
    else:
        loaded = _load_file(Path(source), dtype, head_width)
    loaded.unet.eval().requires_grad_(False)
    if schedule is None:
        return loaded
    return LoadedUNet(**{**vars(loaded), "schedule": schedule})


def describe_unet(source: str | Path, *, head_width: int = HEAD_WIDTH) -> dict[str, Any]:
    """diffusers' configuration of a UNet without reading its weights. Raises as ``load_unet``."""
    if str(source) == MICROWORLD:
        return _microworld_config()
    if Path(source).is_dir():
        return _folder_config(_unet_folder(Path(source)))
    return read_unet_file(Path(source), head_width=head_width).config


def unet_name(source: str | Path) -> str:
    """For the adapter's record: the file's or folder's name, or ``microworld``."""
    return MICROWORLD if str(source) == MICROWORLD else Path(source).name


def unet_fingerprint(source: str | Path) -> str:
    """Changes when the weights do; without loading them. Raises ``FileMissingError``."""
    if str(source) == MICROWORLD:
        from microworld import files

        random = hashlib.sha256(b"microworld's random UNet").hexdigest()
        return sampled_sha256(files.UNET) if files.UNET.is_file() else random
    if not Path(source).is_dir():
        return sampled_sha256(Path(source))
    return sampled_sha256(*_folder_weights(_unet_folder(Path(source))))


def _folder_weights(place: Path) -> list[Path]:
    weights = sorted(place.glob("*.safetensors"))
    if not weights:
        raise FileMissingError(place, "holds no .safetensors file.")
    return weights


# --- single files ----------------------------------------------------------------------------


def read_unet_file(path: Path, *, head_width: int = HEAD_WIDTH) -> UNetFile:
    """Check a file's UNet by its header. Raises ``NotSDXLError``, subclasses of ``FileError``."""
    with open_safetensors(path) as file:
        return _described(path, file.header, head_width)


def _described(path: Path, header: Header, head_width: int) -> UNetFile:
    end = "input_blocks.0.0.weight"
    found = [name for name in header.tensors if name.endswith(end)]
    if len(found) != 1:
        hint = (
            "It looks like diffusers' naming: give the folder with its config.json instead."
            if any(name.startswith(("conv_in.", "down_blocks.")) for name in header.tensors)
            else "Expected an SDXL checkpoint or UNet as ComfyUI loads it."
        )
        raise NotSDXLError(
            f"{path}: no UNet was found among its {len(header.tensors)} tensors. {hint}"
        )
    prefix = found[0].removesuffix(end)
    # A bare UNet file may hold marks beside the network; a checkpoint holds whole other models.
    shapes = {
        name.removeprefix(prefix): entry.shape
        for name, entry in header.tensors.items()
        if name.startswith(prefix) and name.removeprefix(prefix) not in _MARKS
    }
    marks = {name.removeprefix(prefix) for name in header.tensors} & set(_MARKS)
    try:
        config = unet_config(shapes, head_width)
        names = check_shapes(config, shapes)
        check_inputs(config)
    except NotSDXLError as error:
        raise NotSDXLError(f"{path}: {error}") from error
    return UNetFile(
        path=path, prefix=prefix, config=config, names=names, schedule=_schedule_of(marks)
    )


_MARKS = ("v_pred", "ztsnr")  # empty tensors by which files say how they were trained


def _schedule_of(marks: set[str]) -> NoiseSchedule:
    return NoiseSchedule(
        prediction="v" if "v_pred" in marks else "epsilon",
        zero_terminal_snr="ztsnr" in marks,
    )


def _load_file(path: Path, dtype: torch.dtype, head_width: int) -> LoadedUNet:
    with open_safetensors(path) as file:
        described = _described(path, file.header, head_width)
        unet = _empty_unet(described.config)
        unet.load_state_dict(dict(_read_unet(file, described, dtype)), assign=True)
    return LoadedUNet(
        unet=unet,
        schedule=described.schedule,
        name=path.name,
        fingerprint=sampled_sha256(path),
    )


def _read_unet(
    file: SafetensorsFile, described: UNetFile, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Tensors under diffusers' names, one at a time; only the UNet's are read."""
    for ldm, name in described.names.items():
        yield name, file.tensor(described.prefix + ldm, dtype)


def _empty_unet(config: Mapping[str, Any]) -> Any:
    """The module without memory for its weights."""
    import diffusers

    build: Any = diffusers.UNet2DConditionModel
    with torch.device("meta"):
        return build(**config)


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


def _load_folder(folder: Path, dtype: torch.dtype) -> LoadedUNet:
    import diffusers

    place = _unet_folder(folder)
    _folder_config(place)
    weights = _folder_weights(place)
    model: Any = diffusers.UNet2DConditionModel
    unet = model.from_pretrained(
        place, torch_dtype=dtype, use_safetensors=True, local_files_only=True
    )
    return LoadedUNet(
        unet=unet,
        schedule=_folder_schedule(folder),
        name=folder.name,
        fingerprint=sampled_sha256(*weights),
    )


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


# --- the embedded tiny model -----------------------------------------------------------------


def _microworld_config() -> dict[str, Any]:
    from microworld.config import UNET

    per_level = UNET["num_res_blocks"]
    down, up = list(UNET["transformer_depth"]), list(UNET["transformer_depth_output"])
    layout = Layout(
        down=tuple(tuple(down.pop(0) for _ in range(count)) for count in per_level),
        middle=UNET["transformer_depth_middle"],
        # ldm lists the output depths from the finest level on, as it pops them from the end.
        up=tuple(tuple(up.pop() for _ in range(count + 1)) for count in reversed(per_level)),
    )
    return layout.config(
        in_channels=UNET["in_channels"],
        out_channels=UNET["out_channels"],
        widths=[UNET["model_channels"] * m for m in UNET["channel_mult"]],
        head_width=UNET["num_head_channels"],
        context_width=UNET["context_dim"],
        added_width=UNET["adm_in_channels"],
        linear=UNET["use_linear_in_transformer"],
    )


def _load_microworld(dtype: torch.dtype) -> LoadedUNet:
    """The weights that ComfyUI gets from ``InfiniteIDMicroModel``: trained, else seeded random."""
    from microworld import files, random_weights

    config = _microworld_config()
    unet = _empty_unet(config)
    names = ldm_names(unet)
    if files.UNET.is_file():
        state = files.read_weights(files.UNET)
        files.check_names(files.UNET, state, names)
    else:
        reference = unet.state_dict()
        state = random_weights.unet_state_dict(
            {ldm: reference[name] for ldm, name in names.items()}
        )
    unet.load_state_dict({names[n]: t.to(dtype) for n, t in state.items()}, assign=True)
    return LoadedUNet(
        unet=unet,
        schedule=NoiseSchedule(),
        name=MICROWORLD,
        fingerprint=unet_fingerprint(MICROWORLD),
    )


# --- names -----------------------------------------------------------------------------------

_FIXED = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Transformer depth of each resnet, by level; 0 is none. All that names depend on."""

    down: tuple[tuple[int, ...], ...]
    middle: int
    """As in ComfyUI, -1 is a middle of one resnet, -2 is none at all."""
    up: tuple[tuple[int, ...], ...]
    """From the coarsest level to the finest, one resnet more than ``down``."""

    def prefixes(self) -> Iterator[tuple[str, str]]:
        """(ldm, diffusers) prefix of every module whose inner names need no or a fixed change."""
        yield from _FIXED.items()
        number = 1
        for level, depths in enumerate(self.down):
            for position, depth in enumerate(depths):
                block = f"input_blocks.{number}", f"down_blocks.{level}"
                yield from _block(*block, position, depth)
                number += 1
            if level < len(self.down) - 1:
                yield f"input_blocks.{number}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
                number += 1
        if self.middle >= -1:
            yield from _resnet("middle_block.0", "mid_block.resnets.0")
        if self.middle >= 0:
            yield "middle_block.1", "mid_block.attentions.0"
            yield from _resnet("middle_block.2", "mid_block.resnets.1")
        number = 0
        for level, depths in enumerate(self.up):
            for position, depth in enumerate(depths):
                block = f"output_blocks.{number}", f"up_blocks.{level}"
                yield from _block(*block, position, depth)
                if position == len(depths) - 1 and level < len(self.up) - 1:
                    place = 2 if depth else 1
                    yield (
                        f"output_blocks.{number}.{place}.conv",
                        f"up_blocks.{level}.upsamplers.0.conv",
                    )
                number += 1

    def config(
        self,
        *,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        head_width: int,
        context_width: int,
        added_width: int,
        linear: bool,
    ) -> dict[str, Any]:
        """diffusers' configuration. Raises ``NotSDXLError`` for what diffusers cannot build."""
        attending = [width for width, depths in zip(widths, self.down, strict=True) if any(depths)]
        bad = [w for w in attending if w % head_width] + [w for w in widths if w % _GROUPS]
        mixed = [depths for depths in (*self.down, *self.up) if 0 in depths and any(depths)]
        if bad or mixed:
            raise NotSDXLError(
                f"expected channels that divide into heads of {head_width} and groups of {_GROUPS} "
                f"and levels with attention everywhere or nowhere; found channels {list(widths)} "
                f"and depths {self.down}, {self.up}. If its heads have another width, set "
                "model.head_width."
            )
        down, up = (_depths(side) for side in (self.down, self.up))
        middle = down[-1] if isinstance(down[-1], int) else down[-1][0]
        if self.middle > 0 and self.middle != middle and any(self.down[-1]):
            raise NotSDXLError(
                f"its middle block is {self.middle} transformers deep, its coarsest level {middle};"
                " diffusers builds only equal ones."
            )
        if self.middle > 0:
            down[-1] = self.middle if isinstance(down[-1], int) else down[-1]
        symmetric = all(isinstance(d, int) for d in (*down, *up)) and [
            d for d, depths in zip(down, self.down, strict=True) if any(depths)
        ] == [u for u, depths in zip(reversed(up), reversed(self.up), strict=True) if any(depths)]
        return {
            "sample_size": 128,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "block_out_channels": tuple(widths),
            "layers_per_block": tuple(len(depths) for depths in self.down),
            "down_block_types": tuple(f"{_attends(d)}DownBlock2D" for d in self.down),
            "mid_block_type": _middle_type(self.middle),
            "up_block_types": tuple(f"{_attends(d)}UpBlock2D" for d in self.up),
            "transformer_layers_per_block": down,
            "reverse_transformer_layers_per_block": None if symmetric else up,
            # diffusers' attention_head_dim is the number of heads (a known misnomer).
            "attention_head_dim": tuple(max(1, width // head_width) for width in widths),
            "cross_attention_dim": context_width,
            "use_linear_projection": linear,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": _TIME_WIDTH,
            "projection_class_embeddings_input_dim": added_width,
        }


def _block(ldm: str, diffusers: str, position: int, depth: int) -> Iterator[tuple[str, str]]:
    yield from _resnet(f"{ldm}.0", f"{diffusers}.resnets.{position}")
    if depth:
        yield f"{ldm}.1", f"{diffusers}.attentions.{position}"


def _resnet(ldm: str, diffusers: str) -> Iterator[tuple[str, str]]:
    for inner, name in _RESNET.items():
        yield f"{ldm}.{inner}", f"{diffusers}.{name}"


def _middle_type(depth: int) -> str | None:
    if depth == 0:
        raise NotSDXLError("a middle block of two resnets without attention is not SDXL's.")
    return "UNetMidBlock2DCrossAttn" if depth > 0 else "UNetMidBlock2D" if depth == -1 else None


def _attends(depths: Sequence[int]) -> str:
    return "CrossAttn" if any(depths) else ""


def _depths(side: Sequence[Sequence[int]]) -> list[Any]:
    """One number a level where all its depths agree, else a list; levels without any count 1."""
    return [(max(1, depths[0]) if len(set(depths)) == 1 else list(depths)) for depths in side]


def layout_of(shapes: Shapes) -> Layout:
    """The layout behind ldm names. Raises ``NotSDXLError``."""
    layers_from_ldm(shapes)  # says what is wrong with anything that is no SDXL at all
    depths: dict[tuple[str, int], int] = defaultdict(int)
    blocks: dict[str, set[int]] = defaultdict(set)
    for name in shapes:
        match = re.match(r"(input|output|middle)_blocks?\.(\d+)\.", name)
        if match:
            blocks[match[1]].add(int(match[2]))
        match = re.match(
            r"(?:(input|output)_blocks\.(\d+)|(middle)_block)\.1\.transformer_blocks\.(\d+)\.", name
        )
        if match:
            key = (match[1] or match[3], int(match[2] or 0))
            depths[key] = max(depths[key], int(match[4]) + 1)
    down: list[list[int]] = [[]]
    for number in sorted(blocks["input"] - {0}):
        if f"input_blocks.{number}.0.op.weight" in shapes:
            down.append([])
        else:
            down[-1].append(depths["input", number])
    up: list[list[int]] = [[]]
    for number in sorted(blocks["output"]):
        up[-1].append(depths["output", number])
        if any(f"output_blocks.{number}.{place}.conv.weight" in shapes for place in (1, 2)):
            up.append([])
    if [len(d) + 1 for d in reversed(down)] != [len(u) for u in up]:
        raise NotSDXLError(
            f"expected one resnet more on the way up than down at each level; found {down} down "
            f"and {up} up (transformer depths)."
        )
    middle = depths["middle", 0] or min(len(blocks["middle"]), 2) - 2
    return Layout(down=tuple(map(tuple, down)), middle=middle, up=tuple(map(tuple, up)))


def unet_config(shapes: Shapes, head_width: int = HEAD_WIDTH) -> dict[str, Any]:
    """diffusers' configuration of a UNet given as ldm ``{name: shape}``. Raises ``NotSDXLError``.

    Names are relative to the UNet (``input_blocks.4.1...``).
    """
    layout = layout_of(shapes)
    number, widths = 1, []
    for depths in layout.down:
        widths.append(_first(shapes, f"input_blocks.{number}.0.out_layers.3.weight"))
        number += len(depths) + 1
    context = next(s[1] for n, s in shapes.items() if n.endswith(".attn2.to_k.weight"))
    linear = next(len(s) == 2 for n, s in shapes.items() if n.endswith(".1.proj_in.weight"))
    return layout.config(
        in_channels=_entry(shapes, "input_blocks.0.0.weight")[1],
        out_channels=_first(shapes, "out.2.weight"),
        widths=widths,
        head_width=head_width,
        context_width=context,
        added_width=_entry(shapes, "label_emb.0.0.weight")[1],
        linear=linear,
    )


def check_inputs(config: Mapping[str, Any]) -> None:
    """Raise ``NotSDXLError`` for SDXL's relatives, whose inputs mean something else."""
    channels = config.get("in_channels", _LATENT_CHANNELS)
    if channels != _LATENT_CHANNELS:
        raise NotSDXLError(
            f"the UNet reads {channels} channels, SDXL's {_LATENT_CHANNELS}. Inpainting and "
            "editing models cannot be trained or sampled here; give the model they come from."
        )
    pooled = config.get("projection_class_embeddings_input_dim")
    if (config.get("cross_attention_dim"), pooled) == _REFINER:
        raise NotSDXLError("this is SDXL's refiner; give the base model.")


def _entry(shapes: Shapes, name: str) -> Sequence[int]:
    try:
        return shapes[name]
    except KeyError:
        raise NotSDXLError(f"the UNet lacks {name}.") from None


def _first(shapes: Shapes, name: str) -> int:
    return int(_entry(shapes, name)[0])


def check_shapes(config: Mapping[str, Any], shapes: Shapes) -> dict[str, str]:
    """ldm name -> diffusers name, for exactly the tensors the configuration asks for.

    Raises ``NotSDXLError`` naming what is missing, left over or of another shape.
    """
    wanted = {name: tuple(t.shape) for name, t in _empty_unet(config).state_dict().items()}
    names = rename(layout_of(shapes), shapes)
    found = {names[ldm]: tuple(shape) for ldm, shape in shapes.items() if ldm in names}
    unknown = sorted(shapes.keys() - names.keys())
    missing = sorted(wanted.keys() - found.keys())
    wrong = sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name])
    if unknown or missing or wrong or found.keys() - wanted.keys():
        raise NotSDXLError(
            f"the UNet is not SDXL's: unknown tensors {unknown[:3] or 'none'}, missing "
            f"{missing[:3] or 'none'}, of another shape {wrong[:3] or 'none'}. Quantised files "
            "with scales beside the weights must be converted to plain ones first."
        )
    return names


def rename(layout: Layout, names: Iterator[str] | Mapping[str, Any]) -> dict[str, str]:
    """ldm name -> diffusers name, for those of ``names`` that have one."""
    prefixes = dict(layout.prefixes())
    renamed = {}
    for name in names:
        parts = name.split(".")
        for end in range(len(parts) - 1, 0, -1):
            prefix = ".".join(parts[:end])
            if prefix in prefixes:
                renamed[name] = ".".join([prefixes[prefix], *parts[end:]])
                break
    return renamed


def ldm_names(unet: Any) -> dict[str, str]:
    """ldm name -> diffusers name for every tensor of a ``UNet2DConditionModel``."""
    config = unet.config

    def depths(blocks: Any) -> tuple[tuple[int, ...], ...]:
        return tuple(
            tuple(
                len(block.attentions[i].transformer_blocks) if hasattr(block, "attentions") else 0
                for i in range(len(block.resnets))
            )
            for block in blocks
        )

    if config.mid_block_type == "UNetMidBlock2DCrossAttn":
        middle = len(unet.mid_block.attentions[0].transformer_blocks)
    else:
        middle = -2 if config.mid_block_type is None else -1
    layout = Layout(down=depths(unet.down_blocks), middle=middle, up=depths(unet.up_blocks))
    back = {diffusers: ldm for ldm, diffusers in layout.prefixes()}
    names: dict[str, str] = {}
    for name in unet.state_dict():
        parts = name.split(".")
        end = next(e for e in range(len(parts) - 1, 0, -1) if ".".join(parts[:e]) in back)
        names[".".join([back[".".join(parts[:end])], *parts[end:]])] = name
    return names
