"""Where a model comes from: a file, a diffusers folder, or the embedded one; asked the same way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from infinite_id_core.files.safetensors_file import SafetensorsFile, open_safetensors, read_header

MICROWORLD = "microworld"
"""In place of a path: the embedded tiny models."""

Part = Literal["unet", "vae", "text_encoders", "open_clip", "adapter", "face_models", "scorer"]
Shape = tuple[int, ...]


class Tensors(Protocol):
    """A model's tensors by their names in the file."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Of all tensors; nothing is read for it."""

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One of them. Raises subclasses of ``FileError``."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model's file, or the folder that diffusers keeps it in."""

    path: Path
    embedded: bool = False

    @property
    def name(self) -> str:
        """For records: of the file or folder, or ``microworld``."""
        return MICROWORLD if self.embedded else self.path.name

    @property
    def is_folder(self) -> bool:
        """Whether it is diffusers' folder, not a file."""
        return not self.embedded and self.path.is_dir()

    def head_width(self, usual: int) -> int:
        """Width of an attention head, which no tensor tells: ``usual``, or the embedded models'."""
        if not self.embedded:
            return usual
        from microworld.config import UNET

        return int(UNET["num_head_channels"])

    def shapes(self) -> Mapping[str, Shape]:
        """Of a file's tensors, which are not read. Raises subclasses of ``FileError``."""
        if self.embedded:
            return _Embedded(self.path).shapes
        return {name: entry.shape for name, entry in read_header(self.path).tensors.items()}

    @contextmanager
    def opened(self) -> Iterator[Tensors]:
        """A file's tensors, read as they are asked for. Raises subclasses of ``FileError``."""
        if self.embedded:
            yield _Embedded(self.path)
            return
        with open_safetensors(self.path) as file:
            yield _Stored(file)


def source_of(source: str | Path, part: Part) -> Source:
    """The source that a configuration or an option names."""
    if str(source) != MICROWORLD:
        return Source(path=Path(source))
    from microworld import files

    paths: dict[Part, Path] = {
        "unet": files.UNET,
        "vae": files.VAE,
        "text_encoders": files.TEXT_ENCODERS,
        "open_clip": files.OPEN_CLIP,
        "adapter": files.ADAPTER,
        "face_models": files.FACE_MODELS,
        "scorer": files.WEIGHTS / "scorer.onnx",
    }
    return Source(path=paths[part], embedded=True)


class _Stored:
    def __init__(self, file: SafetensorsFile) -> None:
        self._file = file

    @property
    def shapes(self) -> Mapping[str, Shape]:
        return {name: entry.shape for name, entry in self._file.header.tensors.items()}

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self._file.tensor(name, dtype)


class _Embedded:
    """The embedded files are packed: small enough to be unpacked as a whole."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @cached_property
    def _tensors(self) -> Mapping[str, Tensor]:
        from microworld import files

        return files.read_weights(self._path)

    @property
    def shapes(self) -> Mapping[str, Shape]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self._tensors[name].to(dtype or self._tensors[name].dtype)
