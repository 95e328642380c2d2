"""What a new run takes over from another adapter (``adapter.start_from``).

An adapter of ours gives all of its weights. A published one gives the K/V pairs of its
cross-attention layers, and a mapper where it has one of the same layers that reads the same
feature: FaceID's MLP is our face mapper, IP-Adapter's full model our image mapper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from infinite_id_core.errors import ModelMismatchError
from infinite_id_core.files.adapter_options import AdapterOptions
from infinite_id_core.files.adapters import read_adapter
from infinite_id_core.method.adapter import Adapter, infinite_id_adapter
from infinite_id_core.method.face_clip import CLIP, FACE
from infinite_id_core.method.records import AdapterConfig, PublishedRecord
from infinite_id_core.sdxl.layers import CrossAttentionLayer
from infinite_id_core.sdxl.published_layers import SDXL_LAYERS

_SAME = ("clip_width", "context_width", "face_tokens", "recogniser", "clip_model", "clip_layer",
         "embedding")  # fmt: skip
_MAPPERS = {FACE: "face_mapper", CLIP: "clip_mapper"}
# Of a published projector, by the feature: our layers with the names of its own.
_PARTS = {
    FACE: {"proj_in": "proj.0", "proj_out": "proj.2", "norm": "norm"},
    CLIP: {"proj_in": "proj.0", "proj_out": "proj.2", "norm": "proj.3"},
}


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """Weights to begin with, and what they are."""

    tensors: Mapping[str, Tensor]
    """By the names of our adapter's ``state_dict``; what is not here begins fresh."""
    told: str
    """What was taken over, in numbers."""


def beginning(
    path: str | Path, recorded: AdapterConfig, layers: Sequence[CrossAttentionLayer]
) -> Beginning:
    """What ``adapter.start_from`` gives a run that records ``recorded``, for its UNet's layers.

    Raises ``ModelMismatchError`` where an adapter of ours is another one than this run makes, or
    was made for another UNet; subclasses of ``FileError``.
    """
    ours = _layers_of(layers)
    before = read_adapter(path, options=AdapterOptions(layers=ours))
    widths = {layer.path: layer.width for layer in layers}
    if not isinstance(before.config, PublishedRecord):
        _check_same(path, before, recorded, widths)
        state = before.state_dict()
        return Beginning(tensors=state, told=f"all {len(state)} tensors of an Infinite-ID adapter")
    if before.widths != widths:
        raise ModelMismatchError(f"{path}: it was made for a UNet of another shape.")
    with torch.device("meta"):
        wanted = infinite_id_adapter(recorded, widths).state_dict()
    taken = {n: t for n, t in before.state_dict().items() if n.startswith("layers.")}
    pairs = len(taken)
    said = [f"{pairs} of {sum(n.startswith('layers.') for n in wanted)} K/V tensors"]
    for feature, mapper in _MAPPERS.items():
        found = _mapper(before, recorded, feature, wanted)
        taken |= found
        count = sum(name.startswith(f"{mapper}.") for name in wanted)
        said.append(f"{mapper} {len(found)} of {count}" + (" (fresh)" if not found else ""))
    return Beginning(tensors=taken, told=f"{before.config.family}: {', '.join(said)}")


def _layers_of(layers: Sequence[CrossAttentionLayer]) -> tuple[CrossAttentionLayer, ...] | None:
    """None for SDXL's own, whose files are told from other generations' by name."""
    shapes = [(layer.path, layer.width, layer.context_width) for layer in layers]
    published = [(layer.path, layer.width, layer.context_width) for layer in SDXL_LAYERS]
    return None if sorted(shapes) == sorted(published) else tuple(layers)


def _check_same(
    path: str | Path, before: Adapter, recorded: AdapterConfig, widths: Mapping[str, int]
) -> None:
    earlier, now = before.config.to_json(), recorded.to_json()
    wrong = [n for n in _SAME if earlier.get(n) != now[n]]
    if wrong or before.widths != widths:
        pairs = [f"{n}: {earlier.get(n)!r}, now {now[n]!r}" for n in wrong]
        raise ModelMismatchError(
            f"{path}: cannot go on from this adapter "
            f"({'; '.join(pairs) or 'it was made for a UNet of another shape'})."
        )


def _mapper(
    before: Adapter, recorded: AdapterConfig, feature: str, wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A published projector's layers as our mapper of a feature; none where any differs, or where
    it reads the feature of another model or in another way."""
    reading, ours = before.needs.get(feature), recorded.needs[feature]
    if reading is None or (reading.model, reading.output) != (ours.model, ours.output):
        return {}
    state, found = before.state_dict(), {}
    for own, theirs in _PARTS[feature].items():
        for kind in ("weight", "bias"):
            name = f"{_MAPPERS[feature]}.{own}.{kind}"
            tensor = state.get(f"image_proj.{theirs}.{kind}")
            if tensor is None or tensor.shape != wanted[name].shape:
                return {}
            found[name] = tensor
    return found
