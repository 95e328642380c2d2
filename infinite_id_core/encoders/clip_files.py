"""One side of a CLIP file: its tensors checked by the header before any of them is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ..errors import WrongDtypeError, WrongShapeError
from ..files.safetensors_file import Header, SafetensorsFile
from .clip_names import Source

_FLOATS = ("F32", "F16", "BF16")


def stored_shapes(
    sources: Mapping[str, Source], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Sequence[int]]:
    """The file's names for the ``sources`` of tensors of these ``shapes``, with their own."""
    stored: dict[str, Sequence[int]] = {}
    for name, source in sources.items():
        stored.update(source.shapes(shapes[name]))
    return stored


def check_floats(path: Path, header: Header, wanted: Mapping[str, Sequence[int]]) -> None:
    """Raise ``WrongShapeError`` or ``WrongDtypeError`` where the header says another thing."""
    for name, shape in wanted.items():
        entry = header.tensors[name]
        if entry.shape != tuple(shape):
            raise WrongShapeError(
                path, f"{name} has shape {list(entry.shape)}; expected {list(shape)}. Is it "
                "the weights of another model?"
            )  # fmt: skip
        if entry.dtype not in _FLOATS:
            raise WrongDtypeError(path, f"{name} is {entry.dtype}; expected one of {_FLOATS}.")


def read_floats(file: SafetensorsFile, wanted: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The ``wanted`` tensors of an open file that has them all, by name and shape, checked.

    Raises ``WrongShapeError``, ``WrongDtypeError``, ``NotFiniteError``, ``TruncatedFileError``.
    """
    check_floats(file.path, file.header, wanted)
    return {name: file.tensor(name) for name in wanted}
