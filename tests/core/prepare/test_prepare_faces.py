"""Photos of several people: which of their faces are used, and for whom."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from infinite_id_core.errors import OptionError
from trainer import __main__ as cli
from trainer.config import Data
from trainer.data_index import Dataset, Filters
from trainer.histograms import bucket_counts, spread
from trainer.prepare import group, report
from trainer.prepare.options import Places, PrepareOptions, RunOptions
from trainer.prepare.run import prepare
from trainer.prepare.stages import EMBEDDINGS, FACES

from ..prepare_world import SIZE, encoded, make_pack, make_people, picture

OPTIONS = PrepareOptions(detector_size=512, min_detection=0.6, duplicate_bits=-1)
ALONE = RunOptions(workers=1, threads=1, provider="cpu", report=True, progress=False)
SMALL = Filters(min_short_side=0, min_face_size=0, max_pair_cosine=1.0)


@pytest.fixture(scope="module")
def pack(tmp_path_factory) -> Path:
    return make_pack(tmp_path_factory.mktemp("face models"))


def beside(*pictures: Image.Image) -> bytes:
    row = Image.new("RGB", (SIZE * len(pictures), SIZE))
    for n, one in enumerate(pictures):
        row.paste(one, (n * SIZE, 0))
    return encoded(row)


def places(source: Path, output: Path, pack: Path) -> Places:
    return Places(source=source, output=output, face_models=pack)


def sides(dataset: Dataset) -> dict[str, set[str]]:
    """For each person in which half of the photos the face is."""
    found: dict[str, set[str]] = {}
    for n in range(len(dataset)):
        row = dataset.row(n)
        half = "right" if row.box[0] >= SIZE else "left"
        found.setdefault(row.identity, set()).add(half)
    return found


def test_each_face_of_a_heap_goes_to_its_own_person(pack, tmp_path):
    heap = tmp_path / "heap"
    heap.mkdir()
    for n in range(4):
        (heap / f"{n}.jpg").write_bytes(beside(picture(0, n), picture(4, n)))
    output = tmp_path / "all"
    summary = prepare(places(heap, output, pack), replace(OPTIONS, faces="all"), ALONE)
    dataset = Dataset(output, SMALL, None)
    assert (summary.identities, summary.info.counts, summary.more_faces) == (2, {"kept": 8}, 0)
    assert sorted(map(sorted, sides(dataset).values())) == [["left"], ["right"]]
    assert len(set(dataset.table["key"].to_pylist())) == 8
    for name in dataset.identities:
        assert len(dataset.rows_of(name)) == 4 and len(dataset.pairs_of(name)) == 12
    one = prepare(places(heap, tmp_path / "one", pack), OPTIONS, ALONE)
    assert one.info.counts["kept"] == 4 == one.more_faces
    page = (tmp_path / "one" / "report.html").read_text(encoding="utf-8")
    assert "--faces all" in page and "--faces all" not in (output / "report.html").read_text()


def test_a_guest_in_a_folder_goes_to_the_guests_own_folder(pack, tmp_path):
    source = make_people(tmp_path / "in", people=2, photos=3)
    (source / "p0" / "both.jpg").write_bytes(beside(picture(0, 3), picture(1, 3)))
    (source / "p0" / "guest.jpg").write_bytes(beside(picture(0, 3), picture(4, 3)))
    output = tmp_path / "set"
    summary = prepare(places(source, output, pack), replace(OPTIONS, faces="all"), ALONE)
    dataset = Dataset(output, SMALL, None)
    assert {n: len(dataset.rows_of(n)) for n in dataset.identities} == {"p0": 5, "p1": 4}
    shared = [r for r in dataset.table.to_pylist() if r["source"] == "p0/both.jpg"]
    assert {r["identity"]: r["box"][0] >= SIZE for r in shared} == {"p0": False, "p1": True}
    assert summary.info.counts == {"kept": 9, "other_face": 1}  # the guest has no folder
    alone = prepare(places(source, tmp_path / "one", pack), OPTIONS, ALONE)
    assert (alone.info.counts, alone.more_faces) == ({"kept": 8}, 2)


def faces_table(rows: list[dict]) -> pa.Table:
    rng = np.random.default_rng(0)
    people = {n: rng.normal(size=512).astype(np.float32) for n in range(4)}
    full = [
        {"name": "n", "path": b"p", "place": 0, "length": 9, "width": 9, "height": 9, "faces": 2,
         "phash": f"{n:016x}", "blur": 1.0, "dropped": "", "detail": "", "identity": "", **row}
        for n, row in enumerate(rows)
    ]  # fmt: skip
    vectors = [people[row.pop("who")] + rng.normal(size=512) * 0.1 for row in full]
    table = pa.Table.from_pylist(full, schema=FACES).drop_columns(["aligned"])
    column = pa.array([v.astype(np.float32).tolist() for v in vectors], EMBEDDINGS[0].type)
    return table.append_column("embedding", column)


def test_two_people_of_the_same_photos_are_two_people():
    rows = [
        {"photo": photo, "face": face, "who": face, "source_sha256": f"{photo:064x}"}
        for photo in range(3)
        for face in range(2)
    ]
    options = PrepareOptions(faces="all", duplicate_bits=-1)
    grouped = group.group_photos(faces_table(rows), False, options)
    people = Counter(grouped.kept["identity"].to_pylist())
    assert sorted(people.values()) == [3, 3] and not len(grouped.dropped)


def test_nobody_is_twice_in_a_photo():
    rows = [
        {"photo": photo, "face": face, "who": 0, "source_sha256": f"{photo:064x}"}
        for photo in range(3)
        for face in range(2)  # in a mirror
    ]
    options = PrepareOptions(faces="all", duplicate_bits=-1)
    grouped = group.group_photos(faces_table(rows), False, options)
    assert len(grouped.kept) == 3 and len(set(grouped.kept["photo"].to_pylist())) == 3
    assert grouped.dropped["dropped"].to_pylist() == ["other_face"] * 3


def test_the_option_is_checked_and_told(capsys):
    with pytest.raises(OptionError, match="faces"):
        PrepareOptions(faces="some")
    with pytest.raises(SystemExit):
        cli.main(["prepare", "--help"])
    said = capsys.readouterr().out
    assert "--faces {largest,all}" in said and "True" not in said
    table = pa.table({"faces": [1, 2, 3]})
    assert report.photos_with_more_faces(table, {"faces": "largest"}) == 2
    assert report.photos_with_more_faces(table, {"faces": "all"}) == 0


def test_the_report_counts_people_photos_faces_and_buckets(pack, tmp_path):
    rows = [
        {"identity": f"p{n // 2}", "split": "held_out" if n > 3 else "train", "width": width,
         "height": height, "faces": 1 + n, "face_size": 100.0 * n}
        for n, (width, height) in enumerate([(900, 900)] * 4 + [(600, 900), (4000, 1000)])
    ]  # fmt: skip
    kept = pa.Table.from_pylist(rows)
    sizes = bucket_counts(kept, Data(folder="-"))
    assert sum(sizes.values()) == 6 and max(sizes.values()) == 4
    square = next(bucket for bucket, n in sizes.items() if n == 4)
    assert square[0] == square[1]
    (tall, wide) = sorted((b for b in sizes if b != square), key=lambda b: b[1] / b[0])
    assert tall[0] > tall[1] and wide[1] > wide[0]
    found = spread(kept)
    assert found["photos of a person"] == (2.0,) * 5
    assert found["short side of the face, px"] == (0.0, 125.0, 250.0, 375.0, 500.0)
    assert found["faces in a photo"][-1] == 6.0
    source = make_people(tmp_path / "in", people=1, photos=2)
    prepare(places(source, tmp_path / "set", pack), OPTIONS, ALONE)
    page = (tmp_path / "set" / "report.html").read_text(encoding="utf-8")
    assert "photos of a person<td class=number>2" in page and "Buckets" in page
