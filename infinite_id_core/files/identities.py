"""Identity files: version 1 holds the paper's two features, version 2 any.

Version 2 is written only for what version 1 cannot hold. Neither holds a photo.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, NotWrittenError, OptionError, WrongShapeError
from ..method.face_clip import (
    CLIP_TOKENS,
    FACE_WIDTH,
    IdentityConfig,
    face_clip_config,
    face_clip_identity,
)
from ..method.features import MAX_DIMENSIONS, MAX_WIDTH, Feature, Reading
from ..method.identity import Identity, check_names, check_weights
from ..method.records import record_from_json
from .checked import (
    MAX_TENSORS,
    Shapes,
    check_format,
    check_shapes,
    check_sizes,
    config_of,
    shapes_of,
    version_of,
    write_checked,
)
from .safetensors_file import SafetensorsFile, open_safetensors

IDENTITY_FORMAT = "infinite-id-identity"
IDENTITY_VERSION = 1
"""Of an identity of the paper's two features."""
FEATURES_VERSION = 2

MAX_REFERENCES = 4096
MAX_FEATURES = 16
MAX_TEXT = 200  # characters of a model's name, an output's, a cut's


def read_identity(path: str | Path) -> Identity:
    """Read an identity file of either version. Raises a subclass of ``FileError``."""
    path = Path(path)
    with open_safetensors(path) as file:
        check_format(path, file.header, IDENTITY_FORMAT)
        version = version_of(path, file.header, FEATURES_VERSION)
        values = config_of(path, file.header)
        try:
            return (_read_1 if version == IDENTITY_VERSION else _read_2)(file, values)
        except OptionError as error:
            raise ConfigError(path, f"bad identity configuration: {error}") from error


def write_identity(path: str | Path, identity: Identity, *, exclusive: bool = False) -> None:
    """Write an identity file atomically. It holds biometric features, and no photo.

    ``exclusive`` writes only where no file of this name is, whoever else writes at the moment.
    Raises ``NotFiniteError``, ``NotWrittenError`` or, with ``exclusive``, ``NameTakenError``; a
    file that was there before stays.
    """
    config = face_clip_config(identity)
    content = _content_2(path, identity) if config is None else _content_1(identity, config)
    _check_writable(path, identity, content.tensors)
    write_checked(
        path, content.tensors, content.config,
        format_name=IDENTITY_FORMAT, version=content.version, exclusive=exclusive,
    )  # fmt: skip


class _Content(NamedTuple):
    """What a file holds."""

    version: int
    tensors: dict[str, Tensor]
    config: dict[str, Any]


def _check_writable(path: str | Path, identity: Identity, tensors: Mapping[str, Tensor]) -> None:
    """Nothing is written that could not be read again. Raises ``NotWrittenError``."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if identity.references > MAX_REFERENCES or size > MAX_TENSORS // 2:
        raise NotWrittenError(
            path, f"not written: {identity.references} references ({size} bytes) are more than a "
            f"file takes ({MAX_REFERENCES}, {MAX_TENSORS // 2} bytes). Average some of them first."
        )  # fmt: skip


def _stored(value: Tensor) -> Tensor:
    """In half precision what is in half precision, all else in full."""
    return value if value.dtype == torch.float16 else value.float()


def _references(path: Path, shapes: Shapes) -> int:
    """How many references a file says it holds. Raises ``WrongShapeError``."""
    n = shapes["weight"][0] if len(shapes.get("weight", ())) == 1 else 1
    if not 1 <= n <= MAX_REFERENCES:
        raise WrongShapeError(path, f"holds {n} references; expected 1 to {MAX_REFERENCES}.")
    return n


def _weight(file: SafetensorsFile) -> Tensor:
    """Read before the features, which may be large. Raises ``ConfigError``."""
    weight = file.tensor("weight", torch.float32)
    try:
        check_weights(weight)
    except OptionError as error:
        raise ConfigError(file.path, str(error)) from error
    return weight


# --- version 1 -------------------------------------------------------------------------------


def _read_1(file: SafetensorsFile, values: Mapping[str, Any]) -> Identity:
    config: IdentityConfig = record_from_json(IdentityConfig, values)
    shapes = shapes_of(file.header)
    check_shapes(file.path, shapes, _wanted_1(file.path, shapes))
    check_sizes(file)
    weight = _weight(file)
    face, clip = file.tensor("face", torch.float32), file.tensor("clip")
    return face_clip_identity(face=face, clip=clip, weight=weight, config=config)


def _wanted_1(path: Path, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Every tensor of an identity of as many references and as wide features."""
    n = _references(path, shapes)
    clip = shapes.get("clip", (n, CLIP_TOKENS, 1))
    if len(clip) != 3:
        raise WrongShapeError(
            path, f"clip has shape {list(clip)}; expected [{n}, {CLIP_TOKENS}, encoder's width]."
        )
    if clip[2] > MAX_WIDTH:
        raise WrongShapeError(
            path, f"clip is {clip[2]} wide; expected at most {MAX_WIDTH}, as image encoders are."
        )
    return {"face": (n, FACE_WIDTH), "clip": (n, CLIP_TOKENS, clip[2]), "weight": (n,)}


