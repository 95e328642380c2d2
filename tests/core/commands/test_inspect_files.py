"""``trainer inspect`` of files that are wrong: each is told, none ends in a traceback."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from infinite_id_core import errors
from infinite_id_core.files import adapters
from infinite_id_core.method.adapter import infinite_id_adapter
from infinite_id_core.method.records import AdapterConfig
from trainer import __main__ as cli
from trainer.inspect import inspect_file

from .. import hostile_files

ROOT = Path(__file__).resolve().parents[3]


def shard(path: Path, *records: bytes, **members: bytes) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        named = {f"{n}.json": data for n, data in enumerate(records)} | members
        for name, data in named.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("dtype", [7, None, ["F16"], {}])
def test_a_dtype_that_is_no_text_is_a_problem(dtype, tmp_path):
    file = hostile_files.identity()
    header = file.header()
    header["clip"]["dtype"] = dtype
    path = tmp_path / "i.safetensors"
    path.write_bytes(file.bytes(json.dumps(header).encode()))
    assert "dtype" in inspect_file(path).problems[0]


def test_a_type_of_the_future_is_a_problem(tmp_path):
    file = hostile_files.identity()
    file.metadata = {"format": "pt"}
    file.tensors["clip"].dtype = "F3_E1M1"
    path = tmp_path / "x.safetensors"
    path.write_bytes(file.bytes())
    found = inspect_file(path)
    assert "F3_E1M1" in found.facts["types"] and "F3_E1M1" in found.problems[0]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_no_terminal_should_get_is_spelt_out(encoding, tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    names = {"a\x1b[2J": torch.ones(1), "\u202etxt.exe": torch.ones(1), "安娜": torch.ones(1)}
    save_file(names, path, {"title": "\x1b]0;owned\x07\r\x9b", "half": "\U0001f600"})
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", out)
    assert cli.main(["inspect", str(path)]) == 0
    assert cli.main(["inspect", "--json", str(path)]) == 0
    out.flush()
    said = out.buffer.getvalue().decode(encoding)
    assert not {"\x1b", "\x07", "\r", "\x9b", "\u202e"} & set(said)
    assert r"\x1b]0;owned\x07" in said


def test_an_error_out_of_a_hostile_name_moves_no_cursor(tmp_path):
    error = errors.FileError(tmp_path / "a", "has a tensor \x1b[2J\ud800 of\nno use")
    assert error.problem == "has a tensor \\x1b[2J\\ud800 of\nno use"


@pytest.mark.parametrize(
    ("record", "said"),
    [(b"null", "NoneType"), (b"[]", "list"), (b"7", "int"), (b"{", "JSON"), (b"\xff", "JSON"),
     (b"[" * 100_000, "JSON")],
)  # fmt: skip
def test_a_record_that_is_no_object_is_a_problem(record, said, tmp_path):
    path = shard(tmp_path / "s.tar", b'{"identity": "a"}', record)
    found = inspect_file(path)
    assert found.facts["samples"] == 2
    assert len(found.problems) == 1
    assert "1.json" in found.problems[0] and said in found.problems[0]


def test_a_thousand_problems_are_shown_in_short(tmp_path):
    found = inspect_file(shard(tmp_path / "s.tar", *[b"null"] * 1000))
    assert len(found.problems) < 30 and "more" in found.problems[-1]


def test_a_sparse_shard_takes_no_memory_of_its_size(tmp_path):
    path = shard(tmp_path / "s.tar", b"{}")
    with path.open("r+b") as file:
        info = tarfile.TarInfo("big.json")
        info.size = 2**33 - 512
        file.write(info.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(2**33 + 4096)
    found = inspect_file(path)
    assert "expected a record" in found.problems[0]


def test_a_cut_shard_is_a_problem(tmp_path):
    path = shard(tmp_path / "s.tar", b"{}", b"{}")
    data = path.read_bytes()
    for end in (600, 1100, 1536, 2048):
        path.write_bytes(data[:end])
        assert inspect_file(path).problems


# --- checkpoints -----------------------------------------------------------------------------


def made_checkpoint(folder: Path) -> Path:
    """A folder as training saves it."""
    from trainer.train.state import RunRecord, Snapshot, save

    torch.manual_seed(0)
    config = AdapterConfig(clip_width=6, context_width=4, recogniser="r", clip_model="c")
    adapter = infinite_id_adapter(config, {"mid_block.attentions.0.transformer_blocks.0": 8})
    optimiser = torch.optim.AdamW(adapter.parameters())
    sum(p.sum() for p in adapter.parameters()).backward()
    optimiser.step()
    record = RunRecord(config={}, fingerprints={}, world=1, step=7)
    snapshot = Snapshot(adapter=adapter, optimiser=optimiser, average=None, scaler=None)
    return save(folder, record, snapshot)


def test_a_checkpoint_is_looked_at_to_its_last_number(tmp_path):
    path = made_checkpoint(tmp_path)
    found = inspect_file(path)
    kinds = [row[:2] for row in found.tables["files"][1:]]
    assert kinds == [("adapter.safetensors", "adapter"), ("state.pt", "training state")]
    assert found.problems == []
    state = torch.load(path / "state.pt", weights_only=True)
    state["optimiser"]["state"][3]["exp_avg_sq"][0] = torch.inf
    torch.save(state, path / "state.pt")
    (problem,) = inspect_file(tmp_path).problems
    assert "state.pt" in problem and "exp_avg_sq" in problem


def test_a_damaged_checkpoint_is_told_and_the_rest_is_read(tmp_path):
    path = made_checkpoint(tmp_path)
    data = (path / "state.pt").read_bytes()
    (path / "state.pt").write_bytes(data[: len(data) // 2])
    found = inspect_file(path)
    assert [row[1] for row in found.tables["files"][1:]] == ["adapter", "unreadable"]
    assert len(found.problems) == 1 and "state.pt" in found.problems[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_any_safetensors_file_is_looked_at_to_its_last_number(value, tmp_path):
    """A cache of latents, a model: the header alone says nothing about them."""
    tensors = {"a": torch.ones(5), "b": torch.ones(3, dtype=torch.int64), "c": torch.zeros(4)}
    save_file(tensors, tmp_path / "x.safetensors")
    assert inspect_file(tmp_path / "x.safetensors").problems == []
    tensors["c"][3] = value
    save_file(tensors, tmp_path / "x.safetensors")
    (problem,) = inspect_file(tmp_path / "x.safetensors").problems
    assert "c" in problem and "NaN" in problem


# --- the system ------------------------------------------------------------------------------


def test_permission_denied_is_named_for_every_kind(tmp_path, monkeypatch, capsys):
    made_checkpoint(tmp_path / "run")
    shard(tmp_path / "s.tar", b"{}")
    (tmp_path / "index.parquet").write_bytes(b"PAR1")
    files = [tmp_path / "s.tar", tmp_path / "index.parquet",
             tmp_path / "run" / "step-00000007" / "state.pt"]  # fmt: skip
    real = os.open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path).startswith(str(tmp_path)):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    for file in files:
        with pytest.raises(errors.UnreadableError, match="Permission denied"):
            inspect_file(file)
    found = inspect_file(tmp_path / "run")
    assert len(found.problems) == 2 and all("Permission" in p for p in found.problems)
    assert cli.main(["inspect", str(files[0])]) == 1
    assert "UnreadableError" in capsys.readouterr().err


def test_an_oserror_that_nobody_named_is_no_traceback(monkeypatch, capsys):
    def refuse(argv: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", "some/file")

    monkeypatch.setattr("trainer.inspect.main", refuse)
    assert cli.main(["inspect", "x"]) == 1
    said = capsys.readouterr().err
    assert "some/file" in said and "Permission denied" in said and "Traceback" not in said


def test_a_checkpoint_that_grows_without_end_is_told_at_once(tmp_path):
    many: list[Any] = []
    many.extend([many] * 300_000)
    tensor = torch.zeros(1000)
    for number, values in enumerate((many, [tensor] * 300_000, [tensor[i:] for i in range(900)])):
        folder = tmp_path / str(number)
        folder.mkdir()
        torch.save(values, folder / "state.pt")
        started = time.process_time()
        inspect_file(folder)
        assert time.process_time() - started < 20


def test_a_parquet_file_that_is_no_index_is_not_taken_for_the_one_beside_it(tmp_path, capsys):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    assert cli.main(["inspect", str(tmp_path / "other.parquet")]) == 1
    assert "UnknownFileError" in capsys.readouterr().err


def test_a_path_that_the_console_cannot_show_is_spelt_out(tmp_path):
    path = tmp_path / "\u4eba.safetensors"
    words = [sys.executable, "-m", "trainer", "inspect", str(path)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert "\\u4eba.safetensors: no such file" in ended.stderr


def test_sound_files_stay_sound(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(hostile_files.adapter().bytes())
    assert inspect_file(path).problems == []
    assert adapters.read_adapter(path).widths == hostile_files.LAYERS
