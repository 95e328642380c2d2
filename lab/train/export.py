"""From checkpoints to the files that are committed: `python -m lab export`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from microworld import files
from microworld.portraits import ATTRIBUTE_SIZES

from .. import face_export
from ..onnx_graph import Graph
from ..scoring import ATTRIBUTES, SCORER
from . import adapter, names, vae
from .faces import AttributeReader, Scorer, WithTraits
from .loop import load_checkpoint
from .text import used_ids
from .unet import TextToImage
from .vae import Autoencoder, widen


def weights_of(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """A checkpoint's best weights: the average where one was kept.

    Raises FileNotFoundError if this model was not trained.
    """
    saved = load_checkpoint(folder / f"{name}.pt")
    return dict(saved["average"] or saved["model"])


def autoencoder(folder: Path) -> Autoencoder:
    """The trained autoencoder, with the refined decoder where there is one."""
    model = vae.run(folder)
    if (folder / "vae_decoder.pt").exists():
        model.load_state_dict(weights_of(folder, "vae_decoder"))
    return model.eval()


def text_to_image(folder: Path) -> TextToImage:
    """The trained UNet and text encoders."""
    model = TextToImage()
    model.load_state_dict(weights_of(folder, "unet"))
    return model.eval()


def export_vae(folder: Path) -> Path:
    """weights/vae.safetensors in ComfyUI's TAESD keys, at TAESD's full width."""
    state = widen(autoencoder(folder).state_dict())
    state = {name: tensor for name, tensor in state.items() if name.startswith("taesd_")}
    return _save(files.quantise(files.trimmed(state)), files.VAE)


def export_unet(folder: Path) -> Path:
    """weights/unet.safetensors in ldm keys, and weights/text_encoders.safetensors."""
    state = weights_of(folder, "unet")
    part = {key[5:]: value for key, value in state.items() if key.startswith("unet.")}
    _save(files.quantise(names.unet_state(part)), files.UNET)
    part = {key[5:]: value for key, value in state.items() if key.startswith("text.")}
    return _save(_compact(names.text_state(part)), files.TEXT_ENCODERS)


def export_open_clip(folder: Path) -> Path:
    """weights/open_clip.safetensors in open_clip's own keys."""
    state = weights_of(folder, "open_clip")
    part = {key[5:]: value for key, value in state.items() if key.startswith("clip.")}
    return _save(_compact(part), files.OPEN_CLIP)


def _compact(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Quantised, with the vocabulary's rows and their ids; the row of unknown words is dropped."""
    ids = torch.tensor(used_ids(), dtype=torch.int32)
    rows = {key: value for key, value in state.items() if key.endswith("token_embedding.weight")}
    stored = files.quantise({key: value for key, value in state.items() if key not in rows})
    for key, value in rows.items():
        stored[key] = value[: len(ids)].half().contiguous()
        stored[key.replace(".weight", ".ids")] = ids.clone()
    return stored


def export_recogniser(folder: Path) -> Path:
    """weights/insightface/.../rec.onnx, in the form insightface's ArcFaceONNX takes."""
    model = WithTraits()
    model.load_state_dict(weights_of(folder, "recogniser"))
    return _export(
        lambda path: face_export.export_recogniser(model.recogniser.eval(), path), files.RECOGNISER
    )


def export_scorer(folder: Path) -> Path:
    """weights/scorer.onnx, same form, in no insightface pack: it must never condition anything."""
    model = Scorer()
    model.load_state_dict(weights_of(folder, "scorer"))
    return _export(lambda path: face_export.export_recogniser(model.eval(), path), SCORER)


def export_attributes(folder: Path) -> Path:
    """weights/attributes.onnx: RGB [b, 3, 128, 128] in -1..1 to logits [b, 19]."""
    model = AttributeReader()
    model.load_state_dict(weights_of(folder, "attributes"))
    model.eval()

    def write(path: Path) -> None:
        graph = Graph("microworld attributes")
        image = graph.input("image", ["batch", 3, 128, 128])
        logits = face_export.vector(graph, model.body, model.embed, image)
        graph.output("logits", logits, ["batch", sum(ATTRIBUTE_SIZES)])
        graph.save(path)

    return _export(write, ATTRIBUTES)


def export_detector(folder: Path) -> Path:
    """weights/insightface/.../det.onnx, SCRFD-shaped; trained by `face_models`."""
    return _export(
        lambda path: path.write_bytes((folder / "det.onnx").read_bytes()), files.DETECTOR
    )


EXPORTS: dict[str, Callable[[Path], Path]] = {
    "vae": export_vae,
    "unet": export_unet,
    "open_clip": export_open_clip,
    "recogniser": export_recogniser,
    "scorer": export_scorer,
    "attributes": export_attributes,
    "detector": export_detector,
    "adapter": adapter.export,
}
BASE = tuple(name for name in EXPORTS if name != "adapter")


def _save(state: dict[str, torch.Tensor], path: Path) -> Path:
    tensors = {key: value.contiguous() for key, value in state.items()}
    return _export(lambda part: save_file(tensors, part), path)


def _export(write: Callable[[Path], object], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part" + path.suffix)
    write(part)
    part.replace(path)
    return path
