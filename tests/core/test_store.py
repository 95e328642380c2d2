"""Saving identities under a name."""

from __future__ import annotations

import pytest
import torch

from infinite_id_core import errors, store
from infinite_id_core.checkpoint import read_identity
from infinite_id_core.identity import Identity, IdentityConfig


def identity(value: float) -> Identity:
    return Identity(
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
    assert [float(read_identity(p).face[0, 0]) for p in paths] == [1.0, 2.0, 3.0]
    assert read_identity(paths[1]).config.name == "anna 2"


def test_overwrite_and_error(tmp_path):
    path = store.save_identity(identity(1.0), tmp_path, "anna")
    with pytest.raises(errors.NameTakenError, match="anna.safetensors"):
        store.save_identity(identity(2.0), tmp_path, "anna", "error")
    assert float(read_identity(path).face[0, 0]) == 1.0
    assert store.save_identity(identity(2.0), tmp_path, "anna", "overwrite") == path
    assert float(read_identity(path).face[0, 0]) == 2.0
    assert [p.name for p in tmp_path.iterdir()] == ["anna.safetensors"]
    with pytest.raises(errors.OptionError):
        store.save_identity(identity(2.0), tmp_path, "anna", "maybe")  # type: ignore[arg-type]


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
