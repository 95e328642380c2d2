"""Checks that every section of the configuration makes of its values."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, get_args

from infinite_id_core.errors import shown

from .errors import ConfigValueError


def in_range(section: str, values: Any, **ranges: tuple[float, float]) -> None:
    """Both ends are allowed. Raises ``ConfigValueError``, as all here."""
    for name, (low, high) in ranges.items():
        value = getattr(values, name)
        if not low <= value <= high:
            raise ConfigValueError(
                f"{section}.{name} must lie in [{low}, {high}], got {shown(value)}."
            )


def below(lower: str, low: int, upper: str, high: int) -> None:
    """Two keys of which one must be smaller."""
    if low >= high:
        raise ConfigValueError(
            f"{lower} {low} is not below {upper} {high}. Lower the one, or raise the other."
        )


_SYNONYMS = {"gpu": "cuda", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def one_of(section: str, values: Any, **choices: Any) -> None:
    """Each of ``choices`` is a ``Literal``."""
    for name, allowed in choices.items():
        _is_one_of(f"{section}.{name} must be", getattr(values, name), get_args(allowed))


def each_of(section: str, values: Any, **choices: Any) -> None:
    """As ``one_of``, for lists."""
    for name, allowed in choices.items():
        for value in getattr(values, name):
            _is_one_of(f"{section}.{name}: each must be", value, get_args(allowed))


def _is_one_of(what: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(_SYNONYMS.get(value, str(value)), allowed, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigValueError(f"{what} one of {', '.join(allowed)}; got {value!r}.{hint}")


def not_empty(section: str, values: Any, *names: str) -> None:
    """Text that has to be there."""
    for name in names:
        if not getattr(values, name):
            raise ConfigValueError(f"{section}.{name} must not be empty.")
