"""Which piece needs which, and the call that makes one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from .. import face_export, face_models
from . import adapter, export, faces, open_clip, side_by_side, unet, vae
from .pictures import Pictures, pictures
from .seen import seen

# In the order in which they are started when several could be: the longest first.
NEEDS: dict[str, tuple[str, ...]] = {
    "vae": (),  # renders the pictures, too
    "unet": ("vae",),
    "detector": (),
    "attributes": ("vae",),
    "recogniser": ("vae", "detector"),
    "open_clip": ("recogniser",),
    "photos": ("vae", "recogniser", "open_clip"),
    "scorer": ("recogniser",),
    "base": ("unet", "photos", "attributes", "scorer"),
    "adapter": ("base",),
    "entangled": ("base",),
}


def train_piece(name: str, folder: Path, threads: int) -> None:
    """Make one piece, or finish it, from the pieces it needs. `name`: a key of NEEDS."""
    torch.set_num_threads(threads)
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
            face_export.export_detector(face_models.train_detector(), part)
            part.replace(path)
    elif name == "photos":  # the trainer reads files, as anybody's
        for model_file in ("vae", "detector", "recogniser", "open_clip"):
            export.EXPORTS[model_file](folder)
        adapter.fill_caches(adapter.prepare(folder))
    elif name == "base":
        for model_file in export.BASE:
            export.EXPORTS[model_file](folder)
    elif name in ("adapter", "entangled"):
        adapter.run(folder, name, adapter.ENTANGLED if name == "entangled" else ())
    else:
        raise ValueError(f"Expected a piece of the microworld ({', '.join(NEEDS)}), got {name!r}.")


def with_needs(names: Iterable[str]) -> list[str]:
    """`names` and all that they need, each after what it needs."""
    wanted: set[str] = set()
    open_ = list(names)
    while open_:
        name = open_.pop()
        if name not in wanted:
            wanted.add(name)
            open_ += NEEDS[name]
    return [name for name in NEEDS if name in wanted]


def train_all(names: Iterable[str], folder: Path, *, jobs: int = 2, threads: int = 2) -> None:
    """Make pieces and what they need, side by side; see `side_by_side.run`."""
    side_by_side.run(with_needs(names), NEEDS, train_piece, folder, jobs=jobs, threads=threads)


def _seen(folder: Path) -> Pictures:
    model, data = export.autoencoder(folder), pictures(folder)
    return seen(folder, model, vae.latents(folder, model, data), data)
