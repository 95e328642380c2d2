"""Layouts of a batch: every row gets what it would get alone, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from infinite_id_core.errors import OptionError, PatchConflictError
from infinite_id_core.method.attention import IdentityTerm, StreamOptions
from infinite_id_core.method.rows import Rows, cross_attention_over, self_attention_over

LAYOUTS = {
    "two streams, two prompts": Rows.both(2),
    "one stream": Rows.alone(2),
    "one stream for two sets of people": Rows.alone(2, sets=2),
    "three sets read one text stream": Rows.both(2, sets=3),
    "a negative prompt of text rows alone": Rows(people=(0, 1), text=(True, True)),
    "sets differ by prompt": Rows(people=(1, 3), text=(True, True)),
    "text rows are not computed in one": Rows(people=(2, 1), text=(False, True)),
}
B, N, M, C = 2, 5, 3, 4


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    scores = q @ k.transpose(1, 2) / C**0.5
    return torch.softmax(scores if bias is None else scores + bias, dim=-1) @ v


def made(rows: Rows, *shape: int, seed: int) -> Tensor:
    count = B * sum(rows.blocks)
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=chance, dtype=torch.float64)


def places(rows: Rows) -> list[tuple[int, int, int, int | None]]:
    """(row, prompt, picture, its text row) of each row of people, counted from the docstring."""
    found, at = [], 0
    for prompt, (sets, text) in enumerate(zip(rows.people, rows.text, strict=True)):
        start = at
        at += B if text else 0
        for _ in range(sets):
            for picture in range(B):
                found.append((at + picture, prompt, picture, start + picture if text else None))
            at += B
    return found


def shifted(x: Tensor, y: Tensor) -> Tensor:
    return x - x.mean(0) + y.mean(0)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("mixing", ["mixed", "mutual", "off"])
def test_self_attention_gives_every_row_what_it_gets_alone(name: str, mixing: str) -> None:
    rows = LAYOUTS[name]
    q, k, v = (made(rows, N, C, seed=s) for s in (1, 2, 3))
    kept = [
        (made(Rows.alone(1), N, C, seed=10 + p), made(Rows.alone(1), N, C, seed=20 + p))
        for p in range(len(rows.people))
    ]
    recalled = None if all(rows.text) else kept
    options = StreamOptions(mixing=mixing)  # type: ignore[arg-type]
    out = self_attention_over(rows, q, k, v, options, attend, recalled)
    wanted = attend(q, k, v)
    for row, prompt, picture, text in places(rows):
        if mixing == "off":
            continue
        if recalled is None:
            assert text is not None
            k_t, v_t = k[text], v[text]
        else:
            k_t, v_t = kept[prompt][0][picture], kept[prompt][1][picture]
        keys, values = [k_t], [v_t]
        if mixing == "mixed":
            keys, values = [shifted(k[row], k_t), k_t], [shifted(v[row], v_t), v_t]
        wanted[row] = attend(q[row][None], torch.cat(keys)[None], torch.cat(values)[None])[0]
    assert torch.allclose(out, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAYOUTS)
def test_cross_attention_adds_people_to_their_rows_alone(name: str) -> None:
    rows = LAYOUTS[name]
    q, k, v = made(rows, N, C, seed=1), made(rows, M, C, seed=2), made(rows, M, C, seed=3)
    text_out = attend(q, k, v)
    keys = torch.randn(len(rows.people), 2, C, dtype=torch.float64)

    def terms(prompt: int, q_p: Tensor) -> list[IdentityTerm]:
        key = keys[prompt][None].expand(q_p.shape[0], -1, -1)
        return [IdentityTerm(key=key, value=2 * key, strength=0.7)]

    out = cross_attention_over(rows, q, k, v, text_out, terms, StreamOptions(), attend)
    wanted = text_out.clone()
    for row, prompt, _, _ in places(rows):
        key, value = shifted(keys[prompt], k[row]), shifted(2 * keys[prompt], v[row])
        wanted[row] += 0.7 * attend(q[row][None], key[None], value[None])[0]
    assert torch.allclose(out, wanted, rtol=1e-12, atol=1e-12)
    assert not torch.equal(out, text_out)


@pytest.mark.parametrize("name", LAYOUTS)
def test_split_and_join_are_inverse_and_widen_repeats_a_prompt(name: str) -> None:
    rows = LAYOUTS[name]
    x = made(rows, 3, seed=4)
    text, people = rows.split(x)
    assert torch.equal(rows.join(text, people), x)
    prompts = [torch.full((B, 1), float(p)) for p in range(len(rows.people))]
    counts = [B * n for n in rows.blocks]
    wanted = torch.tensor([float(p) for p, n in enumerate(counts) for _ in range(n)])
    assert torch.equal(rows.widen(prompts)[:, 0], wanted)


def test_rows_that_are_not_those_of_the_layout_are_refused() -> None:
    with pytest.raises(PatchConflictError, match="with 5 rows for 2 conds of 4 streams"):
        Rows.both(2).split(torch.zeros(5, 1))
    with pytest.raises(OptionError, match="Every prompt of a call needs rows"):
        Rows(people=(0, 1), text=(False, True))
    with pytest.raises(OptionError, match="Every prompt of a call needs rows"):
        Rows(people=(1,), text=(True, True))
