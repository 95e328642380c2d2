"""Adapter files of every format this project reads, told apart by what they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from ..errors import WrongFormatError
from ..method.adapter import Adapter
from .checked import what_it_is
from .infinite_id_format import InfiniteIdFormat
from .safetensors_file import Header, SafetensorsFile, open_safetensors


class AdapterFormat(Protocol):
    """One kind of adapter file."""

    family: str
    """As people call it."""

    def recognises(self, header: Header) -> bool:
        """Whether a file with this header is of this kind, sound or not."""

    def build(self, file: SafetensorsFile, operations: Any = torch.nn) -> Adapter:
        """The adapter of an open file, checked before any tensor is read.

        It holds the tensors that were read (no copy). Raises subclasses of ``FileError``.
        """


FORMATS: tuple[AdapterFormat, ...] = (InfiniteIdFormat(),)


def format_of(path: Path, header: Header) -> AdapterFormat:
    """The first format that recognises a file. Raises ``WrongFormatError``."""
    for known in FORMATS:
        if known.recognises(header):
            return known
    families = ", ".join(known.family for known in FORMATS)
    raise WrongFormatError(
        path, f"expected an adapter of one of these families: {families}. As metadata format it "
        f"{what_it_is(header)}."
    )  # fmt: skip


def read_adapter(path: str | Path, operations: Any = torch.nn) -> Adapter:
    """Read an adapter file into a CPU module of the file's own dtype.

    ``operations`` supplies its layers. Raises a subclass of ``FileError``; nothing is loaded from
    a file that fails any check.
    """
    path = Path(path)
    with open_safetensors(path) as file:
        return format_of(path, file.header).build(file, operations)
