"""The named tensors of a pickle that ``torch.save`` wrote, read as those of a safetensors file.

Nested dictionaries become dotted names. Nothing of the file runs (``unpickler.py``), and a tensor
is read when it is asked for, into memory of its own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import NotConvertibleError, NotFiniteError, UnreadableError
from .pickles import open_pickle
from .safetensors_file import DTYPE_NAMES, PIECE, Header, TensorEntry, all_finite
from .stored_tensor import StoredTensor
from .system import reading

MAX_TENSORS = 100_000
_MAX_DEPTH = 8
_MAX_NAME = 1000  # letters; copied for each tensor below
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "adapter", "identity")


class PickledTensors:
    """The tensors of an open pickle; see ``TensorFile``."""

    def __init__(self, path: Path, tensors: Mapping[str, StoredTensor]) -> None:
        self.path = path
        with reading(path):
            self.size = os.stat(path).st_size
        self._tensors = tensors
        self.header = _header(tensors)

    def tensor(self, name: str, dtype: torch.dtype | None = None, *, finite: bool = True) -> Tensor:
        """One tensor in memory of its own. Raises as ``SafetensorsFile.tensor`` does."""
        try:
            tensor = self._tensors[name].read()
        except (MemoryError, RuntimeError) as error:
            shape = list(self._tensors[name].shape)
            raise UnreadableError(
                self.path, f"{name} has shape {shape}, for which there is no memory."
            ) from error
        tensor = tensor if dtype is None else tensor.to(dtype)
        flat = tensor.view(-1)
        starts = range(0, len(flat) if finite else 0, PIECE)
        if not all(all_finite(flat[start : start + PIECE]) for start in starts):
            raise NotFiniteError(self.path, f"{name} holds NaN or infinity.")
        return tensor


@contextmanager
def open_pickled_tensors(path: Path) -> Iterator[PickledTensors]:
    """Open a pickle of tensors. Raises as ``open_pickle`` does."""
    with open_pickle(path) as values:
        yield PickledTensors(path, flat_tensors(path, values))


def _header(tensors: Mapping[str, StoredTensor]) -> Header:
    """As if they lay one after another; a pickle has no metadata."""
    entries, position = {}, 0
    for name, tensor in tensors.items():
        end = position + math.prod(tensor.shape) * tensor.dtype.itemsize
        kind = DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
        entries[name] = TensorEntry(dtype=kind, shape=tensor.shape, start=position, end=end)
        position = end
    return Header(tensors=entries, metadata={})


def flat_tensors(path: Path, values: Any) -> dict[str, StoredTensor]:
    """Tensors of nested dictionaries by their dotted names, out of the usual wrappers.

    Raises ``NotConvertibleError``.
    """
    result: dict[str, StoredTensor] = {}
    seen = 0
    waiting: list[tuple[str, Any, int]] = [("", _unwrapped(values), 0)]
    while waiting:
        prefix, value, depth = waiting.pop()
        seen += len(value) if isinstance(value, Mapping) else 0
        if len(prefix) > _MAX_NAME:
            raise NotConvertibleError(path, f"has a name of more than {_MAX_NAME} letters.")
        if seen > MAX_TENSORS or depth > _MAX_DEPTH:
            # Few dictionaries that hold one another have more names than any file.
            raise NotConvertibleError(
                path, f"has dictionaries in one another without end, or more than {MAX_TENSORS} "
                "entries; expected names and tensors."
            )  # fmt: skip
        if isinstance(value, StoredTensor):
            result[_printable(path, prefix.removesuffix("."))] = value
        elif isinstance(value, Mapping):
            names = {name: str(name)[: _MAX_NAME + 1] for name in value}
            entries = [(f"{prefix}{names[n]}.", inner, depth + 1) for n, inner in value.items()]
            waiting += reversed(entries)
    return result


def check_shared(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise ``NotConvertibleError`` where tensors are many views of one storage, which would make
    a small pickle a file, or a module, without end."""
    size = sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors.values())
    if size > 2 * path.stat().st_size:
        raise NotConvertibleError(
            path, f"would become {size} bytes of tensors, more than twice its own size: they "
            "share their memory. Save it with a copy of each tensor."
        )  # fmt: skip


def _unwrapped(values: Any) -> Any:
    for _ in range(_MAX_DEPTH):  # a dictionary may hold itself
        if not isinstance(values, Mapping):
            break
        inner = [values[w] for w in _WRAPPERS if isinstance(values.get(w), Mapping)]
        if len(inner) != 1:
            break
        values = inner[0]
    return values


def _printable(path: Path, name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise NotConvertibleError(path, f"has a tensor of the name {name[:100]!r}.") from error
    return name
