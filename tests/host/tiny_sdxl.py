"""A tiny SDXL-shaped model in real ComfyUI, with an adapter and identities to match.

Weights are random everywhere (ldm starts its output layers at zero, which would hide errors).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch

from microworld import comfy_models

CONTEXT = 48
POOLED = 32
CLIP_WIDTH = 24
UNET_CONFIG: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "channel_mult": [1, 2, 4],
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_middle": 2,
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    "context_dim": CONTEXT,
    "adm_in_channels": POOLED + 6 * 256,
    "num_head_channels": 64,
    "num_classes": "sequential",
    "use_linear_in_transformer": True,
    "use_spatial_transformer": True,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
    "use_checkpoint": False,
    "legacy": False,
}


def random_weights(
    shapes: Mapping[str, torch.Tensor],
    seed: int,
    gain: float = 0.6,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Weights of a size that keeps activations near one; ``shapes`` may be on the meta device."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, like in shapes.items():
        noise = torch.randn(like.shape, generator=generator, dtype=torch.float32)
        if like.ndim == 1:
            scale = 0.05
            base = 1.0 if name.endswith("weight") else 0.0
        else:
            scale, base = gain / math.sqrt(like[0].numel()), 0.0
        weights[name] = (base + scale * noise).to(dtype)
    return weights


def model_config(
    dtype: torch.dtype = torch.float32, cast_to: torch.dtype | None = None, **changes: Any
) -> Any:
    """``cast_to``: the dtype ComfyUI computes in where the weights' own cannot be used (fp8)."""
    config = comfy.supported_models.SDXL({**UNET_CONFIG, **changes})
    config.set_inference_dtype(dtype, cast_to)
    return config


def tiny_base(
    config: Any, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """ComfyUI's model object with random weights, loaded as a file's are.

    So it is the same where the host makes layers without weights (dynamic VRAM).
    """
    model = config.get_model({}, "")
    shapes = comfy_models.unet_reference({**UNET_CONFIG, **changes})
    model.diffusion_model.load_state_dict(random_weights(shapes, seed, dtype=dtype))
    return model


def tiny_model(
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    cast_to: torch.dtype | None = None,
    **changes: Any,
) -> comfy.model_patcher.ModelPatcher:
    model = tiny_base(model_config(dtype, cast_to, **changes), seed, dtype, **changes)
    cpu = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def conditioning(seed: int, rows: int = 1, tokens: int = 77, **extra: Any) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(rows, tokens, CONTEXT, generator=generator)
    pooled = torch.randn(rows, POOLED, generator=generator)
    return [[text, {"pooled_output": pooled, **extra}]]


def latent(rows: int, size: int = 16, seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, size, size, generator=generator)


def adapter_config(pack: Any) -> Any:
    return pack.infinite_id_core.method.records.AdapterConfig(
        clip_width=CLIP_WIDTH, context_width=CONTEXT, recogniser="tiny", clip_model="tiny"
    )


def tiny_adapter(pack: Any, model: Any, seed: int = 9) -> Any:
    """A ``LoadedAdapter`` with random weights for the layers of ``model``."""
    import comfy.ops

    host = pack.infinite_id_core.hosts.comfyui
    widths = {layer.path: layer.width for layer in host.model_layers(model)}
    config = adapter_config(pack)
    with torch.device("meta"):
        shapes = pack.infinite_id_core.method.adapter.infinite_id_adapter(
            config, widths
        ).state_dict()
    build = pack.infinite_id_core.files.infinite_id_format.build_adapter
    weights = random_weights(shapes, seed, gain=1.0)
    return host.LoadedAdapter(build(config, weights, comfy.ops.manual_cast))


def tiny_identity(pack: Any, seed: int = 3, references: int = 1) -> Any:
    core = pack.infinite_id_core.method.face_clip
    generator = torch.Generator().manual_seed(seed)
    face = torch.nn.functional.normalize(torch.randn(references, 512, generator=generator), dim=1)
    return core.face_clip_identity(
        face=face,
        clip=torch.randn(references, 257, CLIP_WIDTH, generator=generator),
        weight=torch.ones(references),
        config=core.IdentityConfig(recogniser="tiny", clip_model="tiny"),
    )
