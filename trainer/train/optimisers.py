"""Optimisers by name: how each is made, what its state takes, and how large its steps are."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from infinite_id_core.packages import require

from ..config import Optimiser, OptimiserKind

PRODIGY_SLICE = 11
"""Prodigy measures its distance on every eleventh number, as its authors advise: a tenth of the
memory."""


_PACKAGES: dict[OptimiserKind, str] = {
    "adamw8bit": "bitsandbytes",
    "adafactor": "transformers",
    "prodigy": "prodigyopt",
}


def require_package(kind: OptimiserKind) -> Any:
    """The package an optimiser comes from. Raises ``MissingPackageError``."""
    name = _PACKAGES.get(kind)
    if name is None:
        return torch.optim
    return require(name, f"for optimiser.kind = {kind!r} (or use 'adamw')", name)


def build_optimiser(options: Optimiser, parameters: Sequence[Tensor], device: torch.device) -> Any:
    """The optimiser of float32 weights. Raises ``MissingPackageError``."""
    package = require_package(options.kind)
    if options.kind == "adamw8bit":
        return package.optim.AdamW8bit(parameters, **_adam_settings(options))
    if options.kind == "adafactor":
        return _adafactor(package, options, parameters)
    if options.kind == "prodigy":
        return _prodigy(package, options, parameters)
    fused = device.type == "cuda"
    return torch.optim.AdamW(parameters, fused=fused, **_adam_settings(options))


def _adam_settings(options: Optimiser) -> dict[str, Any]:
    return {
        "lr": options.rate,
        "betas": (options.beta1, options.beta2),
        "eps": options.epsilon,
        "weight_decay": options.weight_decay,
    }


def _adafactor(package: Any, options: Optimiser, parameters: Sequence[Tensor]) -> Any:
    """Adafactor (Shazeer and Stern 2018) at the configured rate, without a first moment."""
    return package.Adafactor(
        parameters,
        lr=options.rate,
        weight_decay=options.weight_decay,
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
    )


def _prodigy(package: Any, options: Optimiser, parameters: Sequence[Tensor]) -> Any:
    """Prodigy (Mishchenko and Defazio 2024), with its authors' settings for diffusion models."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints; that stream is for the result
        return package.Prodigy(
            parameters,
            use_bias_correction=True,
            safeguard_warmup=True,
            slice_p=PRODIGY_SLICE,
            **_adam_settings(options),
        )


def step_size(optimiser: Any, rate: float) -> float:
    """What ``rate`` comes to: Prodigy multiplies it by the step size it has found."""
    return rate * float(optimiser.param_groups[0].get("d", 1.0))


# --- memory ----------------------------------------------------------------------------------


def state_bytes(kind: OptimiserKind, parameters: Iterable[Tensor]) -> int:
    """Bytes of an optimiser's state for float32 ``parameters``, once it has made a step."""
    return sum(_STATE[kind](tuple(p.shape)) for p in parameters)


def _numbers(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def _adam(shape: Sequence[int]) -> int:
    return 8 * _numbers(shape)


def _adam_8bit(shape: Sequence[int]) -> int:
    return 2 * _numbers(shape)


def _factored(shape: Sequence[int]) -> int:
    """A number for each row and each column of a matrix, in place of one for each entry."""
    if len(shape) < 2:
        return 4 * _numbers(shape)
    return 4 * (_numbers(shape[:-1]) + _numbers((*shape[:-2], shape[-1])))


def _adam_and_distance(shape: Sequence[int]) -> int:
    sliced = -(-_numbers(shape) // PRODIGY_SLICE)
    return _adam(shape) + 8 * sliced


_STATE = {
    "adamw": _adam,
    "adamw8bit": _adam_8bit,
    "adafactor": _factored,
    "prodigy": _adam_and_distance,
}
