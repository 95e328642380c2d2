"""Which model needs which, and the one call that trains it."""

from __future__ import annotations

from pathlib import Path

from .. import face_models
from . import adapter, export, faces, open_clip, unet, vae
from .pictures import Pictures, pictures
from .seen import seen


def train_piece(name: str, folder: Path) -> None:
    """Train one model, or resume it, with what it needs before it. `name` as in `--only`."""
    if name == "vae":
        model, data = vae.run(folder), pictures(folder)
        vae.refine_decoder(folder, model, data, vae.latents(folder, model, data))
    elif name == "unet":
        unet.run(folder, vae.run(folder))
    elif name == "recogniser":
        faces.recogniser(folder, _seen(folder))
    elif name == "scorer":
        faces.scorer(folder, _seen(folder))
    elif name == "attributes":
        faces.attribute_reader(folder, pictures(folder))
    elif name == "open_clip":
        open_clip.run(folder, _seen(folder))
    elif name == "detector":
        path = folder / "det.onnx"
        if not path.exists():
            part = path.with_suffix(".part")
            face_models.export_detector(face_models.train_detector(), part)
            part.replace(path)
    elif name in ("adapter", "entangled"):
        for piece in export.BASE:  # the trainer reads files, as anybody's
            export.EXPORTS[piece](folder)
        adapter.run(folder, name, adapter.ENTANGLED if name == "entangled" else ())
    else:
        raise ValueError(f"Expected a model of the microworld, got {name!r}.")


def _seen(folder: Path) -> Pictures:
    train_piece("detector", folder)
    model, data = export.autoencoder(folder), pictures(folder)
    return seen(folder, model, vae.latents(folder, model, data), data)
