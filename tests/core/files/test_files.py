"""Adapter and identity files: what is refused, what is read back, what a crash leaves."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import pickle
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from infinite_id_core import errors
from infinite_id_core.files import (
    adapters,
    checked,
    identities,
    infinite_id_format,
    safetensors_file,
    store,
)
from infinite_id_core.files.safetensors_file import SafetensorsFile, open_safetensors, save_tensors
from infinite_id_core.method.adapter import Adapter, infinite_id_adapter
from infinite_id_core.method.face_clip import IdentityConfig, face_clip_config, face_clip_identity
from infinite_id_core.method.features import Feature, Reading
from infinite_id_core.method.identity import Identity
from infinite_id_core.method.records import AdapterConfig

from .. import hostile_files

READ = {
    "adapter": adapters.read_adapter,
    "identity": identities.read_identity,
    "features": identities.read_identity,
}
LAYERS = {"mid_block.attentions.0.transformer_blocks.0": 8}


def made_adapter(dtype: torch.dtype = torch.float32, seed: int = 0) -> Adapter:
    torch.manual_seed(seed)
    config = AdapterConfig(
        clip_width=6, context_width=4, recogniser="r", clip_model="c", licence_note="für Anna"
    )
    return infinite_id_adapter(config, LAYERS).to(dtype)


def made_identity(seed: int = 0, clip: torch.dtype = torch.float32, name: str = "") -> Identity:
    generator = torch.Generator().manual_seed(seed)
    return face_clip_identity(
        face=torch.randn(2, 512, generator=generator),
        clip=torch.randn(2, 257, 6, generator=generator).to(clip),
        weight=torch.tensor([1.0, 0.5]),
        config=IdentityConfig(recogniser="r", clip_model="c", embedding="raw", name=name),
    )


def made_features(seed: int = 0) -> Identity:
    """An identity that version 1 of the file cannot hold."""
    generator = torch.Generator().manual_seed(seed)
    reading = Reading(model="e", output="pooled", shape=(3, 8), cut="grey")
    pooled = Feature(
        reading=reading,
        value=torch.randn(2, 3, 8, generator=generator),
        null=torch.randn(3, 8, generator=generator).half(),
    )
    two = made_identity(seed, torch.float16, name="Änne")
    return dataclasses.replace(two, features={**two.features, "pooled": pooled})


def write(kind: str, path: Path, seed: int = 0) -> None:
    if kind == "adapter":
        infinite_id_format.write_adapter(path, made_adapter(seed=seed))
    else:
        made = made_identity if kind == "identity" else made_features
        identities.write_identity(path, made(seed))


# --- refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), hostile_files.CASES)
def test_a_bad_file_is_refused_by_name(kind, name, tmp_path, monkeypatch):
    threat, harm = hostile_files.THREATS[name], tmp_path / "harm"
    path = tmp_path / f"{kind}.safetensors"
    path.write_bytes(hostile_files.build(kind, name, harm))
    before = path.read_bytes()
    reads: list[str] = []
    read = SafetensorsFile.tensor
    monkeypatch.setattr(
        SafetensorsFile, "tensor", lambda *a, **k: reads.append(a[1]) or read(*a, **k)
    )
    started = time.perf_counter()
    with pytest.raises(errors.FileError) as caught:
        READ[kind](path)
    assert type(caught.value).__name__ == threat.error, caught.value
    assert str(caught.value).startswith(f"{path}: ")
    assert caught.value.path == path
    assert len(str(caught.value)) < len(str(path)) + 4100  # whatever was in the file
    assert bool(reads) == threat.loads  # tensors are read only after everything else is checked
    assert time.perf_counter() - started < 20
    assert not harm.exists()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", [n for n in hostile_files.THREATS if n.startswith("pickle")])
def test_the_pickles_would_have_done_harm(name, tmp_path):
    harm = tmp_path / "harm"
    pickle.loads(hostile_files.build("adapter", name, harm))
    assert harm.exists()


def test_sound_files_are_read(tmp_path):
    """Without this, refusing everything would pass."""
    path = tmp_path / "sound.safetensors"
    path.write_bytes(hostile_files.adapter().bytes())
    adapter = adapters.read_adapter(path)
    assert adapter.widths == hostile_files.LAYERS
    found = adapters.describe_adapter(path)
    assert found.record == adapter.config and found.needs == adapter.needs
    assert (adapter.config.clip_width, adapter.config.face_tokens) == (6, 2)
    path.write_bytes(hostile_files.identity(3).bytes())
    identity = identities.read_identity(path)
    assert (identity.references, identity["clip"].reading.shape) == (3, (257, 6))
    assert (
        float(identity["face"].value[0, 0]) == 0.5
        and float(identity["clip"].value[2, 256, 5]) == 0.25
    )


@pytest.mark.parametrize("kind", hostile_files.KINDS)
def test_truncated_at_every_boundary(kind, tmp_path):
    file = hostile_files.SOUND[kind]()
    path = tmp_path / "short.safetensors"
    path.write_bytes(file.bytes())
    size = path.stat().st_size
    start = size - len(file.data())
    ends = {start + v["data_offsets"][1] for k, v in file.header().items() if k[0] != "_"}
    edges = {0, 1, 7, 8, 9, start // 2, start, size, *ends}
    cuts = {edge + by for edge in edges for by in (-1, 0, 1)}
    for cut in sorted((c for c in cuts if 0 <= c < size), reverse=True):
        os.truncate(path, cut)
        with pytest.raises(errors.TruncatedFileError):
            READ[kind](path)


MEMORY = """
import resource, sys
sys.path.append(sys.argv[1])
from infinite_id_core.files import identities
from infinite_id_core import errors
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    identities.read_identity(sys.argv[2])
    name = "read"
