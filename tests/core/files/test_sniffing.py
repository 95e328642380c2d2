"""A safetensors file whose header's size begins with a pickle's first bytes is none."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from infinite_id_core.errors import UnknownFileError
from trainer.convert import convert
from trainer.inspect import inspect_file

SIZES = (640, 896, 1152, 1408, 640 + 65536)  # \x80\x02 to \x80\x05


def with_header_of(size: int, path: Path) -> Path:
    whole = save({"x": torch.zeros(4)})
    old = struct.unpack("<Q", whole[:8])[0]
    header = whole[8 : 8 + old].ljust(size)
    path.write_bytes(struct.pack("<Q", size) + header + whole[8 + old :])
    return path


@pytest.mark.parametrize("size", SIZES)
def test_it_is_inspected_as_what_it_is(size: int, tmp_path: Path) -> None:
    path = with_header_of(size, tmp_path / "x.safetensors")
    assert path.read_bytes()[:1] == b"\x80"
    assert "pickle" not in inspect_file(path).kind


@pytest.mark.parametrize("size", SIZES)
def test_it_is_nothing_to_convert(size: int, tmp_path: Path) -> None:
    path = with_header_of(size, tmp_path / "x.safetensors")
    with pytest.raises(UnknownFileError, match="is a safetensors file, not a pickle"):
        convert(path, tmp_path / "y.safetensors")
