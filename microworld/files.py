"""Where each embedded file lives, and how its tensors are stored.

Three storage tricks keep the safetensors files small, and all are undone on reading:

- `<name>.scale` beside `<name>`: the tensor is stored as int8 or float8 and multiplied by the scale
  (broadcastable; one number a row).
- `<...>token_embedding.ids` [n] beside `<...>token_embedding.weight` [n, width]: only these rows of
  the vocabulary are stored; every other token gets their mean.
- `<name>.shape` beside `<name>`: the tensor is padded with zeros to this shape.

Nothing is ever written here at run time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from .config import TEXT_L

Weights = dict[str, torch.Tensor]

WEIGHTS = Path(__file__).resolve().parent / "weights"
UNET = WEIGHTS / "unet.safetensors"
VAE = WEIGHTS / "vae.safetensors"
TEXT_ENCODERS = WEIGHTS / "text_encoders.safetensors"
OPEN_CLIP = WEIGHTS / "open_clip.safetensors"
ADAPTER = WEIGHTS / "adapter.safetensors"

INSIGHTFACE_ROOT = WEIGHTS / "insightface"
INSIGHTFACE_PACK = "microworld"
FACE_MODELS = INSIGHTFACE_ROOT / "models" / INSIGHTFACE_PACK
DETECTOR = FACE_MODELS / "det.onnx"
RECOGNISER = FACE_MODELS / "rec.onnx"

VOCABULARY = int(TEXT_L["vocab_size"])

_SCALE = ".scale"
_SHAPE = ".shape"
_IDS = "token_embedding.ids"
_ROWS = "token_embedding.weight"


class MicroWeightsError(ValueError):
    """An embedded file does not hold the tensors its model needs."""


def read_weights(path: Path) -> Weights:
    """Read an embedded file as float32, with scales and vocabularies expanded.

    Raises FileNotFoundError, or safetensors' own error for a damaged file.
    """
    return expand_vocabularies(padded(dequantise(load_file(path))))


def check_names(path: Path, found: Iterable[str], wanted: Iterable[str]) -> None:
    """Raise MicroWeightsError if the tensors' names differ from the wanted ones."""
    found, wanted = set(found), set(wanted)
    if found != wanted:
        missing, extra = sorted(wanted - found)[:3], sorted(found - wanted)[:3]
        raise MicroWeightsError(
            f"{path}: expected {len(wanted)} tensors, found {len(found)}; missing: {missing}, "
            f"unknown: {extra}. The file is older or newer than the code: update both together."
        )


def dequantise(state: Mapping[str, torch.Tensor]) -> Weights:
    """Undo `quantise`; floating-point tensors become float32, others keep their type."""
    return {
        name: _dequantised(tensor, state.get(name + _SCALE))
        for name, tensor in state.items()
        if not (name.endswith(_SCALE) and name.removesuffix(_SCALE) in state)
    }


def _dequantised(tensor: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    if scale is not None:
        return tensor.float() * scale.float()
    return tensor.float() if tensor.is_floating_point() else tensor


def quantise(state: Mapping[str, torch.Tensor], *, smallest: int = 1024) -> Weights:
    """Store matrices and kernels of at least `smallest` values as int8 with one scale a row.

    The rest becomes float16. The error of a weight is at most 1/254 of its row's largest.
    """
    stored: Weights = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            stored[name] = tensor
        elif tensor.ndim < 2 or tensor.numel() < smallest:
            stored[name] = tensor.half()
        else:
            largest = tensor.abs().flatten(1).amax(1).clamp_min(1e-12).float()
            scale = (largest / 127).reshape(-1, *[1] * (tensor.ndim - 1))
            stored[name] = (tensor.float() / scale).round().to(torch.int8)
            stored[name + _SCALE] = scale
    return stored


def trimmed(state: Mapping[str, torch.Tensor]) -> Weights:
    """Leave out the zeros at the end of each tensor's first two dimensions; see `padded`."""
    stored: Weights = {}
    for name, tensor in state.items():
        cut = tensor
        for dimension in range(min(2, tensor.ndim)):
            others = [d for d in range(tensor.ndim) if d != dimension]
            used = (tensor != 0).any(dim=others) if others else tensor != 0
            last = int(used.nonzero().max()) + 1 if bool(used.any()) else 1
            cut = cut.narrow(dimension, 0, last)
        stored[name] = cut.contiguous()
        if cut.shape != tensor.shape:
            stored[name + _SHAPE] = torch.tensor(tensor.shape)
    return stored


def padded(state: Mapping[str, torch.Tensor]) -> Weights:
    """Undo `trimmed`."""
    whole: Weights = {}
    for name, tensor in state.items():
        if name.endswith(_SHAPE):
            continue
        shape = state.get(name + _SHAPE)
        whole[name] = tensor if shape is None else tensor.new_zeros(shape.tolist())
        if shape is not None:
            whole[name][tuple(slice(0, n) for n in tensor.shape)] = tensor
    return whole


def compact_vocabularies(state: Mapping[str, torch.Tensor], ids: torch.Tensor) -> Weights:
    """Keep only the rows `ids` [n] of every full token embedding."""
    ids = ids.to(torch.int32)
    stored = dict(state)
    for name in state:
        if name.endswith(_ROWS):
            stored[name] = state[name][ids.long()].contiguous()
            stored[name.removesuffix(_ROWS) + _IDS] = ids.clone()
    return stored


def expand_vocabularies(state: Mapping[str, torch.Tensor]) -> Weights:
    """Undo `compact_vocabularies`: each embedding gets its VOCABULARY rows back."""
    expanded = {name: tensor for name, tensor in state.items() if not name.endswith(_IDS)}
    for name, ids in state.items():
        if name.endswith(_IDS):
            rows_name = name.removesuffix(_IDS) + _ROWS
            rows = state[rows_name]
            table = rows.mean(0, keepdim=True).repeat(VOCABULARY, 1)
            table[ids.long()] = rows
            expanded[rows_name] = table
    return expanded
