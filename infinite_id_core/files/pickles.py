"""Tensors out of a pickle, and nothing else: a reader of its own that cannot call anything.

A pickle is a program. This one understands the opcodes that build plain containers, and the few
names by which ``torch.save`` spells tensors; each of those names stands for a function of this
file that notes where a tensor lies. Nothing else can be named, called or set, whatever version of
torch is installed. Tensors are read only when asked for, so memory is bounded by the largest one,
and no tensor is larger than its bytes in the file. Both containers of ``torch.save`` are read:
the zip archive, and the stream that came before it.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..errors import (
    FileError,
    NotConvertibleError,
    TruncatedFileError,
    UnknownFileError,
    UnreadableError,
    UnsafePickleError,
)
from .system import open_regular, reading

MAX_PICKLE = 2**23  # bytes without the tensors; each may become a hundred in memory
_MAX_MEMBERS = 200_000
_MAX_DIMENSIONS = 8
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001

_UNSAFE = (
    "It holds more than tensors and was not loaded; nothing of it ran. Ask its author for "
    "safetensors."
)

# torch's names of typed storages, for the element types that have one.
_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
}  # fmt: skip
_DTYPES = {*_STORAGES.values(), "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"}
_OTHER_KINDS = {
    "_rebuild_sparse_tensor": "sparse",
    "_rebuild_sparse_csr_tensor": "sparse",
    "_rebuild_qtensor": "quantised",
    "_rebuild_nested_tensor": "nested",
    "_rebuild_meta_tensor_no_storage": "meta (without its numbers)",
    "_rebuild_wrapper_subclass": "wrapped",
    "_rebuild_device_tensor_from_numpy": "numpy's",
}


class _Source(Protocol):
    """Where storages lie."""

    def size(self, key: str) -> int:
        """Bytes of one storage. Raises ``KeyError``."""

    def read(self, key: str, start: int, size: int) -> bytearray:
        """Some of its bytes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredTensor:
    """A dense tensor that still lies in its file; checked against the bytes there are."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    first: int
    """Its first element in the storage."""
    storage: _Storage

    def read(self) -> Tensor:
        """The tensor, contiguous. Raises ``TruncatedFileError``, ``UnreadableError``."""
        count = _reach(self.shape, self.stride)
        if not count:
            return torch.empty(self.shape, dtype=self.dtype)
        width = self.dtype.itemsize
        data = self.storage.source.read(self.storage.key, self.first * width, count * width)
        flat = torch.frombuffer(data, dtype=self.dtype)
        return flat.as_strided(self.shape, self.stride).contiguous()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Storage:
    source: _Source
    key: str
    dtype: torch.dtype | None
    """None: bytes, and the tensor says what they are."""
    elements: int


@contextmanager
def open_pickle(path: str | Path) -> Iterator[Any]:
    """Give what ``torch.save`` wrote: plain containers, with ``StoredTensor`` for each tensor.

    Tensors can be read while the file is open. Raises ``UnsafePickleError`` for a pickle that
    asks for more, ``NotConvertibleError`` for tensors that are not dense,
    ``UnknownFileError``, ``TruncatedFileError``, ``FileMissingError``, ``UnreadableError``.
    """
    path = Path(path)
    with open_regular(path) as file:
        with _named(path), reading(path):
            start = file.read(16)
            if not start.startswith((b"PK\x03\x04", b"\x80")):
                kind = "a safetensors file" if start[8:9] == b"{" else "of an unknown kind"
                raise UnknownFileError(
                    path, f"is {kind}, not a pickle; there is nothing to convert."
                )
            file.seek(0)
            zipped = start.startswith(b"PK")
            values = _read_zip(path, file) if zipped else _read_stream(path, file)
        yield values


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """The many errors of a damaged archive or pickle, by name."""
    try:
        yield
    except (FileError, OSError):
        raise
    except (EOFError, zipfile.BadZipFile, struct.error, NotImplementedError) as error:
        raise TruncatedFileError(
            path, f"cannot be read ({_line(error)}). Download or copy it again."
        ) from error
    except pickle.UnpicklingError as error:
        if "truncated" in str(error) or "exhausted" in str(error):
            raise TruncatedFileError(
                path, f"is cut ({_line(error)}). Download or copy it again."
            ) from error
        raise UnsafePickleError(path, f"{_line(error)} {_UNSAFE}") from error
    except MemoryError as error:
        raise UnreadableError(path, "asks for more memory than there is.") from error
    except Exception as error:  # opcodes in an order that no honest file has: anything may fail
        raise UnsafePickleError(path, f"is no sound pickle ({_line(error)}). {_UNSAFE}") from error


def _line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


# --- the two containers ----------------------------------------------------------------------


class _Archive:
    """The members of a zip archive by their place in the file; none is compressed."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self.path, self._file = path, file
        size = os.fstat(file.fileno()).st_size
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
        if len(members) > _MAX_MEMBERS or sum(m.file_size for m in members) > size:
            raise UnsafePickleError(
                path, f"claims {len(members)} members larger than itself ({size} bytes); it is "
                "made to fill the memory. It was not loaded."
            )  # fmt: skip
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                raise UnsafePickleError(
                    path, f"has a compressed member {member.filename[:100]!r}, which torch.save "
                    "never writes. It was not loaded."
                )  # fmt: skip
        # The first folder is named after the file; every member lies in it.
        self._members = {m.filename.partition("/")[2]: m for m in members}
        if len(self._members) != len(members):
            raise UnsafePickleError(path, "has two members of one name. It was not loaded.")

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def size(self, key: str) -> int:
        return self._members[f"data/{key}"].file_size

    def read(self, key: str, start: int, size: int) -> bytearray:
        return self.bytes(f"data/{key}", start, size)

    def whole(self, name: str, limit: int) -> bytes:
        size = self._members[name].file_size
        if size > limit:
            raise UnsafePickleError(
                self.path, f"{name} has {size} bytes; expected at most {limit}. It was not loaded."
            )
        return bytes(self.bytes(name, 0, size))

    def bytes(self, name: str, start: int, size: int) -> bytearray:
        at = self._members[name].header_offset
        self._file.seek(at)
        header = self._file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise TruncatedFileError(self.path, f"has no member {name[:100]!r} where it should be.")
        skipped, extra = struct.unpack("<HH", header[26:30])
        return _exactly(self.path, self._file, at + 30 + skipped + extra + start, size)


