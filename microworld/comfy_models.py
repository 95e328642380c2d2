"""The embedded SDXL-shaped model as ComfyUI's own objects.

Everything is built from ComfyUI's classes and set up as its checkpoint loader does it, so every
node of the host (samplers, LoRA, clip skip, ControlNet, tiled VAE, previews) works on it unchanged.
ComfyUI is imported inside the functions: this module costs nothing until a model is wanted.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import files
from .config import TEXT_G, TEXT_L, UNET

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE

SDXL_LATENT_SCALE = 0.13025  # as ComfyUI's loader of TAESD for SDXL: latents are TAESD's own

# Builders below end in a patcher with `cached_patcher_init`: how ComfyUI makes the model anew, for
# another GPU or without dynamic VRAM. It calls them by position, or with `disable_dynamic=True`.


def load_unet() -> ModelPatcher:
    """The tiny UNet, as `UNETLoader` would give it.

    The weights are built once per process and shared; each call returns a clone of its own.
    """
    return _unet().clone()


def load_clip() -> CLIP:
    """Both tiny text encoders, as `DualCLIPLoader` would give them; shared like `load_unet`'s."""
    return _clip().clone()


@lru_cache(maxsize=1)
def load_vae() -> VAE:
    """The tiny autoencoder, as `VAELoader` would give TAESD; one object per process."""
    return _built_vae()


def plain_layers() -> Any:
    """ComfyUI's `operations` with torch's own layers, which have their weights from the start.

    Its Linear and Embedding have none until a file is loaded where dynamic VRAM is on, so a model
    made of them has no names and shapes to hold a file against. For models on the meta device.
    """
    import comfy.ops

    base = comfy.ops.disable_weight_init
    layers = {
        name: getattr(torch.nn, name)
        for name, layer in vars(base).items()
        if isinstance(layer, type) and hasattr(torch.nn, name)
    }
    return type("PlainLayers", (base,), layers)


def _weights(path: Path, reference: Mapping[str, torch.Tensor]) -> files.Weights:
    """What a file holds for a model of `reference`'s names. Raises MicroWeightsError."""
    state = files.read_weights(path)
    files.check_names(path, state, reference)
    return state


def _as(state: files.Weights, dtype: torch.dtype) -> files.Weights:
    """In the model's own type, which a layer made without weights would not convert to."""
    return {name: tensor.to(dtype) for name, tensor in state.items()}


@lru_cache(maxsize=1)
def _unet() -> ModelPatcher:
    return _built_unet()


def _built_unet(disable_dynamic: bool = False) -> ModelPatcher:
    from comfy import model_management, model_patcher, supported_models

    class MicroSDXL(supported_models.SDXL):
        unet_config = UNET
        unet_extra_config = {"num_heads": -1, "num_head_channels": UNET["num_head_channels"]}

    state = _weights(files.UNET, _unet_reference())
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
    model.load_model_weights(_as(state, dtype), "")
    plain = model_patcher.ModelPatcher
    kind = plain if disable_dynamic else getattr(model_patcher, "CoreModelPatcher", plain)
    patcher: ModelPatcher = kind(model, load_device=load_device, offload_device=offload_device)
    patcher.cached_patcher_init = (_built_unet, ())
    return patcher


@lru_cache(maxsize=1)
def _clip() -> CLIP:
    return _built_clip()


def _built_clip(**options: Any) -> CLIP:
    """`options` go to ComfyUI's CLIP, whose newer releases know `disable_dynamic`."""
    import comfy.sd
    import folder_paths
    from comfy import model_management, sdxl_clip, supported_models_base

    state = _weights(files.TEXT_ENCODERS, _text_reference())
    state = _as(state, model_management.text_encoder_dtype(model_management.text_encoder_device()))
    # Newer releases may load the model where they make it, so the weights have to be there.
    at_once = "state_dict" in inspect.signature(comfy.sd.CLIP).parameters
    clip = comfy.sd.CLIP(
        supported_models_base.ClipTarget(sdxl_clip.SDXLTokenizer, sdxl_clip.SDXLClipModel),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=sum(tensor.numel() for tensor in state.values()),
        model_options=_text_options(),
        **({"state_dict": state} if at_once else {}),
        **options,
    )
    if not at_once:
        clip.load_sd(state, full_model=True)
    clip.patcher.cached_patcher_init = (_clip_patcher, ())
    return clip


def _clip_patcher(**options: Any) -> ModelPatcher:
    return _built_clip(**options).patcher


def _built_vae() -> VAE:
    import comfy.sd

    state = _weights(files.VAE, _vae_reference())
    state["vae_scale"] = torch.tensor(SDXL_LATENT_SCALE)
    state["vae_shift"] = torch.tensor(0.0)
    vae = comfy.sd.VAE(sd=state)
    vae.patcher.cached_patcher_init = (_vae_patcher, ())
    return vae


def _vae_patcher(disable_dynamic: bool = False) -> ModelPatcher:
    # ComfyUI's VAE has no choice of patcher, and takes only the model out of this one.
    return _built_vae().patcher


def _text_options() -> dict[str, object]:
    # ComfyUI lays these over its own CLIP-L and CLIP-G configs.
    return {"clip_l_model_config": TEXT_L, "clip_g_model_config": TEXT_G}


def _unet_reference() -> Mapping[str, torch.Tensor]:
    return unet_reference(UNET)


def unet_reference(config: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
    """Names and shapes of a UNet's weights, as tensors on the meta device."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    options = {"num_heads": -1, **config, "device": "meta", "operations": plain_layers()}
    state: Mapping[str, torch.Tensor] = UNetModel(**options).state_dict()
    return state


def _text_reference() -> Mapping[str, torch.Tensor]:
    from comfy import sdxl_clip

    model = sdxl_clip.SDXLClipModel(
        device="meta",
        dtype=torch.float32,
        model_options={**_text_options(), "custom_operations": plain_layers()},
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
