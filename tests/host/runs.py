"""Short sampling runs of the tiny model, and how far two of them are apart."""

from __future__ import annotations

from typing import Any

import comfy.sample
import torch

from .tiny_sdxl import conditioning, latent

SIZE = 8


def run(
    model: Any,
    sampler: str = "euler",
    *,
    noise: torch.Tensor | None = None,
    rows: int = 2,
    steps: int = 3,
    cfg: float = 4.0,
    positive: Any = None,
    negative: Any = None,
    latent_image: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    noise = latent(rows, SIZE) if noise is None else noise
    with torch.inference_mode():
        return comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            sampler,
            "normal",
            positive or conditioning(1),
            negative or conditioning(2),
            torch.zeros_like(noise) if latent_image is None else latent_image,
            seed=11,
            disable_pbar=True,
            **kwargs,
        )


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def both_ways(silent: Any, patched: Any, model: Any, **kwargs: Any) -> None:
    """Unpatched equals silently patched, in both stream modes; the real patch changes it."""
    plain = run(model, **kwargs)
    for stream in ("own", "shared"):
        assert error(run(silent(model, stream), **kwargs), plain) < 1e-5
    loud = run(patched, **kwargs)
    assert loud.isfinite().all() and error(loud, plain) > 1e-3
