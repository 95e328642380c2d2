"""Tensor names: diffusers' and transformers' to those of ComfyUI's files."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from microworld.config import UNET

_STEPS = int(UNET["num_res_blocks"][0])  # resnets of a down block; an up block has one more

_BASIC = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_to_ldm(name: str) -> str:
    """A diffusers UNet's tensor name as in SDXL's checkpoint. Raises ValueError if unknown."""
    stem, _, end = name.rpartition(".")
    if stem in _BASIC:
        return f"{_BASIC[stem]}.{end}"
    place, _, rest = _place(name)
    if rest.startswith("resnets."):
        _, _, part = rest.split(".", 2)
        inner, _, end = part.rpartition(".")
        return f"{place}.{_RESNET[inner]}.{end}"
    if rest.startswith("attentions."):
        return f"{place}.{rest.split('.', 2)[2]}"
    return f"{place}.{end}"


def _place(name: str) -> tuple[str, str, str]:
    """The ldm module of a tensor in a block, the block's side, and the rest of its name."""
    found = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.|(mid)_block\.(\w+)\.(\d+)\.", name)
    if found is None:
        raise ValueError(f"Expected a tensor of an SDXL-shaped diffusers UNet, got {name!r}.")
    side, level, kind, index, middle, mid_kind, mid_index = found.groups()
    if middle:
        number = {"resnets": 2 * int(mid_index), "attentions": 1}[mid_kind]
        return f"middle_block.{number}", "mid", name.split(".", 1)[1]
    rest = name.split(".", 2)[2]
    if side == "down":
        first = 1 + (_STEPS + 1) * int(level)
        if kind == "downsamplers":
            return f"input_blocks.{first + _STEPS}.0.op", side, rest
        return f"input_blocks.{first + int(index)}.{int(kind == 'attentions')}", side, rest
    first = (_STEPS + 1) * int(level)
    if kind == "upsamplers":
        # After the resnet, and after the transformer where this level has one.
        reversed_depths = UNET["transformer_depth_output"][::-1]
        after = 2 if reversed_depths[first] else 1
        return f"output_blocks.{first + _STEPS}.{after}.conv", side, rest
    return f"output_blocks.{first + int(index)}.{int(kind == 'attentions')}", side, rest


def unet_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A whole UNet's tensors under ldm names."""
    return {unet_to_ldm(name): tensor for name, tensor in state.items()}


def text_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`text.TextEncoders`' tensors under ComfyUI's SDXL names."""
    return {
        re.sub(r"^([lg])\.", r"clip_\1.transformer.", name): tensor
        for name, tensor in state.items()
    }
