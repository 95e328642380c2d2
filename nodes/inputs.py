"""What a node may be given, by its own schema.

ComfyUI checks that a link's type fits, and turns literals into numbers and texts; of an input of
any other type it takes whatever JSON value a prompt holds, 0.3.64 also of a combo, and what comes
out of another pack's "any" output is checked by nobody. So the nodes look themselves.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from numbers import Integral, Real
from typing import Any

import torch
from comfy_api.latest import io

from ..infinite_id_core.errors import OptionError, WrongInputError, shown

Execute = Callable[..., io.NodeOutput]


def checked(execute: Execute) -> Execute:
    """A node's ``execute`` that refuses inputs its schema does not allow, before it does anything.

    It raises ``WrongInputError`` for a value of another kind, ``OptionError`` for a number out of
    range. Which choices a combo has is for the node itself: files come and go.
    """
    signature = inspect.signature(execute)

    @functools.wraps(execute)
    def run(cls: type[io.ComfyNode], *args: Any, **kwargs: Any) -> io.NodeOutput:
        given = dict(_given(signature.bind(cls, *args, **kwargs)))
        for described in (cls.SCHEMA or cls.define_schema()).inputs:
            if described.id in given:
                _check(described, given[described.id])
        return execute(cls, *args, **kwargs)

    return run


def _given(bound: inspect.BoundArguments) -> Iterator[tuple[str, Any]]:
    for name, value in bound.arguments.items():
        if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            yield from value.items()
        else:
            yield name, value


def _check(described: Any, value: Any) -> None:
    if value is None and (described.optional or getattr(described, "lazy", None)):
        return
    kind = described.get_io_type()
    words, fits = _KINDS[kind]
    if not fits(value):
        where = "Set it in the node." if kind in _VALUES else f"Connect an output of type {kind}."
        raise WrongInputError(f"{described.id}: expected {words}, got {shown(value)}. {where}")
    low, high = (getattr(described, name, None) for name in ("min", "max"))
    if low is not None and high is not None and not low <= value <= high:
        raise OptionError(f"{described.id} must lie in [{low}, {high}], got {shown(value)}.")


# --- kinds -----------------------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _is_model(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("model", "model_options", "clone"))


def _is_adapter(value: Any) -> bool:
    from ..infinite_id_core.hosts.comfyui_adapter import LoadedAdapter

    return isinstance(value, LoadedAdapter)


def _is_kit(value: Any) -> bool:
    from .kit import Kit

    return isinstance(value, Kit)


def _is_identity(value: Any) -> bool:
    from ..infinite_id_core.method.identity import Identity

    return isinstance(value, Identity)


def _is_faces(value: Any) -> bool:
    from ..infinite_id_core.faces.align import AlignedFace

    return isinstance(value, tuple) and all(isinstance(one, AlignedFace) for one in value)


def _is_region(value: Any) -> bool:
    from ..infinite_id_core.faces.detail import FaceRegion

    return isinstance(value, FaceRegion)


def _is_encoder(value: Any) -> bool:
    return callable(getattr(value, "encode_image", None))


def _is_control_net(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("copy", "set_cond_hint", "get_control"))


def _is_conditioning(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, (list, tuple)) and len(one) == 2 and isinstance(one[1], dict)
        for one in value
    )


def _is_latent(value: Any) -> bool:
    return isinstance(value, dict) and torch.is_tensor(value.get("samples"))


def _is_anything(value: Any) -> bool:
    return True


_VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "STRING": ("a text", lambda value: isinstance(value, str)),
    "COMBO": ("one of its choices", lambda value: isinstance(value, str)),
    "INT": ("a whole number", lambda value: isinstance(value, Integral)),
    "FLOAT": ("a number", _is_number),
    "BOOLEAN": ("true or false", lambda value: isinstance(value, Integral)),
}
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **_VALUES,
    "IMAGE": ("pictures", torch.is_tensor),
    "MASK": ("a mask", torch.is_tensor),
    "MODEL": ("a model", _is_model),
    "LATENT": ("a latent", _is_latent),
    "CONDITIONING": ("a conditioning", _is_conditioning),
    "CONTROL_NET": ("a ControlNet", _is_control_net),
    "CLIP_VISION": ("an image encoder", _is_encoder),
    # Of several packs' loaders: what is used of them is checked where it is used.
    "FACEANALYSIS": ("face models", _is_anything),
    "IDENTITY": ("an identity", _is_identity),
    "INFINITE_ID": ("what Infinite-ID Loader gives", _is_kit),
    "INFINITE_ID_ADAPTER": ("an adapter", _is_adapter),
    "INFINITE_ID_FACES": ("aligned faces", _is_faces),
    "INFINITE_ID_REGION": ("the region of Face Crop", _is_region),
}