except errors.FileError as error:
    name = type(error).__name__
print(name, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(os.name != "posix", reason="sparse files and their memory")
@pytest.mark.parametrize(
    ("kind", "references", "width", "weight", "expected"),
    [
        ("identity", 1216, 1280, 0.0, "ConfigError"),  # 800 MB of nothing
        ("identity", 1, 1_560_000, 1.0, "WrongShapeError"),  # 800 MB of one reference
        ("identity", 4096, 16384, 1.0, "FileTooLargeError"),  # 35 GB
        ("features", 1216, 1280, 0.0, "ConfigError"),
        ("features", 1, 1_560_000, 1.0, "ConfigError"),  # a width that no reading has
        ("features", 4096, 16384, 1.0, "FileTooLargeError"),
    ],
)
def test_a_sparse_identity_is_refused_before_it_is_read(
    kind, references, width, weight, expected, tmp_path
):
    file = hostile_files.SOUND[kind]()
    face, clip = ("face", "clip") if kind == "identity" else ("face.value", "clip.value")
    size = 2 * references * 257 * width
    file.tensors = {
        face: hostile_files.tensor([references, 512], "F32", 0.5),
        clip: hostile_files.Entry("F16", [references, 257, width], b""),
        "weight": hostile_files.tensor([references], "F32", weight),
    }
    if kind == "features":
        del file.config["features"]["pooled"]
        file.config["features"]["clip"]["shape"] = [257, width]
    entries = file.header()
    start = len(file.tensors[face].data)
    entries[clip]["data_offsets"] = [start, start + size]
    entries["weight"]["data_offsets"] = [start + size, start + size + 4 * references]
    raw = json.dumps(entries).encode()
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as out:
        out.write(len(raw).to_bytes(8, "little") + raw + file.tensors[face].data)
        out.seek(size, os.SEEK_CUR)
        out.write(file.tensors["weight"].data)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(Path(__file__).parents[3]), str(path)],
        capture_output=True, text=True, timeout=300, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    name, grown = done.stdout.split()
    assert name == expected
    assert int(grown) < 100_000  # kB on Linux (bytes on macOS, where this asks for less)


def test_header_and_tensors_come_from_one_file(tmp_path, monkeypatch):
    """Between the two another program puts another file in place, as every save does."""
    path = tmp_path / "i.safetensors"
    identities.write_identity(path, made_identity(1, name="old"))
    parse = safetensors_file._parse_header

    def replaced(*args: Any) -> Any:
        header = parse(*args)
        monkeypatch.undo()
        identities.write_identity(path, made_identity(2, name="new"))
        return header

    monkeypatch.setattr(safetensors_file, "_parse_header", replaced)
    read = identities.read_identity(path)
    assert read.name == "old" and torch.equal(read["face"].value, made_identity(1)["face"].value)
    read = identities.read_identity(path)
    assert read.name == "new" and torch.equal(read["face"].value, made_identity(2)["face"].value)


