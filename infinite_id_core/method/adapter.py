"""An adapter: a projector, and a K/V pair for every cross-attention layer (Eq. 4, 6)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FeatureError, ModelMismatchError
from ..sdxl.layers import CrossAttentionLayer
from .features import Reading, check_readings
from .identity import Identity
from .projectors import Mappers, Projector
from .records import AdapterConfig, AdapterRecord

MakeProjector = Callable[[Any], Projector]
"""Makes a projector out of ``operations``."""


class KeyValue(nn.Module):
    """K'_id and V'_id projections of one cross-attention layer, without bias as SDXL's own."""

    def __init__(self, context_width: int, width: int, operations: Any = nn) -> None:
        super().__init__()
        self.to_k = operations.Linear(context_width, width, bias=False)
        self.to_v = operations.Linear(context_width, width, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """c_id ``[B, M, C]`` -> K'_id, V'_id ``[B, M, width]``."""
        return self.to_k(tokens), self.to_v(tokens)


class Adapter(nn.Module):
    """A projector's parts and K/V pairs; its ``state_dict`` has the names of the adapter's file.

    ``operations`` supplies ``Linear`` and ``LayerNorm`` (a host hands in classes that cast and
    offload its way; the default is ``torch.nn``).
    """

    def __init__(
        self,
        config: AdapterRecord,
        make_projector: MakeProjector,
        widths: Mapping[str, int],
        operations: Any = nn,
    ) -> None:
        """``widths``: K/V width by canonical layer path (see ``layers.py``)."""
        super().__init__()
        self.config = config
        self.make_projector = make_projector
        projector = make_projector(operations)
        # In a tuple: not registered. Its parts are, so that no name grows a prefix.
        self._projector = (projector,)
        parts = dict(projector.named_children())
        assert "layers" not in parts and not list(projector.parameters(recurse=False)), (
            "a projector's weights lie in child modules of other names than 'layers'"
        )
        for name, part in parts.items():
            self.add_module(name, part)
        self.layers = nn.Module()
        self._by_path: dict[str, KeyValue] = {}
        for path, width in widths.items():
            pair = KeyValue(config.context_width, width, operations)
            _nest(self.layers, path, pair)
            self._by_path[path] = pair

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

    def tokens(
        self,
        identity: Identity,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """c_id of Eq. 4, all references side by side: ``[1, n * M, C]``.

        Computed where and in what the projector's weights are, or as ``device`` and ``dtype`` say.
        Raises ``IdentityMismatchError``, and ``FeatureError`` where it is not finite.
        """
        read = {name: identity[name].read_as(wanted) for name, wanted in self.needs.items()}
        return self._projected({n: feature.value for n, feature in read.items()}, device, dtype)

    def null_tokens(
        self,
        identity: Identity,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """c_id of nobody, for guidance: ``[1, M, C]``. Else as ``tokens``.

        One reference is enough: attention over copies of the same tokens equals attention over
        one.
        """
        read = {name: identity[name].read_as(wanted) for name, wanted in self.needs.items()}
        nobody = {n: feature.null_value() for n, feature in read.items()}
        return self._projected(nobody, device, dtype)

    def token_weight(self, identity: Identity) -> Tensor:
        """Weight of each token of ``tokens``, ``[n * M]``: its reference's."""
        return identity.weight.repeat_interleave(self.projector.tokens_per_reference)

    def _projected(
        self,
        features: Mapping[str, Tensor],
        device: torch.device | None,
        dtype: torch.dtype | None,
    ) -> Tensor:
        own = next(self.projector.parameters(), None)
        if own is not None:
            device, dtype = device or own.device, dtype or own.dtype
        tokens: Tensor = self.projector(
            {name: value.to(device=device, dtype=dtype) for name, value in features.items()}
        )
        assert tokens.shape[1] == self.projector.tokens_per_reference, "as the projector says"
        # Tensors without data have nothing to look at.
        if not tokens.is_meta and not bool(tokens.isfinite().all()):
            raise FeatureError(_too_large(features))
        return tokens.reshape(1, -1, tokens.shape[-1])

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
        adapter = Adapter(config, make_projector, _widths(tensors), operations)
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

    A raw embedding fits an adapter that wants it normed.
    """
    found = {
        name: feature.reading.towards(adapter.needs[name])
        for name, feature in identity.features.items()
        if name in adapter.needs
    }
    check_readings("the adapter", adapter.needs, "the identity", found)


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


def _widths(tensors: Mapping[str, Any]) -> dict[str, int]:
    widths = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"layers\.(.+)\.to_k\.weight", name)
        if match:
            widths[match[1]] = int(tensor.shape[0])
    return widths


def _nest(root: nn.Module, path: str, leaf: nn.Module) -> None:
    """Register ``leaf`` under a dotted path, so that state_dict keys spell the path out."""
    *parents, last = path.split(".")
    for name in parents:
        child = root._modules.get(name)
        if child is None:
            child = nn.Module()
            root.add_module(name, child)
        root = child
    root.add_module(last, leaf)


def _some(names: list[str], limit: int = 3) -> str:
    if not names:
        return "none"
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
