"""PuLID's image encoder under ComfyUI's memory management."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import comfy.model_management
import comfy.model_patcher
import torch

from ..encoders.eva import EvaVision, load_eva


class ManagedEva(EvaVision):
    """An encoder whose weights ComfyUI loads, counts and unloads, as a whole."""

    def __init__(self, encoder: EvaVision) -> None:
        super().__init__(encoder.model, encoder.blocks)
        self.patcher: Any = comfy.model_patcher.ModelPatcher(
            encoder.model,
            load_device=comfy.model_management.text_encoder_device(),
            offload_device=comfy.model_management.text_encoder_offload_device(),
        )

    def place(self) -> torch.device:
        """Bring the weights to the device they run on."""
        comfy.model_management.load_models_gpu([self.patcher], force_full_load=True)
        return cast(torch.device, self.patcher.load_device)


def load_managed_eva(path: str | Path) -> ManagedEva:
    """Read it from a file. Raises as ``load_eva``."""
    return ManagedEva(load_eva(path))
