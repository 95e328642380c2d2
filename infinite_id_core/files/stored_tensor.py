"""Dense tensors that still lie in their file, as ``torch.save`` spells them.

They are checked when they are met and read only when asked for, so memory is bounded by the
largest one, and no tensor is larger than its bytes in the file.
"""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import NotConvertibleError, TruncatedFileError

_MAX_DIMENSIONS = 8


class Source(Protocol):
    """Where storages lie."""

    def claim(self, key: str, elements: int, width: int) -> int:
        """Take note that a storage is to have ``elements`` of ``width`` bytes.

        Gives the bytes it has, or is to have where nothing is known of it yet. Raises ``KeyError``
        where it is not there.
        """

    def size(self, key: str) -> int:
        """Bytes of one storage. Raises ``KeyError``."""

    def read(self, key: str, start: int, size: int) -> bytearray:
        """Some of its bytes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Storage:
    """A tensor's memory, as ``torch.save`` wrote it."""

    source: Source
    key: str
    dtype: torch.dtype | None
    """None: bytes, and the tensor says what they are."""
    elements: int


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredTensor:
    """A dense tensor that still lies in its file; checked against the bytes there are."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    first: int
    """Its first element in the storage."""
    storage: Storage

    def read(self) -> Tensor:
        """The tensor, contiguous. Raises ``TruncatedFileError``, ``UnreadableError``."""
        count = _reach(self.shape, self.stride)
        if not count:
            return torch.empty(self.shape, dtype=self.dtype)
        width = self.dtype.itemsize
        data = self.storage.source.read(self.storage.key, self.first * width, count * width)
        flat = torch.frombuffer(data, dtype=self.dtype)
        return flat.as_strided(self.shape, self.stride).contiguous()


def stored_tensor(
    path: Path, storage: Any, first: Any, shape: Any, stride: Any, dtype: torch.dtype | None = None
) -> StoredTensor:
    """``torch._utils._rebuild_tensor_v2`` and ``_v3``, checked.

    Raises ``UnpicklingError``, ``NotConvertibleError``, ``TruncatedFileError``, ``KeyError``.
    """
    if not isinstance(storage, Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    kind = dtype or storage.dtype or torch.uint8
    numbers = isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride)
    if not numbers or not all(is_count(n) for n in (first, *shape, *stride)):
        raise pickle.UnpicklingError("the shape of a tensor is no list of whole numbers")
    if len(shape) > _MAX_DIMENSIONS:
        raise NotConvertibleError(path, f"holds a tensor of {len(shape)} dimensions.")
    reach = _reach(shape, stride)
    there = storage.source.size(storage.key) // kind.itemsize
    if _shares_memory(shape, stride):
        raise NotConvertibleError(
            path, f"holds a tensor of shape {list(shape)} whose elements share their memory "
            f"(strides {list(stride)}). Save it after .contiguous()."
        )  # fmt: skip
    if first + reach > there:
        raise TruncatedFileError(
            path, f"holds a tensor of shape {list(shape)} for which its storage of {there} "
            "elements is too small. Download or copy it again."
        )  # fmt: skip
    return StoredTensor(dtype=kind, shape=shape, stride=stride, first=first, storage=storage)


def is_count(value: Any) -> bool:
    """Whether a value can number elements or bytes."""
    return type(value) is int and 0 <= value < 2**62


def _reach(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from a tensor's first to its last, both counted."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))


def _shares_memory(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether elements of a tensor lie in one place."""
    elements = math.prod(shape)
    repeated = any(step == 0 and n > 1 for n, step in zip(shape, stride, strict=True))
    return elements > _reach(shape, stride) or (repeated and elements > 0)
