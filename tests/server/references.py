"""The two reference photos the `sdxl` workflows name, made from scikit-image's astronaut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

from tools.comfy_live import ComfyServer
from tools.workflow_parts import REFERENCE, REFERENCE_2


def upload_references(server: ComfyServer, folder: Path) -> None:
    """Put both into the server's input folder under the names the workflows use."""
    photo = data.astronaut()
    # A second person: mirrored, darker, with the colours exchanged.
    other = np.clip(photo[:, ::-1, [1, 0, 2]] * 0.8, 0, 255).astype(np.uint8)
    for name, pixels in ((REFERENCE, photo), (REFERENCE_2, other)):
        path = folder / name
        Image.fromarray(np.ascontiguousarray(pixels)).save(path)
        assert server.upload(path) == name
