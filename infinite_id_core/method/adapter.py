"""The trainable part: two mappers and a K/V pair per cross-attention layer (Eq. 4, 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from ..errors import FeatureError, ModelMismatchError, OptionError
from ..sdxl.layers import CrossAttentionLayer
from .identity import CLIP_LAYER, EMBEDDING, ClipLayer, Embedding, Identity, check_match
from .identity import identity_record as _identity_record

FACE_HIDDEN = 1024
MAX_WIDTH = 2**14  # far above any encoder's; what a file claims is checked before it is read


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Everything recorded with an adapter. Raises ``OptionError`` for impossible values."""

    clip_width: int
    """D: hidden width of the image encoder (1280 ViT-H, 1664 ViT-bigG)."""
    context_width: int
    """C: width of the UNet's text context (2048 for SDXL)."""
    recogniser: str
    """Face recogniser it was trained with, e.g. ``buffalo_l/w600k_r50``."""
    clip_model: str
    """Image encoder it was trained with, e.g. ``ViT-H-14``."""
    clip_layer: ClipLayer = "last"
    embedding: Embedding = "normed"
    face_width: int = 512
    face_tokens: int = 4
    """T: tokens the face embedding becomes."""
    base_model: str = ""
    """The SDXL it was trained on."""
    training_step: int = 0
    dataset_fingerprint: str = ""
    licence_note: str = ""

    def __post_init__(self) -> None:
        for name in ("clip_width", "context_width", "face_width", "face_tokens"):
            if not 1 <= getattr(self, name) <= MAX_WIDTH:
                raise OptionError(
                    f"{name} must lie in [1, {MAX_WIDTH}], got {getattr(self, name)}."
                )
        if self.training_step < 0:
            raise OptionError(f"training_step must not be negative, got {self.training_step}.")
        if self.embedding not in EMBEDDING or self.clip_layer not in CLIP_LAYER:
            raise OptionError(
                f"embedding must be one of {EMBEDDING} and clip_layer one of {CLIP_LAYER}; got "
                f"{self.embedding!r} and {self.clip_layer!r}."
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values for the file's metadata."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> AdapterConfig:
        """Inverse of ``to_json``. Raises ``OptionError`` naming what is wrong."""
        return cast(AdapterConfig, dataclass_from_json(cls, values))


class Mapper(nn.Module):
    """Linear, GELU, Linear, LayerNorm; the output is cut into ``tokens`` tokens of width C."""

    def __init__(
        self, width: int, hidden: int, tokens: int, context_width: int, operations: Any = nn
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.proj_in = operations.Linear(width, hidden)
        self.proj_out = operations.Linear(hidden, tokens * context_width)
        self.norm = operations.LayerNorm(context_width)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, ..., width]`` -> ``[n, M, C]``: M tokens in, or one vector made into ``tokens``."""
        x = self.proj_out(gelu(self.proj_in(x)))
        return cast(Tensor, self.norm(x.view(x.shape[0], -1, x.shape[-1] // self.tokens)))


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
    """Mappers and K/V pairs; its ``state_dict`` is exactly the adapter file's tensors.

    ``operations`` supplies ``Linear`` and ``LayerNorm`` (a host hands in classes that cast and
    offload its way; the default is ``torch.nn``).
    """

    def __init__(
        self, config: AdapterConfig, widths: Mapping[str, int], operations: Any = nn
    ) -> None:
        """``widths``: K/V width by canonical layer path (see ``layers.py``)."""
        super().__init__()
        self.config = config
        c = config.context_width
        self.clip_mapper = Mapper(config.clip_width, config.clip_width, 1, c, operations)
        self.face_mapper = Mapper(config.face_width, FACE_HIDDEN, config.face_tokens, c, operations)
        self.layers = nn.Module()
        self._by_path: dict[str, KeyValue] = {}
        for path, width in widths.items():
            pair = KeyValue(c, width, operations)
            _nest(self.layers, path, pair)
            self._by_path[path] = pair

    @property
    def widths(self) -> dict[str, int]:
        """K/V width by canonical layer path."""
        # Not the weight's shape: a host's layer may have no weight before a file is loaded.
        return {path: int(pair.to_k.out_features) for path, pair in self._by_path.items()}

    def key_value(self, path: str) -> KeyValue:
        """The K/V pair of one layer."""
        return self._by_path[path]

    def tokens(self, face: Tensor, clip: Tensor) -> Tensor:
        """c_id of Eq. 4 for n references side by side.

        ``face [n, 512]``, ``clip [n, 257, D]`` -> ``[1, n * (257 + T), C]``.
        """
        per_reference = torch.cat([self.clip_mapper(clip), self.face_mapper(face)], dim=1)
        return per_reference.reshape(1, -1, self.config.context_width)

    def token_weight(self, identity: Identity) -> Tensor:
        """Weight of each token of ``tokens``: ``[n * (257 + T)]``, its reference's weight."""
        count = identity.clip.shape[1] + self.config.face_tokens
        return identity.weight.repeat_interleave(count)

    def copy_text_projections(self, text: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Start each K/V pair as a copy of the frozen text K/V (3.2): ``{path: (k, v)}``."""
        with torch.no_grad():
            for path, pair in self._by_path.items():
                k, v = text[path]
                pair.to_k.weight.copy_(k)
                pair.to_v.weight.copy_(v)


def finite_tokens(adapter: Adapter, face: Tensor, clip: Tensor) -> Tensor:
    """``Adapter.tokens`` of an identity; raises ``FeatureError`` where they are not finite."""
    tokens = adapter.tokens(face, clip)
    if not bool(tokens.isfinite().all()):
        raise FeatureError(
            "The adapter's mappers made numbers that are not finite out of this identity: its "
            f"largest face feature is {float(face.abs().max()):.3g}, its largest image feature "
            f"{float(clip.abs().max()):.3g}; a few dozen is usual. Encode the person again, or "
            "check the adapter with 'python -m trainer inspect'."
        )
    return tokens


def check_identity(adapter: AdapterConfig, identity: Identity) -> None:
    """Raise ``IdentityMismatchError`` where identity and adapter come from other encoders."""
    wanted = {
        "recogniser": adapter.recogniser,
        "embedding": adapter.embedding,
        "clip_model": adapter.clip_model,
        "clip_layer": adapter.clip_layer,
        "clip_width": adapter.clip_width,
        "face_width": adapter.face_width,
    }
    check_match("the adapter", dict(wanted), "the identity", _identity_record(identity))


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


def dataclass_from_json(cls: type[Any], values: Mapping[str, Any]) -> Any:
    """Build a flat config dataclass from JSON values, checking names and types.

    Raises ``OptionError`` naming what is missing, unknown or of the wrong type.
    """
    known = {f.name: f for f in fields(cls)}
    required = {n for n, f in known.items() if f.default is f.default_factory}
    missing, unknown = sorted(required - values.keys()), sorted(values.keys() - known.keys())
    if missing or unknown:
        raise OptionError(
            f"configuration lacks {missing or 'nothing'} and has unknown {unknown or 'nothing'}"
        )
    for name, value in values.items():
        wanted = int if known[name].type == "int" else str
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise OptionError(f"configuration entry {name!r} must be {wanted.__name__}: {value!r}")
    return cls(**values)


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
