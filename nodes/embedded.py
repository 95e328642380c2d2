"""What the loaders give for the embedded default, which goes with the Micro Model node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..infinite_id_core.encoders.open_clip import OpenClipVision, build_open_clip
from ..infinite_id_core.faces.pack import Provider, load_face_models
from ..microworld import files, image_encoder

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
    config, weights = image_encoder.config_and_weights()
    return build_open_clip(config, weights, files.INSIGHTFACE_PACK)


def adapter() -> LoadedAdapter:
    """The adapter that goes with the Micro Model; raises as ``load_adapter``."""
    from ..infinite_id_core.hosts.comfyui_adapter import load_adapter

    return load_adapter(files.ADAPTER)
