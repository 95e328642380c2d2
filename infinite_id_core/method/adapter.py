"""An adapter: a projector, a K/V pair for every cross-attention layer (Eq. 4, 6), and with some
families a change of low rank of the UNet's attention."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FeatureError, IdentityMismatchError, ModelMismatchError
from ..sdxl.layers import CrossAttentionLayer
from .features import Feature, Reading, check_readings
from .identity import Identity
from .layer_parts import KeyValue, LowRank, LowRankShape, nest
from .projectors import Mappers, Projector
from .records import AdapterConfig, AdapterRecord

MakeProjector = Callable[[Any], Projector]
"""Makes a projector out of ``operations``."""


class Adapter(nn.Module):
    """A projector's parts, K/V pairs and low-rank parts, by the names of its ``state_dict``.

    ``operations`` supplies ``Linear`` and ``LayerNorm`` (a host hands in classes that cast and
    offload its way; the default is ``torch.nn``).
    """

    def __init__(
        self,
        config: AdapterRecord,
        make_projector: MakeProjector,
        widths: Mapping[str, int],
        operations: Any = nn,
        low_rank: Mapping[str, LowRankShape] | None = None,
    ) -> None:
        """``widths``: K/V width by canonical layer path (see ``layers.py``); ``low_rank``: see
        ``low_rank_parts``."""
        super().__init__()
        self.config = config
        self.make_projector = make_projector
        projector = make_projector(operations)
        # In a tuple: not registered. Its parts are, so that no name grows a prefix.
        self._projector = (projector,)
        parts = dict(projector.named_children())
        taken = {"layers", "low_rank"} & parts.keys()
        assert not taken and not list(projector.parameters(recurse=False)), (
            "a projector's weights lie in child modules of other names than 'layers', 'low_rank'"
        )
        for name, part in parts.items():
            self.add_module(name, part)
        self.layers = nn.Module()
        self._by_path: dict[str, KeyValue] = {}
        for path, width in widths.items():
            pair = KeyValue(config.context_width, width, operations)
            nest(self.layers, path, pair)
            self._by_path[path] = pair
        self._low_rank: dict[str, LowRank] = {}
        if low_rank:
            self.low_rank = nn.Module()
        for path, shape in (low_rank or {}).items():
            self._low_rank[path] = LowRank(shape, operations)
            nest(self.low_rank, path, self._low_rank[path])

    @property
    def projector(self) -> Projector:
        """What turns features into tokens."""
        return self._projector[0]

    @property
    def needs(self) -> Mapping[str, Reading]:
        """The features it reads of an identity, by name."""
        return self.projector.needs

    @property
    def widths(self) -> dict[str, int]:
        """K/V width by canonical layer path."""
        # Not the weight's shape: a host's layer may have no weight before a file is loaded.
        return {path: int(pair.to_k.out_features) for path, pair in self._by_path.items()}

    def key_value(self, path: str) -> KeyValue:
        """The K/V pair of one layer."""
        return self._by_path[path]

    @property
    def low_rank_parts(self) -> Mapping[str, LowRank]:
        """Its change of the UNet's own attention (a FaceID file's LoRA); empty for most families.

        By the layer that it changes: the canonical path of the transformer block, ``attn1`` or
        ``attn2``, and ``to_q``, ``to_k``, ``to_v`` or ``to_out.0``. The adapter only carries it:
        a host decides for which rows it acts, and how strongly. Those of ``attn2.to_k`` and
        ``attn2.to_v`` are for the text, not for the identity's own K/V.
        """
        return self._low_rank

    def tokens(
        self,
        identity: Identity,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """c_id of Eq. 4, of all references: ``[1, T, C]``.

        Computed where and in what the projector's weights are, or as ``device`` and ``dtype`` say.
        Raises ``IdentityMismatchError``, and ``FeatureError`` where it is not finite.
        """
        values = {name: feature.value for name, feature in self._read(identity).items()}
        placed = self._placed(values, device, dtype)
        return _finite(self.projector.of_person(placed, identity.weight), values)

    def null_tokens(
        self,
        identity: Identity,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """c_id of nobody, for guidance: ``[1, M, C]``. Else as ``tokens``."""
        values = {
            name: self._nobody(name, feature) for name, feature in self._read(identity).items()
        }
        placed = self._placed(values, device, dtype)
        return _finite(self.projector.of_nobody(placed, identity.weight), values)

    def token_weight(self, identity: Identity) -> Tensor:
        """Weight of each token of ``tokens``, ``[T]``."""
        return self.projector.token_weight(identity.weight)

    def _read(self, identity: Identity) -> dict[str, Feature]:
        return {name: identity.read_as(name, wanted) for name, wanted in self.needs.items()}

    def _nobody(self, name: str, feature: Feature) -> Tensor:
        """Nobody as one reference of a feature, as this family has it: ``[1, *shape]``."""
        said = self.projector.nobody.get(name)
        if said == "zeros":
            return torch.zeros_like(feature.value[:1])
        if said == "encoded" and feature.null is None:
            raise IdentityMismatchError(
                f"This adapter's guidance needs what {feature.reading.model} makes of an empty "
                f"picture, and the identity was made without it ({name} has no null). Encode the "
                "person again for this adapter."
            )
        return feature.null_value()

    def check_nobody(self, identity: Identity) -> None:
        """Raise ``IdentityMismatchError`` where the identity lacks what stands for nobody."""
        for name, feature in self._read(identity).items():
            self._nobody(name, feature)

    def _placed(
        self,
        values: Mapping[str, Tensor],
        device: torch.device | None,
        dtype: torch.dtype | None,
    ) -> dict[str, Tensor]:
        own = next(self.projector.parameters(), None)
        if own is not None:
            device, dtype = device or own.device, dtype or own.dtype
        return {name: value.to(device=device, dtype=dtype) for name, value in values.items()}

    def copy_text_projections(self, text: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Start each K/V pair as a copy of the frozen text K/V (3.2): ``{path: (k, v)}``."""
        with torch.no_grad():
            for path, pair in self._by_path.items():
                k, v = text[path]
                pair.to_k.weight.copy_(k)
                pair.to_v.weight.copy_(v)

    def rebuilt(self, tensors: Mapping[str, Tensor], operations: Any = nn) -> Adapter:
        """Another adapter of this kind, which holds ``tensors`` themselves."""
        return assembled(self.config, self.make_projector, tensors, operations)


