"""The embedded SDXL-shaped model as ComfyUI's own objects.

Everything is built from ComfyUI's classes and set up as its checkpoint loader does it, so every
node of the host (samplers, LoRA, clip skip, ControlNet, tiled VAE, previews) works on it unchanged.
ComfyUI is imported inside the functions: this module costs nothing until a model is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import files, random_weights
from .config import TEXT_G, TEXT_L, UNET

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE

SDXL_LATENT_SCALE = 0.13025  # as ComfyUI's loader of TAESD for SDXL: latents are TAESD's own


def load_unet(seed: int = 0) -> ModelPatcher:
    """The tiny UNet, as `UNETLoader` would give it. `seed` matters only without a trained file.

    The weights are built once per process and shared; each call returns a clone of its own.
    """
    return _unet(seed).clone()


def load_clip(seed: int = 0) -> CLIP:
    """Both tiny text encoders, as `DualCLIPLoader` would give them; shared like `load_unet`'s."""
    return _clip(seed).clone()


@lru_cache(maxsize=2)
def load_vae(seed: int = 0) -> VAE:
    """The tiny autoencoder, as `VAELoader` would give TAESD; one object per process."""
    import comfy.sd

    state = _weights(files.VAE, _vae_reference(), random_weights.vae_state_dict, seed)
    state["vae_scale"] = torch.tensor(SDXL_LATENT_SCALE)
    state["vae_shift"] = torch.tensor(0.0)
    return comfy.sd.VAE(sd=state)


def _weights(
    path: Path, reference: Mapping[str, torch.Tensor], draw: random_weights.Draw, seed: int
) -> files.Weights:
    """The trained file where it exists, random weights otherwise. Raises MicroWeightsError."""
    if not path.is_file():
        return draw(reference, seed)
    state = files.read_weights(path)
    files.check_names(path, state, reference)
    return state


@lru_cache(maxsize=2)
def _unet(seed: int) -> ModelPatcher:
    import comfy.model_patcher
    from comfy import model_management, supported_models

    class MicroSDXL(supported_models.SDXL):
        unet_config = UNET
        unet_extra_config = {"num_heads": -1, "num_head_channels": UNET["num_head_channels"]}

    state = _weights(files.UNET, _unet_reference(), random_weights.unet_state_dict, seed)
    load_device = model_management.get_torch_device()
    offload_device = model_management.unet_offload_device()
    config = MicroSDXL(UNET)
    # As comfy.sd.load_diffusion_model_state_dict.
    supported = list(config.supported_inference_dtypes)
    dtype = model_management.unet_dtype(
        model_params=sum(tensor.numel() for tensor in state.values()), supported_dtypes=supported
    )
    config.set_inference_dtype(
        dtype, model_management.unet_manual_cast(dtype, load_device, supported)
    )
    model = config.get_model(state, "").to(offload_device)
    model.load_model_weights(dict(state), "")
    return comfy.model_patcher.ModelPatcher(
        model, load_device=load_device, offload_device=offload_device
    )


@lru_cache(maxsize=2)
def _clip(seed: int) -> CLIP:
    import comfy.sd
    import folder_paths
    from comfy import sdxl_clip, supported_models_base

    state = _weights(files.TEXT_ENCODERS, _text_reference(), random_weights.text_state_dict, seed)
    clip = comfy.sd.CLIP(
        supported_models_base.ClipTarget(sdxl_clip.SDXLTokenizer, sdxl_clip.SDXLClipModel),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=sum(tensor.numel() for tensor in state.values()),
        model_options=_text_options(),
    )
    clip.load_sd(state, full_model=True)
    return clip


def _text_options() -> dict[str, object]:
    # ComfyUI lays these over its own CLIP-L and CLIP-G configs.
    return {"clip_l_model_config": TEXT_L, "clip_g_model_config": TEXT_G}


def _unet_reference() -> Mapping[str, torch.Tensor]:
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    model = UNetModel(**UNET, num_heads=-1, device="meta", operations=comfy.ops.disable_weight_init)
    return model.state_dict()


def _text_reference() -> Mapping[str, torch.Tensor]:
    from comfy import sdxl_clip

    model = sdxl_clip.SDXLClipModel(
        device="meta", dtype=torch.float32, model_options=_text_options()
    )
    # The logit scales belong to contrastive training; no node reads them.
    return {
        name: tensor for name, tensor in model.state_dict().items() if "logit_scale" not in name
    }


def _vae_reference() -> Mapping[str, torch.Tensor]:
    from comfy.taesd.taesd import TAESD

    with torch.device("meta"):
        state = TAESD().state_dict()
    return {name: tensor for name, tensor in state.items() if name.startswith("taesd_")}
