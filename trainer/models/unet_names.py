"""ComfyUI's (ldm) names of SDXL's UNet, diffusers' names and configuration, read off shapes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from infinite_id_core.errors import NotSDXLError
from infinite_id_core.sdxl.layers import layers_from_ldm

HEAD_WIDTH = 64  # SDXL's; not in the tensors
_GROUPS = 32  # of every group norm of SDXL's UNet
_TIME_WIDTH = 256  # sine features of each of SDXL's six size and crop ids
_LATENT_CHANNELS = 4
_REFINER = (1280, 2560)  # its context and added widths; it has five ids, one an aesthetic score

Shapes = Mapping[str, Sequence[int]]


def empty_unet(config: Mapping[str, Any]) -> Any:
    """The module without memory for its weights."""
    import diffusers

    build: Any = diffusers.UNet2DConditionModel
    with torch.device("meta"):
        return build(**config)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Transformer depth of each resnet, by level; 0 is none."""

    down: tuple[tuple[int, ...], ...]
    middle: int
    """As in ComfyUI, -1 is a middle of one resnet, -2 is none at all."""
    up: tuple[tuple[int, ...], ...]
    """From the coarsest level to the finest, one resnet more than ``down``."""

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
    wanted = {name: tuple(t.shape) for name, t in empty_unet(config).state_dict().items()}
    names = diffusers_names(config, shapes)
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


def diffusers_names(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """ldm name -> diffusers name, by diffusers' own conversion, which moves values unseen."""
    from diffusers.loaders import single_file_utils

    convert: Any = single_file_utils.convert_ldm_unet_checkpoint
    layers = set(config["layers_per_block"])
    if len(layers) > 1:
        raise NotSDXLError(
            f"its levels have {sorted(layers)} resnets each; diffusers converts equal levels only."
        )
    held = {single_file_utils.LDM_UNET_KEY + name: name for name in names}
    converted = convert(held, {**config, "layers_per_block": layers.pop()})
    return {ldm: name for name, ldm in converted.items()}
