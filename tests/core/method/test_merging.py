"""PuLID's ways to add an identity in one stream, against loops over rows, heads and positions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from infinite_id_core.errors import OptionError
from infinite_id_core.hosts.diffusers_unet import sdpa
from infinite_id_core.method.attention import IdentityTerm, StreamOptions, merged_cross_attention
from infinite_id_core.method.merging import MERGING, PLAIN, PULID_V11, Merging

ONE = StreamOptions(mixing="off", style="off")
HEADS, WIDTH, TOKENS, PLACES = 3, 4, 7, 6
STRENGTH = 0.8


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


Q, TEXT = draw(1, 2, PLACES, HEADS * WIDTH), draw(2, 2, PLACES, HEADS * WIDTH)
KEY, VALUE = draw(3, 2, TOKENS, HEADS * WIDTH), draw(4, 2, TOKENS, HEADS * WIDTH)


def reference(zeros: int, mode: str) -> Tensor:
    """Written from the description: one row, one head, one position after another."""
    none = torch.zeros(zeros, HEADS * WIDTH, dtype=torch.float64)
    result = []
    for row in range(2):
        q, text = Q[row].double(), TEXT[row].double()
        k, v = (torch.cat([x[row].double(), none]) for x in (KEY, VALUE))
        out, face = torch.zeros_like(q), torch.zeros(PLACES, dtype=torch.float64)
        for head in range(HEADS):
            part = slice(head * WIDTH, (head + 1) * WIDTH)
            for place in range(PLACES):
                scores = k[:, part] @ q[place, part]
                out[place, part] = (scores / math.sqrt(WIDTH)).softmax(0) @ v[:, part]
                face[place] += scores.softmax(0)[:5].sum() / HEADS
        for channel in range(q.shape[1]):
            t, o = text[:, channel], out[:, channel]
            along = (t @ o) / (t @ t) * t
            if mode == "ortho":
                out[:, channel] = o - along
            if mode == "ortho_v2":
                out[:, channel] = o + (face - 1.0) * along
        result.append(text + STRENGTH * out)
    return torch.stack(result).float()


def merged(merging: Merging, options: StreamOptions = ONE, **values: Any) -> Tensor:
    term = IdentityTerm(key=KEY, value=VALUE, strength=STRENGTH, merging=merging, **values)
    text_k, text_v = draw(5, 2, 9, HEADS * WIDTH), draw(6, 2, 9, HEADS * WIDTH)
    return merged_cross_attention(Q, [term], text_k, text_v, TEXT, options, sdpa(HEADS), HEADS)


@pytest.mark.parametrize("zeros", [0, 1, 8])
@pytest.mark.parametrize("mode", ["off", "ortho", "ortho_v2"])
def test_as_described(zeros: int, mode: Any) -> None:
    found = merged(Merging(zeros=zeros, orthogonal=mode))
    torch.testing.assert_close(found, reference(zeros, mode), rtol=1e-4, atol=1e-5)


def test_the_modes_that_are_published() -> None:
    told = {name: (m.zeros, m.orthogonal) for name, m in MERGING.items()}
    assert told == {"fidelity": (8, "ortho_v2"), "style": (16, "ortho"), "neutral": (0, "off")}
    assert (PULID_V11.zeros, PULID_V11.orthogonal) == (20, "ortho_v2")


@pytest.mark.parametrize("options", [StreamOptions(), StreamOptions(mixing="off")])
def test_two_streams_and_style_alignment_add_as_the_paper_does(options: StreamOptions) -> None:
    assert torch.equal(merged(MERGING["fidelity"], options), merged(PLAIN, options))


def test_masks_and_weights_hold() -> None:
    mask = torch.zeros(1, PLACES, 1)
    mask[:, :2] = 1.0
    found = merged(MERGING["style"], mask=mask)
    torch.testing.assert_close(found[:, :2], merged(MERGING["style"])[:, :2])
    assert torch.equal(found[:, 2:], TEXT[:, 2:])
    weighted = merged(MERGING["style"], token_weight=torch.arange(1.0, TOKENS + 1))
    assert weighted.isfinite().all() and not torch.allclose(weighted, merged(MERGING["style"]))
    alike = merged(MERGING["style"], token_weight=torch.ones(TOKENS))
    torch.testing.assert_close(alike, merged(MERGING["style"]))


def test_half_precision_does_not_overflow() -> None:
    merging = MERGING["fidelity"]
    q, key = ((100 * x).half() for x in (Q, KEY))
    added = merging.added(TEXT.half(), TEXT.half(), q, merging.padded(key), HEADS)
    assert added.dtype == torch.float16 and bool(added.isfinite().all())


def test_where_the_text_gives_nothing_there_is_nothing_to_take_away() -> None:
    merging, nothing = MERGING["style"], torch.zeros_like(TEXT)
    assert torch.equal(merging.added(TEXT, nothing, Q, merging.padded(KEY), HEADS), TEXT)


@pytest.mark.parametrize(
    "values", [{"zeros": -1}, {"orthogonal": "v3"}, {"face_tokens": 0}]
)  # fmt: skip
def test_wrong_settings_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        Merging(**values)
