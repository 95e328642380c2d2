"""Tensors that are computed once: packs of safetensors, found by a hash of all that made them.

A key covers the photo, the model and the options, so a stale entry is simply never asked for.
Each pack is written in one step; a damaged one is deleted when its entries are written again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from infinite_id_core.errors import (
    FileError,
    MissingTensorError,
    NotFiniteError,
    WrongShapeError,
)
from infinite_id_core.files.atomic import replacing
from infinite_id_core.files.safetensors_file import SafetensorsFile, read_header
from infinite_id_core.files.system import open_regular

from ..errors import disk_errors
from ..files import locked

PACK = 128  # entries per file
_ANEW = "Delete the file and run the same command again: what it held is computed anew."
_WAIT = 600.0  # seconds for the others to write their packs
_OPEN = 16  # files kept open per process

_log = logging.getLogger(__name__)


def key_of(*values: object) -> str:
    """The name of a cached tensor: a hash of the plain values that it is made from."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def finite(tensor: Tensor) -> bool:
    """Whether every number is one."""
    return bool(tensor.isfinite().all())


class FeatureCache:
    """A folder of packs. Safe to read in worker processes, and to fill by several trainings.

    Writers take turns, and an entry is in one pack only: who computes it a second time reads the
    first one's, now and when resumed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._packs: dict[str, Path] = {}
        self._seen: set[Path] = set()
        self._open: OrderedDict[Path, tuple[SafetensorsFile, BufferedReader]] = OrderedDict()
        self._process = os.getpid()
        self.refresh()

    def refresh(self) -> None:
        """Look again at what is there: another process may have written."""
        self._refresh(delete=False)

    def _refresh(self, *, delete: bool) -> None:
        """``delete`` damaged packs: only with the lock, or one just written could be meant."""
        for path in sorted(set(self.folder.glob("*.safetensors")) - self._seen):
            try:
                names = read_header(path).tensors
            except FileError as error:
                if delete:
                    _log.warning("Computing the contents of a damaged cache file again: %s", error)
                    path.unlink(missing_ok=True)
                continue
            self._take(path, names)

    def _take(self, path: Path, names: Iterable[str]) -> None:
        self._seen.add(path)
        for name in names:
            self._packs.setdefault(name, path)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of ``keys`` that are not there, once each, in order."""
        return [key for key in dict.fromkeys(keys) if key not in self._packs]

    def write(self, entries: Mapping[str, Tensor]) -> None:
        """Keep the tensors that are not there yet.

        An entry never changes: computed again in another batch it would differ by rounding, and
        a resumed run with it. Raises ``NotFiniteError`` (a number that is none would spoil every
        later run), ``DiskFullError``, ``BusyError``; nothing half-written stays.
        """
        tensors = {key: entries[key].cpu().contiguous() for key in self.missing(entries)}
        for key, tensor in tensors.items():
            if not finite(tensor):
                raise NotFiniteError(
                    self.folder, f"was not written to: {key} holds NaN or infinity."
                )
        if tensors:
            with locked(self.folder, "training", _WAIT):
                self._refresh(delete=True)  # what others have written meanwhile
                self._write({key: tensors[key] for key in self.missing(tensors)})

    def _write(self, tensors: dict[str, Tensor]) -> None:
        if not tensors:
            return
        path = self.folder / f"{key_of(*sorted(tensors))}.safetensors"
        with disk_errors(path), replacing(path) as temporary:
            save_file(tensors, temporary)
        self._take(path, tensors)

    def read(self, key: str, shape: tuple[int | None, ...] | None = None) -> Tensor:
        """One tensor. ``shape``: what it must have; None in it, or for it, is any.

        Raises ``NotFiniteError`` for one that is no number, ``WrongShapeError`` (of an older
        release, or of somebody else), and subclasses of ``FileError`` for a file that was cut or
        is gone. It is read, not mapped into memory: a file cut meanwhile would end the process.
        """
        path = self._packs[key]
        file = self._opened(path)
        entry = file.header.tensors.get(key)
        if entry is None:  # another file stands in its place
            raise MissingTensorError(path, f"does not hold the entry {key} any more. {_ANEW}")
        if shape is not None and not _fits(entry.shape, shape):
            wanted = ["any" if size is None else size for size in shape]
            raise WrongShapeError(
                path, f"entry {key} has the shape {list(entry.shape)}; expected {wanted}. {_ANEW}"
            )
        tensor = file.tensor(key, finite=False)
        if not finite(tensor):
            raise NotFiniteError(
                path, f"this cache file holds NaN or infinity (entry {key}). {_ANEW}"
            )
        return tensor

    def _opened(self, path: Path) -> SafetensorsFile:
        if self._process != os.getpid():  # a forked reader shares its parent's place in each file
            self._open, self._process = OrderedDict(), os.getpid()
        known = self._open.pop(path, None)
        if known is None:
            if len(self._open) >= _OPEN:
                _, (_, handle) = self._open.popitem(last=False)
                handle.close()
            handle = open_regular(path)
            known = (SafetensorsFile(path, handle), handle)
        self._open[path] = known
        return known[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


def _fits(found: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(found) == len(wanted) and all(
        size in (None, own) for size, own in zip(wanted, found, strict=True)
    )
