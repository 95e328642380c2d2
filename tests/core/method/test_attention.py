"""Eq. 5-8 against the same sums written as loops over single numbers in float64."""

from __future__ import annotations

import dataclasses
import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from infinite_id_core.errors import OptionError
from infinite_id_core.method import attention as core
from infinite_id_core.method.attention import IdentityTerm, StreamOptions

HEADS, B, N, M, TEXT, C = 2, 2, 5, 4, 3, 6
Rows = list[list[list[float]]]


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, /) -> Tensor:
    """The kernel a host would pass in."""
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
    bias = None if bias is None else bias[:, None]
    out = scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return out.transpose(1, 2).flatten(2)


# --- the reference ---------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, counts: list[float] | None = None) -> Tensor:
    """Eq. 2, one number at a time; ``counts`` says how often each key stands there."""
    out = torch.zeros_like(q)
    width = q.shape[2] // HEADS
    counts = counts or [1.0] * k.shape[1]
    for b, n, head in product(range(q.shape[0]), range(q.shape[1]), range(HEADS)):
        channels = range(head * width, (head + 1) * width)
        scores = [
            sum(float(q[b, n, c]) * float(k[b, m, c]) for c in channels) / math.sqrt(width)
            for m in range(k.shape[1])
        ]
        parts = [count * math.exp(score) for count, score in zip(counts, scores, strict=True)]
        for c in channels:
            weighted = sum(p * float(v[b, m, c]) for m, p in enumerate(parts))
            out[b, n, c] = weighted / sum(parts)
    return out


def aligned(
    x: Tensor, y: Tensor, style: str, strength: float, counts: list[float] | None = None
) -> Tensor:
    """Eq. 8 or its ablation, channel by channel."""
    out = x.clone()
    counts = counts or [1.0] * x.shape[1]
    if style == "off":
        return out
    for b, c in product(range(x.shape[0]), range(x.shape[2])):
        mean_x = sum(w * float(x[b, m, c]) for m, w in enumerate(counts)) / sum(counts)
        mean_y = sum(float(t) for t in y[b, :, c]) / y.shape[1]
        squares = sum(w * (float(x[b, m, c]) - mean_x) ** 2 for m, w in enumerate(counts))
        std_x = math.sqrt(squares / sum(counts) + 1e-5)
        std_y = math.sqrt(sum((float(t) - mean_y) ** 2 for t in y[b, :, c]) / y.shape[1] + 1e-5)
        scale = std_y / std_x if style == "adain" else 1.0
        for m in range(x.shape[1]):
            full = (float(x[b, m, c]) - mean_x) * scale + mean_y
            out[b, m, c] = float(x[b, m, c]) + strength * (full - float(x[b, m, c]))
    return out


