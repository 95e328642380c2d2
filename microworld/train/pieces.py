"""Which model needs which, and the one call that trains it."""

from __future__ import annotations

from pathlib import Path

from .. import face_models, files
from . import faces, open_clip, unet, vae
from .pictures import pictures


def train_piece(name: str, folder: Path) -> None:
    """Train one model, or resume it, with what it needs before it. `name` as in `--only`."""
    if name == "vae":
        vae.refine_decoder(folder, vae.run(folder))
    elif name == "unet":
        unet.run(folder, vae.run(folder))
    elif name == "recogniser":
        faces.recogniser(folder, pictures(folder))
    elif name == "scorer":
        faces.scorer(folder, pictures(folder))
    elif name == "attributes":
        faces.attribute_reader(folder, pictures(folder))
    elif name == "open_clip":
        open_clip.run(folder, pictures(folder))
    elif name == "detector":
        if not files.DETECTOR.exists():
            face_models.export_detector(face_models.train_detector(), files.DETECTOR)
    else:
        raise ValueError(f"Expected a model of the microworld, got {name!r}.")
