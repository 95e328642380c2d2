"""``trainer convert`` and ``trainer inspect``: tensors come out of pickles, code does not."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from infinite_id_core import checkpoint, errors
from infinite_id_core.adapter import Adapter, AdapterConfig
from infinite_id_core.identity import Identity, IdentityConfig
from trainer import __main__ as cli
from trainer import convert as converting
from trainer.errors import (
    NotConvertibleError,
    UnknownFileError,
    UnsafePickleError,
)
from trainer.inspect import inspect_file

LAYER = "mid_block.attentions.0.transformer_blocks.0"
CONFIG = {
    "clip_width": 6,
    "context_width": 4,
    "recogniser": "buffalo_l/w600k_r50",
    "clip_model": "ViT-H-14",
    "face_tokens": 2,
}
ALLOWED = {"recogniser": "r", "clip_model": "c"}


class Harm:
    """Unpickled the usual way, it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"echo harm > {self.target}",)


@pytest.fixture
def adapter() -> Adapter:
    torch.manual_seed(0)
    return Adapter(AdapterConfig(**CONFIG), {LAYER: 8})


def test_an_adapter_in_a_wrapper_becomes_an_adapter_file(adapter, tmp_path):
    state = {f"module.{name}": tensor for name, tensor in adapter.state_dict().items()}
    state["unet.conv_in.weight"] = torch.ones(3)
    source, output = tmp_path / "a.bin", tmp_path / "a.safetensors"
    torch.save({"state_dict": state, "config": CONFIG, "step": 7}, source)
    found = converting.convert(source, output)
    assert (found.kind, found.left_behind) == ("adapter", 1)
    read = checkpoint.read_adapter(output)
    assert read.config == adapter.config
    for name, tensor in adapter.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor)


def test_the_configuration_can_come_from_the_command_line(adapter, tmp_path, capsys):
    source, output = tmp_path / "a.pt", tmp_path / "a.safetensors"
    torch.save(adapter.state_dict(), source)
    assert cli.main(["convert", str(source), str(output)]) == 1
    assert "ConfigError" in capsys.readouterr().err and not output.exists()
    pairs = [f"--config={name}={value}" for name, value in CONFIG.items()]
    assert cli.main(["convert", str(source), str(output), *pairs]) == 0
    assert checkpoint.read_adapter(output).config.face_tokens == 2


def test_an_identity_becomes_an_identity_file(tmp_path):
    face, clip = torch.randn(2, 512), torch.randn(2, 257, 3)
    source, output = tmp_path / "i.pt", tmp_path / "i.safetensors"
    config = {"recogniser": "r", "clip_model": "c", "embedding": "raw"}
    torch.save({"face": face, "clip": clip, "weight": torch.ones(2), "config": config}, source)
    assert converting.convert(source, output).kind == "identity"
    read = checkpoint.read_identity(output)
    assert torch.equal(read.face, face) and read.config.embedding == "raw"


@pytest.mark.parametrize("nested", [True, False])
def test_ip_adapter_files_become_flat(nested, tmp_path):
    k, proj = torch.randn(8, 4), torch.randn(4, 4)
    values = (
        {"image_proj": {"proj.weight": proj}, "ip_adapter": {"1.to_k_ip.weight": k}}
        if nested
        else {
            "image_proj_model.proj.weight": proj,
            "adapter_modules.1.to_k_ip.weight": k,
            "unet.conv_in.weight": torch.ones(1),
        }
    )
    source, output = tmp_path / "ip.bin", tmp_path / "ip.safetensors"
    torch.save(values, source)
    found = converting.convert(source, output)
    assert (found.kind, found.left_behind) == ("ip-adapter", 0 if nested else 1)
    tensors = load_file(output)
    assert set(tensors) == {"image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"}
    assert torch.equal(tensors["ip_adapter.1.to_k_ip.weight"], k)


@pytest.mark.parametrize("container", ["zip", "legacy", "plain pickle"])
def test_a_malicious_pickle_runs_nothing(container, adapter, tmp_path):
    harm = tmp_path / "harm"
    source, output = tmp_path / "bad.bin", tmp_path / "out.safetensors"
    values = {**adapter.state_dict(), "config": CONFIG, "extra": Harm(harm)}
    if container == "plain pickle":
        source.write_bytes(pickle.dumps(values["extra"]))
    else:
        torch.save(values, source, _use_new_zipfile_serialization=container == "zip")
    with pytest.raises(UnsafePickleError, match="nothing of it ran"):
        converting.convert(source, output)
    assert not harm.exists() and not output.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.bin"]
    # The test is worth something only if the pickle would have done it.
    torch.load(source, weights_only=False) if container != "plain pickle" else pickle.loads(
        source.read_bytes()
    )
    assert harm.exists()


