"""Whether what a checkpoint holds is an optimiser's own state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_MOMENTS = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}}


def check_values(optimiser: Any) -> None:
    """A state as it lies in the file, before it is loaded. Raises ``ValueError``, ``KeyError``,
    ``TypeError``."""
    groups, state = (optimiser[name] for name in ("param_groups", "state"))
    entries = [*groups, *state.values()] if isinstance(state, dict) else [None]
    if not isinstance(groups, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("it holds no state of an optimiser")
    for value in [value for entry in state.values() for value in entry.values()]:
        if isinstance(value, Tensor) and (value.is_complex() or value.layout is not torch.strided):
            raise ValueError(f"it holds a tensor of {value.layout}, {value.dtype}")


def check_state(optimiser: Any, groups: Sequence[Mapping[str, Any]], begun: bool) -> None:
    """Whether what was loaded is an optimiser's own. Raises ``ValueError``.

    ``groups``: its own groups before; ``begun``: a step was made.
    """
    for before, now in zip(groups, optimiser.param_groups, strict=True):
        for name, value in before.items():
            found = now.get(name)
            switched = isinstance(value, bool) and value is not found
            if name != "params" and (switched or _kind_of(value) is not _kind_of(found)):
                raise ValueError(f"{name} of the optimiser is {found!r}")
    wanted = _MOMENTS.get(type(optimiser).__name__, set())
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            state = optimiser.state.get(parameter, {})
            if begun and (not state or not wanted <= state.keys()):
                raise ValueError("it lacks the moments of a tensor that learns")
            for name, value in state.items():
                _check_moment(name, value, parameter, name in wanted)


def _kind_of(value: Any) -> type:
    """A whole number is as good as any."""
    return float if type(value) is int else type(value)


def _check_moment(name: str, value: Any, parameter: Tensor, wanted: bool) -> None:
    if not isinstance(value, Tensor):
        if wanted:
            raise ValueError(f"{name} is {type(value).__name__}; expected a tensor")
        return
    if name in ("exp_avg", "exp_avg_sq") and value.shape != parameter.shape:
        found, shape = list(value.shape), list(parameter.shape)
        raise ValueError(f"{name} has the shape {found}; expected {shape}")
    if value.is_floating_point() and not bool(value.isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinity")
