"""The cross-attention layers of an SDXL-shaped UNet, one canonical name each.

The canonical name is diffusers' path of the transformer block; beside it stands the key under
which ComfyUI calls patches for the same block. Depths and widths come from the model itself,
read off tensor names and shapes, so a full SDXL, SSD-1B or a toy all work.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import NotSDXLError

Shapes = Mapping[str, Sequence[int]]
BlockKey = tuple[str, int, int]


@dataclass(frozen=True, kw_only=True)
class CrossAttentionLayer:
    """One transformer block's cross-attention."""

    path: str
    """diffusers path of the transformer block, e.g. ``mid_block.attentions.0...blocks.3``."""
    block: BlockKey
    """ComfyUI's patch key: ("input" | "middle" | "output", number, transformer index)."""
    width: int
    """Channels of keys and values."""
    context_width: int
    """Channels of the text it attends to (2048 for SDXL)."""


def layers_from_ldm(shapes: Shapes) -> tuple[CrossAttentionLayer, ...]:
    """Layers of a UNet given as ``{tensor name: shape}`` in ComfyUI's (ldm) naming.

    Names are relative to the UNet (``input_blocks.4.1...``). Order: down, up, mid, as in
    diffusers' ``attn_processors`` and published IP-Adapter files. Raises ``NotSDXLError``.
    """
    inputs = _positions_by_level(shapes, "input_blocks", r"\.0\.op\.weight$", first=1)
    outputs = _positions_by_level(shapes, "output_blocks", r"\.\d+\.conv\.weight$", first=0)
    found: list[CrossAttentionLayer] = []
    pattern = re.compile(
        r"(?:(input|output)_blocks\.(\d+)|(middle)_block)\.\d+"
        r"\.transformer_blocks\.(\d+)\.attn2\.to_k\.weight$"
    )
    for name, shape in shapes.items():
        match = pattern.match(name)
        if match is None:
            continue
        side, number, middle, depth = match.groups()
        if middle:
            block: BlockKey = ("middle", 0, int(depth))
            parent = "mid_block.attentions.0"
        else:
            places = inputs if side == "input" else outputs
            if int(number) not in places:
                raise NotSDXLError(f"Expected no transformer in the UNet's first block: {name}.")
            level, position = places[int(number)]
            block = (side, int(number), int(depth))
            parent = f"{'down' if side == 'input' else 'up'}_blocks.{level}.attentions.{position}"
        found.append(_layer(f"{parent}.transformer_blocks.{depth}", block, name, shape))
    return _checked(found, pooled="label_emb.0.0.weight" in shapes)


def layers_from_diffusers(shapes: Shapes) -> tuple[CrossAttentionLayer, ...]:
    """Layers of a UNet given as ``{tensor name: shape}`` in diffusers' naming.

    Order as in ``layers_from_ldm``. Raises ``NotSDXLError``.
    """
    resnets = _resnets_per_block(shapes)
    found: list[CrossAttentionLayer] = []
    pattern = re.compile(
        r"((?:(down|up)_blocks\.(\d+)|(mid)_block)\.attentions\.(\d+)"
        r"\.transformer_blocks\.(\d+))\.attn2\.to_k\.weight$"
    )
    for name, shape in shapes.items():
        match = pattern.match(name)
        if match is None:
            continue
        path, side, level, mid, position, depth = match.groups()
        if mid:
            block: BlockKey = ("middle", 0, int(depth))
        else:
            # ldm counts a down block's downsampler as an input block, after the first conv.
            before = sum(resnets[side, i] + (side == "down") for i in range(int(level)))
            number = before + int(position) + (side == "down")
            block = ("input" if side == "down" else "output", number, int(depth))
        found.append(_layer(path, block, name, shape))
    return _checked(found, pooled="add_embedding.linear_1.weight" in shapes)


def _layer(path: str, block: BlockKey, name: str, shape: Sequence[int]) -> CrossAttentionLayer:
    if len(shape) != 2:
        raise NotSDXLError(
            f"Expected a matrix [width, context width] at {name}, got shape {list(shape)}. "
            "A quantised UNet must give the sizes of its layers."
        )
    return CrossAttentionLayer(path=path, block=block, width=shape[0], context_width=shape[1])


def _positions_by_level(
    shapes: Shapes, side: str, resampler: str, *, first: int
) -> dict[int, tuple[int, int]]:
    """Block number -> (level, position in level). A resampler's block ends its level."""
    tails: dict[int, list[str]] = defaultdict(list)
    for name in shapes:
        match = re.match(rf"{side}\.(\d+)(\..*)", name)
        if match:
            tails[int(match[1])].append(match[2])
    ends = {number for number, ts in tails.items() if any(re.match(resampler, t) for t in ts)}
    places: dict[int, tuple[int, int]] = {}
    level = position = 0
    for number in sorted(tails):
        if number < first:
            continue
        places[number] = (level, position)
        position += 1
        if number in ends:
            level, position = level + 1, 0
    return places


def _resnets_per_block(shapes: Shapes) -> dict[tuple[str, int], int]:
    seen: dict[tuple[str, int], set[int]] = defaultdict(set)
    for name in shapes:
        match = re.match(r"(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.", name)
        if match:
            seen[match[1], int(match[2])].add(int(match[3]))
    return {key: len(numbers) for key, numbers in seen.items()}


def _checked(found: list[CrossAttentionLayer], *, pooled: bool) -> tuple[CrossAttentionLayer, ...]:
    widths = {layer.context_width for layer in found}
    if not found or not pooled or len(widths) != 1:
        raise NotSDXLError(
            "Expected an SDXL-shaped UNet (cross-attention blocks of one context width and an "
            f"input for pooled text); found {len(found)} cross-attention blocks, context widths "
            f"{sorted(widths)}, pooled text input: {'yes' if pooled else 'no'}. Load an SDXL "
            "checkpoint; SD 1.5, SD 3, Flux and others are not supported."
        )
    return tuple(sorted(found, key=_diffusers_order))


def _diffusers_order(layer: CrossAttentionLayer) -> tuple[int, int, int]:
    side, number, depth = layer.block
    return ("input", "output", "middle").index(side), number, depth