def numbers(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.3 * seed


def close(a: Tensor, b: Tensor) -> bool:
    return bool(torch.allclose(a, b, rtol=1e-10, atol=1e-11))


Q = numbers(B, N, C, seed=1)
K_ID, V_ID = numbers(B, N, C, seed=2), numbers(B, N, C, seed=3)
K_T, V_T = numbers(B, N, C, seed=4), numbers(B, N, C, seed=5)
TEXT_K, TEXT_V = numbers(B, TEXT, C, seed=6), numbers(B, TEXT, C, seed=7)
STYLES = [("off", 1.0), ("adain_mean", 1.0), ("adain_mean", 0.4), ("adain", 1.0), ("adain", 0.4),
          ("adain", 0.0)]  # fmt: skip


def term(seed: int = 8, **changes: object) -> IdentityTerm:
    return IdentityTerm(
        key=numbers(B, M, C, seed=seed), value=numbers(B, M, C, seed=seed + 1), **changes
    )


# --- Eq. 5 -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("style", "strength"), STYLES)
def test_mixed_self_attention_is_equation_5(style, strength):
    options = StreamOptions(mixing="mixed", style=style, style_strength=strength)
    k = torch.cat([aligned(K_ID, K_T, style, strength), K_T], dim=1)
    v = torch.cat([aligned(V_ID, V_T, style, strength), V_T], dim=1)
    found = core.mixed_attention(Q, K_ID, V_ID, K_T, V_T, options, sdpa)
    assert close(found, attend(Q, k, v))


@pytest.mark.parametrize("style", core.STYLE)
def test_mutual_and_off_use_one_stream_only(style):
    mutual = StreamOptions(mixing="mutual", style=style)
    off = StreamOptions(mixing="off", style=style)
    nan = torch.full_like(K_ID, float("nan"))
    assert close(core.mixed_attention(Q, nan, nan, K_T, V_T, mutual, sdpa), attend(Q, K_T, V_T))
    assert close(core.mixed_attention(Q, K_ID, V_ID, nan, nan, off, sdpa), attend(Q, K_ID, V_ID))


def test_the_mixing_modes_differ():
    found = [
        core.mixed_attention(Q, K_ID, V_ID, K_T, V_T, StreamOptions(mixing=m), sdpa)
        for m in core.MIXING
    ]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert float((found[a] - found[b]).abs().max()) > 0.05


# --- Eq. 6, 7 --------------------------------------------------------------------------------


@pytest.mark.parametrize("merge_text", [True, False])
@pytest.mark.parametrize(("style", "strength"), STYLES)
def test_merged_cross_attention_is_equation_6(style, strength, merge_text):
    options = StreamOptions(style=style, style_strength=strength, merge_text=merge_text)
    one = term(strength=0.7)
    k = aligned(one.key, TEXT_K, style, strength)
    v = aligned(one.value, TEXT_V, style, strength)
    text_out = attend(Q, TEXT_K, TEXT_V)
    expected = 0.7 * attend(Q, k, v) + text_out * merge_text
    found = core.merged_cross_attention(Q, [one], TEXT_K, TEXT_V, text_out, options, sdpa)
    assert close(found, expected)


def test_several_people_speak_where_their_masks_are():
    left = torch.tensor([1.0, 1.0, 0.5, 0.0, 0.0], dtype=torch.float64).view(1, N, 1)
    rows = torch.stack([1 - left[0], torch.zeros(N, 1, dtype=torch.float64)])  # one per row
    first = term(8, strength=1.5, mask=left)
    second = term(20, mask=rows, token_weight=torch.tensor([1.0, 3.0, 0.5, 1.0]))
    options = StreamOptions(style="adain")
    text_out = attend(Q, TEXT_K, TEXT_V)
    expected = text_out.clone()
    for one, counts in ((first, None), (second, [1.0, 3.0, 0.5, 1.0])):
        k = aligned(one.key, TEXT_K, "adain", 1.0, counts)
        v = aligned(one.value, TEXT_V, "adain", 1.0, counts)
        expected = expected + one.strength * one.mask * attend(Q, k, v, counts)
    found = core.merged_cross_attention(Q, [first, second], TEXT_K, TEXT_V, text_out, options, sdpa)
    assert close(found, expected)
    assert torch.equal(found[1, 3:], text_out[1, 3:])  # nobody's place


@pytest.mark.parametrize("merge_text", [True, False])
def test_where_no_identity_speaks_the_text_does(merge_text):
    options = StreamOptions(merge_text=merge_text)
    text_out = numbers(B, N, C, seed=30)
    assert core.merged_cross_attention(Q, [], TEXT_K, TEXT_V, text_out, options, sdpa) is text_out


def test_the_text_term_is_the_callers():
    """Another patch may have changed it: it is added as it came, not computed again."""
    text_out = numbers(B, N, C, seed=30)
    found = core.merged_cross_attention(
        Q, [term(strength=0.0)], TEXT_K, TEXT_V, text_out, StreamOptions(), sdpa
    )
    assert torch.equal(found, text_out)


# --- weights of references -------------------------------------------------------------------


@pytest.mark.parametrize("style", core.STYLE)
def test_weight_two_is_the_token_twice(style):
    options = StreamOptions(style=style)
    once = term()
    order = [0, 1, 1, 2, 3, 3, 3]
    repeated = IdentityTerm(key=once.key[:, order], value=once.value[:, order])
    weighted = dataclasses.replace(once, token_weight=torch.tensor([1.0, 2.0, 1.0, 3.0]))
    found, expected, plain = (
        core.identity_attention(Q, t, TEXT_K, TEXT_V, options, sdpa)
        for t in (weighted, repeated, once)
    )
    assert close(found, expected)
    assert float((found - plain).abs().max()) > 0.01


@pytest.mark.parametrize("value", [1.0, 0.25, 7.0])
def test_equal_weights_are_no_weights(value):
    weight = torch.full((M,), value)
    assert core.weight_bias(weight, Q, term().key) is None
    for style in core.STYLE:
        options = StreamOptions(style=style)
        found = core.identity_attention(Q, term(token_weight=weight), TEXT_K, TEXT_V, options, sdpa)
        assert close(found, core.identity_attention(Q, term(), TEXT_K, TEXT_V, options, sdpa))


def test_only_the_ratio_of_weights_counts():
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    found, scaled = (
        core.identity_attention(
            Q, term(token_weight=w), TEXT_K, TEXT_V, StreamOptions(style="adain"), sdpa
        )
        for w in (weight, weight * 10)
    )
    assert close(found, scaled)


def test_the_bias_is_a_view_in_the_queries_dtype():
    bias = core.weight_bias(torch.tensor([1.0, 2.0, 3.0, 4.0]), Q.half(), term().key)
    assert bias is not None and bias.shape == (B, N, M) and bias.dtype == torch.float16
    assert bias.untyped_storage().nbytes() == M * 2
    assert float(bias[1, 2, 1]) == pytest.approx(math.log(2), abs=1e-3)


# --- Eq. 8 -----------------------------------------------------------------------------------


def test_adain_mean_moves_the_mean_and_nothing_else():
    x, y = term().key, TEXT_K
    found = core.adain_mean(x, y)
    assert close(found.mean(dim=1), y.mean(dim=1))
    assert close(found - found.mean(dim=1, keepdim=True), x - x.mean(dim=1, keepdim=True))


def test_adain_takes_mean_and_deviation():
    x, y = numbers(B, 50, C, seed=8) * 3, numbers(B, 70, C, seed=9)
    found = core.adain(x, y)
    assert close(found.mean(dim=1), y.mean(dim=1))
    assert torch.allclose(
        found.std(dim=1, correction=0), y.std(dim=1, correction=0), rtol=1e-4, atol=0
    )


def test_weighted_statistics():
    x, y = term().key, TEXT_K
    weight = torch.tensor([1.0, 2.0, 5.0, 0.1], dtype=torch.float64)
    share = (weight / weight.sum()).view(1, -1, 1)
    for align in (core.adain_mean, core.adain):
        found = align(x, y, 1.0, weight)
        assert close((found * share).sum(dim=1), y.mean(dim=1))


@pytest.mark.parametrize("align", [core.adain_mean, core.adain])
def test_alignment_to_itself_and_of_constants(align):
    x = term().key
    assert torch.allclose(align(x, x), x, atol=1e-12)
    constant = torch.full((B, M, C), 2.5, dtype=torch.float64)
    found = align(constant, TEXT_K)  # no deviation to divide by
    assert torch.allclose(found, TEXT_K.mean(dim=1, keepdim=True).expand(B, M, C))


@pytest.mark.parametrize("style", ["adain_mean", "adain"])
def test_style_strength_is_a_straight_line(style):
    x = term().key
    none, half, full = (
        core.align_style(x, TEXT_K, StreamOptions(style=style, style_strength=s))
        for s in (0.0, 0.5, 1.0)
    )
    assert none is x
    assert close(half, (x + full) / 2)
    assert float((full - x).abs().max()) > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("style", core.STYLE)
def test_dtypes_stay(style, dtype):
    options = StreamOptions(style=style)
    q, k, v, text_k, text_v = (x.to(dtype) for x in (Q, K_ID, V_ID, TEXT_K, TEXT_V))
    one = IdentityTerm(
        key=k, value=v, mask=torch.ones(1, N, 1), token_weight=torch.tensor([1.0, 2, 1, 1, 1])
    )
    merged = core.merged_cross_attention(q, [one], text_k, text_v, q, options, sdpa)
    mixed = core.mixed_attention(q, k, v, k, v, options, sdpa)
    assert merged.dtype == mixed.dtype == dtype
    assert bool(merged.isfinite().all()) and bool(mixed.isfinite().all())


# --- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mixing", "both"), ("mixing", ""), ("mixing", None), ("style", "adain-mean"),
        ("style", True), ("text_stream", "both"), ("style_strength", -0.01),
        ("style_strength", 1.01), ("style_strength", float("nan")),
        ("style_strength", float("inf")),
    ],
)  # fmt: skip
def test_options_out_of_range_are_named(name, value):
    with pytest.raises(OptionError, match=name) as caught:
        StreamOptions(**{name: value})
    assert str(value) in str(caught.value)


def test_options_are_frozen_and_by_name():
    options = StreamOptions()
    assert dataclasses.astuple(options) == ("mixed", "adain_mean", 1.0, True, "own")
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.mixing = "off"  # type: ignore[misc]
    with pytest.raises(TypeError):
        StreamOptions("mixed")  # type: ignore[misc]
