"""Seeded random weights for the pieces whose trained files are absent.

Each tensor is drawn on the CPU from a generator of its own, keyed by (seed, name): the same on
every machine, whatever the order of the tensors.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import files
from .config import CONTEXT_WIDTH, FACE_TOKENS, OPEN_CLIP
from .files import Weights

Draw = Callable[[Mapping[str, torch.Tensor], int], Weights]


def seeded_state_dict(reference: Mapping[str, torch.Tensor], seed: int) -> Weights:
    """Draw float32 weights with the names and shapes of `reference` (meta tensors will do).

    Norms start as the identity, biases at zero, embeddings at deviation 1, everything else at
    1 / sqrt(fan in). Numbers that are not floating point are left out.
    """
    return {
        name: _draw(name, tensor.shape, seed)
        for name, tensor in reference.items()
        if tensor.is_floating_point()
    }


def _draw(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    if len(shape) < 2 and not name.endswith("embedding"):
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    deviation = 1.0 if "embedding" in name else 1 / math.sqrt(math.prod(shape[1:]))
    return torch.randn(shape, generator=_generator(seed, name)) * deviation


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "little"))


def unet_state_dict(reference: Mapping[str, torch.Tensor], seed: int = 0) -> Weights:
    """Random weights for a UNet of `reference`'s shape, in ldm names.

    The latent is led past the network's body to its output, so that the untrained net takes its
    own (normalised) input for the noise. Sampling then stays near unit size instead of drifting
    off with whatever an arbitrary net calls noise; the body adds what prompt and identity do.
    """
    state = seeded_state_dict(reference, seed)
    for name, tensor in state.items():
        # The ends of residual branches: small, as training would begin from zero.
        if name.endswith(("out_layers.3.weight", "proj_out.weight")):
            tensor.mul_(0.5)
    first, last = state["input_blocks.0.0.weight"], state["out.2.weight"]
    last_block = max(int(name.split(".")[1]) for name in state if name.startswith("output_blocks"))
    skip = state[f"output_blocks.{last_block}.0.skip_connection.weight"]
    width = skip.shape[0]
    for channel in range(first.shape[1]):
        for sign, row in ((1.0, 2 * channel), (-1.0, 2 * channel + 1)):
            first[row].zero_()[channel, 1, 1] = sign
            skip[row].zero_()[skip.shape[1] - width + row] = 1.0
            # silu(x) - silu(-x) = x: a pair of channels carries the value through the activation.
            last[channel, row].zero_()[1, 1] = sign
    last[:, 2 * first.shape[1] :].mul_(0.3)
    return state


def text_state_dict(reference: Mapping[str, torch.Tensor], seed: int = 0) -> Weights:
    """Random weights for both text encoders."""
    return seeded_state_dict(reference, seed)


def vae_state_dict(reference: Mapping[str, torch.Tensor], seed: int = 0) -> Weights:
    """Random weights for a TAESD-shaped autoencoder; its last layer is centred on mid grey."""
    state = seeded_state_dict(reference, seed)
    last = max(
        (name for name in state if name.startswith("taesd_decoder.") and name.endswith("bias")),
        key=lambda name: int(name.split(".")[1]),
    )
    state[last] = torch.full_like(state[last], 0.5)
    for name, tensor in state.items():
        if name.endswith("conv.4.weight"):  # the end of each residual branch
            tensor.mul_(0.5)
    return state


def adapter_config() -> dict[str, Any]:
    """Values of the `AdapterConfig` of an untrained embedded adapter."""
    return {
        "clip_width": OPEN_CLIP["vision_cfg"]["width"],
        "context_width": CONTEXT_WIDTH,
        "face_tokens": FACE_TOKENS,
        "recogniser": f"{files.INSIGHTFACE_PACK}/{files.RECOGNISER.stem}",
        "clip_model": files.INSIGHTFACE_PACK,
    }


def open_clip_state_dict(seed: int = 0) -> Weights:
    """Random weights of open_clip's own CLIP class in the shape of config.OPEN_CLIP."""
    return seeded_state_dict(_open_clip_reference(), seed) | {"logit_scale": torch.tensor(4.6)}


def open_clip_config_and_weights(seed: int = 0) -> tuple[dict[str, Any], Weights]:
    """The tiny open_clip model: keyword arguments for `open_clip.CLIP`, and its state dict.

    Read from weights/open_clip.safetensors where that exists, random otherwise. Raises
    MicroWeightsError if the file does not fit the config.
    """
    config = copy.deepcopy(OPEN_CLIP)
    if not files.OPEN_CLIP.is_file():
        return config, open_clip_state_dict(seed)
    state = files.read_weights(files.OPEN_CLIP)
    files.check_names(files.OPEN_CLIP, state, _open_clip_reference())
    return config, state


def _open_clip_reference() -> Mapping[str, torch.Tensor]:
    import open_clip

    with torch.device("meta"):
        state: Mapping[str, torch.Tensor] = open_clip.CLIP(**copy.deepcopy(OPEN_CLIP)).state_dict()
    return state
