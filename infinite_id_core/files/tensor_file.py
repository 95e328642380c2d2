"""Any file of named tensors, opened by what it holds: safetensors, or a pickle of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .pickled_tensors import open_pickled_tensors
from .safetensors_file import Header, is_pickle, open_safetensors
from .system import open_regular, reading


class TensorFile(Protocol):
    """An open file: its checked header, and its tensors on demand."""

    path: Path
    size: int
    """Bytes of the whole file."""
    header: Header

    def tensor(self, name: str, dtype: torch.dtype | None = None, *, finite: bool = True) -> Tensor:
        """One tensor on the CPU, in memory of its own, in ``dtype`` (default: the file's).

        Raises ``NotFiniteError`` for NaN or infinity unless ``finite`` is off, and what a damaged
        file raises.
        """


@contextmanager
def open_tensors(path: str | Path) -> Iterator[TensorFile]:
    """Open a file of either kind, whatever its name says; nothing in it runs.

    Raises as ``open_safetensors`` or ``open_pickle`` does.
    """
    path = Path(path)
    with open_regular(path) as file, reading(path):
        start = file.read(9)
    opened = open_pickled_tensors(path) if is_pickle(start) else open_safetensors(path)
    with opened as tensors:
        yield tensors
