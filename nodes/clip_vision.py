"""open_clip's encoder under ComfyUI's memory management, as its own CLIP vision models are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch

from ..infinite_id_core.encoders.encoders import (
    OpenClipVision,
    build_open_clip,
    load_open_clip,
)
from ..microworld import files as micro_files


def load(model: str, path: Path) -> OpenClipVision:
    """An open_clip model's image side from a file; see ``load_open_clip``."""
    return managed(load_open_clip(model, path))


def load_embedded() -> OpenClipVision:
    """The embedded tiny open_clip model's image side."""
    from ..microworld.random_weights import open_clip_config_and_weights

    config, weights = open_clip_config_and_weights()
    return managed(build_open_clip(config, weights, micro_files.INSIGHTFACE_PACK))


def managed(encoder: OpenClipVision) -> OpenClipVision:
    """Hand the encoder's weights to ComfyUI: it loads, counts and unloads them.

    Its layers are torch's own, which cannot take a weight from another device for one call. So
    they are loaded whole or not at all, and by the plain patcher: dynamic VRAM's would leave what
    attention layers hold themselves (a quarter of the encoder) on the GPU for good.
    """
    load_device = comfy.model_management.text_encoder_device()
    offload_device = comfy.model_management.text_encoder_offload_device()
    patcher: Any = comfy.model_patcher.ModelPatcher(
        encoder.model, load_device=load_device, offload_device=offload_device
    )

    def place() -> torch.device:
        comfy.model_management.load_models_gpu([patcher], force_full_load=True)
        return patcher.load_device

    encoder.place = place
    encoder.output_device = comfy.model_management.intermediate_device()
    # Under these names other packs look for them on a CLIP vision model.
    encoder.patcher, encoder.load_device = patcher, load_device  # type: ignore[attr-defined]
    return encoder
