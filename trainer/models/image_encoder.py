"""E_clip of a configuration: open_clip's model of a file, or the embedded one."""

from __future__ import annotations

from pathlib import Path

from infinite_id_core.encoders.open_clip import (
    OpenClipVision,
    build_open_clip,
    check_open_clip,
    load_open_clip,
)
from infinite_id_core.errors import EncoderError
from infinite_id_core.packages import require

from ..files import sampled_sha256
from .source import MICROWORLD, source_of


def load_image_encoder(model: str, weights: str = "") -> OpenClipVision:
    """``model``: open_clip's name, with its file ``weights``, or ``microworld``. Raises as
    ``load_open_clip``."""
    if model != MICROWORLD:
        return load_open_clip(model, weights)
    from microworld.image_encoder import config_and_weights

    return build_open_clip(*config_and_weights(), MICROWORLD)


def check_image_encoder(model: str, weights: str = "") -> None:
    """Find the encoder, with names and shapes, without reading its weights.

    Raises as ``load_image_encoder``.
    """
    if model != MICROWORLD:
        check_open_clip(model, weights)


def clip_width(model: str) -> int:
    """D, without reading any weights. Raises ``EncoderError``."""
    if model == MICROWORLD:
        from microworld.config import OPEN_CLIP

        return int(OPEN_CLIP["vision_cfg"]["width"])
    open_clip = require("open_clip", "to read images with open_clip", "open_clip_torch")
    config = open_clip.get_model_config(model)
    if config is None:
        raise EncoderError(f"open_clip knows no model {model!r}.")
    return int(config["vision_cfg"]["width"])


def clip_fingerprint(model: str, weights: str = "") -> str:
    """Changes when the weights do. Raises ``FileMissingError``."""
    if model == MICROWORLD:
        return sampled_sha256(source_of(model, "open_clip").path)
    return f"{model} {sampled_sha256(Path(weights))}"
