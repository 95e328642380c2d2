"""ComfyUI's (ldm) names of a diffusers UNet's tensors, written down apart from what reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Depths = tuple[tuple[int, ...], ...]

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


def prefixes(down: Depths, middle: int, up: Depths) -> Iterator[tuple[str, str]]:
    """(ldm, diffusers) prefix of every module whose inner names need no or a fixed change."""
    yield from _FIXED.items()
    number = 1
    for level, depths in enumerate(down):
        for position, depth in enumerate(depths):
            block = f"input_blocks.{number}", f"down_blocks.{level}"
            yield from _block(*block, position, depth)
            number += 1
        if level < len(down) - 1:
            yield f"input_blocks.{number}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
            number += 1
    if middle >= -1:
        yield from _resnet("middle_block.0", "mid_block.resnets.0")
    if middle >= 0:
        yield "middle_block.1", "mid_block.attentions.0"
        yield from _resnet("middle_block.2", "mid_block.resnets.1")
    number = 0
    for level, depths in enumerate(up):
        for position, depth in enumerate(depths):
            block = f"output_blocks.{number}", f"up_blocks.{level}"
            yield from _block(*block, position, depth)
            if position == len(depths) - 1 and level < len(up) - 1:
                place = 2 if depth else 1
                yield (
                    f"output_blocks.{number}.{place}.conv",
                    f"up_blocks.{level}.upsamplers.0.conv",
                )
            number += 1


def _block(ldm: str, diffusers: str, position: int, depth: int) -> Iterator[tuple[str, str]]:
    yield from _resnet(f"{ldm}.0", f"{diffusers}.resnets.{position}")
    if depth:
        yield f"{ldm}.1", f"{diffusers}.attentions.{position}"


def _resnet(ldm: str, diffusers: str) -> Iterator[tuple[str, str]]:
    for inner, name in _RESNET.items():
        yield f"{ldm}.{inner}", f"{diffusers}.{name}"


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
    pairs = prefixes(depths(unet.down_blocks), middle, depths(unet.up_blocks))
    back = {diffusers: ldm for ldm, diffusers in pairs}
    names: dict[str, str] = {}
    for name in unet.state_dict():
        parts = name.split(".")
        end = next(e for e in range(len(parts) - 1, 0, -1) if ".".join(parts[:e]) in back)
        names[".".join([back[".".join(parts[:end])], *parts[end:]])] = name
    return names