def assembled(
    config: AdapterRecord,
    make_projector: MakeProjector,
    tensors: Mapping[str, Tensor],
    operations: Any = nn,
) -> Adapter:
    """An ``Adapter`` that holds ``tensors`` themselves (no copy), built without allocating.

    ``tensors`` by the names of the adapter's ``state_dict``.
    """
    with torch.device("meta"):
        # Frozen first: a tensor made in inference mode cannot become a trainable parameter.
        adapter = Adapter(
            config, make_projector, _widths(tensors), operations, _low_rank_shapes(tensors)
        )
        adapter.requires_grad_(False)
    adapter.load_state_dict(dict(tensors), assign=True)
    return adapter.requires_grad_(False)


def infinite_id_adapter(
    config: AdapterConfig, widths: Mapping[str, int], operations: Any = nn
) -> Adapter:
    """The paper's adapter, as it is before training: two mappers and the K/V pairs."""
    return Adapter(config, partial(Mappers, config), widths, operations)


# --- what goes together ----------------------------------------------------------------------


def check_identity(adapter: Adapter, identity: Identity) -> None:
    """Raise ``IdentityMismatchError`` where identity and adapter come from other encoders.

    A raw embedding fits an adapter that wants it normed, and a feature of another name fits where
    it was read as the adapter reads it.
    """
    found = {}
    for name, wanted in adapter.needs.items():
        feature = identity.fitting(name, wanted)
        if feature is not None:
            found[name] = feature.reading.towards(wanted)
    check_readings("the adapter", adapter.needs, "the identity", found)
    adapter.check_nobody(identity)


def check_layers(
    adapter_widths: Mapping[str, int],
    context_width: int,
    layers: Sequence[CrossAttentionLayer],
) -> None:
    """Raise ``ModelMismatchError`` where the adapter's layers are not the UNet's."""
    model_widths = {layer.path: layer.width for layer in layers}
    if dict(adapter_widths) == model_widths and layers[0].context_width == context_width:
        return
    missing = sorted(model_widths.keys() - adapter_widths.keys())
    extra = sorted(adapter_widths.keys() - model_widths.keys())
    other = sorted(
        path
        for path in model_widths.keys() & adapter_widths.keys()
        if model_widths[path] != adapter_widths[path]
    )
    raise ModelMismatchError(
        f"The adapter was trained for another UNet: it has {len(adapter_widths)} layers and "
        f"context width {context_width}, the model has {len(model_widths)} and "
        f"{layers[0].context_width}. Missing in the adapter: {_some(missing)}; not in the model: "
        f"{_some(extra)}; of another width: {_some(other)}. Use a checkpoint of the kind the "
        "adapter was trained on, or an adapter trained for this model."
    )


def _too_large(features: Mapping[str, Tensor]) -> str:
    largest = ", ".join(f"{name} {float(x.abs().max()):.3g}" for name, x in features.items())
    return (
        "The adapter's projector made numbers that are not finite out of this identity, whose "
        f"features reach up to: {largest}; a few dozen is usual. Encode the person again, or check "
        "the adapter with 'python -m trainer inspect'."
    )


def _finite(tokens: Tensor, features: Mapping[str, Tensor]) -> Tensor:
    """``tokens``. Raises ``FeatureError`` where they are not finite."""
    # Tensors without data have nothing to look at.
    if not tokens.is_meta and not bool(tokens.isfinite().all()):
        raise FeatureError(_too_large(features))
    return tokens


def _widths(tensors: Mapping[str, Any]) -> dict[str, int]:
    widths = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"layers\.(.+)\.to_k\.weight", name)
        if match:
            widths[match[1]] = int(tensor.shape[0])
    return widths


def _low_rank_shapes(tensors: Mapping[str, Any]) -> dict[str, LowRankShape]:
    shapes = {}
    for name, down in tensors.items():
        match = re.fullmatch(r"low_rank\.(.+)\.down\.weight", name)
        if match:
            up = tensors[f"low_rank.{match[1]}.up.weight"]
            shapes[match[1]] = LowRankShape(int(down.shape[1]), int(down.shape[0]), len(up))
    return shapes


def _some(names: list[str], limit: int = 3) -> str:
    if not names:
        return "none"
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
