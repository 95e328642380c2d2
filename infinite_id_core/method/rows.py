"""The rows of a batch that text streams and people share, and attention over them.

A model call has prompts side by side (the positive and the negative one, say), each for the same
``b`` pictures. A prompt's rows are its text stream's ``b`` rows, where it has a text stream, and
then ``b`` rows for each set of people in it: ``[text; people 1; people 2; ...]``. All sets of a
prompt read its one text stream. A prompt may have text rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError, PatchConflictError
from .attention import (
    IdentityTerm,
    Kernel,
    StreamOptions,
    merged_cross_attention,
    mixed_attention,
)

KeyValues = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The layout of one model call. Raises ``OptionError`` for a layout without rows."""

    people: tuple[int, ...]
    """By prompt: how many sets of people it is painted with; each set has the ``b`` pictures."""
    text: tuple[bool, ...]
    """By prompt: whether its text stream's rows are in the call."""

    def __post_init__(self) -> None:
        counts = [n + t for n, t in zip(self.people, self.text, strict=False)]
        if len(self.people) != len(self.text) or not counts or min(counts) < 1:
            raise OptionError(
                "Every prompt of a call needs rows: its text stream's, people's, or both; got "
                f"people {self.people} and text streams {self.text}."
            )

    @classmethod
    def both(cls, prompts: int, sets: int = 1) -> Rows:
        """Each of ``prompts`` with its text stream and ``sets`` sets of people."""
        return cls(people=(sets,) * prompts, text=(True,) * prompts)

    @classmethod
    def alone(cls, prompts: int, sets: int = 1) -> Rows:
        """Each of ``prompts`` with people only: one stream."""
        return cls(people=(sets,) * prompts, text=(False,) * prompts)

    @property
    def blocks(self) -> tuple[int, ...]:
        """How many blocks of ``b`` rows each prompt has."""
        return tuple(n + t for n, t in zip(self.people, self.text, strict=True))

    def pictures(self, x: Tensor) -> int:
        """b, for the rows ``x`` of a call. Raises ``PatchConflictError`` where they do not fit."""
        count = sum(self.blocks)
        if x.shape[0] % count:
            raise PatchConflictError(
                f"Attention was called with {x.shape[0]} rows for {len(self.people)} conds of "
                f"{count} streams in all. Another node changed the batch inside the model; bypass "
                "it or Infinite-ID."
            )
        return x.shape[0] // count

    def split(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The call's rows by prompt: text rows ``[b or 0, ...]``, people's ``[sets * b, ...]``."""
        b = self.pictures(x)
        sizes = [b * n for t, p in zip(self.text, self.people, strict=True) for n in (int(t), p)]
        parts = _split(x, sizes)
        return list(parts[0::2]), list(parts[1::2])

    def people_of(self, x: Tensor) -> Tensor:
        """All people's rows, prompt after prompt; ``x`` itself where a call has no others."""
        return _cat(self.split(x)[1]) if any(self.text) else x

    def with_people(self, x: Tensor, people: Tensor) -> Tensor:
        """The call's rows ``x`` with other ones of people, as ``people_of`` gives them."""
        if not any(self.text):
            return people
        text, before = self.split(x)
        return self.join(text, _split(people, [part.shape[0] for part in before]))

    def join(self, text: Sequence[Tensor], people: Sequence[Tensor]) -> Tensor:
        """Inverse of ``split``."""
        return torch.cat([part for pair in zip(text, people, strict=True) for part in pair])

    def widen(self, prompts: Sequence[Tensor]) -> Tensor:
        """Each prompt's ``[b, ...]`` for all of its blocks: the rows of a call."""
        pairs = zip(prompts, self.blocks, strict=True)
        return torch.cat([x for prompt, count in pairs for x in [prompt] * count])

    def for_people(self, text: Sequence[Tensor]) -> list[Tensor]:
        """What each prompt's text stream has, ``[b, ...]``, for each set that reads it."""
        pairs = zip(text, self.people, strict=True)
        return [part if n == 1 else part.repeat(n, *[1] * (part.ndim - 1)) for part, n in pairs]


def twice(x: Tensor) -> Tensor:
    """``[b, ...]`` -> ``[2b, ...]``: text stream, identity stream."""
    return torch.cat([x, x])


def identity_half(x: Tensor) -> Tensor:
    """``[2b, ...]`` -> the identity stream's ``[b, ...]``."""
    return x[x.shape[0] // 2 :]


def self_attention_over(
    rows: Rows,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: StreamOptions,
    kernel: Kernel,
    recalled: Sequence[KeyValues] | None = None,
) -> Tensor:
    """Text rows plain, people's rows mixed (Eq. 5): ``[rows, N, C]`` in and out.

    ``recalled``: by prompt, text keys and values ``[b, N, C]`` that people read where the call
    has no text rows.
    """
    (q_t, q_p), (k_t, k_p), (v_t, v_p) = (rows.split(x) for x in (q, k, v))
    text_out = _plain(q_t, k_t, v_t, kernel)
    if options.mixing == "off":
        return rows.join(text_out, _plain(q_p, k_p, v_p, kernel))
    if recalled is not None:
        k_t, v_t = [pair[0] for pair in recalled], [pair[1] for pair in recalled]
    read = [_cat(rows.for_people(x)) for x in (k_t, v_t)]
    mixed = mixed_attention(_cat(q_p), _cat(k_p), _cat(v_p), read[0], read[1], options, kernel)
    return rows.join(text_out, _split(mixed, [x.shape[0] for x in q_p]))


def cross_attention_over(
    rows: Rows,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_out: Tensor,
    terms: Callable[[int, Tensor], Sequence[IdentityTerm]],
    options: StreamOptions,
    kernel: Kernel,
    heads: int = 1,
) -> Tensor:
    """Text rows plain, people's rows merged (Eq. 6, 7).

    ``q`` and ``text_out = Attn(q, k, v)`` are ``[rows, N, C]``, ``k`` and ``v [rows, M, C]`` the
    text's. ``terms(prompt, q)`` gives who takes effect in the people's rows of a prompt. ``heads``
    as in ``merged_cross_attention``.
    """
    q_p = rows.split(q)[1]
    found = [terms(prompt, part) for prompt, part in enumerate(q_p) if part.shape[0]]
    sizes = [part.shape[0] for part in q_p if part.shape[0]]
    if len(found) > 1 and all(_alike(found[0], other) for other in found[1:]):
        # One product for all prompts instead of one each: on a GPU the calls cost more.
        found, sizes = [[_stacked(same) for same in zip(*found, strict=True)]], [sum(sizes)]
    parts = zip(*(_split(rows.people_of(x), sizes) for x in (q, k, v, text_out)), strict=True)
    merged = [
        merged_cross_attention(q_n, terms_n, k_n, v_n, out_n, options, kernel, heads)
        for (q_n, k_n, v_n, out_n), terms_n in zip(parts, found, strict=True)
    ]
    return rows.with_people(text_out, _cat(merged))


def _alike(a: Sequence[IdentityTerm], b: Sequence[IdentityTerm]) -> bool:
    """Whether the people of two prompts can be computed together."""
    return len(a) == len(b) > 0 and all(
        x.key.shape[1:] == y.key.shape[1:]
        and (x.strength, x.merging) == (y.strength, y.merging)
        and all(w is None for w in (x.token_weight, y.token_weight, x.mask, y.mask))
        for x, y in zip(a, b, strict=True)
    )


def _stacked(terms: Sequence[IdentityTerm]) -> IdentityTerm:
    """One person's terms of several prompts, for their rows one after another."""
    return IdentityTerm(
        key=torch.cat([t.key for t in terms]),
        value=torch.cat([t.value for t in terms]),
        strength=terms[0].strength,
        merging=terms[0].merging,
    )


def _plain(
    q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], kernel: Kernel
) -> Sequence[Tensor]:
    """Attention of each part for itself, in one call of the kernel."""
    if not any(part.shape[0] for part in q):
        return q
    return _split(kernel(_cat(q), _cat(k), _cat(v)), [part.shape[0] for part in q])


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _split(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = torch.split(x, list(sizes))
    return parts
