"""diffusers' SDXL UNet: its layers, its attention processors, its kernel.

Processors are plain objects that refer to the adapter. Were they modules, diffusers would register
the adapter inside the UNet: ``unet.to(bfloat16)`` would then cast trainable weights, and saving
either would drop or double them. diffusers itself is not imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..errors import OptionError
from ..method.attention import Kernel
from ..sdxl.layers import CrossAttentionLayer, layers_from_diffusers

Processor = Callable[..., Tensor]


def unet_layers(unet: Any) -> tuple[CrossAttentionLayer, ...]:
    """The cross-attention layers of a ``UNet2DConditionModel``. Raises ``NotSDXLError``."""
    return layers_from_diffusers({name: p.shape for name, p in unet.named_parameters()})


def text_projections(unet: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """The frozen text K/V weights by layer path, for ``Adapter.copy_text_projections``."""
    attentions = ((layer.path, unet.get_submodule(layer.path).attn2) for layer in unet_layers(unet))
    return {path: (attn.to_k.weight, attn.to_v.weight) for path, attn in attentions}


@contextmanager
def processors(unet: Any, replaced: Mapping[str, Processor]) -> Iterator[None]:
    """``unet`` with other attention processors; the original ones are back afterwards.

    ``replaced`` maps names of ``unet.attn_processors``; the rest stays. ``set_attn_processor``
    empties the dict it is given, hence the copies.
    """
    before = dict(unet.attn_processors)
    unet.set_attn_processor({**before, **replaced})
    try:
        yield
    finally:
        unet.set_attn_processor(before)


def sdpa(heads: int) -> Kernel:
    """Eq. 2 by torch's ``scaled_dot_product_attention`` for ``heads`` heads."""

    def split(x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], heads, -1).transpose(1, 2)  # BMC -> BHMc

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        mask = None if bias is None else bias.unsqueeze(1)
        out: Tensor = scaled_dot_product_attention(split(q), split(k), split(v), attn_mask=mask)
        return out.transpose(1, 2).flatten(2)

    return attend


def projected_out(attn: Any, hidden: Tensor) -> Tensor:
    """The output projection of a diffusers ``Attention``."""
    for module in attn.to_out:
        hidden = module(hidden)
    return hidden


Change = Callable[[str, Tensor, Tensor], Tensor]
"""By a linear layer's name in an attention (``to_out.0``): its output and input to the output."""


def attention_inputs(
    attn: Any, hidden: Tensor, context: Tensor, change: Change
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of a diffusers ``Attention``."""
    q, k, v = (
        change(linear, getattr(attn, linear)(x), x)
        for linear, x in (("to_q", hidden), ("to_k", context), ("to_v", context))
    )
    return q, k, v


def attention_output(attn: Any, hidden: Tensor, change: Change) -> Tensor:
    """The output projection of a diffusers ``Attention``."""
    return change("to_out.0", projected_out(attn, hidden), hidden)


def no_mask(attention_mask: Tensor | None) -> None:
    if attention_mask is not None:
        raise OptionError(
            "The two streams take no attention mask; give prompts of their full length."
        )