def test_the_environment_cannot_switch_the_protection_off(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    harm = tmp_path / "harm"
    torch.save({"x": Harm(harm)}, tmp_path / "bad.bin")
    with pytest.raises(UnsafePickleError):
        converting.load_tensors(tmp_path / "bad.bin")
    assert not harm.exists()


def test_what_cannot_be_converted_is_named(adapter, tmp_path):
    output = tmp_path / "o.safetensors"

    def attempt(error, values=None, data=None, name="x.bin"):
        source = tmp_path / name
        if data is None:
            torch.save(values, source)
        else:
            source.write_bytes(data)
        with pytest.raises(error):
            converting.convert(source, output, ALLOWED)
        assert not output.exists()

    attempt(NotConvertibleError, {"weight": torch.ones(2)})
    attempt(NotConvertibleError, [1, 2, 3])
    attempt(UnknownFileError, data=b"hello, world, this is text")
    attempt(UnknownFileError, data=b"")
    torch.save(adapter.state_dict(), tmp_path / "whole.bin")
    half = (tmp_path / "whole.bin").read_bytes()
    attempt(errors.TruncatedFileError, data=half[: len(half) // 2])
    bad = {**adapter.state_dict(), "config": CONFIG}
    bad["clip_mapper.norm.weight"] = torch.tensor([1.0, float("nan"), 1.0, 1.0])
    attempt(errors.NotFiniteError, bad)
    bad["clip_mapper.norm.weight"] = torch.ones(5)
    attempt(errors.WrongShapeError, bad)
    del bad["clip_mapper.norm.weight"]
    attempt(errors.MissingTensorError, bad)
    attempt(errors.UnexpectedTensorError, {**adapter.state_dict(), "config": CONFIG,
                                           "stray": torch.ones(1)})  # fmt: skip
    with pytest.raises(errors.FileMissingError):
        converting.convert(tmp_path / "none.bin", output)
    with pytest.raises(errors.OptionError, match=r"\.safetensors"):
        converting.convert(tmp_path / "whole.bin", tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "z.bin", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(errors.FileError):
        converting.convert(tmp_path / "z.bin", output)


# --- inspect ---------------------------------------------------------------------------------


def test_inspect_an_adapter(adapter, tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    checkpoint.write_adapter(path, adapter, torch.float16)
    found = inspect_file(path)
    count = sum(t.numel() for t in adapter.state_dict().values())
    assert (found.kind, found.problems) == ("adapter", [])
    assert found.facts["parameters"] == count
    assert found.facts["config: clip_model"] == "ViT-H-14"
    assert found.tables["layers"][1] == ("mid_block.attentions.0", 1, 8, 4)
    assert cli.main(["inspect", str(path)]) == 0
    assert f"{count:,}" in capsys.readouterr().out


def test_inspect_an_identity(tmp_path, capsys):
    identity = Identity(
        face=2 * torch.nn.functional.normalize(torch.randn(1, 512)),
        clip=torch.randn(1, 257, 3),
        weight=torch.ones(1),
        config=IdentityConfig(recogniser="r", clip_model="c", embedding="normed"),
    )
    path = tmp_path / "i.safetensors"
    checkpoint.write_identity(path, identity)
    found = inspect_file(path)
    assert found.kind == "identity" and found.facts["references"] == 1
    assert found.facts["lengths of the face embeddings"] == pytest.approx([2.0], abs=1e-3)
    assert len(found.problems) == 1 and "normed" in found.problems[0]
    assert cli.main(["inspect", "--json", str(path)]) == 1
    assert json.loads(capsys.readouterr().out)["kind"] == "identity"


def test_inspect_finds_damage_and_does_not_open_pickles(adapter, tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.write_adapter(path, adapter)
    data = path.read_bytes()
    (tmp_path / "half.safetensors").write_bytes(data[: len(data) // 2])
    assert "bytes" in inspect_file(tmp_path / "half.safetensors").problems[0]
    tensors = {**load_file(path), "clip_mapper.norm.bias": torch.full((4,), torch.inf)}
    header = checkpoint.read_header(path)
    save_file(tensors, tmp_path / "inf.safetensors", metadata=header.metadata)
    assert "NotFiniteError" in inspect_file(tmp_path / "inf.safetensors").problems[0]
    torch.save({"x": Harm(tmp_path / "harm")}, tmp_path / "p.safetensors")
    found = inspect_file(tmp_path / "p.safetensors")
    assert found.kind == "pickle" and "convert" in found.problems[0]
    assert not (tmp_path / "harm").exists()
    save_file({"ip_adapter.1.to_k_ip.weight": torch.ones(2, 2)}, tmp_path / "ip.safetensors")
    assert inspect_file(tmp_path / "ip.safetensors").kind == "ip-adapter"
    (tmp_path / "text.bin").write_text("hello", encoding="utf-8")
    with pytest.raises(UnknownFileError):
        inspect_file(tmp_path / "text.bin")
    with pytest.raises(errors.FileMissingError):
        inspect_file(tmp_path / "none")


def test_inspect_a_folder_of_files(adapter, tmp_path):
    checkpoint.write_adapter(tmp_path / "one.safetensors", adapter)
    found = inspect_file(tmp_path)
    assert found.tables["files"][1][:2] == ("one.safetensors", "adapter")
    assert found.problems == []
