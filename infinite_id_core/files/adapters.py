"""Adapter files of every format this project reads, told apart by what they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from ..errors import OtherFamilyError, WrongFormatError
from ..method.adapter import Adapter
from ..method.records import AdapterDescription
from .adapter_options import AdapterOptions
from .checked import what_it_is
from .infinite_id_format import InfiniteIdFormat
from .published.families import PUBLISHED, refusal_of
from .safetensors_file import Header
from .tensor_file import TensorFile, open_tensors


class AdapterFormat(Protocol):
    """One kind of adapter file."""

    family: str
    """As people call it."""

    def recognises(self, header: Header) -> bool:
        """Whether a file with this header is of this kind, sound or not."""

    def describe(
        self, file: TensorFile, options: AdapterOptions | None = None
    ) -> AdapterDescription:
        """What an open file holds, by its header. Raises subclasses of ``FileError``."""

    def build(
        self, file: TensorFile, operations: Any = torch.nn, options: AdapterOptions | None = None
    ) -> Adapter:
        """The adapter of an open file, checked before any tensor is read.

        It holds the tensors that were read (no copy). Raises subclasses of ``FileError``.
        """


FORMATS: tuple[AdapterFormat, ...] = (InfiniteIdFormat(), *PUBLISHED)


_CONVERT = (
    " It looks like an adapter of this project without its metadata: 'python -m trainer convert' "
    "adds them."
)


def format_of(path: Path, header: Header) -> AdapterFormat:
    """The first format that recognises a file.

    Raises ``OtherFamilyError`` where it is known as something else, else ``WrongFormatError``.
    """
    for known in FORMATS:
        if known.recognises(header):
            return known
    problem = refusal_of(header)
    if problem is not None:
        raise OtherFamilyError(path, problem)
    families = ", ".join(known.family for known in FORMATS)
    advice = _CONVERT * any(name.startswith("clip_mapper.") for name in header.tensors)
    raise WrongFormatError(
        path, f"expected an adapter of one of these families: {families}. As metadata format it "
        f"{what_it_is(header)}.{advice}"
    )  # fmt: skip


def describe_adapter(path: str | Path, options: AdapterOptions | None = None) -> AdapterDescription:
    """What ``read_adapter`` would give, without reading a tensor. Raises as that does."""
    path = Path(path)
    with open_tensors(path) as file:
        return format_of(path, file.header).describe(file, options)


def read_adapter(
    path: str | Path, operations: Any = torch.nn, options: AdapterOptions | None = None
) -> Adapter:
    """Read an adapter file, safetensors or pickle, into a CPU module of the file's own dtype.

    ``operations`` supplies its layers; ``options`` says what a published file does not. Raises a
    subclass of ``FileError``; nothing is loaded from a file that fails any check, and nothing of
    a pickle runs.
    """
    path = Path(path)
    with open_tensors(path) as file:
        return format_of(path, file.header).build(file, operations, options)


def family_of(path: str | Path) -> str:
    """What kind of adapter a file is, by its header alone. Raises a subclass of ``FileError``."""
    path = Path(path)
    with open_tensors(path) as file:
        return format_of(path, file.header).family
