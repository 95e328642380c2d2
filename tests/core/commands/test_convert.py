"""``trainer convert`` and ``trainer inspect``: tensors come out of pickles, code does not."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from infinite_id_core import errors
from infinite_id_core.files import adapters, identities, infinite_id_format, safetensors_file
from infinite_id_core.method.adapter import Adapter, infinite_id_adapter
from infinite_id_core.method.face_clip import IdentityConfig, face_clip_identity
from infinite_id_core.method.records import AdapterConfig
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
    return infinite_id_adapter(AdapterConfig(**CONFIG), {LAYER: 8})


@pytest.mark.parametrize("name", ["k" * 10**6, "module." * 600_000 + "clip_mapper.x"])
def test_names_without_end_are_refused_at_once(name, tmp_path):
    values: dict[str, Any] = {name: torch.zeros(4)}
    values["own"] = values
    torch.save(values, tmp_path / "a.pt")
    started = time.process_time()
    with pytest.raises(NotConvertibleError, match="1000 letters|without end"):
        converting.convert(tmp_path / "a.pt", tmp_path / "b.safetensors")
    assert time.process_time() - started < 20


def test_an_adapter_in_a_wrapper_becomes_an_adapter_file(adapter, tmp_path):
    state = {f"module.{name}": tensor for name, tensor in adapter.state_dict().items()}
    state["unet.conv_in.weight"] = torch.ones(3)
    source, output = tmp_path / "a.bin", tmp_path / "a.safetensors"
    torch.save({"state_dict": state, "config": CONFIG, "step": 7}, source)
    found = converting.convert(source, output)
    assert (found.kind, found.left_behind) == ("adapter", 1)
    read = adapters.read_adapter(output)
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
    assert adapters.read_adapter(output).config.face_tokens == 2


def test_an_identity_becomes_an_identity_file(tmp_path):
    face, clip = torch.randn(2, 512), torch.randn(2, 257, 3)
    source, output = tmp_path / "i.pt", tmp_path / "i.safetensors"
    config = {"recogniser": "r", "clip_model": "c", "embedding": "raw"}
    torch.save({"face": face, "clip": clip, "weight": torch.ones(2), "config": config}, source)
    assert converting.convert(source, output).kind == "identity"
    read = identities.read_identity(output)
    assert torch.equal(read["face"].value, face) and read["face"].reading.output == "raw"


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
        converting.convert(tmp_path / "bad.bin", tmp_path / "o.safetensors")
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


# --- pickles that mean harm, or mean well and are odd ----------------------------------------


def saved(path: Path, values: Any, zipped: bool = True) -> Path:
    torch.save(values, path, _use_new_zipfile_serialization=zipped)
    return path


def complete(adapter: Adapter, **more: Any) -> dict[str, Any]:
    return {**adapter.state_dict(), "config": CONFIG, **more}


@pytest.mark.parametrize("zipped", [True, False])
def test_both_containers_give_what_torch_gives(zipped, tmp_path):
    """Views, transposes, shared storages, parameters and every element type."""
    base = torch.arange(60.0)
    values = {
        "down_blocks.a": base.view(6, 10).t(),
        "b": base[7:19].view(3, 4),
        "c": torch.nn.Parameter(torch.randn(3, 5)),
        "d": torch.tensor(2.5),
        "e": torch.empty(0, 4),
        "f": base.to(torch.bfloat16)[::3],
        "i": torch.arange(5),
        "t": torch.tensor([True, False]),
        "w": base.view(6, 10)[:, 3:5],
    }
    if zipped:  # the old container has no spelling for these
        values["u"] = torch.arange(4).to(torch.uint16)
        values["e4"] = base[:8].to(torch.float8_e4m3fn)
    source = saved(tmp_path / "m.ckpt", values, zipped)
    found = converting.convert(source, tmp_path / "m.safetensors")
    assert (found.kind, found.left_behind) == ("model", 0)
    wanted = torch.load(source, weights_only=True)
    read = load_file(tmp_path / "m.safetensors")
    assert set(read) == set(wanted)
    for name, tensor in wanted.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert torch.equal(read[name].float(), tensor.detach().float())


def test_a_checkpoint_in_a_pickle_becomes_one_that_training_reads(tmp_path):
    from trainer.models.unet import load_unet

    from .. import train_world

    unet = tmp_path / "unet.safetensors"
    train_world.write_unet(unet)
    state = load_file(unet)  # as in a checkpoint: model.diffusion_model.*
    state["model_ema.decay"] = torch.tensor(0.9999)
    source = saved(tmp_path / "sdxl.ckpt", {"state_dict": state, "global_step": 7, "epoch": 1})
    with pytest.raises(errors.NotSafetensorsError, match="convert"):
        load_unet(source, head_width=32)
    found = converting.convert(source, tmp_path / "sdxl.safetensors")
    assert (found.kind, found.left_behind) == ("model", 1)
    read = load_unet(tmp_path / "sdxl.safetensors", head_width=32)
    known = load_unet(unet, head_width=32)
    for name, tensor in known.unet.state_dict().items():
        assert torch.equal(read.unet.state_dict()[name], tensor)


def _self_holding() -> dict[str, Any]:
    values: dict[str, Any] = {}
    values["state_dict"] = values
    return values


def _laughing() -> dict[str, Any]:
    values: dict[str, Any] = {"ip_adapter.x": torch.ones(1)}
    for _ in range(12):
        values = {str(n): values for n in range(20)}
    return values


def _nested() -> Any:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


ODD: dict[str, Callable[[], Any]] = {
    "a dict that holds itself": _self_holding,
    "a dict that holds itself in a name": lambda: {"ip_adapter": _self_holding()},
    "dicts of dicts of dicts": _laughing,
    "stride 0": lambda: {"ip_adapter.x": torch.ones(1).expand(10**6, 10**6)},
    "overlapping strides": lambda: {
        "ip_adapter.x": torch.ones(2000).as_strided((1000, 1000), (1, 1))
    },
    "sparse": lambda: {"ip_adapter.x": torch.eye(3).to_sparse()},
    "sparse rows": lambda: {"ip_adapter.x": torch.eye(3).to_sparse_csr()},
    "quantised": lambda: {
        "ip_adapter.x": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    },
    "meta": lambda: {"ip_adapter.x": torch.ones(3, device="meta")},
    "nested": lambda: {"ip_adapter.x": _nested()},
    "many views of one storage": lambda: {
        f"ip_adapter.{n}": big for big in [torch.ones(10_000)] for n in range(50)
    },
    "a name that is no text": lambda: {"ip_adapter": {"\ud800": torch.ones(1)}},
    "a key of a tuple": lambda: {("a", "b"): torch.ones(1)},
    "a number of a thousand digits": lambda: {"config": {"face_tokens": 10**1000}},
    "a set": lambda: {"ip_adapter.x": {1, 2}},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ODD)
def test_odd_pickles_are_named_at_once(name, zipped, tmp_path):
    if name == "nested" and not zipped:
        zipped = True  # torch writes it in no other way
    source = saved(tmp_path / "odd.bin", ODD[name](), zipped)
    started = time.perf_counter()
    with pytest.raises(errors.FileError) as caught:
        converting.convert(source, tmp_path / "o.safetensors", ALLOWED)
    assert time.perf_counter() - started < 20
    assert len(str(caught.value)) < 6000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["odd.bin"]


@pytest.mark.parametrize("config", ["[" * 100_000, "not json", 7, {"clip_width": [1]}])
def test_an_odd_configuration_of_a_pickle_is_named(config, adapter, tmp_path):
    source = saved(tmp_path / "a.bin", complete(adapter, config=config))
    with pytest.raises(errors.ConfigError):
        converting.convert(source, tmp_path / "o.safetensors")


def pickled(data: bytes, **members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in {"a/data.pkl": data, **members}.items():
            archive.writestr(name, content)
    return out.getvalue()


def tensor_code(shape: tuple[int, ...], stride: tuple[int, ...], elements: int) -> bytes:
    """A pickle of one tensor with any claim, spelt out."""
    numbers = [b"".join(b"\x8a\x08" + n.to_bytes(8, "little") for n in part) for part in
               (shape, stride)]  # fmt: skip
    return (
        b"\x80\x02}X\x0c\0\0\0ip_adapter.xctorch._utils\n_rebuild_tensor_v2\n("
        b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu\x8a\x08"
        + elements.to_bytes(8, "little") + b"tQK\0(" + numbers[0] + b"t(" + numbers[1]
        + b"t\x89NtRs."
    )  # fmt: skip


@pytest.mark.parametrize(
    "data",
    [
        pickled(tensor_code((4,), (1,), 4), **{"a/data/0": bytes(12)}),
        pickled(tensor_code((2**40,), (1,), 4), **{"a/data/0": bytes(16)}),
        pickled(tensor_code((4,), (1,), 2**40), **{"a/data/0": bytes(16)}),
        pickled(tensor_code((2**31, 2**31), (2**31, 1), 2**61), **{"a/data/0": bytes(16)}),
        pickled(tensor_code((4,), (2**61,), 4), **{"a/data/0": bytes(16)}),
        pickled(tensor_code((0,) * 9, (1,) * 9, 4), **{"a/data/0": bytes(16)}),
        pickled(tensor_code((4,), (1,), 4)),
        pickled(b"\x80\x02" + b"(" * 9_000_000 + b"."),
        pickled(b"\x80\x02r\xff\xff\xff\x7f."),
        pickled(b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"."),
        pickled(b"\x80\x02cbuiltins\nexec\nX\x01\0\0\x001\x85R."),
        pickled(b"\x80\x02ccollections\nOrderedDict\n)R}(X\x01\0\0\0aK\1ubb."),
        pickled(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x04\0\0\0callctorch\nSize\nsb."),
        pickled(b"\x80\x02](K\1K\2eb."),
        pickled(b"\x80\x02K\1K\2s."),
        pickled(b"\x80\x02K\1K\2a."),
        pickled(b""),
        pickled(b"\x80\x02"),
        b"\x80\x02" + b"\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little") + b".",
        b"\x80\x02K\1.",
        b"\x80\x04X\xff\xff\xff\x7f",
        b"PK\x03\x04" + bytes(200),
    ],
)
def test_pickles_of_bytes_that_no_honest_writer_makes(data, tmp_path):
    source = tmp_path / "x.bin"
    source.write_bytes(data)
    started = time.perf_counter()
    with pytest.raises(errors.FileError):
        converting.convert(source, tmp_path / "o.safetensors", ALLOWED)
    assert time.perf_counter() - started < 20
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.bin"]


def test_the_spelt_tensor_is_read_where_it_is_sound(tmp_path):
    """Without this, the claims above could fail for any reason."""
    source = tmp_path / "x.bin"
    source.write_bytes(
        pickled(tensor_code((2, 2), (2, 1), 4), **{"a/data/0": struct.pack("<4f", 1, 2, 3, 4)})
    )
    found = converting.convert(source, tmp_path / "o.safetensors")
    assert found.kind == "ip-adapter"
    assert load_file(tmp_path / "o.safetensors")["ip_adapter.x"].tolist() == [[1, 2], [3, 4]]


def test_a_compressed_archive_is_not_unpacked(adapter, tmp_path):
    source, output = tmp_path / "z.bin", tmp_path / "o.safetensors"
    saved(source, complete(adapter))
    with zipfile.ZipFile(source) as archive:
        members = {m.filename: archive.read(m) for m in archive.infolist()}
    with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr("archive/data/99", bytes(2**28))
    with pytest.raises(UnsafePickleError):
        converting.convert(source, output)


CONVERT = """
import resource, sys
sys.path.append(sys.argv[1])
from pathlib import Path
from trainer import convert
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = convert.convert(Path(sys.argv[2]), Path(sys.argv[3]))
print(found.kind, len(found.tensors), found.left_behind)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(os.name != "posix", reason="measures memory")
@pytest.mark.parametrize("zipped", [True, False])
def test_memory_is_that_of_one_tensor(zipped, tmp_path):
    state = {f"input_blocks.{n}.weight": torch.full((2**22,), float(n)) for n in range(16)}
    saved(tmp_path / "m.ckpt", {"state_dict": state}, zipped)  # 268 MB
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, str(Path(__file__).parents[3]), str(tmp_path / "m.ckpt"),
         str(tmp_path / "o.safetensors")],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    said, grown = done.stdout.splitlines()
    assert said == "model 16 0"
    assert int(grown) < 120_000  # kB on Linux (bytes on macOS, where this asks for less)


