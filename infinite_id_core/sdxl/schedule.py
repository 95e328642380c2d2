"""SDXL's noise levels: what the UNet was trained on, and the runs cut from them.

The numbers agree with ComfyUI's, so that a run through either host passes the same levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import OptionError

Prediction = Literal["epsilon", "v"]
Scheduler = Literal["normal", "karras", "ddim_uniform", "simple"]
PREDICTION: tuple[Prediction, ...] = get_args(Prediction)
SCHEDULER: tuple[Scheduler, ...] = get_args(Scheduler)

TIMESTEPS = 1000
_BETA_FIRST, _BETA_LAST = 0.00085, 0.012  # scaled-linear
_LAST_ALPHA = 4.8973451890853435e-08  # what zero-terminal-SNR models call zero (as ComfyUI)
_KARRAS_RHO = 7.0


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """SDXL's 1000 noise levels, and what the UNet's output means."""

    prediction: Prediction = "epsilon"
    """``epsilon``: the noise; ``v``: velocity (v-prediction bases)."""
    zero_terminal_snr: bool = False
    """Rescaled so that the last level is pure noise (some v-prediction bases)."""

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTION:
            raise OptionError(f"prediction must be one of {PREDICTION}, got {self.prediction!r}.")

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """Signal power of each timestep, ``[1000]`` float64."""
        roots = torch.linspace(_BETA_FIRST**0.5, _BETA_LAST**0.5, TIMESTEPS, dtype=torch.float64)
        alphas = torch.cumprod(1.0 - roots**2, dim=0)
        if self.zero_terminal_snr:
            root = alphas.sqrt()
            alphas = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
            alphas[-1] = _LAST_ALPHA
        return alphas

    @cached_property
    def sigmas(self) -> Tensor:
        """Noise over signal of each timestep, ``[1000]`` float32, rising."""
        alphas = self.alphas_cumprod
        return ((1.0 - alphas) / alphas).sqrt().float()

    def timestep(self, sigma: float | Tensor) -> int:
        """The timestep whose noise level is nearest (in the logarithm)."""
        return int((self.sigmas.log() - torch.as_tensor(sigma).log()).abs().argmin())

    def sigma_at(self, timestep: float | Tensor) -> float:
        """Noise level at a fractional timestep, interpolated in the logarithm."""
        t = torch.as_tensor(timestep, dtype=torch.float32).clamp(0, TIMESTEPS - 1)
        low, high, share = int(t.floor()), int(t.ceil()), t.frac()
        logs = self.sigmas.log()
        return float(((1 - share) * logs[low] + share * logs[high]).exp())

    def sigma_at_percent(self, percent: float) -> float:
        """Noise level at a share of the sampling run: 0 is above all levels, 1 is none."""
        if percent <= 0.0:
            return math.inf
        return 0.0 if percent >= 1.0 else self.sigma_at((1.0 - percent) * (TIMESTEPS - 1))

    def run_sigmas(self, scheduler: Scheduler, steps: int) -> Tensor:
        """Falling noise levels of a run, ending in 0, under ComfyUI's scheduler names."""
        every = max(TIMESTEPS // steps, 1)
        if scheduler == "karras":
            low, high = (self.sigmas[i] ** (1 / _KARRAS_RHO) for i in (0, -1))
            levels = (high + torch.linspace(0, 1, steps) * (low - high)) ** _KARRAS_RHO
        elif scheduler == "ddim_uniform":
            levels = self.sigmas[1::every].flip(0)
        elif scheduler == "simple":
            levels = self.sigmas[[-1 - int(i * TIMESTEPS / steps) for i in range(steps)]]
        else:
            times = torch.linspace(TIMESTEPS - 1, 0, steps)
            levels = torch.tensor([self.sigma_at(t) for t in times])
        return torch.cat([levels, levels.new_zeros(1)])

    def start(self, noise: Tensor, latent: Tensor, sigma: float | Tensor) -> Tensor:
        """A noisy latent at the first level of a run; a full run starts at unit total power."""
        highest, sigma = float(self.sigmas[-1]), float(sigma)
        full = sigma > highest or math.isclose(sigma, highest, rel_tol=1e-5)
        return latent + noise * (math.sqrt(1.0 + sigma**2) if full else sigma)

    def denoised(self, x: Tensor, output: Tensor, sigma: float | Tensor) -> Tensor:
        """The clean latent that the UNet's output stands for."""
        if self.prediction == "epsilon":
            return x - output * sigma
        power = sigma**2 + 1.0
        return x / power - output * sigma / power**0.5
