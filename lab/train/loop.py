"""One resumable training loop for all models: atomic checkpoints, progress bar, seeded steps."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm


class NonFiniteLossError(RuntimeError):
    """A training step gave a loss that is not a number; nothing was stepped or saved."""


def arithmetic() -> torch.autocast:
    """bfloat16 where the processor multiplies it; elsewhere emulation is ten times slower."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.autocast("cpu", torch.bfloat16, enabled=fast)


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """How long and how fast one model learns."""

    steps: int
    """Optimiser steps in all."""
    rate: float = 1e-3
    """Peak learning rate: linear warm-up, then a cosine to a hundredth."""
    warmup: int = 50
    """Steps of warm-up."""
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    """Gradients above this norm are scaled down."""
    save_every: float = 60.0
    """Seconds between checkpoints."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights; 0 keeps none."""

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.ema < 1:
            raise ValueError(f"Expected steps >= 1 and 0 <= ema < 1, got {self}.")

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, 0-based."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def save_atomic(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint so that a kill at any moment leaves the previous file good."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        torch.save(dict(content), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ours (tensors and numbers only)."""
    return dict(torch.load(path, map_location="cpu", weights_only=True))


def train(
    name: str,
    folder: Path,
    model: torch.nn.Module,
    loss_of: Callable[[int], tuple[torch.Tensor, dict[str, float]]],
    options: LoopOptions,
) -> dict[str, torch.Tensor]:
    """Run or resume a training; returns the final weights (the average, where one is kept).

    `loss_of(step)` must take every random choice from the step number, so that a resumed run sees
    the same data. The checkpoint is `folder/<name>.pt`. Raises NonFiniteLossError.
    """
    path = folder / f"{name}.pt"
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters, lr=options.rate, weight_decay=options.weight_decay, betas=(0.9, 0.99)
    )
    average = {k: v.detach().clone() for k, v in model.state_dict().items()} if options.ema else {}
    start = 0
    if path.exists():
        saved = load_checkpoint(path)
        model.load_state_dict(saved["model"])
        start = int(saved["step"])
        if start >= options.steps:
            return dict(saved["average"] or saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        average = dict(saved["average"])

    def save(step: int) -> None:
        save_atomic(
            path,
            {
                "model": model.state_dict(),
                "average": average,
                "step": step,
                "optimiser": optimiser.state_dict(),  # also at the end: more steps may follow
            },
        )

    saved_at, shown = time.monotonic(), {}
    bar = tqdm(
        range(start, options.steps),
        initial=start,
        total=options.steps,
        desc=name,
        mininterval=10.0,
        dynamic_ncols=True,
    )
    model.train()
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = options.rate_at(step)
        loss, numbers = loss_of(step)
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"{name}: the loss of step {step} is {float(loss)}. The last good checkpoint is "
                f"{path}; lower the rate ({options.rate}) and start again."
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, options.clip_norm)
        optimiser.step()
        if average:
            _follow(average, model, min(options.ema, (1 + step) / (10 + step)))
        for key, value in {"loss": float(loss.detach()), **numbers}.items():
            shown[key] = value if key not in shown else 0.95 * shown[key] + 0.05 * value
        bar.set_postfix({k: f"{v:.4f}" for k, v in shown.items()}, refresh=False)
        if time.monotonic() - saved_at > options.save_every:
            save(step + 1)
            saved_at = time.monotonic()
    save(options.steps)
    return average or {k: v.detach() for k, v in model.state_dict().items()}


@torch.no_grad()
def _follow(average: dict[str, torch.Tensor], model: torch.nn.Module, decay: float) -> None:
    for key, value in model.state_dict().items():
        if value.dtype.is_floating_point:
            average[key].lerp_(value, 1 - decay)
        else:
            average[key].copy_(value)
