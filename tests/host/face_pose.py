"""A made InstantID and a ControlNet for it, as tiny as the model they are for."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.ops
import numpy as np
import torch

import nodes as host_nodes
from microworld.comfy_models import plain_layers
from microworld.people import reference_picture

from ..core import published_files as files
from .tiny_sdxl import CONTEXT, UNET_CONFIG, random_weights, tiny_model

TOKENS = 16
_NOT_OF_CONTROL = ("out_channels", "transformer_depth_output")


def photo() -> torch.Tensor:
    """``[1, H, W, 3]``: a face that the embedded models find."""
    return torch.from_numpy(np.array(reference_picture())).float()[None] / 255


def made_kit(pack: Any, model: Any, family: str = "raw face", recogniser: str | None = None) -> Any:
    """What Loader gives for a made file of a family, with the embedded face models."""
    core = pack.infinite_id_core
    layers = tuple(core.hosts.comfyui.model_layers(model))
    numbered = [
        files.Layer(number=2 * i + 1, path=layer.path, width=layer.width)
        for i, layer in enumerate(layers)
    ]
    sizes = files.Sizes(
        layers=tuple(numbered), context=CONTEXT, width=40, heads=1, face_heads=1, tokens=TOKENS,
        face_hidden=32, rank=2, states=24,
    )  # fmt: skip
    formats = importlib.import_module(f"{core.__name__}.files.adapters")
    options = formats.AdapterOptions(
        layers=layers, image_encoder="made-H", recogniser=recogniser or "microworld/rec"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "adapter.bin")
        files.write(path, "nested pickle", files.made(family, sizes, 6), sizes)
        adapter = formats.read_adapter(path, comfy.ops.manual_cast, options)
    return importlib.import_module(f"{pack.__name__}.nodes.kit").Kit(
        adapter=core.hosts.comfyui.LoadedAdapter(adapter),
        face_analysis=importlib.import_module(f"{pack.__name__}.nodes.embedded").face_models(
            "CPU", 640
        ),
        clip_vision=None,
    )


def made_control_net(seed: int = 21, context: int = CONTEXT) -> Any:
    """A ControlNet of the host with random weights, for the tiny model."""
    config = {k: v for k, v in UNET_CONFIG.items() if k not in _NOT_OF_CONTROL}
    made = {"hint_channels": 3, **config, "context_dim": context}
    twin = comfy.cldm.cldm.ControlNet(**made, device="meta", operations=plain_layers())
    network = comfy.cldm.cldm.ControlNet(**made, operations=comfy.ops.disable_weight_init)
    weights = random_weights(twin.state_dict(), seed)
    for name in weights:
        if name.startswith("input_hint_block") and name.endswith("weight"):
            weights[name] *= 3.0  # eight layers in a row would leave nothing of a drawing
    network.load_state_dict(weights)
    return comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"))


def load_made_instantid(pack: Any) -> None:
    """Make a node ``MadeInstantID`` of the host: a photo's kit, identity and ControlNet."""

    class MadeInstantID:
        RETURN_TYPES = ("INFINITE_ID", "IDENTITY", "CONTROL_NET")
        FUNCTION = "make"

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {"photo": ("IMAGE", {})}}

        def make(self, photo: torch.Tensor) -> tuple[Any, Any, Any]:
            kit = made_kit(pack, tiny_model())
            return kit, kit.person(photo)[0], made_control_net()

    host_nodes.NODE_CLASS_MAPPINGS["MadeInstantID"] = MadeInstantID
