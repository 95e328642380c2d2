"""Eq. 5-8 of the paper as pure functions on tensors.

Shapes: ``B`` rows, ``N`` queries, ``M`` keys, ``C`` = heads * head width. Keys and values are
``[B, M, C]`` as they leave their projections; the kernel splits the heads. Every host hands in
its own kernel, so that the user's choice of attention (SDPA, xformers, sage, ...) holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from ..errors import OptionError, shown
from .merging import PLAIN, Merging

Mixing = Literal["mixed", "mutual", "off"]
Style = Literal["adain_mean", "adain", "off"]
TextStream = Literal["own", "shared"]

MIXING: tuple[Mixing, ...] = get_args(Mixing)
STYLE: tuple[Style, ...] = get_args(Style)
TEXT_STREAM: tuple[TextStream, ...] = get_args(TextStream)
MAX_STRENGTH = 3.0

_EPS = 1e-5  # keeps the division of full AdaIN finite on constant features


class Kernel(Protocol):
    """Eq. 2, Attn(Q, K, V), with an optional additive bias ``[B, N, M]`` on the scores."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, /) -> Tensor:
        """``q [B, N, C]``, ``k`` and ``v [B, M, C]`` -> ``[B, N, C]``."""
        ...


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """How the identity stream reads the text stream.

    Raises ``OptionError`` for a value outside its range.
    """

    mixing: Mixing = "mixed"
    """Self-attention: ``mixed`` (Eq. 5), ``mutual`` (text keys only, Table 1), ``off``."""
    style: Style = "adain_mean"
    """Alignment of identity features to text features: Eq. 8, full AdaIN (Fig. 8), none."""
    style_strength: float = 1.0
    """Scales the shift of the alignment; 0 equals ``style="off"``."""
    merge_text: bool = True
    """Keep the text term of Eq. 6; off is the ablation of Table 2."""
    text_stream: TextStream = "own"
    """``own``: a trajectory of its own from the same noise; ``shared``: the same latent."""

    def __post_init__(self) -> None:
        _check_choice("mixing", self.mixing, MIXING)
        _check_choice("style", self.style, STYLE)
        _check_choice("text_stream", self.text_stream, TEXT_STREAM)
        if not 0.0 <= self.style_strength <= 1.0:
            raise OptionError(
                f"style_strength must lie in [0, 1], got {self.style_strength}. Use 1.0 for the "
                "paper's alignment, 0.0 for none."
            )


@dataclass(frozen=True, kw_only=True)
class IdentityTerm:
    """One identity's part in the cross-attention of one layer."""

    key: Tensor
    """K'_id ``[B, M, C]``."""
    value: Tensor
    """V'_id ``[B, M, C]``."""
    strength: float = 1.0
    token_weight: Tensor | None = None
    """``[M]``, positive: a token of weight 2 counts as if it stood there twice."""
    mask: Tensor | None = None
    """``[B or 1, N, 1]`` in [0, 1]: where in the picture this identity takes effect."""
    merging: Merging = PLAIN
    """How it is added in one stream without style alignment."""


