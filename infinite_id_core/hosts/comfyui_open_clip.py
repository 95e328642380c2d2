"""open_clip's encoder under ComfyUI's memory management, as its own CLIP vision models are."""

from __future__ import annotations

from typing import Any, cast

import comfy.model_management
import comfy.model_patcher
import torch

from ..encoders.open_clip import OpenClipVision


class ManagedOpenClip(OpenClipVision):
    """An encoder whose weights ComfyUI loads, counts and unloads.

    Its layers are torch's own, which cannot take a weight from another device for one call. So
    they are loaded whole or not at all, and by the plain patcher: dynamic VRAM's would leave what
    attention layers hold themselves (a quarter of the encoder) on the GPU for good.
    """

    def __init__(self, encoder: OpenClipVision) -> None:
        super().__init__(encoder.model, encoder.clip_model, encoder.image_size, encoder.read_texts)
        # Under these names other packs look for them on a CLIP vision model.
        self.load_device = comfy.model_management.text_encoder_device()
        self.patcher: Any = comfy.model_patcher.ModelPatcher(
            encoder.model,
            load_device=self.load_device,
            offload_device=comfy.model_management.text_encoder_offload_device(),
        )
        self.output_device = comfy.model_management.intermediate_device()

    def place(self) -> torch.device:
        """Bring the weights to the device they run on."""
        comfy.model_management.load_models_gpu([self.patcher], force_full_load=True)
        return cast(torch.device, self.patcher.load_device)
