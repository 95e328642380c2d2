"""The training pictures as the pipeline sees them, for what must recognise people in practice.

Exact landmarks and clean pixels never reach a recogniser: it gets the detector's landmarks, a tenth
of the eyes' distance off, and pictures that came out of the autoencoder.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from ..scoring import find_landmarks
from .loop import load_checkpoint, save_atomic
from .pictures import EACH, Pictures
from .vae import Autoencoder

SIZES = (128, 256)  # pixels the detector works at, in turns: worse than the 320 of practice
_BATCH = 8


def seen(folder: Path, vae: Autoencoder, encoded: torch.Tensor, data: Pictures) -> Pictures:
    """`data` with each person's first picture through the autoencoder, and landmarks as found.

    `encoded` are the pictures' latents. Where the detector `folder/det.onnx` finds nothing, the
    exact landmarks stay. What it makes is kept in `folder/seen.pt`.
    """
    path = folder / "seen.pt"
    saved = load_checkpoint(path) if path.exists() else {"decoded": _decoded(vae, encoded[::EACH])}
    pictures = data.pictures.clone()
    pictures[::EACH] = saved["decoded"]
    if "landmarks" not in saved:
        saved["landmarks"] = _found(folder / "det.onnx", pictures, data.landmarks)
        save_atomic(path, saved)
    return replace(data, pictures=pictures, landmarks=saved["landmarks"])


@torch.no_grad()
def _decoded(vae: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
    """float16 [N, 4, 16, 16] to uint8 [N, 128, 128, 3]."""
    parts = []
    for batch in tqdm(latents.split(_BATCH), desc="decode"):
        made = vae.decode(batch.float().contiguous(memory_format=torch.channels_last))
        # BCHW -> BHWC
        parts.append((made.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous())
    return torch.cat(parts)


def _found(detector: Path, pictures: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """The surest face's five points in each picture, [N, 5, 2] in its pixels."""
    found, missed = exact.clone(), 0
    for row, picture in enumerate(tqdm(pictures.numpy(), desc="landmarks", mininterval=10)):
        points = find_landmarks(picture, detector=str(detector), size=SIZES[row % len(SIZES)])
        if points is None:
            missed += 1
        else:
            found[row] = torch.from_numpy(points)
    print(f"no face was found in {missed} of {len(pictures)} pictures")
    return found
