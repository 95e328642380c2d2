"""A dataset's index that means harm: nothing outside the dataset is read, and nothing waits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infinite_id_core import errors
from infinite_id_core.errors import InfiniteIDError
from trainer import index_file
from trainer.data_index import Dataset, Filters
from trainer.errors import DatasetError, ShardDamagedError
from trainer.index_file import INDEX, DatasetInfo, read_index
from trainer.inspect import inspect_file
from trainer.shards import ShardReader

INFO = DatasetInfo(recogniser="r", fingerprint="f" * 64, counts={"kept": 2}, options={})
OPEN = Filters(min_short_side=0, min_face_size=0, min_det_score=0, min_similarity=-1)


def row(n: int, **values: Any) -> dict[str, Any]:
    return {
        "key": f"{n:024x}", "shard": "00000.tar", "offset": 512, "size": 4, "face_offset": 0,
        "sha256": "0" * 64, "source_sha256": "0" * 64, "identity": "p", "split": "train",
        "source": "", "licence": "cc0", "caption": "", "width": 600, "height": 700,
        "box": [0.0, 0.0, 300.0, 300.0], "landmarks": [float(i) for i in range(10)],
        "det_score": 0.9, "faces": 1, "face_size": 300.0, "face_share": 0.2, "blur": 100.0,
        "yaw": 10.0, "pitch": -10.0, "roll": 20.0, "similarity": 0.8, "phash": "0" * 16,
        "group": f"{n:024x}", "dropped": "", "detail": "", **values,
    }  # fmt: skip


def dataset(folder: Path, **values: Any) -> Path:
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    rows = [row(0, **values), row(1)]
    index_file.write_index(folder / INDEX, index_file.table_of(rows), INFO)
    return folder


def test_a_sound_index_is_read(tmp_path):
    table, info = read_index(dataset(tmp_path))
    assert (table.num_rows, info, table.schema.names) == (2, INFO, index_file.SCHEMA.names)
    assert table.schema.types == index_file.SCHEMA.types


@pytest.mark.parametrize(
    "name",
    ["../../../secret", "../00000.tar", "/etc/passwd", "a/b.tar", "a\\b.tar", "C:\\x.tar",
     "a\0.tar", "", ".", "..", ".tar", "-", "00000", "00000.tar\n", "x" * 300 + ".tar",
     "\u202e.tar", None],
)  # fmt: skip
def test_a_shard_is_a_plain_name(name, tmp_path):
    (tmp_path / "secret").write_bytes(b"x" * 9000)
    folder = dataset(tmp_path / "a" / "b", shard=name)
    for read in (read_index, Dataset, inspect_named):
        with pytest.raises(DatasetError, match="shard"):
            read(folder)
    if name is not None:  # the reader itself does not rely on the index's check
        with pytest.raises(DatasetError):
            ShardReader(folder).photo(name, 0, 1)


def inspect_named(folder: Path) -> None:
    inspect_file(folder)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("offset", -1), ("offset", 2**62 + 1), ("size", -1), ("size", 0), ("size", 2**62),
        ("face_offset", -1), ("width", 0), ("height", -5), ("faces", 0), ("offset", None),
        ("box", [0.0, 0.0, float("nan"), 1.0]), ("box", None), ("landmarks", [float("inf")] * 10),
        ("identity", None), ("split", "test"), ("split", None), ("caption", None),
        ("caption", "x" * 2**21), ("box", [9e30, 9e30, -9e30, -9e30]), ("box", [1e30] * 4),
        ("landmarks", [5.0] * 10), ("landmarks", [9e30, 0.0] * 5), ("identity", ""),
        ("similarity", float("nan")), ("face_size", float("nan")), ("yaw", float("inf")),
        ("key", f"{1:024x}"), ("split", "held_out"), ("dropped", None),
    ],
)  # fmt: skip
def test_impossible_values_of_a_row_are_named(column, value, tmp_path):
    with pytest.raises(DatasetError, match=column):
        read_index(dataset(tmp_path, **{column: value}))


def test_people_who_stand_apart_are_named(tmp_path):
    rows = [row(0), row(1, identity="q"), row(2)]
    index_file.write_index(tmp_path / INDEX, index_file.table_of(rows), INFO)
    with pytest.raises(DatasetError, match="together"):
        read_index(tmp_path)


def test_a_dropped_photo_may_have_anything(tmp_path):
    """Photos that were left out have no shard, and their values are for people only."""
    table, _ = read_index(dataset(tmp_path, dropped="no face", shard=None, box=None, offset=-1))
    assert table["dropped"].to_pylist() == ["no face", ""]


def test_numbers_larger_than_the_shard_take_no_memory(tmp_path):
    folder = dataset(tmp_path)
    (folder / "shards" / "00000.tar").write_bytes(b"x" * 2000)
    reader = ShardReader(folder)
    for offset, size in ((0, 2**40), (-5, 4), (0, -1), (2**62, 4), (1999, 2)):
        with pytest.raises(ShardDamagedError, match="ends before"):
            reader.photo("00000.tar", offset, size)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_pipes_and_folders_are_not_opened(tmp_path):
    folder = dataset(tmp_path)
    shard = folder / "shards" / "00000.tar"
    os.mkfifo(shard)
    with pytest.raises(DatasetError, match="pipe"):
        Dataset(folder, OPEN).photo_bytes(0)
    assert any("00000.tar" in problem for problem in inspect_file(folder).problems)
    assert inspect_file(folder, verify=True).problems
    shard.unlink()
    shard.mkdir()
    with pytest.raises(DatasetError, match="folder"):
        Dataset(folder, OPEN).photo_bytes(0)
    (folder / INDEX).unlink()
    os.mkfifo(folder / INDEX)
    with pytest.raises(DatasetError, match="pipe"):
        read_index(folder)
    with pytest.raises(InfiniteIDError):
        inspect_file(folder)
    with pytest.raises(errors.FileMissingError, match="pipe"):
        inspect_file(folder / INDEX)


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_a_link_does_not_lead_outside(tmp_path):
    folder = dataset(tmp_path / "data")
    shard = folder / "shards" / "00000.tar"
    (tmp_path / "secret.tar").write_bytes(b"x" * 2000)
    shard.symlink_to(tmp_path / "secret.tar")
    with pytest.raises(DatasetError, match="outside"):
        ShardReader(folder).photo("00000.tar", 0, 4)
    shard.unlink()
    (folder / "shards" / "real.tar").write_bytes(b"abcd" * 500)
    shard.symlink_to("real.tar")
    assert ShardReader(folder).photo("00000.tar", 0, 4) == b"abcd"
    # The whole folder may be a link: that is how people move data to another disk.
    (folder / "shards").rename(tmp_path / "elsewhere")
    (folder / "shards").symlink_to(tmp_path / "elsewhere")
    assert ShardReader(folder).photo("00000.tar", 0, 4) == b"abcd"


def schema_of(**values: Any) -> bytes:
    return json.dumps(
        {"format": "infinite-id-dataset", "version": 1, "recogniser": "r", "fingerprint": "f",
         "counts": {}, "options": {}, **values}
    ).encode()  # fmt: skip


@pytest.mark.parametrize(
    "metadata",
    [b"[" * 100_000, b"[]", b"null", b"\xff", schema_of(version="1"), schema_of(version=None),
     schema_of(version=True), schema_of(version=10**400), schema_of(counts=[]),
     schema_of(counts={"kept": "x"}), schema_of(options=None), schema_of(recogniser=7),
     schema_of(fingerprint=None)],
)  # fmt: skip
def test_what_an_index_says_of_itself_is_checked(metadata, tmp_path):
    table = index_file.table_of([row(0)]).replace_schema_metadata({index_file.METADATA: metadata})
    pq.write_table(table, tmp_path / INDEX)
    with pytest.raises(errors.FileError):
        read_index(tmp_path)


def test_columns_of_other_types_are_named(tmp_path):
    table = index_file.table_of([row(0)])
    wrong = table.set_column(2, "offset", pa.array([["a"]]))
    wrong = wrong.replace_schema_metadata({index_file.METADATA: schema_of()})
    pq.write_table(wrong, tmp_path / INDEX)
    with pytest.raises(DatasetError):
        read_index(tmp_path)


BOMB = """
import resource, sys
sys.path.append(sys.argv[1])
from trainer.index_file import read_index
from trainer.errors import DatasetError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_index(sys.argv[2])
except DatasetError as error:
    print(error)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(os.name != "posix", reason="measures memory")
@pytest.mark.parametrize(("rows", "caption"), [(2_000_000, ""), (3000, "x" * 2**20)])
def test_a_small_file_of_many_rows_is_refused_small(rows, caption, tmp_path):
    """Equal values pack to nothing: two million rows, or three gigabytes of captions."""
    one = index_file.table_of([row(0, caption=caption)])
    columns = [pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), column.chunk(0))
               if column.type == pa.string() else column.take(pa.array([0] * rows, pa.int32()))
               for column in one.columns]  # fmt: skip
    table = pa.table(columns, names=one.schema.names)
    pq.write_table(
        table.replace_schema_metadata({index_file.METADATA: schema_of()}),
        tmp_path / INDEX, compression="zstd", store_schema=False,
    )  # fmt: skip
    assert (tmp_path / INDEX).stat().st_size < 2_000_000
    done = subprocess.run(
        [sys.executable, "-c", BOMB, str(Path(__file__).parents[3]), str(tmp_path)],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    said, grown = done.stdout.splitlines()
    assert INDEX in said
    assert int(grown) < 250_000  # kB on Linux (bytes on macOS, where this asks for less)
