"""The embedded open_clip model: its shape and its weights."""

from __future__ import annotations

import copy
from typing import Any

import torch

from . import files
from .config import OPEN_CLIP
from .files import Weights


def config_and_weights() -> tuple[dict[str, Any], Weights]:
    """Keyword arguments for `open_clip.CLIP`, and its state dict.

    Raises MicroWeightsError if the file does not fit the config.
    """
    import open_clip

    with torch.device("meta"):
        wanted = open_clip.CLIP(**copy.deepcopy(OPEN_CLIP)).state_dict()
    state = files.read_weights(files.OPEN_CLIP)
    files.check_names(files.OPEN_CLIP, state, wanted)
    return copy.deepcopy(OPEN_CLIP), state
