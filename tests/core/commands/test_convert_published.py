"""Published adapters of every family and container, written in one spelling."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from infinite_id_core.errors import InfiniteIDError, UnknownFileError
from infinite_id_core.files.adapter_options import AdapterOptions
from infinite_id_core.files.adapters import read_adapter
from infinite_id_core.sdxl import layers as sdxl_layers
from trainer.convert_published import convert_published

from .. import published_files as files

LAYERS = files.layers_of(files.SMALL, sdxl_layers)
OPTIONS = AdapterOptions(layers=LAYERS)


@pytest.mark.parametrize("container", sorted(files.CONTAINERS))
@pytest.mark.parametrize("family", sorted(files.PROJECTORS))
def test_the_result_is_the_published_spelling(family: str, container: str, tmp_path: Path) -> None:
    made, output = files.made(family, files.SMALL, 3), tmp_path / "out.safetensors"
    path = files.write(tmp_path / "in", container, made, files.SMALL)
    before = path.read_bytes()
    if container == "flat safetensors":
        with pytest.raises(UnknownFileError, match="already"):
            convert_published(path, output, LAYERS)
        return
    told = convert_published(path, output, LAYERS)
    wanted = files.flat(**made)
    found = load_file(output)
    assert told is not None and told.tensors == len(wanted)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert path.read_bytes() == before
    theirs, ours = (read_adapter(p, options=OPTIONS).state_dict() for p in (path, output))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    first = output.read_bytes()
    convert_published(path, output, LAYERS)
    assert output.read_bytes() == first


def test_another_file_is_none(tmp_path: Path) -> None:
    torch.save({"face": torch.zeros(1, 512)}, tmp_path / "x.bin")
    assert convert_published(tmp_path / "x.bin", tmp_path / "y.safetensors", LAYERS) is None


def test_a_damaged_one_writes_nothing(tmp_path: Path) -> None:
    made, output = files.made("plus", files.SMALL, 3), tmp_path / "out.safetensors"
    made["image_proj"]["proj_in.bias"][0] = torch.nan
    path = files.write(tmp_path / "in.bin", "nested pickle", made, files.SMALL)
    with pytest.raises(InfiniteIDError):
        convert_published(path, output, LAYERS)
    assert [p.name for p in tmp_path.iterdir()] == ["in.bin"]