def token_mean(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over tokens, per row and channel: ``[B, M, C]`` -> ``[B, 1, C]`` (mu of Eq. 8)."""
    if weight is None:
        return x.mean(dim=1, keepdim=True)
    weight = weight.to(device=x.device, dtype=_exact(x))
    share = (weight / weight.sum()).view(1, -1, 1)
    return (x * share).sum(dim=1, keepdim=True).to(x.dtype)


def adain_mean(x: Tensor, y: Tensor, strength: float = 1.0, weight: Tensor | None = None) -> Tensor:
    """AdaIN-m(x, y) = x - mu(x) + mu(y) (Eq. 8), the shift scaled by ``strength``.

    ``x [B, M, C]``, ``y [B, M', C]`` -> ``[B, M, C]``; ``weight [M]`` weighs x's tokens.
    """
    return x + strength * (token_mean(y) - token_mean(x, weight))


def adain(x: Tensor, y: Tensor, strength: float = 1.0, weight: Tensor | None = None) -> Tensor:
    """Full AdaIN (mean and deviation), the ablation of Fig. 8; shapes as in ``adain_mean``."""
    mean_x, mean_y = token_mean(x, weight), token_mean(y)
    std_x = (token_mean((x - mean_x) ** 2, weight) + _EPS).sqrt()
    std_y = (token_mean((y - mean_y) ** 2) + _EPS).sqrt()
    aligned = (x - mean_x) / std_x * std_y + mean_y
    return torch.lerp(x, aligned, strength)


def align_style(
    x: Tensor, y: Tensor, options: StreamOptions, weight: Tensor | None = None
) -> Tensor:
    """Eq. 7: identity features ``x`` moved to the statistics of the text features ``y``."""
    if options.style == "off" or options.style_strength == 0.0:
        return x
    align = adain_mean if options.style == "adain_mean" else adain
    return align(x, y, options.style_strength, weight)


def mixed_attention(
    q: Tensor,
    k_id: Tensor,
    v_id: Tensor,
    k_t: Tensor,
    v_t: Tensor,
    options: StreamOptions,
    kernel: Kernel,
) -> Tensor:
    """Self-attention of the identity stream (Eq. 5 with Eq. 7).

    All inputs ``[B, N, C]``: q, k_id, v_id of the identity stream, k_t, v_t of the text stream
    at the same step. Returns ``[B, N, C]``.
    """
    if options.mixing == "off":
        return kernel(q, k_id, v_id)
    if options.mixing == "mutual":
        return kernel(q, k_t, v_t)
    k = torch.cat([align_style(k_id, k_t, options), k_t], dim=1)
    v = torch.cat([align_style(v_id, v_t, options), v_t], dim=1)
    return kernel(q, k, v)


def identity_attention(
    q: Tensor, term: IdentityTerm, k_t: Tensor, v_t: Tensor, options: StreamOptions, kernel: Kernel
) -> Tensor:
    """First term of Eq. 6 with Eq. 7: strength * mask * Attn(Q, K'_id, V'_id).

    ``q [B, N, C]``; ``k_t``, ``v_t [B, M', C]`` are the text's K'_t, V'_t. Returns ``[B, N, C]``.
    """
    k = align_style(term.key, k_t, options, term.token_weight)
    v = align_style(term.value, v_t, options, term.token_weight)
    out = kernel(q, k, v, weight_bias(term.token_weight, q, k)) * term.strength
    return out if term.mask is None else out * term.mask.to(out)


def _added_as_published(
    q: Tensor, term: IdentityTerm, text_out: Tensor, kernel: Kernel, heads: int
) -> Tensor:
    """What a term adds in one stream where its adapter's authors do more than add."""
    merging = term.merging
    k, v = merging.padded(term.key), merging.padded(term.value)
    out = kernel(q, k, v, weight_bias(merging.padded_weight(term.token_weight), q, k))
    out = merging.added(out, text_out, q, k, heads) * term.strength
    return out if term.mask is None else out * term.mask.to(out)


def merged_cross_attention(
    q: Tensor,
    terms: Sequence[IdentityTerm],
    k_t: Tensor,
    v_t: Tensor,
    text_out: Tensor,
    options: StreamOptions,
    kernel: Kernel,
    heads: int = 1,
) -> Tensor:
    """Cross-attention of the identity stream (Eq. 6 with Eq. 7), over one or more identities.

    ``text_out [B, N, C]`` is Attn(Q, K'_t, V'_t), computed by the caller because another patch
    may have a say in it. Without ``merge_text`` it is left out (Table 2), except where no
    identity takes effect: there is nothing else to attend to. ``heads``: of the layer, for terms
    with a ``merging`` of their own.
    """
    if not terms:
        return text_out
    out = text_out if options.merge_text else torch.zeros_like(text_out)
    published = options.mixing == options.style == "off"
    for term in terms:
        if published and not term.merging.plain:
            out = out + _added_as_published(q, term, text_out, kernel, heads)
        else:
            out = out + identity_attention(q, term, k_t, v_t, options, kernel)
    return out


def weight_bias(weight: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Additive score bias that makes token j count ``weight[j]`` times: log of the weight.

    ``weight [M]`` -> ``[B, N, M]`` (a view), or None where all weights are equal, which softmax
    cannot tell from no bias.
    """
    if weight is None or bool((weight == weight[0]).all()):
        return None
    bias = weight.to(device=q.device, dtype=_exact(q)).log().to(q.dtype)
    return bias.view(1, 1, -1).expand(q.shape[0], q.shape[1], k.shape[1])


def _exact(x: Tensor) -> torch.dtype:
    """The dtype for weights beside ``x``: its own, but at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"{name} must be one of {', '.join(allowed)}; got {shown(value)}.")


STREAM_PRESETS: Mapping[str, StreamOptions] = {
    "balanced": StreamOptions(),
    "likeness": StreamOptions(style="off"),
    "style": StreamOptions(style="adain"),
    "one stream": StreamOptions(mixing="off", style="off"),
}
"""By what matters most: the paper's; without alignment, which keeps most of the face; with full
AdaIN, which keeps most of the style; and IP-Adapter's own formula, at half the price."""