def _content_1(identity: Identity, config: IdentityConfig) -> _Content:
    tensors = {
        "face": identity["face"].value.float(),
        "clip": _stored(identity["clip"].value),
        "weight": identity.weight.float(),
    }
    return _Content(IDENTITY_VERSION, tensors, asdict(config))


# --- version 2 -------------------------------------------------------------------------------


def _read_2(file: SafetensorsFile, values: Mapping[str, Any]) -> Identity:
    readings = _readings(values)
    shapes = shapes_of(file.header)
    check_shapes(file.path, shapes, _wanted_2(file.path, readings, shapes))
    check_sizes(file)
    weight = _weight(file)
    features = {
        name: Feature(
            reading=reading,
            value=file.tensor(f"{name}.value"),
            null=file.tensor(f"{name}.null") if f"{name}.null" in shapes else None,
        )
        for name, reading in readings.items()
    }
    return Identity(features=features, weight=weight, name=values.get("name", ""))


def _readings(values: Mapping[str, Any]) -> dict[str, Reading]:
    """The readings of a configuration. Raises ``OptionError`` naming what is wrong."""
    features = values.get("features")
    if not values.keys() <= {"features", "name"} or not isinstance(values.get("name", ""), str):
        raise OptionError(f"expected features and a name, found {sorted(values)[:MAX_FEATURES]}")
    if not isinstance(features, dict) or not 1 <= len(features) <= MAX_FEATURES:
        raise OptionError(f"features must be an object of 1 to {MAX_FEATURES} entries")
    check_names(features)
    return {name: _reading(name, value) for name, value in features.items()}


def _reading(name: str, value: Any) -> Reading:
    required = {"model", "output", "shape"}
    if not isinstance(value, dict) or not required <= value.keys() <= {*required, "cut"}:
        raise OptionError(f"the feature {name!r} must have model, output, shape and cut")
    shape = value["shape"]
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise OptionError(f"the shape of {name!r} must be at most {MAX_DIMENSIONS} whole numbers")
    texts = {key: text for key, text in value.items() if key != "shape"}
    if not all(isinstance(text, str) and len(text) <= MAX_TEXT for text in texts.values()):
        raise OptionError(
            f"{sorted(texts)} of {name!r} must be texts of at most {MAX_TEXT} characters"
        )
    return Reading(shape=tuple(shape), **texts)


def _wanted_2(
    path: Path, readings: Mapping[str, Reading], shapes: Shapes
) -> dict[str, tuple[int, ...]]:
    """Every tensor of so many references read so; nulls only where there are any."""
    n = _references(path, shapes)
    wanted: dict[str, tuple[int, ...]] = {"weight": (n,)}
    for name, reading in readings.items():
        wanted[f"{name}.value"] = (n, *reading.shape)
        if f"{name}.null" in shapes:
            wanted[f"{name}.null"] = reading.shape
    return wanted


def _content_2(path: str | Path, identity: Identity) -> _Content:
    features = {name: asdict(reading) for name, reading in identity.readings.items()}
    try:
        _readings({"features": {n: {**f, "shape": list(f["shape"])} for n, f in features.items()}})
    except OptionError as error:
        raise NotWrittenError(path, f"not written: {error}.") from error
    tensors = {"weight": identity.weight.float()}
    for name, feature in identity.features.items():
        tensors[f"{name}.value"] = _stored(feature.value)
        if feature.null is not None and bool(feature.null.any()):
            tensors[f"{name}.null"] = _stored(feature.null)
    return _Content(FEATURES_VERSION, tensors, {"features": features, "name": identity.name})
