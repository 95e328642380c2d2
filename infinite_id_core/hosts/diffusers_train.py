"""Training on diffusers' SDXL UNet: its text attention replaced by the adapter's (3.2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..method.adapter import Adapter, check_layers
from ..method.attention import (
    IdentityTerm,
    StreamOptions,
    identity_attention,
    merged_cross_attention,
)
from ..method.layer_parts import KeyValue
from .diffusers_unet import no_mask, processors, projected_out, sdpa, unet_layers

# In training nothing aligns the identity's keys and values to a text's: there is none.
_PLAIN = StreamOptions(mixing="off", style="off")


class IdentityCrossAttention:
    """attn2 while training: Attn(Q, K'_id, V'_id), no text (3.2).

    The UNet's ``encoder_hidden_states`` is c_id ``[B, M, C]``. With ``text_tokens`` > 0 it is
    [text; c_id] and the text attention stays on: the paper's entangled ablation.
    """

    def __init__(self, pair: KeyValue, text_tokens: int = 0) -> None:
        self.pair = pair
        self.text_tokens = text_tokens

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """``[B, N, C]`` -> ``[B, N, C]``, as diffusers calls it."""
        no_mask(attention_mask)
        text, identity = encoder_hidden_states.tensor_split([self.text_tokens], dim=1)
        q, kernel = attn.to_q(hidden_states), sdpa(attn.heads)
        k, v = self.pair(identity)
        term = IdentityTerm(key=k.to(q.dtype), value=v.to(q.dtype))
        if self.text_tokens:
            k_t, v_t = attn.to_k(text), attn.to_v(text)
            out = merged_cross_attention(q, [term], k_t, v_t, kernel(q, k_t, v_t), _PLAIN, kernel)
        else:
            out = identity_attention(q, term, term.key, term.value, _PLAIN, kernel)
        return projected_out(attn, out)


@contextmanager
def identity_training(unet: Any, adapter: Adapter, *, text_tokens: int = 0) -> Iterator[None]:
    """``unet`` with its text attention replaced by the adapter's (see the processor's docstring).

    Gradients flow into ``adapter``; whether the UNet learns is the caller's ``requires_grad_``.
    Raises ``NotSDXLError``, ``ModelMismatchError``.
    """
    layers = unet_layers(unet)
    check_layers(adapter.widths, adapter.config.context_width, layers)
    with processors(
        unet,
        {
            f"{layer.path}.attn2.processor": IdentityCrossAttention(
                adapter.key_value(layer.path), text_tokens
            )
            for layer in layers
        },
    ):
        yield
