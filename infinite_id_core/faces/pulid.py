"""What PuLID's image encoder is shown of a face: facexlib's 512 px crop, in grey, on white.

The background is found by facexlib's face parsing where that package and its weights are there;
nothing is downloaded. Without it the crop stays whole, in grey.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .align import similarity, warped
from .pixels import Array

PULID_SIZE = 512  # pixels
# The five landmarks in facexlib's 512 px crop (facexlib, utils/face_restoration_helper.py).
_TEMPLATE = np.array(
    [
        [192.98138, 239.94708],
        [318.90277, 240.1936],
        [256.63416, 314.01935],
        [201.26117, 371.41043],
        [313.08905, 371.15118],
    ]
)
_OUTSIDE = (135 / 255, 133 / 255, 132 / 255)  # facexlib's colour beyond the picture
_BACKGROUND = (0, 7, 8, 9, 14, 15, 16, 18)  # BiSeNet's: ears' surroundings, neck, cloth, hat, ...
_GREY = (0.299, 0.587, 0.114)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

NO_PARSING = (
    "face parsing: not installed (facexlib with parsing_bisenet.pth), so the photo's background "
    "stays in what PuLID sees"
)


def pulid_picture(photo: Tensor, landmarks: Array) -> Tensor:
    """``[H, W, C]`` in [0, 1] and the five landmarks -> ``[512, 512, 3]``."""
    matrix = similarity(landmarks, _TEMPLATE)
    crop = warped(photo, matrix, PULID_SIZE, _OUTSIDE)
    grey = (crop * torch.tensor(_GREY)).sum(dim=-1, keepdim=True).expand(-1, -1, 3)
    parser = face_parser()
    if parser is None:
        return grey.contiguous()
    background = _background(parser, crop)
    return torch.where(background[..., None], torch.ones_like(grey), grey)


def parsing_told() -> str:
    """What a user is to know of it; empty where the parsing is there."""
    return "" if face_parser() is not None else NO_PARSING


@lru_cache(maxsize=1)
def face_parser() -> Any | None:
    """facexlib's BiSeNet, None where the package or its weights are not there."""
    if importlib.util.find_spec("facexlib") is None:
        return None
    package = importlib.import_module("facexlib")
    folder = Path(str(package.__file__)).parent / "weights"
    if not (folder / "parsing_bisenet.pth").is_file():
        return None
    parsing = importlib.import_module("facexlib.parsing")
    return parsing.init_parsing_model(model_name="bisenet", device="cpu")


@torch.no_grad()
def _background(parser: Any, crop: Tensor) -> Tensor:
    """``[512, 512, 3]`` -> bool ``[512, 512]``."""
    mean, std = torch.tensor(_MEAN), torch.tensor(_STD)
    pixels = ((crop - mean) / std).permute(2, 0, 1)[None]
    labels = parser(pixels)[0].argmax(dim=1)[0]
    return torch.isin(labels, torch.tensor(_BACKGROUND))
