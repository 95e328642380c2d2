"""Saving identities under a name."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from infinite_id_core import errors
from infinite_id_core.files import checked, store
from infinite_id_core.files.identities import read_identity
from infinite_id_core.method.face_clip import IdentityConfig, face_clip_identity
from infinite_id_core.method.identity import Identity


def identity(value: float) -> Identity:
    return face_clip_identity(
        face=torch.full((1, 512), value),
        clip=torch.full((1, 257, 8), value),
        weight=torch.ones(1),
        config=IdentityConfig(recogniser="made/reader", clip_model="vit-8"),
    )


def test_keep_both_numbers_the_new_file(tmp_path):
    paths = [store.save_identity(identity(v), tmp_path, "anna") for v in (1.0, 2.0, 3.0)]
    assert [p.name for p in paths] == [
        "anna.safetensors", "anna 2.safetensors", "anna 3.safetensors"
    ]  # fmt: skip
    assert [float(read_identity(p)["face"].value[0, 0]) for p in paths] == [1.0, 2.0, 3.0]
    assert read_identity(paths[1]).name == "anna 2"


def test_overwrite_and_error(tmp_path):
    path = store.save_identity(identity(1.0), tmp_path, "anna")
    with pytest.raises(errors.NameTakenError, match="anna.safetensors"):
        store.save_identity(identity(2.0), tmp_path, "anna", "error")
    assert float(read_identity(path)["face"].value[0, 0]) == 1.0
    assert store.save_identity(identity(2.0), tmp_path, "anna", "overwrite") == path
    assert float(read_identity(path)["face"].value[0, 0]) == 2.0
    assert [p.name for p in tmp_path.iterdir()] == ["anna.safetensors"]
    with pytest.raises(errors.OptionError):
        store.save_identity(identity(2.0), tmp_path, "anna", "maybe")  # type: ignore[arg-type]


SAVER = """
import sys
sys.path.append(sys.argv[1])
import torch
from infinite_id_core.files import store
from infinite_id_core.method.face_clip import IdentityConfig, face_clip_identity
torch.set_num_threads(1)
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[3])):
    value = float(sys.argv[4]) + number
    made = face_clip_identity(
        face=torch.full((1, 512), value), clip=torch.full((1, 257, 8), value),
        weight=torch.ones(1), config=IdentityConfig(recogniser="r", clip_model="c"),
    )
    store.save_identity(made, sys.argv[2], "anna")
"""


def test_keep_both_between_processes_loses_nothing(tmp_path):
    root = str(Path(__file__).parents[3])
    savers = [
        subprocess.Popen(
            [sys.executable, "-c", SAVER, root, str(tmp_path), "15", str(100 * n)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for n in (1, 2, 3)
    ]  # fmt: skip
    for saver in savers:
        assert saver.stdout is not None and saver.stdout.readline() == "ready\n"
    for saver in savers:
        assert saver.stdin is not None
        saver.stdin.write("\n")
        saver.stdin.flush()
    assert [saver.wait(timeout=300) for saver in savers] == [0, 0, 0]
    for saver in savers:
        saver.communicate()
    found = {path.stem: read_identity(path) for path in tmp_path.glob("*.safetensors")}
    values = sorted(float(read["face"].value[0, 0]) for read in found.values())
    assert values == [100.0 * n + i for n in (1, 2, 3) for i in range(15)]
    assert all(read.name == name for name, read in found.items())
    assert len(list(tmp_path.iterdir())) == 45  # no temporary file is left


@pytest.mark.parametrize("links", [True, False])
def test_a_name_that_is_taken_at_the_last_moment_is_not_replaced(links, tmp_path, monkeypatch):
    """``links`` off: a file system that has no hard links."""
    if not links:

        def refuse(*args: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse, raising=False)
    save = checked.save_tensors

    def slow(tensors: object, path: Path, *rest: object, **more: object) -> None:
        save(tensors, path, *rest, **more)
        with contextlib.suppress(FileExistsError):
            (tmp_path / "anna.safetensors").open("xb").close()

    monkeypatch.setattr(checked, "save_tensors", slow)
    assert store.save_identity(identity(1.0), tmp_path, "anna").name == "anna 2.safetensors"
    assert (tmp_path / "anna.safetensors").read_bytes() == b""
    (tmp_path / "anna.safetensors").unlink()
    with pytest.raises(errors.NameTakenError):
        store.save_identity(identity(1.0), tmp_path, "anna", "error")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "anna 2.safetensors", "anna.safetensors"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["", " ", ".", "..", "../anna", "a/b", "a\\b", "/etc/anna", "C:anna", "CON", "con.safetensors",
     "nul.txt", "COM1", ".hidden", "a\x00b", "a\nb", "a:b", "anna.", "x" * 200],
)  # fmt: skip
def test_names_that_leave_the_folder_or_are_reserved(tmp_path, name):
    folder = tmp_path / "identities"
    with pytest.raises(errors.NameNotAllowedError):
        store.save_identity(identity(1.0), folder, name)
    assert list(tmp_path.iterdir()) == []
