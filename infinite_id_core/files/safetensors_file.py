"""safetensors, carefully: one opening for header and tensors, and equal bytes for equal contents.

Reading checks everything before anything large is allocated, takes tensors in pieces into memory
of their own (a mapped file would change, or end the process, when somebody writes to it), and
refuses a file that changed meanwhile.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import (
    HeaderError,
    HeaderTooLargeError,
    NotFiniteError,
    NotSafetensorsError,
    OverlappingOffsetsError,
    TruncatedFileError,
    UnreadableError,
    WrongDtypeError,
)
from .system import open_regular, reading, unchanged

MAX_HEADER = 16 * 2**20  # bytes; SDXL's 70 layers need 20 kB
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
FLOATS = {"F16": 2, "BF16": 2, "F32": 4}
_MAX_DIMENSIONS = 8
_MAX_SIZE = 2**63
PIECE = 2**22  # elements that are cast, checked and written at a time

_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
# Not every torch has every type.
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, known) for name, known in _NAMES.items() if hasattr(torch, known)
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_EIGHT_BITS = ("F8_E4M3", "F8_E5M2")


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor as the header describes it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """A checked safetensors header."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]


# --- reading ---------------------------------------------------------------------------------


class SafetensorsFile:
    """An open file: its checked header, and its tensors on demand."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self.path = path
        self.size = os.fstat(file.fileno()).st_size
        self._file = file
        self.header, self._data = _read_header(path, file)

    def tensor(self, name: str, dtype: torch.dtype | None = None, *, finite: bool = True) -> Tensor:
        """One tensor on the CPU, in memory of its own, in ``dtype`` (default: the file's).

        Raises ``WrongDtypeError`` for a type torch does not have, ``HeaderError`` where type,
        shape and bytes disagree, ``TruncatedFileError``, ``UnreadableError`` where there is no
        memory for it, and ``NotFiniteError`` for NaN or infinity unless ``finite`` is off.
        """
        entry = self.header.tensors[name]
        own = self._dtype(name, entry)
        flat = self._empty(name, entry, dtype or own)
        with reading(self.path):
            self._file.seek(self._data + entry.start)
            for start in range(0, len(flat), PIECE):
                part = flat[start : start + PIECE]
                read = part if part.dtype == own else torch.empty(len(part), dtype=own)
                self._fill(name, read)
                if read is not part:
                    part.copy_(read)
                if finite and not all_finite(part):
                    raise NotFiniteError(self.path, f"{name} holds NaN or infinity.")
        return flat.view(entry.shape)

    def finite(self, name: str) -> bool:
        """Whether a tensor holds neither NaN nor infinity; read in pieces, nothing is kept."""
        entry = self.header.tensors[name]
        own = self._dtype(name, entry)
        count = math.prod(entry.shape)
        with reading(self.path):
            self._file.seek(self._data + entry.start)
            for start in range(0, count, PIECE):
                part = torch.empty(min(PIECE, count - start), dtype=own)
                self._fill(name, part)
                if not all_finite(part):
                    return False
        return True

    def _dtype(self, name: str, entry: TensorEntry) -> torch.dtype:
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise WrongDtypeError(
                self.path, f"{name} is {entry.dtype}, which this torch does not have. Expected one "
                f"of {', '.join(DTYPES)}."
            )  # fmt: skip
        wanted = math.prod(entry.shape) * dtype.itemsize
        if entry.end - entry.start != wanted:
            raise HeaderError(
                self.path, f"{name} of shape {list(entry.shape)} {entry.dtype} cannot have "
                f"{entry.end - entry.start} bytes; expected {wanted}."
            )  # fmt: skip
        return dtype

    def _empty(self, name: str, entry: TensorEntry, dtype: torch.dtype) -> Tensor:
        try:
            return torch.empty(math.prod(entry.shape), dtype=dtype)
        except (RuntimeError, MemoryError) as error:
            raise UnreadableError(
                self.path, f"{name} has shape {list(entry.shape)}, for which there is no memory."
            ) from error

    def _fill(self, name: str, part: Tensor) -> None:
        view = part.view(torch.uint8).numpy().data
        done = 0
        while done < len(view):
            count = self._file.readinto(view[done:])
            if not count:
                raise TruncatedFileError(
                    self.path, f"was cut while it was read: {name} is not whole. Try again."
                )
            done += count


@contextmanager
def open_safetensors(path: str | Path) -> Iterator[SafetensorsFile]:
    """Open a file once; header and tensors come from the same bytes.

    Raises ``FileMissingError``, ``UnreadableError``, ``NotSafetensorsError``,
    ``TruncatedFileError``, ``HeaderTooLargeError``, ``HeaderError``, ``OverlappingOffsetsError``,
    and at the end ``FileChangedError`` where somebody wrote into the file meanwhile.
    """
    path = Path(path)
    with open_regular(path) as file, unchanged(path, file):
        with reading(path):
            opened = SafetensorsFile(path, file)
        yield opened


def read_header(path: str | Path) -> Header:
    """Read and check a safetensors header without touching the tensors.

    Raises as ``open_safetensors`` does.
    """
    with open_safetensors(path) as file:
        return file.header


def is_pickle(start: bytes) -> bool:
    """Whether a file with these first 9 bytes is a pickle, or the archive that torch makes."""
    # A header of 640 bytes starts like a pickle, too; its JSON opens with a brace.
    return start.startswith(PICKLES) and start[8:9] != b"{"


def _read_header(path: Path, file: BufferedReader) -> tuple[Header, int]:
    """The header, and where the tensors' bytes begin."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    if is_pickle(start + file.read(1)):
        raise NotSafetensorsError(
            path,
            "is a pickle (or zip) whatever its name says, and was not opened. Convert it "
            "with 'python -m trainer convert' if you trust its source.",
        )
    file.seek(8)
    if len(start) < 8:
        raise TruncatedFileError(path, f"is {size} bytes long, too short for any file.")
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER:
        raise HeaderTooLargeError(
            path, f"claims a header of {length} bytes; expected at most {MAX_HEADER}. "
            "The file is damaged or not a safetensors file."
        )  # fmt: skip
    if 8 + length > size:
        raise TruncatedFileError(
            path, f"ends inside its header ({size} of at least {8 + length} bytes). "
            "Download or copy it again."
        )  # fmt: skip
    raw = file.read(length)
    return _parse_header(path, raw, size - 8 - length), 8 + length


def _parse_header(path: Path, raw: bytes, data_size: int) -> Header:
    try:
        values = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
        if not isinstance(values, dict):
            raise ValueError("expected an object of tensors")
        # The format's own readers take null for no metadata.
        metadata = _metadata(values.pop("__metadata__", None))
        tensors = {name: _entry(name, value) for name, value in values.items()}
    except (ValueError, RecursionError) as error:
        raise HeaderError(path, f"does not start with a safetensors header ({error}).") from error
    position = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            raise OverlappingOffsetsError(
                path, f"tensor {name!r} starts at byte {entry.start}; expected {position}."
            )
        position = entry.end
    if position != data_size:
        raise TruncatedFileError(
            path, f"should hold {position} bytes of tensors and holds {data_size}. "
            "Download or copy it again."
        )  # fmt: skip
    return Header(tensors=tensors, metadata=metadata)


def _metadata(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError("its metadata must be an object of texts")
    return value


def _entry(name: str, value: Any) -> TensorEntry:
    shown = repr(name[:100])
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise ValueError(f"tensor {shown} must have dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str):
        raise ValueError(f"the dtype of tensor {shown} must be text")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError(f"tensor {shown} must have a list as shape and two data_offsets")
    if len(shape) > _MAX_DIMENSIONS:  # a product of millions of numbers takes hours
        raise ValueError(f"tensor {shown} has {len(shape)} dimensions")
    if not all(type(n) is int and 0 <= n < _MAX_SIZE for n in (*offsets, *shape)):
        raise ValueError(f"shape and offsets of tensor {shown} must be whole numbers")
    start, end = offsets
    width = FLOATS.get(dtype)
    if end < start or (width is not None and end - start != math.prod(shape) * width):
        raise ValueError(f"tensor {shown} of shape {shape} {dtype} cannot have {end - start} bytes")
    return TensorEntry(dtype=dtype, shape=tuple(shape), start=start, end=end)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON readers disagree on which of two equal names holds; so neither does."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return values


def json_object(text: str) -> Any:
    """JSON as this project reads it from files: no name twice. Raises ``ValueError``."""
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def all_finite(part: Tensor) -> bool:
    """Whether there is neither NaN nor infinity in a tensor of any type.

    On the CPU by the exponents' bits, which are all 1 in both: torch's ``isfinite`` takes twenty
    times as long.
    """
    if not part.is_floating_point() and not part.is_complex():
        return True
    if part.dtype in _EXPONENTS and part.device.type == "cpu":
        return _exponents_are_finite(part)
    if part.dtype.itemsize == 1:  # torch knows no isfinite for eight bits
        part = part.float()
    return bool(part.isfinite().all())


def _exponents_are_finite(part: Tensor) -> bool:
    kind, mask = _EXPONENTS[part.dtype]
    bits = part.detach().contiguous().view(-1).view(_BITS[part.dtype.itemsize])
    numbers = bits.numpy().view(kind)
    masked = np.empty(min(_AT_ONCE, len(numbers)), kind)
    for start in range(0, len(numbers), _AT_ONCE):
        piece = numbers[start : start + _AT_ONCE]
        if np.bitwise_and(piece, mask, out=masked[: len(piece)]).max() == mask:
            return False
    return True


_AT_ONCE = 2**18  # numbers: what a core's cache holds
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_EXPONENTS: Mapping[torch.dtype, tuple[type[np.unsignedinteger[Any]], Any]] = {
    torch.float16: (np.uint16, np.uint16(0x7C00)),
    torch.bfloat16: (np.uint16, np.uint16(0x7F80)),
    torch.float32: (np.uint32, np.uint32(0x7F800000)),
    torch.float64: (np.uint64, np.uint64(0x7FF0000000000000)),
}


# --- writing ---------------------------------------------------------------------------------


class TensorSource(Protocol):
    """A tensor that is read only when its turn to be written comes."""

    @property
    def dtype(self) -> torch.dtype:
        """Its type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    def read(self) -> Tensor:
        """The tensor itself."""


def save_tensors(
    tensors: Mapping[str, Tensor | TensorSource],
    path: str | Path,
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    finite: bool = True,
) -> None:
    """Write a safetensors file, in ``dtype`` (default: each tensor's own); casts go in pieces.

    Equal tensors and metadata give equal bytes, unlike the library's own writer, whose metadata
    stand in random order. Raises ``NotFiniteError`` unless ``finite`` is off, ``OSError``.
    """
    path = Path(path)
    # Wide types first, as the library does: every tensor is aligned.
    order = sorted(tensors, key=lambda name: (-(dtype or tensors[name].dtype).itemsize, name))
    entries: dict[str, Any] = {}
    position = 0
    for name in order:
        tensor, kind = tensors[name], dtype or tensors[name].dtype
        end = position + math.prod(tensor.shape) * kind.itemsize
        entries[name] = {
            "dtype": DTYPE_NAMES[kind],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    values = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    raw = json.dumps({**values, **entries}, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name in order:
            _save_one(file.write, path, name, tensors[name], dtype, finite)


def _save_one(
    write: Callable[[Any], Any],
    path: Path,
    name: str,
    source: Tensor | TensorSource,
    dtype: torch.dtype | None,
    finite: bool,
) -> None:
    tensor = source if isinstance(source, Tensor) else source.read()
    flat = tensor.detach().contiguous().view(-1)
    for start in range(0, len(flat), PIECE):
        part = flat[start : start + PIECE].to(device="cpu", dtype=dtype or flat.dtype)
        if finite and not all_finite(part):
            raise NotFiniteError(path, f"not written: {name} holds NaN or infinity.")
        write(part.contiguous().view(torch.uint8).numpy().data)
