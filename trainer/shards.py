"""Identity-contiguous WebDataset tars: how they are written and read.

A sample is the consecutive members of one key:

- ``<key>.jpg`` (or ``.png``, ``.webp``): the photo, as its original bytes or re-encoded once;
- ``<key>.face.npy``: the raw face embedding, ``[512]`` float32;
- ``<key>.json``: identity, box, landmarks, source, licence, caption;
- ``<key>.txt``: the caption, where there is one.

All photos of one identity stand one after another in one shard, so a pair never crosses shards.
The bytes depend on the contents only: USTAR, no times, no owners. ``index_file.py`` knows where
each member starts, so a photo is read by one seek; the ``webdataset`` library reads the same
files as a stream.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from infinite_id_core.errors import FileMissingError
from infinite_id_core.files.pictures import read_picture, to_rgb
from infinite_id_core.files.system import open_regular, reading
from infinite_id_core.method.face_clip import FACE_WIDTH

from .errors import DatasetError, ShardDamagedError

Embedding = NDArray[np.float32]

SHARDS = "shards"
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_OPEN_SHARDS = 16


# --- writing ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Where a sample's members start in their shard, in bytes."""

    offset: int
    size: int
    face_offset: int


class ShardWriter:
    """Writes one shard to an open binary file; the same samples always give the same bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._tar = tarfile.TarFile(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)

    def add(
        self, key: str, photo: bytes, extension: str, face: Embedding, record: dict[str, Any]
    ) -> Placed:
        """Append one sample. ``face [512]`` float32, ``record`` becomes ``<key>.json``."""
        offset = self._member(f"{key}.{extension}", photo)
        face_offset = self._member(f"{key}.face.npy", _npy(face))
        text = json.dumps(record, ensure_ascii=False, sort_keys=True)
        self._member(f"{key}.json", text.encode())
        if record.get("caption"):
            self._member(f"{key}.txt", record["caption"].encode())
        return Placed(offset=offset, size=len(photo), face_offset=face_offset)

    def close(self) -> None:
        """Write the end-of-archive marker."""
        self._tar.close()

    def _member(self, name: str, data: bytes) -> int:
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = len(data), 0o644, 0
        self._tar.addfile(info, io.BytesIO(data))
        blocks = -(-len(data) // tarfile.BLOCKSIZE)
        return int(self._tar.offset) - blocks * tarfile.BLOCKSIZE


def _npy(face: Embedding) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(face, dtype="<f4"), allow_pickle=False)
    return buffer.getvalue()


_NPY_HEADER = len(_npy(np.zeros(FACE_WIDTH, np.float32))) - 4 * FACE_WIDTH


# --- reading ---------------------------------------------------------------------------------


class ShardReader:
    """Random access to the members of a folder's shards.

    Safe in threads, after ``fork`` and through pickle: each process opens its own files.
    """

    def __init__(self, folder: str | Path) -> None:
        """``folder``: the dataset's folder (the one that holds ``index.parquet``)."""
        self._folder = Path(folder) / SHARDS
        self._reset()

    def photo(self, shard: str, offset: int, size: int, sha256: str | None = None) -> bytes:
        """The photo's bytes, checked against ``sha256`` if given.

        Raises ``ShardDamagedError``, ``UnreadableError``, ``DatasetError`` where the shard is
        missing, no plain file or not in the folder.
        """
        data = self._read(shard, offset, size)
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise ShardDamagedError(
                self._folder / shard,
                f"the photo at byte {offset} is not the one the index names. {_AGAIN}",
            )
        return data

    def face(self, shard: str, face_offset: int) -> Embedding:
        """The raw face embedding, ``[512]`` float32. Raises as ``photo`` does."""
        data = self._read(shard, face_offset, _NPY_HEADER + 4 * FACE_WIDTH)
        face = np.frombuffer(data, "<f4", offset=_NPY_HEADER).astype(np.float32)
        if data[:6] != b"\x93NUMPY" or not np.isfinite(face).all():
            raise ShardDamagedError(
                self._folder / shard, f"no face embedding at byte {face_offset}. {_AGAIN}"
            )
        return face

    def _read(self, shard: str, offset: int, size: int) -> bytes:
        if self._pid != os.getpid():  # a forked worker must not share file positions
            self._reset()
        path = self._folder / shard
        with self._lock, reading(path):
            file = self._file(shard)
            end = os.fstat(file.fileno()).st_size
            # Before reading: an index may claim any size, and memory would be made for it.
            if offset < 0 or size < 0 or offset + size > end:
                raise ShardDamagedError(
                    path, f"ends before byte {offset + size} (it has {end}). {_AGAIN}"
                )
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise ShardDamagedError(path, f"was cut while it was read. {_AGAIN}")
        return data

    def _file(self, shard: str) -> BinaryIO:
        file = self._files.pop(shard, None)
        if file is None:
            if len(self._files) >= _OPEN_SHARDS:
                self._files.popitem(last=False)[1].close()
            file = self._opened(shard)
        self._files[shard] = file
        return file

    def _opened(self, shard: str) -> BinaryIO:
        if not is_shard_name(shard):
            raise DatasetError(
                self._folder, f"the index names a shard {shard[:100]!r}; expected the name of a "
                f"file in this folder, such as 000000.tar. {_AGAIN}"
            )  # fmt: skip
        path = self._folder / shard
        if path.is_symlink() and self._folder.resolve() not in path.resolve().parents:
            raise DatasetError(
                path, "is a link to a file outside its folder, and was not followed. Put the file "
                "itself there."
            )  # fmt: skip
        try:
            return open_regular(path)
        except FileMissingError as error:
            raise DatasetError(
                path,
                f"the index names this shard and it is gone or no file ({error.problem}). {_AGAIN}",
            ) from error

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._files: OrderedDict[str, BinaryIO] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()


_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.tar")


def is_shard_name(name: str) -> bool:
    """Whether ``name`` is a file's name as ``prepare`` gives them, without any folder in it."""
    return _SHARD_NAME.fullmatch(name) is not None


_AGAIN = "Run 'python -m trainer prepare' again with the same input; it rewrites what is wrong."


def decode_photo(data: bytes) -> Image.Image:
    """A stored photo as an upright RGB picture; transparency is laid over white.

    Boxes and landmarks of the index are in this picture's pixels. Raises ``ImageError``.
    """
    return to_rgb(read_picture(data))
