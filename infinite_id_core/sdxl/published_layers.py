"""SDXL's 70 cross-attention layers in the order of published adapters, and their numbers there.

IP-Adapter numbers the attention processors of diffusers' UNet: down, up, mid, the self-attention
of a transformer block before its cross-attention. So cross-attention has the odd numbers 1 to 139.
"""

from __future__ import annotations

from collections.abc import Sequence

from .layers import CrossAttentionLayer

CONTEXT_WIDTH = 2048

# (diffusers' path, ComfyUI's block, transformer blocks, width)
_PLACES = (
    *((f"down_blocks.1.attentions.{i}", ("input", 4 + i), 2, 640) for i in range(2)),
    *((f"down_blocks.2.attentions.{i}", ("input", 7 + i), 10, 1280) for i in range(2)),
    *((f"up_blocks.0.attentions.{i}", ("output", i), 10, 1280) for i in range(3)),
    *((f"up_blocks.1.attentions.{i}", ("output", 3 + i), 2, 640) for i in range(3)),
    ("mid_block.attentions.0", ("middle", 0), 10, 1280),
)

SDXL_LAYERS = tuple(
    CrossAttentionLayer(
        path=f"{path}.transformer_blocks.{i}",
        block=(*block, i),
        width=width,
        context_width=CONTEXT_WIDTH,
    )
    for path, block, depth, width in _PLACES
    for i in range(depth)
)


def attention_of(number: int, layers: Sequence[CrossAttentionLayer]) -> str | None:
    """``<path of the transformer block>.attn1`` or ``.attn2`` of a processor's number; None where
    there is none."""
    layer, cross = divmod(number, 2)
    return f"{layers[layer].path}.attn{1 + cross}" if 0 <= layer < len(layers) else None


def number_of(path: str, layers: Sequence[CrossAttentionLayer]) -> int:
    """The number of a layer's cross-attention."""
    return 1 + 2 * [layer.path for layer in layers].index(path)
