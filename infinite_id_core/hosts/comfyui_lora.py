"""The low-rank part of an adapter (a FaceID file's LoRA) in ComfyUI's own LoRA mechanism."""

from __future__ import annotations

from typing import Any

import comfy.lora
from comfy.model_patcher import ModelPatcher

from ..errors import ModelMismatchError
from ..method.adapter import Adapter


def with_low_rank(model: ModelPatcher, adapter: Adapter, strength: float) -> ModelPatcher:
    """A clone of ``model`` whose attention the adapter's low-rank part changes, for all rows.

    As IP-Adapter's own pipeline runs it. The same model where there is no such part, or
    ``strength`` is 0. Raises ``ModelMismatchError`` where the UNet has not all of its layers.
    """
    parts = adapter.low_rank_parts
    if not parts or strength == 0.0:
        return model
    keys: dict[str, Any] = comfy.lora.model_lora_keys_unet(model.model, {})
    tensors = {}
    missing = []
    for path, part in parts.items():
        name = "lora_unet_" + path.replace(".", "_")
        if name not in keys:
            missing.append(path)
        tensors[f"{name}.lora_up.weight"] = part.up.weight
        tensors[f"{name}.lora_down.weight"] = part.down.weight
    if missing:
        raise ModelMismatchError(
            f"The LoRA in this adapter changes {len(parts)} layers, and the model lacks "
            f"{len(missing)} of them, e.g. {missing[0]}. Is the model SDXL, as the adapter's?"
        )
    patched = model.clone()
    patched.add_patches(comfy.lora.load_lora(tensors, keys), strength)
    return patched
