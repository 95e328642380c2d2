"""What the loaders give for the embedded default, which goes with the Micro Model node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..infinite_id_core.encoders.open_clip import OpenClipVision, build_open_clip
from ..infinite_id_core.faces.pack import Provider, load_face_models
from ..microworld import comfy_models, files, random_weights

if TYPE_CHECKING:
    from ..infinite_id_core.hosts.comfyui_adapter import LoadedAdapter

EMBEDDED = "microworld (embedded)"


def face_models(provider: Provider, detector_size: int) -> Any:
    """Its detector and recogniser; raises as ``load_face_models``."""
    return load_face_models(
        files.INSIGHTFACE_PACK, [files.INSIGHTFACE_ROOT], provider, detector_size
    )


def open_clip() -> OpenClipVision:
    """Its tiny open_clip model; raises as ``build_open_clip``."""
    config, weights = random_weights.open_clip_config_and_weights()
    return build_open_clip(config, weights, files.INSIGHTFACE_PACK)


def adapter() -> LoadedAdapter:
    """The adapter that goes with the Micro Model: the trained file, else seeded random weights."""
    import comfy.ops

    from ..infinite_id_core.files.infinite_id_format import build_adapter
    from ..infinite_id_core.hosts.comfyui import model_layers
    from ..infinite_id_core.hosts.comfyui_adapter import LoadedAdapter, load_adapter
    from ..infinite_id_core.method.adapter import infinite_id_adapter
    from ..infinite_id_core.method.records import AdapterConfig

    if files.ADAPTER.is_file():
        return load_adapter(files.ADAPTER)
    config = AdapterConfig(**random_weights.adapter_config())
    widths = {layer.path: layer.width for layer in model_layers(comfy_models.load_unet())}
    with torch.device("meta"):
        shapes = infinite_id_adapter(config, widths).state_dict()
    tensors = random_weights.seeded_state_dict(shapes, seed=0)
    return LoadedAdapter(build_adapter(config, tensors, comfy.ops.manual_cast))