def test_a_file_that_is_written_into_while_it_is_read_is_named(tmp_path):
    path = tmp_path / "i.safetensors"
    write("identity", path)
    data = path.read_bytes()
    with pytest.raises(errors.FileChangedError), open_safetensors(path) as file:
        with path.open("r+b") as other:
            other.seek(len(data) - 8)
            other.write(data[-8:])
        os.utime(path, ns=(1, 1))  # a clock too coarse to see the writing
        file.tensor("face")
    with pytest.raises(errors.TruncatedFileError), open_safetensors(path) as file:
        os.truncate(path, len(data) // 2)
        for name in file.header.tensors:
            file.tensor(name)


def test_null_metadata_is_no_metadata(tmp_path):
    """The format's own reader takes it; a model file may have it."""
    path = tmp_path / "null.safetensors"
    file = hostile_files.identity()
    path.write_bytes(file.bytes(json.dumps({**file.header(), "__metadata__": None}).encode()))
    with safe_open(path, framework="pt") as known:
        assert set(known.keys()) == set(file.tensors)
    header = safetensors_file.read_header(path)
    assert header.metadata == {} and set(header.tensors) == set(file.tensors)
    with pytest.raises(errors.WrongFormatError):
        identities.read_identity(path)


def test_equal_contents_give_equal_bytes(tmp_path):
    """The library's writer puts the metadata in random order."""
    for kind in hostile_files.KINDS:
        found = set()
        for number in range(12):
            write(kind, tmp_path / f"{number}.safetensors")
            found.add((tmp_path / f"{number}.safetensors").read_bytes())
        assert len(found) == 1


@pytest.mark.parametrize("dtype", sorted(safetensors_file.DTYPES))
def test_every_type_of_tensor_is_written_and_read(dtype, tmp_path):
    kind = safetensors_file.DTYPES[dtype]
    tensors = {
        "grid": torch.arange(24).view(2, 3, 4).permute(2, 0, 1).float().to(kind),
        "one": torch.tensor(1.0).to(kind),
        "none": torch.empty(0, 3).to(kind),
        "odd": torch.ones(3, dtype=torch.uint8),  # what follows it is not aligned
    }
    path = tmp_path / "x.safetensors"
    save_tensors(tensors, path, {"b": "2", "a": "1"})
    with open_safetensors(path) as file:
        assert file.header.metadata == {"a": "1", "b": "2"}
        for name, tensor in tensors.items():
            read = file.tensor(name)
            assert read.dtype == tensor.dtype and read.shape == tensor.shape
            assert torch.equal(read.view(-1).view(torch.uint8),
                               tensor.contiguous().view(-1).view(torch.uint8))  # fmt: skip
            assert file.finite(name)
        if not kind.is_complex:
            assert file.tensor("grid", torch.float32).dtype == torch.float32
    with safe_open(path, framework="pt") as known:
        assert known.get_tensor("grid").dtype == kind


def test_an_identity_that_could_not_be_read_is_not_written(tmp_path):
    many = face_clip_identity(
        face=torch.zeros(4097, 512),
        clip=torch.zeros(1, 1, 1, dtype=torch.float16).expand(4097, 257, 1),
        weight=torch.ones(4097),
        config=IdentityConfig(recogniser="r", clip_model="c"),
    )
    with pytest.raises(errors.NotWrittenError, match="4096"):
        identities.write_identity(tmp_path / "many.safetensors", many)
    assert list(tmp_path.iterdir()) == []


def test_a_claim_of_terabytes_allocates_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    names = ["terabytes claimed", "shape of 2**40", "a million dimensions", "giant header"]
    paths = []
    for name in names:
        paths.append(tmp_path / f"{len(paths)}.safetensors")
        paths[-1].write_bytes(hostile_files.build("identity", name, tmp_path / "harm"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in paths:
        with pytest.raises(errors.FileError):
            identities.read_identity(path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100_000  # kB on Linux (bytes on macOS, where this asks for less)


@pytest.mark.parametrize("kind", hostile_files.KINDS)
def test_what_is_no_readable_file_is_named(kind, tmp_path, monkeypatch):
    for path in (tmp_path / "none.safetensors", tmp_path, tmp_path / ("x" * 300), Path("a\0b")):
        with pytest.raises(errors.FileMissingError):
            READ[kind](path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")  # opened, it would wait for ever
        with pytest.raises(errors.FileMissingError):
            READ[kind](tmp_path / "pipe")
    locked = tmp_path / "locked.safetensors"
    write(kind, locked)

    def refuse(path: Path, *args: Any, **kwargs: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(errors.UnreadableError, match="Permission denied"):
        READ[kind](locked)


# --- read back -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_adapter_comes_back_bit_for_bit(dtype, tmp_path):
    adapter, path = made_adapter(), tmp_path / "a.safetensors"
    infinite_id_format.write_adapter(path, adapter, dtype)
    read = adapters.read_adapter(path)
    assert read.config == adapter.config and read.widths == LAYERS
    found, wanted = read.state_dict(), adapter.state_dict()
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor.to(dtype))
    assert not any(p.requires_grad for p in read.parameters())
    assert all(not p.is_meta for p in read.parameters())


@pytest.mark.parametrize("clip", [torch.float32, torch.float16])
def test_an_identity_comes_back_bit_for_bit(clip, tmp_path):
    identity, path = (
        made_identity(clip=clip, name="Änne 安娜 \U0001f600"),
        tmp_path / "i.safetensors",
    )
    identities.write_identity(path, identity)
    read = identities.read_identity(path)
    assert face_clip_config(read) == face_clip_config(identity)
    assert (
        read["clip"].value.dtype == clip
        and read["face"].value.dtype == read.weight.dtype == torch.float32
    )
    assert torch.equal(read["clip"].value, identity["clip"].value)
    assert torch.equal(read["face"].value, identity["face"].value) and torch.equal(
        read.weight, identity.weight
    )


def test_features_come_back_bit_for_bit(tmp_path):
    who, path = made_features(), tmp_path / "i.safetensors"
    identities.write_identity(path, who)
    read = identities.read_identity(path)
    assert read.readings == who.readings and read.name == "Änne"
    assert torch.equal(read.weight, who.weight)
    for name, wanted in who.features.items():
        found = read[name]
        assert found.value.dtype == wanted.value.dtype
        assert torch.equal(found.value, wanted.value)
    assert read["face"].null is None and read["clip"].null is None
    assert read["pooled"].null.dtype == torch.float16
    assert torch.equal(read["pooled"].null, who["pooled"].null)
    with safe_open(path, framework="pt") as known:  # the contract, as any other reader sees it
        assert set(known.keys()) == {
            "face.value", "clip.value", "pooled.value", "pooled.null", "weight"
        }  # fmt: skip
        metadata = known.metadata()
    assert (metadata["format"], metadata["version"]) == ("infinite-id-identity", "2")
    config = json.loads(metadata["config"])
    assert set(config) == {"features", "name"}
    assert config["features"]["pooled"] == {
        "model": "e", "output": "pooled", "shape": [3, 8], "cut": "grey",
    }  # fmt: skip


def changed(who: Identity, name: str, value: Feature) -> Identity:
    return dataclasses.replace(who, features={**who.features, name: value})


def test_version_2_is_written_only_for_what_version_1_cannot_hold(tmp_path):
    who, path = made_identity(), tmp_path / "i.safetensors"
    face, clip = who["face"], who["clip"]

    def version(identity: Identity) -> str:
        identities.write_identity(path, identity)
        read = identities.read_identity(path)
        assert read.readings == identity.readings
        return safetensors_file.read_header(path).metadata["version"]

    nobody = torch.zeros(257, 6)
    assert version(who) == "1"
    assert version(changed(who, "clip", dataclasses.replace(clip, null=nobody))) == "1"
    assert "clip.null" not in safetensors_file.read_header(path).tensors
    assert version(changed(who, "clip", dataclasses.replace(clip, null=nobody + 1))) == "2"
    cut = dataclasses.replace(face.reading, cut="112 pixels")
    assert version(changed(who, "face", dataclasses.replace(face, reading=cut))) == "2"
    pooled = dataclasses.replace(clip.reading, output="third to last")
    assert version(changed(who, "clip", dataclasses.replace(clip, reading=pooled))) == "2"
    narrow = dataclasses.replace(face.reading, shape=(256,))
    narrow_face = Feature(reading=narrow, value=face.value[:, :256])
    assert version(changed(who, "face", narrow_face)) == "2"
    assert version(dataclasses.replace(who, features={"face": face})) == "2"


@pytest.mark.parametrize("text", ["model", "output", "cut"])
def test_a_feature_that_could_not_be_read_is_not_written(text, tmp_path):
    who = made_features()
    reading = dataclasses.replace(who["pooled"].reading, **{text: "x" * 201})
    odd = changed(who, "pooled", dataclasses.replace(who["pooled"], reading=reading))
    with pytest.raises(errors.NotWrittenError, match="200 characters"):
        identities.write_identity(tmp_path / "i.safetensors", odd)
    assert list(tmp_path.iterdir()) == []


def counted(shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers that every processor computes alike."""
    return (torch.arange(math.prod(shape)) % 251 - 125).view(shape) / 128


def test_the_bytes_of_version_1_are_what_they_always_were(tmp_path):
    """Hashes of what the release before these types wrote."""
    adapter, path = made_adapter(), tmp_path / "x.safetensors"
    adapter.load_state_dict({n: counted(t.shape) for n, t in adapter.state_dict().items()})
    infinite_id_format.write_adapter(path, adapter, torch.float16)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == (
        "b4e26d504f74c539a4dde872b2fea4f751b6effeeb3143e416c7d87962bb13ad"
    )
    config = IdentityConfig(recogniser="r", clip_model="c", embedding="raw", name="Änne")
    who = face_clip_identity(
        face=counted((2, 512)), clip=counted((2, 257, 6)).half(),
        weight=torch.tensor([1.0, 0.5]), config=config,
    )  # fmt: skip
    identities.write_identity(path, who)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == (
        "0e3be213815367cebcd1aa9057594b113e0e228532819862064ac1aaa7112add"
    )


def test_files_that_others_wrote_by_the_contract_are_read(tmp_path):
    """Plain tensors and metadata, put down by the format's own library."""
    path = tmp_path / "theirs.safetensors"
    tensors = {"face": counted((3, 512)), "clip": counted((3, 257, 6)), "weight": torch.ones(3)}
    config = {"recogniser": "r", "clip_model": "c", "embedding": "raw", "name": "n"}
    metadata = {"format": "infinite-id-identity", "version": "1", "config": json.dumps(config)}
    save_file(tensors, path, metadata)
    read = identities.read_identity(path)
    assert read.readings == {
        "face": Reading(model="r", output="raw", shape=(512,)),
        "clip": Reading(model="c", output="last", shape=(257, 6)),
    }
    assert read.name == "n" and torch.equal(read["clip"].value, tensors["clip"])

    wanted = {name: counted(t.shape) for name, t in made_adapter().state_dict().items()}
    values = {"clip_width": 6, "context_width": 4, "recogniser": "r", "clip_model": "c"}
    metadata = {"format": "infinite-id-adapter", "version": "1", "config": json.dumps(values)}
    save_file(wanted, path, metadata)
    adapter = adapters.read_adapter(path)
    assert adapter.config == AdapterConfig(**values)
    assert all(torch.equal(t, wanted[n]) for n, t in adapter.state_dict().items())


def test_a_file_of_no_known_format_is_told_what_it_is(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"some_proj.proj.weight": torch.ones(2)}, path, {"format": "pt"})
    with pytest.raises(errors.WrongFormatError, match="'pt'.*some_proj.proj.weight") as caught:
        adapters.read_adapter(path)
    assert "Infinite-ID" in caught.value.problem


def test_an_adapter_is_read_without_a_second_copy(tmp_path, monkeypatch):
    """Its weights are the very memory that the file was read into."""
    path, read = tmp_path / "a.safetensors", {}
    infinite_id_format.write_adapter(path, made_adapter())
    tensor = SafetensorsFile.tensor

    def noted(file: SafetensorsFile, name: str, *args: Any) -> torch.Tensor:
        read[name] = tensor(file, name, *args)
        return read[name]

    monkeypatch.setattr(SafetensorsFile, "tensor", noted)
    for name, weight in adapters.read_adapter(path).state_dict().items():
        assert weight.data_ptr() == read[name].data_ptr()


def test_files_hold_the_contract(tmp_path):
    """The published format, as any other safetensors reader sees it."""
    write("adapter", tmp_path / "a.safetensors")
    write("identity", tmp_path / "i.safetensors")
    adapter = safetensors_file.read_header(tmp_path / "a.safetensors")
    identity = safetensors_file.read_header(tmp_path / "i.safetensors")
    assert adapter.metadata["format"] == "infinite-id-adapter"
    assert identity.metadata["format"] == "infinite-id-identity"
    assert adapter.metadata["version"] == identity.metadata["version"] == "1"
    assert json.loads(adapter.metadata["config"])["licence_note"] == "für Anna"
    assert set(json.loads(identity.metadata["config"])) == {
        "recogniser", "embedding", "clip_model", "clip_layer", "name"
    }  # fmt: skip
    assert {n: e.shape for n, e in identity.tensors.items()} == {
        "face": (2, 512), "clip": (2, 257, 6), "weight": (2,)
    }  # fmt: skip
    assert set(load_file(tmp_path / "a.safetensors")) == set(made_adapter().state_dict())


def test_every_length_of_header_is_read(tmp_path):
    """Header lengths 640, 896, ... start with a pickle's magic bytes."""
    path, lengths = tmp_path / "i.safetensors", set()
    for letters in range(0, 1600, 8):
        identities.write_identity(path, made_identity(name="x" * letters))
        lengths.add(int.from_bytes(path.read_bytes()[:8], "little"))
        assert identities.read_identity(path).name == "x" * letters
    assert {640, 896, 1152, 1408} <= lengths


def test_paths_of_any_script_and_length(tmp_path):
    folder = tmp_path / "Übung 模型" / ("d" * 200)
    path = folder / f"{'ж' * 50}.safetensors"
    write("identity", path)
    assert torch.equal(identities.read_identity(path)["face"].value, made_identity()["face"].value)
    with pytest.raises(errors.NotWrittenError):
        write("identity", folder / f"{'x' * 300}.safetensors")


def test_a_read_identity_does_not_hold_the_file(tmp_path):
    """A view of the file would change, or end the process, when the file is written over."""
    path = tmp_path / "i.safetensors"
    write("identity", path)
    read = identities.read_identity(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(read["face"].value, made_identity()["face"].value)
    if Path("/proc/self/maps").exists():
        assert str(path) not in Path("/proc/self/maps").read_text(encoding="utf-8")


# --- written ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_unfinished_in_numbers_is_written(value, tmp_path):
    adapter, identity = made_adapter(), made_identity()
    write("adapter", tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    with torch.no_grad():
        adapter.face_mapper.norm.bias[2] = value
    identity["clip"].value[1, 3, 2] = value
    with pytest.raises(errors.NotFiniteError, match="face_mapper.norm.bias"):
        infinite_id_format.write_adapter(tmp_path / "a.safetensors", adapter)
    with pytest.raises(errors.NotFiniteError, match="clip"):
        identities.write_identity(tmp_path / "i.safetensors", identity)
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_number_too_large_for_the_dtype_is_not_written(tmp_path):
    adapter = made_adapter()
    with torch.no_grad():
        adapter.clip_mapper.norm.weight[0] = 1e5
    with pytest.raises(errors.NotFiniteError, match="clip_mapper.norm.weight"):
        infinite_id_format.write_adapter(tmp_path / "a.safetensors", adapter, torch.float16)
    assert list(tmp_path.iterdir()) == []


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("kind", hostile_files.KINDS)
@pytest.mark.parametrize(
    ("place", "raised", "expected"),
    [
        ("save", NO_SPACE, errors.DiskFullError),
        ("save", OSError(errno.EROFS, "Read-only file system"), errors.NotWrittenError),
        ("half", NO_SPACE, errors.DiskFullError),
        ("fsync", NO_SPACE, errors.DiskFullError),
        ("replace", PermissionError(errno.EACCES, "in use"), errors.NotWrittenError),
        ("half", KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failed_write_leaves_the_old_file(kind, place, raised, expected, tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write(kind, path, seed=1)
    before = path.read_bytes()

    def fail(*args: Any, **kwargs: Any) -> None:
        if place == "half":
            Path(args[1]).write_bytes(b"half a file")
        raise raised

    target = (checked, "save_tensors") if place in ("save", "half") else (os, place)
    monkeypatch.setattr(*target, fail)
    with pytest.raises(expected) as caught:
        write(kind, path, seed=2)
    if issubclass(expected, errors.NotWrittenError):
        assert type(caught.value) is expected
        assert str(caught.value).startswith(f"{path}: ")
        assert raised.strerror in str(caught.value)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(errors.NotWrittenError):
        write("identity", tmp_path / "file" / "i.safetensors")


def test_a_folder_that_cannot_be_synced_loses_nothing(tmp_path, monkeypatch):
    """Some network file systems refuse fsync of a folder: the file is there all the same."""
    real = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write("identity", tmp_path / "i.safetensors")
    assert torch.equal(
        identities.read_identity(tmp_path / "i.safetensors")["face"].value,
        made_identity()["face"].value,
    )


def test_data_is_on_disk_before_the_rename(tmp_path, monkeypatch):
    path, calls = tmp_path / "i.safetensors", []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        status = os.fstat(handle)
        calls.append("folder" if stat.S_ISDIR(status.st_mode) else status.st_ino)
        fsync(handle)

    def renamed(source: Any, target: Any) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write("identity", path)
    folder = ["folder"] if os.name == "posix" else []
    assert calls == [path.stat().st_ino, "rename", *folder]


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_permissions_are_the_umasks_or_the_old_files(tmp_path):
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    path = tmp_path / "i.safetensors"
    old = os.umask(0o027)
    try:
        write("identity", path)
    finally:
        os.umask(old)
    assert mode(path) == 0o640
    path.chmod(0o600)
    write("identity", path, seed=2)
    assert mode(path) == 0o600


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_kill_9_at_any_moment_leaves_whole_files(tmp_path):
    script = Path(__file__).with_name("killed_writer.py")
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.ones(3)}, other)
    untouched = other.read_bytes()
    done = subprocess.run(
        [sys.executable, script, tmp_path, "4"],
        capture_output=True, text=True, encoding="utf-8", timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == []
    assert found["exits"] == [-9, -9, -9, 7]  # three killed; the full disk named
    assert found["parts"] == 3  # of the three killed; the failed write cleaned up
    assert {2.0, 3.0} <= set(found["seen"])  # the children did write
    assert found["files"] == ["adapter.safetensors", "identity.safetensors", "other.safetensors"]
    assert other.read_bytes() == untouched


# --- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["", " ", ".", "..", "../anna", "..\\anna", "a/b", "a\\b", "/etc/anna", "C:anna", "C:\\a",
     "~", "~root", ".hidden", "..safetensors", ".safetensors", "-a", "_a", "a:b", "a*", "a?", "a|b",
     'a"b', "<a>", "a\0b", "a\nb", "a\tb", "anna.", "anna .safetensors", "%2e%2e", "$HOME", "a;b",
     "CON", "con", "Con.txt", "con.safetensors", "con .x", "PRN", "aux", "NUL", "nul.tar.gz",
     "COM1", "com9.x", "COM\u00b9", "LPT\u00b3", "x" * 101, "\u5b89" * 67, "a\u202eb",
     "\u2044etc", "a\u2215b", "\uff0fa", "\ud800", "a\ud800", "\u0301a", "\U0001f600"],
)  # fmt: skip
def test_names_that_are_not_allowed(name, tmp_path):
    with pytest.raises(errors.NameNotAllowedError) as caught:
        store.identity_path(tmp_path, name)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("anna", "anna"),
        ("  anna  ", "anna"),
        ("anna.safetensors", "anna"),
        ("Anna-Lena (2) v1.5_a+b", "Anna-Lena (2) v1.5_a+b"),
        ("7", "7"),
        ("conan", "conan"),
        ("com10", "com10"),
        ("Änne", "Änne"),
        ("A\u0308nne", "Änne"),  # as macOS writes it
        ("安娜", "安娜"),
        ("Анна", "Анна"),
        ("अनिता", "अनिता"),  # its vowels are marks, not letters
        ("สมชาย", "สมชาย"),
        ("ليلى", "ليلى"),
        ("x" * 100, "x" * 100),
        ("安" * 66, "安" * 66),
    ],
)
def test_names_that_are_allowed(name, file, tmp_path):
    path = store.identity_path(tmp_path, name)
    assert path == tmp_path / f"{file}.safetensors"
    identities.write_identity(path, made_identity())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
