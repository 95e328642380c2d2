"""Reference photos as tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .errors import ReferencePhotoError
from .prepare.photo import PhotoError, read_pixels


def read_photo(path: Path) -> Tensor:
    """A picture upright as ``[H, W, 3]`` in [0, 1]. Raises ``PhotoError``."""
    return torch.from_numpy(read_pixels(path).copy()).float() / 255.0


def read_reference(path: Path) -> Tensor:
    """``read_photo`` of a reference. Raises ``ReferencePhotoError``."""
    try:
        return read_photo(path)
    except PhotoError as error:
        raise ReferencePhotoError(
            path, f"the reference cannot be read: {error.reason} ({error.detail})."
        ) from error