def test_what_the_system_refuses_while_converting_is_named(adapter, tmp_path, monkeypatch, capsys):
    source = saved(tmp_path / "a.bin", complete(adapter))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(errors.NotWrittenError):
        converting.convert(source, tmp_path / "file" / "deep" / "o.safetensors")
    converting.convert(source, tmp_path / "new" / "deep" / "o.safetensors")  # folders are made

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert cli.main(["convert", str(source), str(tmp_path / "o.safetensors")]) == 1
    assert "DiskFullError" in capsys.readouterr().err
    monkeypatch.undo()

    def refuse(path: Path, *args: Any, **kwargs: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    assert cli.main(["convert", str(source), str(tmp_path / "o.safetensors")]) == 1
    assert "UnreadableError" in capsys.readouterr().err
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "file", "new"]


# --- inspect ---------------------------------------------------------------------------------


def test_inspect_an_adapter(adapter, tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    infinite_id_format.write_adapter(path, adapter, torch.float16)
    found = inspect_file(path)
    count = sum(t.numel() for t in adapter.state_dict().values())
    assert (found.kind, found.problems) == ("adapter", [])
    assert found.facts["parameters"] == count
    assert found.facts["config: clip_model"] == "ViT-H-14"
    assert found.tables["layers"][1] == ("mid_block.attentions.0", 1, 8, 4)
    assert cli.main(["inspect", str(path)]) == 0
    assert f"{count:,}" in capsys.readouterr().out


def test_inspect_an_identity(tmp_path, capsys):
    identity = face_clip_identity(
        face=2 * torch.nn.functional.normalize(torch.randn(1, 512)),
        clip=torch.randn(1, 257, 3),
        weight=torch.ones(1),
        config=IdentityConfig(recogniser="r", clip_model="c", embedding="normed"),
    )
    path = tmp_path / "i.safetensors"
    identities.write_identity(path, identity)
    found = inspect_file(path)
    assert found.kind == "identity" and found.facts["references"] == 1
    assert found.facts["lengths of the face embeddings"] == pytest.approx([2.0], abs=1e-3)
    assert len(found.problems) == 1 and "normed" in found.problems[0]
    assert cli.main(["inspect", "--json", str(path)]) == 1
    assert json.loads(capsys.readouterr().out)["kind"] == "identity"


def test_inspect_finds_damage_and_does_not_open_pickles(adapter, tmp_path):
    path = tmp_path / "a.safetensors"
    infinite_id_format.write_adapter(path, adapter)
    data = path.read_bytes()
    (tmp_path / "half.safetensors").write_bytes(data[: len(data) // 2])
    assert "bytes" in inspect_file(tmp_path / "half.safetensors").problems[0]
    tensors = {**load_file(path), "clip_mapper.norm.bias": torch.full((4,), torch.inf)}
    header = safetensors_file.read_header(path)
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
    infinite_id_format.write_adapter(tmp_path / "one.safetensors", adapter)
    found = inspect_file(tmp_path)
    assert found.tables["files"][1][:2] == ("one.safetensors", "adapter")
    assert found.problems == []