def _exactly(path: Path, file: BufferedReader, at: int, size: int) -> bytearray:
    if at + size > os.fstat(file.fileno()).st_size:
        raise TruncatedFileError(path, "ends inside a tensor. Download or copy it again.")
    with reading(path):
        data = bytearray(size)
        file.seek(at)
        if file.readinto(data) != size:
            raise TruncatedFileError(path, "was cut while it was read. Download or copy it again.")
    return data


def _read_zip(path: Path, file: BufferedReader) -> Any:
    archive = _Archive(path, file)
    if "constants.pkl" in archive:
        raise UnsafePickleError(path, f"is a TorchScript archive. {_UNSAFE}")
    if "data.pkl" not in archive:
        raise UnknownFileError(
            path, "is a zip archive without data.pkl: torch.save did not make it."
        )
    if "byteorder" in archive and archive.whole("byteorder", 16) != b"little":
        raise NotConvertibleError(path, "was saved by a machine of the other byte order.")
    data = archive.whole("data.pkl", MAX_PICKLE)
    return _Reader(path, io.BytesIO(data), archive).load()


class _Stream:
    """Storages one after another behind the pickles, each after its number of elements."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self.path, self._file = path, file
        self.claimed: dict[str, tuple[int, int]] = {}
        """Elements and bytes an element, by key, as the tensors say."""
        self._places: dict[str, tuple[int, int]] = {}

    def size(self, key: str) -> int:
        # Where the storages lie is known only after the tensors; see ``find``.
        elements, width = self.claimed[key]
        return elements * width

    def find(self, keys: Any) -> None:
        """Walk over the storages. Raises where they are not those the tensors named."""
        listed = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
        if not listed or len(keys) != len(self.claimed) or set(keys) != set(self.claimed):
            raise pickle.UnpicklingError("the list of storages is not that of the tensors")
        at, end = self._file.tell(), os.fstat(self._file.fileno()).st_size
        for key in keys:
            elements, width = self.claimed[key]
            self._file.seek(at)
            found = int.from_bytes(self._file.read(8), "little")
            at += 8
            if found != elements or at + elements * width > end:
                raise TruncatedFileError(
                    self.path, f"ends inside storage {key[:40]}, or it has another size than its "
                    "tensors say. Download or copy it again."
                )  # fmt: skip
            self._places[key] = at, elements * width
            at += elements * width

    def read(self, key: str, start: int, size: int) -> bytearray:
        return _exactly(self.path, self._file, self._places[key][0] + start, size)


class _Limited:
    """A file that gives no more than a pickle's worth of bytes, whatever is asked for."""

    def __init__(self, file: BufferedReader) -> None:
        self._file = file
        self._left = MAX_PICKLE

    def read(self, size: int) -> bytes:
        return self._counted(self._file.read(min(size, self._left)))

    def readline(self) -> bytes:
        return self._counted(self._file.readline(min(4096, self._left)))

    def _counted(self, data: bytes) -> bytes:
        self._left -= len(data)
        return data


