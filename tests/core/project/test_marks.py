"""Marks of files: replaced contents are seen, whatever size and clock say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from infinite_id_core import marks


def contents(mark: str) -> str:
    """The part of a mark that only the bytes of the file make."""
    return mark.rpartition(":")[2]


def overwrite(path: Path, data: bytes) -> None:
    """In place, with the old time of writing, as within one tick of a coarse clock."""
    old = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))


def test_the_same_file_has_the_same_mark(tmp_path):
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(b"one")
    assert marks.mark_of(file) == marks.mark_of(file)


def test_the_same_size_within_one_tick(tmp_path):
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(b"a" * 5000)
    first = marks.mark_of(file)
    overwrite(file, b"a" * 4999 + b"b")
    assert contents(marks.mark_of(file)) != contents(first)


def test_a_large_file_is_sampled_from_its_beginning_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(marks, "WHOLE", 2**20)
    file, size = tmp_path / "large.safetensors", 3 * 2**20
    file.write_bytes(bytes(size))
    first = marks.mark_of(file)
    for changed in (0, size - 1, slice(size // 2, size // 2 + 20_000)):
        data = bytearray(size)
        data[changed] = b"\1" * 20_000 if isinstance(changed, slice) else 1
        overwrite(file, bytes(data))
        assert contents(marks.mark_of(file)) != contents(first)
    overwrite(file, bytes(size))
    assert contents(marks.mark_of(file)) == contents(first)


@pytest.mark.parametrize("change", ["replaced", "added", "removed", "renamed"])
def test_a_folder_is_all_its_files(tmp_path, change):
    pack = tmp_path / "pack"
    (pack / "sub").mkdir(parents=True)
    for name in ("det.onnx", "sub/rec.onnx"):
        (pack / name).write_bytes(name.encode())
    first = marks.mark_of(pack)
    assert marks.mark_of(pack) == first
    if change == "replaced":
        overwrite(pack / "sub" / "rec.onnx", b"sub/REC.onnx")
    elif change == "added":
        (pack / "more.onnx").touch()
    elif change == "removed":
        (pack / "det.onnx").unlink()
    else:
        (pack / "det.onnx").rename(pack / "detector.onnx")
    assert marks.mark_of(pack) != first


def test_what_is_gone_has_a_mark_of_its_own(tmp_path):
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(b"one")
    first = marks.mark_of(file)
    file.unlink()
    assert marks.mark_of(file) != first
    assert marks.mark_of(file) == marks.mark_of(file)
