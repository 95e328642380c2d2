"""A reader of pickles that cannot call anything.

A pickle is a program. This one understands the opcodes that build plain containers, and the few
names by which ``torch.save`` spells tensors; each of those names stands for a function of these
files that notes where a tensor lies. Nothing else can be named, called or set, whatever version of
torch is installed.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..errors import NotConvertibleError, TruncatedFileError
from .stored_tensor import Source, Storage, StoredTensor, is_count, stored_tensor

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


class Reader(pickle._Unpickler):
    """Python's own reader with most of its opcodes taken away."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]]
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]

    def __init__(self, path: Path, file: Any, source: Source) -> None:
        super().__init__(file)
        self._path, self._source = path, source
        self._storages: dict[str, Storage] = {}
        self._tensors = {
            "_rebuild_tensor_v2": _Name(self._tensor),
            "_rebuild_tensor_v3": _Name(self._tensor_of_type),
        }

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for each name that ``torch.save`` writes. Nothing is imported."""
        found = _NAMES.get((module, name))
        if found is None and module == "torch._utils":
            found = self._tensors.get(name)
            if name in _OTHER_KINDS:
                raise NotConvertibleError(
                    self._path, f"holds a {_OTHER_KINDS[name]} tensor; expected dense ones. Save "
                    "it after turning it into a plain tensor."
                )  # fmt: skip
        if found is None:
            raise pickle.UnpicklingError(f"GLOBAL {module[:100]}.{name[:100]} is not allowed.")
        return found

    def _tensor(self, storage: Any, first: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
        return stored_tensor(self._path, storage, first, shape, stride)

    def _tensor_of_type(
        self, storage: Any, first: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any,
        dtype: Any, *_: Any
    ) -> StoredTensor:  # fmt: skip
        return stored_tensor(self._path, storage, first, shape, stride, dtype.dtype)

    def persistent_load(self, pid: Any) -> Storage:
        """``('storage', type, key, device, elements)``, in the stream with a view behind."""
        dtype, key, elements = self._reference(pid)
        known = self._storages.get(key)
        if known is None:
            known = self._storages[key] = self._storage(dtype, key, elements)
        if known.dtype != dtype or known.elements != elements:
            raise pickle.UnpicklingError("it gives one storage two sizes")
        return known

    def _reference(self, pid: Any) -> tuple[torch.dtype | None, str, int]:
        """Element type, key and number of elements of a storage that is referred to."""
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise pickle.UnpicklingError("it refers to something that is no storage")
        _, kind, key, device, elements = pid[:5]
        sound = isinstance(kind, _Name) and (kind.dtype is not None or kind.plain == "bytes")
        if not sound or not isinstance(key, str) or not is_count(elements):
            raise pickle.UnpicklingError("it refers to a storage in a way that torch does not")
        if device == "meta":
            raise NotConvertibleError(self._path, "holds a meta tensor, without its numbers.")
        if len(pid) == 6 and pid[5] is not None:
            raise NotConvertibleError(self._path, "holds views of storages, as torch 0.3 wrote.")
        return kind.dtype, key, elements

    def _storage(self, dtype: torch.dtype | None, key: str, elements: int) -> Storage:
        width = dtype.itemsize if dtype else 1
        there = self._source.claim(key, elements, width)
        if elements * width > there:
            raise TruncatedFileError(
                self._path, f"storage {key[:40]} has {there} bytes; its tensors need "
                f"{elements * width}. Download or copy it again."
            )  # fmt: skip
        return Storage(source=self._source, key=key, dtype=dtype, elements=elements)

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


def _of_type(function: Any, kind: Any, arguments: Any, _state: Any) -> StoredTensor:
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


_NAMES = {
    ("collections", "OrderedDict"): _Name(OrderedDict),
    ("torch._utils", "_rebuild_parameter"): _Name(_same_tensor),
    ("torch._utils", "_rebuild_parameter_with_state"): _Name(_same_tensor),
    ("torch._tensor", "_rebuild_from_type_v2"): _Name(_of_type),
    ("torch", "Tensor"): _Name(plain="Tensor"),
    ("torch.nn.parameter", "Parameter"): _Name(plain="Parameter"),
    ("torch", "Size"): _Name(tuple),
    ("torch", "device"): _Name(lambda *_: None),
    ("torch", "UntypedStorage"): _Name(plain="bytes"),
    ("torch.storage", "UntypedStorage"): _Name(plain="bytes"),
    **{
        (module, name): _Name(dtype=getattr(torch, dtype))
        for module in ("torch", "torch.cuda")
        for name, dtype in _STORAGES.items()
    },
    **{("torch", n): _Name(dtype=getattr(torch, n)) for n in _DTYPES if hasattr(torch, n)},
}

_KEPT = (
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "NONE", "NEWTRUE", "NEWFALSE",
    "BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2",
    "TUPLE3", "EMPTY_LIST", "LIST", "EMPTY_DICT", "BINGET", "LONG_BINGET", "BINPUT",
    "LONG_BINPUT", "MEMOIZE", "GLOBAL", "STACK_GLOBAL", "BINPERSID",
)  # fmt: skip
_OWN = {
    "REDUCE": Reader._reduce,
    "BUILD": Reader._build,
    "SETITEM": Reader._setitem,
    "SETITEMS": Reader._setitems,
    "DICT": Reader._dict,
    "APPEND": Reader._append_one,
    "APPENDS": Reader._append_many,
    "LONG1": lambda reader: reader._long(1),
    "LONG4": lambda reader: reader._long(4),
}


def _refused(reader: Any) -> None:
    raise pickle.UnpicklingError("it holds an instruction that no file of tensors needs.")


_codes = {getattr(pickle, name)[0] for name in _KEPT}
Reader.dispatch = {
    **{code: _refused for code in range(256)},
    **{code: pickle._Unpickler.dispatch[code] for code in _codes},
    **{getattr(pickle, name)[0]: function for name, function in _OWN.items()},
}