def _read_stream(path: Path, file: BufferedReader) -> Any:
    limited, source = _Limited(file), _Stream(path, file)

    def load() -> Any:
        return _Reader(path, limited, source).load()

    first = load()
    if first != _MAGIC:
        # A bare pickle of plain values, or of something that is refused on the way.
        raise NotConvertibleError(path, "is a pickle that torch.save did not write.")
    if load() != _PROTOCOL:
        raise NotConvertibleError(path, "was written by a version of torch that nobody knows.")
    load()  # sizes of the types of the machine that wrote it
    values = load()
    source.find(load())
    return values


# --- the pickle itself -----------------------------------------------------------------------


class _Name:
    """What a name of the pickle stands for. It can be handed to REDUCE, and do nothing else."""

    __slots__ = ("call", "dtype", "plain")

    def __init__(
        self,
        call: Callable[..., Any] | None = None,
        dtype: torch.dtype | None = None,
        plain: str = "",
    ) -> None:
        self.call, self.dtype, self.plain = call, dtype, plain


def _tensor(
    path: Path, storage: Any, first: Any, shape: Any, stride: Any, dtype: torch.dtype | None = None
) -> StoredTensor:
    """``torch._utils._rebuild_tensor_v2`` and ``_v3``, checked."""
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    kind = dtype or storage.dtype or torch.uint8
    numbers = isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride)
    if not numbers or not all(_count(n) for n in (first, *shape, *stride)):
        raise pickle.UnpicklingError("the shape of a tensor is no list of whole numbers")
    if len(shape) > _MAX_DIMENSIONS:
        raise NotConvertibleError(path, f"holds a tensor of {len(shape)} dimensions.")
    repeated = any(step == 0 and n > 1 for n, step in zip(shape, stride, strict=True))
    elements, reach = math.prod(shape), _reach(shape, stride)
    there = storage.source.size(storage.key) // kind.itemsize
    if elements > reach or (repeated and elements):
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


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _reach(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from a tensor's first to its last, both counted."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))


class _Reader(pickle._Unpickler):
    """Python's own reader with most of its opcodes taken away."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]]
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]

    def __init__(self, path: Path, file: Any, source: _Archive | _Stream) -> None:
        super().__init__(file)
        self._path, self._source = path, source
        self._storages: dict[str, _Storage] = {}
        self._names: dict[tuple[str, str], _Name] = {}

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for each name that ``torch.save`` writes. Nothing is imported."""
        found = self._names.get((module, name))
        if found is None:
            found = self._names[module, name] = self._name(module, name)
        return found

    def _name(self, module: str, name: str) -> _Name:
        path = self._path
        if (module, name) == ("collections", "OrderedDict"):
            return _Name(OrderedDict)
        if module == "torch._utils":
            if name == "_rebuild_tensor_v2":
                return _Name(lambda storage, first, shape, stride, *_: _tensor(
                    path, storage, first, shape, stride))  # fmt: skip
            if name == "_rebuild_tensor_v3":
                return _Name(lambda storage, first, shape, stride, grad, hooks, dtype, *_: _tensor(
                    path, storage, first, shape, stride, dtype.dtype))  # fmt: skip
            if name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
                return _Name(_same_tensor)
            if name in _OTHER_KINDS:
                raise NotConvertibleError(
                    path, f"holds a {_OTHER_KINDS[name]} tensor; expected dense ones. Save it "
                    "after turning it into a plain tensor."
                )  # fmt: skip
        if module == "torch._tensor" and name == "_rebuild_from_type_v2":
            return _Name(lambda function, kind, arguments, state: _of_type(
                function, kind, arguments))  # fmt: skip
        if (module, name) in (("torch", "Tensor"), ("torch.nn.parameter", "Parameter")):
            return _Name(plain=name)
        if (module, name) == ("torch", "Size"):
            return _Name(tuple)
        if (module, name) == ("torch", "device"):
            return _Name(lambda *_: None)
        if module in ("torch", "torch.cuda") and name in _STORAGES:
            return _Name(dtype=getattr(torch, _STORAGES[name]))
        if (module, name) in (("torch.storage", "UntypedStorage"), ("torch", "UntypedStorage")):
            return _Name(plain="bytes")
        if module == "torch" and name in _DTYPES and hasattr(torch, name):
            return _Name(dtype=getattr(torch, name))
        raise pickle.UnpicklingError(f"GLOBAL {module[:100]}.{name[:100]} is not allowed.")

    def persistent_load(self, pid: Any) -> _Storage:
        """``('storage', type, key, device, elements)``, in the stream with a view behind."""
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise pickle.UnpicklingError("it refers to something that is no storage")
        _, kind, key, device, elements = pid[:5]
        sound = isinstance(kind, _Name) and (kind.dtype is not None or kind.plain == "bytes")
        if not sound or not isinstance(key, str) or not _count(elements):
            raise pickle.UnpicklingError("it refers to a storage in a way that torch does not")
        if device == "meta":
            raise NotConvertibleError(self._path, "holds a meta tensor, without its numbers.")
        if len(pid) == 6 and pid[5] is not None:
            raise NotConvertibleError(self._path, "holds views of storages, as torch 0.3 wrote.")
        known = self._storages.get(key)
        if known is None:
            width = kind.dtype.itemsize if kind.dtype else 1
            if isinstance(self._source, _Stream):
                self._source.claimed[key] = elements, width
                there = elements * width
            else:
                there = self._source.size(key)
            if elements * width > there:
                raise TruncatedFileError(
                    self._path, f"storage {key[:40]} has {there} bytes; its tensors need "
                    f"{elements * width}. Download or copy it again."
                )  # fmt: skip
            known = _Storage(source=self._source, key=key, dtype=kind.dtype, elements=elements)
            self._storages[key] = known
        if known.dtype != kind.dtype or known.elements != elements:
            raise pickle.UnpicklingError("it gives one storage two sizes")
        return known

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        name = self.stack[-1]
        if not isinstance(name, _Name) or name.call is None or not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("it calls something that is no tensor")
        if name.call is OrderedDict and arguments:
            arguments = (_pairs(arguments),)
        self.stack[-1] = name.call(*arguments)

    def _build(self) -> None:
        """torch's state dicts carry their versions as an attribute; they are dropped."""
        self.stack.pop()
        if not isinstance(self.stack[-1], OrderedDict):
            raise pickle.UnpicklingError("it sets attributes of something that is no dictionary")

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._put([key, value])

    def _setitems(self) -> None:
        self._put(self.pop_mark())

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._put(items)

    def _put(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise pickle.UnpicklingError("it puts an entry into something that is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise pickle.UnpicklingError("it appends to something that is no list")
        target.extend(items)

    def _append_one(self) -> None:
        value = self.stack.pop()
        self._extend([value])

    def _append_many(self) -> None:
        self._extend(self.pop_mark())

    def _long(self, width: int) -> None:
        size = int.from_bytes(self.read(width), "little")
        if size > 16:
            raise pickle.UnpicklingError(f"it holds a whole number of {size} bytes")
        self.append(pickle.decode_long(self.read(size)))


def _same_tensor(tensor: Any, *_: Any) -> StoredTensor:
    if not isinstance(tensor, StoredTensor):
        raise pickle.UnpicklingError("a parameter that is no tensor")
    return tensor


def _of_type(function: Any, kind: Any, arguments: Any) -> StoredTensor:
    """A tensor with attributes of its own, which are dropped."""
    sound = isinstance(function, _Name) and function.call and isinstance(arguments, tuple)
    if not sound or not isinstance(kind, _Name) or kind.plain not in ("Tensor", "Parameter"):
        raise pickle.UnpicklingError("a tensor of a class of its own")
    return _same_tensor(function.call(*arguments))


def _pairs(arguments: tuple[Any, ...]) -> list[tuple[Any, Any]]:
    """What protocol 0 and 1 hand to OrderedDict: a list of pairs."""
    pairs = arguments[0] if len(arguments) == 1 else None
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
    ):
        raise pickle.UnpicklingError("a dictionary of something that is no pairs")
    return [(_key(key), value) for key, value in pairs]


def _key(key: Any) -> Any:
    """Keys whose hashes nobody can choose: others can be made to collide, which takes hours."""
    if isinstance(key, str) or key is None or (type(key) is int and abs(key) < 2**31):
        return key
    raise pickle.UnpicklingError(f"a dictionary has a key of type {type(key).__name__}")


_KEPT = (
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "NONE", "NEWTRUE", "NEWFALSE",
    "BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2",
    "TUPLE3", "EMPTY_LIST", "LIST", "EMPTY_DICT", "BINGET", "LONG_BINGET", "BINPUT",
    "LONG_BINPUT", "MEMOIZE", "GLOBAL", "STACK_GLOBAL", "BINPERSID",
)  # fmt: skip
_OWN = {
    "REDUCE": _Reader._reduce,
    "BUILD": _Reader._build,
    "SETITEM": _Reader._setitem,
    "SETITEMS": _Reader._setitems,
    "DICT": _Reader._dict,
    "APPEND": _Reader._append_one,
    "APPENDS": _Reader._append_many,
    "LONG1": lambda reader: reader._long(1),
    "LONG4": lambda reader: reader._long(4),
}


def _refused(reader: Any) -> None:
    raise pickle.UnpicklingError("it holds an instruction that no file of tensors needs.")


_codes = {getattr(pickle, name)[0] for name in _KEPT}
_Reader.dispatch = {
    **{code: _refused for code in range(256)},
    **{code: pickle._Unpickler.dispatch[code] for code in _codes},
    **{getattr(pickle, name)[0]: function for name, function in _OWN.items()},
}
