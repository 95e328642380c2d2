"""``trainer prepare`` end to end: real detector, real files, every kind of input and of damage."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from infinite_id_core.errors import FaceModelError, MissingPackageError, OptionError
from microworld import files, portraits
from trainer import __main__ as cli
from trainer.data_index import Dataset, Filters
from trainer.errors import (
    BusyError,
    DatasetError,
    DiskFullError,
    EngineError,
    NoFacesError,
    NoPairsError,
)
from trainer.index_file import read_index
from trainer.inspect import inspect_file
from trainer.prepare import engines, run, stages
from trainer.prepare.manifest import Target
from trainer.prepare.options import Places, PrepareOptions, RunOptions
from trainer.prepare.run import prepare

from ..prepare_world import SIZE, encoded, make_pack, make_people, nuisance, person, picture

ROOT = Path(__file__).resolve().parents[3]
OPTIONS = PrepareOptions(detector_size=256, min_detection=0.6, held_out=0.4)
ALONE = RunOptions(workers=1, threads=1, provider="cpu", report=False, progress=False)
SMALL = Filters(min_short_side=0, min_face_size=0, max_pair_cosine=1.0)


@pytest.fixture(scope="module")
def pack(tmp_path_factory) -> Path:
    return make_pack(tmp_path_factory.mktemp("face models"))


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    """Five people, four photos each."""
    return make_people(tmp_path_factory.mktemp("people"))


@pytest.fixture(scope="module")
def whole(people, pack, tmp_path_factory):
    """The five people prepared in this process, with the report: (folder, summary)."""
    output = tmp_path_factory.mktemp("whole") / "set"
    summary = prepare(places(people, output, pack), OPTIONS, replace(ALONE, report=True))
    return output, summary


def places(source: Path, output: Path, pack: Path) -> Places:
    return Places(source=source, output=output, face_models=pack)


def contents(output: Path) -> dict[str, str]:
    """Hashes of what a dataset is: its index and shards."""
    found = [output / "index.parquet", *sorted((output / "shards").iterdir())]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def reasons(output: Path) -> dict[str, str]:
    """Why each dropped photo was dropped, by the end of its source."""
    table, _ = read_index(output)
    rows = table.to_pylist()
    return {row["source"].rpartition("/")[2]: row["dropped"] for row in rows if row["dropped"]}


def overlap(a, b) -> float:
    inter = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
    return inter / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - inter)


# --- what comes out --------------------------------------------------------------------------


def test_a_folder_per_person_becomes_a_dataset(people, whole):
    output, summary = whole
    assert (summary.info.counts, summary.identities) == ({"kept": 20}, 5)
    assert summary.info.recogniser == "test/rec"
    dataset = Dataset(output, SMALL, split=None)
    assert len(dataset) == 20 and set(dataset.identities) == {f"p{n}" for n in range(5)}
    for name in dataset.identities:
        for number in dataset.rows_of(name):
            row = dataset.row(number)
            who, photo = int(name[1:]), int(Path(row.source).stem)
            assert row.source == f"{name}/{photo}.jpg" and row.similarity > 0.5
            assert dataset.photo_bytes(number) == (people / row.source).read_bytes()
            truth = portraits.face_box(person(who), nuisance(photo), SIZE)
            assert overlap(np.array(row.box), truth) > 0.5
            eyes = np.array(row.landmarks[:2])
            found = portraits.face_landmarks(person(who), nuisance(photo), SIZE)[:2]
            assert np.abs(eyes - found).max() < 0.12 * SIZE
            assert row.face_size == pytest.approx(
                min(row.box[2] - row.box[0], row.box[3] - row.box[1]), rel=1e-5
            )
            assert row.blur > 0 and abs(row.roll) < 20
            assert dataset.face(number).shape == (512,)
    allowed = dataset.pairs_of("p0")
    assert len(allowed) == 12 and (0, 0) not in allowed


def test_the_split_is_by_person(whole):
    output, summary = whole
    table, _ = read_index(output)
    splits = {(r["identity"], r["split"]) for r in table.to_pylist()}
    assert len(splits) == 5  # nobody is in both
    assert summary.held_out == sum(split == "held_out" for _, split in splits) > 0


def test_the_defaults_of_the_field_act_at_read_time(whole):
    from trainer.errors import FilterError

    with pytest.raises(FilterError, match="min_short_side=512 removes"):
        Dataset(whole[0])


def test_the_report_shows_people_and_scores(whole):
    text = (whole[0] / "report.html").read_text(encoding="utf-8")
    assert text.count("<figure>") == 20 and text.count("data:image/jpeg") == 20
    assert "p4 · 4 photos" in text and "data:image/png" in text


def test_inspect_reads_what_prepare_wrote(whole, tmp_path):
    output, _ = whole
    found = inspect_file(output, verify=True)
    assert (found.kind, found.problems) == ("index", [])
    assert found.facts["photos kept"] == 20 and found.facts["people"] == 5
    shard = inspect_file(output / "shards" / "00000.tar")
    assert (shard.kind, shard.facts["samples"], shard.problems) == ("shard", 20, [])
    copy = tmp_path / "set"
    (copy / "shards").mkdir(parents=True)
    (copy / "index.parquet").write_bytes((output / "index.parquet").read_bytes())
    assert "missing" in inspect_file(copy).problems[0]
    data = bytearray((output / "shards" / "00000.tar").read_bytes())
    data[1000] ^= 1
    (copy / "shards" / "00000.tar").write_bytes(data)
    assert inspect_file(copy).problems == []
    assert len(inspect_file(copy, verify=True).problems) == 1
    (copy / "shards" / "00000.tar").write_bytes(data[:90_000])
    assert inspect_file(copy).problems
    assert "cut" in inspect_file(copy / "shards" / "00000.tar").problems[0] or (
        "damaged" in inspect_file(copy / "shards" / "00000.tar").problems[0]
    )


def test_nobody_is_in_two_shards_and_stale_shards_go(people, pack, tmp_path):
    output = tmp_path / "set"
    small = replace(OPTIONS, shard_bytes=1024)
    assert prepare(places(people, output, pack), small, ALONE).shards == 5
    table, _ = read_index(output)
    rows = table.to_pylist()
    assert len({(r["identity"], r["shard"]) for r in rows}) == 5
    summary = prepare(places(people, output, pack), OPTIONS, ALONE)
    assert summary.shards == 1
    assert [p.name for p in (output / "shards").iterdir()] == ["00000.tar"]
    assert len(Dataset(output, SMALL, None).photo_bytes(19)) > 1000


def test_large_photos_are_reencoded_once_and_boxes_follow(people, pack, whole, tmp_path):
    output = tmp_path / "set"
    prepare(places(people, output, pack), replace(OPTIONS, max_side=128), ALONE)
    small, full = (Dataset(o, SMALL, None) for o in (output, whole[0]))
    assert len(small) == 20
    box = {row["source"]: row["box"] for row in full.table.to_pylist()}
    for number in range(len(small)):
        row = small.row(number)
        assert small.photo(number).size == (row.width, row.height) == (128, 128)
        assert overlap(np.array(row.box) * 2, np.array(box[row.source])) > 0.6
        original = np.asarray(Image.open(people / row.source).resize((128, 128)), float)
        assert np.abs(np.asarray(small.photo(number), float) - original).mean() < 6


# --- other inputs ----------------------------------------------------------------------------


def test_a_heap_is_grouped_by_face(people, pack, tmp_path):
    heap = tmp_path / "heap"
    heap.mkdir()
    for path in people.glob("*/*.jpg"):
        (heap / f"{path.parent.name}_{path.name}").write_bytes(path.read_bytes())
    output = tmp_path / "set"
    summary = prepare(places(heap, output, pack), OPTIONS, ALONE)
    assert (summary.identities, summary.info.counts) == (5, {"kept": 20})
    dataset = Dataset(output, SMALL, None)
    for name in dataset.identities:
        people_of = {dataset.row(n).source[:2] for n in dataset.rows_of(name)}
        assert len(people_of) == 1 and len(dataset.rows_of(name)) == 4
        assert name.startswith("person-")


def make_shards(people: Path, folder: Path, cut: bool = False) -> Path:
    """LAION-style tars of ten photos, everybody's photos apart from each other."""
    folder.mkdir()
    photos = sorted(people.glob("*/*.jpg"), key=lambda p: (p.name, p.parent.name))
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as archive:
            for n, path in enumerate(photos[shard * 10 : shard * 10 + 10]):
                record = {
                    "url": f"https://example.org/{path.parent.name}/{path.name}",
                    "license": "cc-by",
                    "person": path.parent.name,
                    "caption": "from json",
                }
                members = {"jpg": path.read_bytes(), "json": json.dumps(record).encode()}
                if shard == 0:
                    members["txt"] = f"a portrait of {path.parent.name}, café".encode()
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{shard:05}{n:04}.{extension}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    if cut:
        last = folder / "00001.tar"
        last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    return folder


def test_shards_with_captions(people, pack, tmp_path):
    source = make_shards(people, tmp_path / "laion")
    output = tmp_path / "set"
    assert prepare(places(source, output, pack), OPTIONS, ALONE).identities == 5
    dataset = Dataset(output, SMALL, None)
    for number in range(len(dataset)):
        row = dataset.row(number)
        who = row.source.split("/")[-2]
        assert row.source.startswith("https://example.org/p") and row.licence == "cc-by"
        assert row.caption in (f"a portrait of {who}, café", "from json")
        assert dataset.photo_bytes(number) == (people / row.source[20:]).read_bytes()
    assert Counter(dataset.table["caption"].to_pylist())["from json"] == 10
    named = tmp_path / "named"
    labelled = replace(OPTIONS, identity_field="person")
    prepare(places(source, named, pack), labelled, ALONE)
    assert set(Dataset(named, SMALL, None).identities) == {f"p{n}" for n in range(5)}


def test_a_shard_cut_in_half_gives_its_whole_samples(people, pack, tmp_path):
    source = make_shards(people, tmp_path / "laion", cut=True)
    output = tmp_path / "set"
    counts = prepare(places(source, output, pack), OPTIONS, ALONE).info.counts
    assert counts["shard_cut"] == 1 and 14 <= counts["kept"] < 20
    assert reasons(output)["00001.tar"] == "shard_cut"


# --- bad photos ------------------------------------------------------------------------------


def test_bad_photos_are_counted_and_listed_and_good_ones_in_any_form_are_kept(pack, tmp_path):
    source, output = tmp_path / "in", tmp_path / "set"
    make_people(source, people=3, photos=3)
    p0, p1, p2 = (source / f"p{n}" for n in range(3))
    good = (p0 / "0.jpg").read_bytes()
    (p0 / "cut.jpg").write_bytes(good[: len(good) // 2])
    (p0 / "empty.jpg").write_bytes(b"")
    (p0 / "text.png").write_bytes(b"no picture")
    (p0 / "plain.jpg").write_bytes(encoded(Image.new("RGB", (300, 300), (90, 120, 150))))
    (p0 / "tiny.png").write_bytes(encoded(Image.new("RGB", (9, 9)), "PNG"))
    (p1 / "copy.jpg").write_bytes(good)  # of p0: the same file under another name
    (p0 / "again.jpg").write_bytes(encoded(picture(0, 1), quality=80))
    (p1 / "other.jpg").write_bytes(encoded(picture(4, 3)))  # somebody else
    (source / "p3").mkdir()
    (source / "p3" / "alone.jpg").write_bytes(encoded(picture(3, 0)))
    (source / "loose.jpg").write_bytes(encoded(picture(3, 1)))
    (p0 / "gone.jpg").symlink_to(tmp_path / "nothing")  # a link to nowhere
    # Good photos in other forms.
    exif = Image.Exif()
    exif[0x0112] = 8
    turned = picture(2, 3).rotate(-90)
    (p2 / "turned.jpg").write_bytes(encoded(turned, exif=exif))
    clear = picture(1, 3).convert("RGBA")
    (p1 / "clear.png").write_bytes(encoded(clear, "PNG"))
    bitmap = picture(0, 3)
    (p0 / "bitmap.bmp").write_bytes(encoded(bitmap, "BMP"))
    counts = prepare(
        places(source, output, pack), replace(OPTIONS, kind="folders"), ALONE
    ).info.counts
    assert reasons(output) == {
        "cut.jpg": "truncated",
        "empty.jpg": "empty",
        "text.png": "not_an_image",
        "plain.jpg": "no_face",
        "tiny.png": "too_small",
        "copy.jpg": "duplicate",
        "again.jpg": "near_duplicate",
        "other.jpg": "outlier",
        "alone.jpg": "too_few",
        "loose.jpg": "no_person",
        "gone.jpg": "link",
    }
    assert counts["kept"] == 12 and sum(counts.values()) == 23
    dataset = Dataset(output, SMALL, None)
    by_source = {dataset.row(n).source: n for n in range(len(dataset))}
    upright = np.asarray(dataset.photo(by_source["p2/turned.jpg"]), float)
    assert np.abs(upright - np.asarray(picture(2, 3), float)).mean() < 5
    roll = dataset.row(by_source["p2/turned.jpg"]).roll
    assert abs(roll) < 20
    bitmap_row = dataset.row(by_source["p0/bitmap.bmp"])
    assert dataset.photo_bytes(by_source["p0/bitmap.bmp"])[:3] == b"\xff\xd8\xff"
    assert (bitmap_row.width, bitmap_row.height) == (SIZE, SIZE)


def test_no_faces_and_no_pairs_are_named_and_leave_no_dataset(pack, tmp_path):
    source = tmp_path / "in"
    for n in range(2):
        path = source / f"p{n}" / "0.jpg"
        path.parent.mkdir(parents=True)
        path.write_bytes(encoded(Image.new("RGB", (300, 300), (90, 120, 150 + n))))
    output = tmp_path / "set"
    with pytest.raises(NoFacesError, match="2 no_face"):
        prepare(places(source, output, pack), OPTIONS, replace(ALONE, report=True))
    assert (output / "report.html").is_file() and not (output / "index.parquet").exists()
    for n in range(2):
        (source / f"p{n}" / "0.jpg").write_bytes(encoded(picture(n, 0)))
    with pytest.raises(NoPairsError, match="2 too_few"):
        prepare(places(source, output, pack), OPTIONS, ALONE)
    with pytest.raises(DatasetError, match="did not finish"):
        Dataset(output)
    # One more photo of one of them, and the same command works.
    (source / "p0" / "1.jpg").write_bytes(encoded(picture(0, 1)))
    assert prepare(places(source, output, pack), OPTIONS, ALONE).info.counts == {
        "kept": 2,
        "too_few": 1,
    }


# --- interrupted, disturbed ------------------------------------------------------------------


def test_a_second_run_does_nothing(whole, people, pack):
    output, first = whole
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.is_file()}
    second = prepare(places(people, output, pack), OPTIONS, replace(ALONE, report=True))
    assert second.info == first.info
    assert second.tasks_done_before == 6  # two parts detected and embedded, groups, one shard
    changed = {p.name for p, t in before.items() if p.stat().st_mtime_ns != t}
    assert changed <= {".lock"}


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(whole, people, pack, tmp_path):
    output = tmp_path / "set"
    command = [
        sys.executable, "-m", "trainer", "prepare", people, output, "--face-models", pack,
        "--detector-size", "256", "--min-detection", "0.6", "--held-out", "0.4", "--workers",
        "1", "--threads", "1", "--provider", "cpu", "--no-progress", "--no-report",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = 0
    for wanted in ("detect/00000.json", "write"):
        process = subprocess.Popen(
            list(map(str, command)), env=environment, stderr=subprocess.PIPE, cwd=tmp_path
        )
        while process.poll() is None and not (output / "work" / wanted).exists():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert b"Error" not in errors, errors.decode()
        killed += process.returncode == -signal.SIGKILL
        if not (output / "index.parquet").exists():
            with pytest.raises(DatasetError):
                read_index(output)
    assert killed >= 1
    (output / "shards").mkdir(exist_ok=True)
    (output / "shards" / ".00000.tar.00.part").write_bytes(b"half a shard")
    summary = prepare(places(people, output, pack), OPTIONS, ALONE)
    assert summary.tasks_done_before >= 1
    assert contents(output) == contents(whole[0])


def test_a_full_disk_is_named_and_nothing_half_written_stays(
    whole, people, pack, tmp_path, monkeypatch
):
    output = tmp_path / "set"
    calls = Counter()
    add = stages.ShardWriter.add

    def full(self, *arguments):
        calls["add"] += 1
        if calls["add"] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return add(self, *arguments)

    monkeypatch.setattr(stages.ShardWriter, "add", full)
    with pytest.raises(DiskFullError, match="shards"):
        prepare(places(people, output, pack), OPTIONS, ALONE)
    assert not list((output / "shards").iterdir()) and not (output / "index.parquet").exists()
    monkeypatch.undo()
    assert prepare(places(people, output, pack), OPTIONS, ALONE).tasks_done_before == 5
    assert contents(output) == contents(whole[0])


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on file sizes")
def test_a_write_that_really_fails_midway(people, pack, tmp_path):
    import resource

    output = tmp_path / "set"
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
        with pytest.raises(DiskFullError, match="detect"):
            prepare(places(people, output, pack), OPTIONS, ALONE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list((output / "work" / "detect").iterdir())


def test_damaged_outputs_are_made_again(people, pack, tmp_path, whole):
    output = tmp_path / "set"
    prepare(places(people, output, pack), OPTIONS, ALONE)
    shard = output / "shards" / "00000.tar"
    shard.write_bytes(shard.read_bytes()[:70_000])
    (output / "work" / "embed" / "00000.parquet").write_bytes(b"")
    (output / "index.parquet").unlink()
    prepare(places(people, output, pack), OPTIONS, ALONE)
    assert contents(output) == contents(whole[0])


def test_a_photo_that_changes_meanwhile_is_noticed(pack, tmp_path, monkeypatch):
    source, output = make_people(tmp_path / "in", people=2, photos=2), tmp_path / "set"
    real = run.group_photos

    def disturbed(*arguments):
        (source / "p0" / "0.jpg").write_bytes(encoded(picture(0, 3)))
        return real(*arguments)

    monkeypatch.setattr(run, "group_photos", disturbed)
    with pytest.raises(DatasetError, match="changed while"):
        prepare(places(source, output, pack), OPTIONS, ALONE)
    monkeypatch.undo()
    assert prepare(places(source, output, pack), OPTIONS, ALONE).info.counts == {"kept": 4}


def test_two_runs_do_not_share_a_folder(people, pack, tmp_path):
    output = tmp_path / "set"
    output.mkdir()
    with FileLock(output / ".lock"), pytest.raises(BusyError, match="another prepare"):
        prepare(places(people, output, pack), OPTIONS, ALONE)


def test_places_that_cannot_be_are_refused(people, pack, tmp_path):
    with pytest.raises(OptionError, match="inside INPUT"):
        prepare(places(people, people / "out", pack), OPTIONS, ALONE)
    with pytest.raises(FaceModelError, match="nowhere"):
        prepare(places(people, tmp_path / "o", tmp_path / "models" / "nowhere"), OPTIONS, ALONE)
    with pytest.raises(FaceModelError, match="provider"):
        prepare(places(people, tmp_path / "o", pack), OPTIONS, replace(ALONE, provider="tpu"))


# --- engines ---------------------------------------------------------------------------------


def test_processes_give_the_same_bytes(whole, people, pack, tmp_path):
    output = tmp_path / "set"
    prepare(places(people, output, pack), OPTIONS, replace(ALONE, workers=2))
    assert contents(output) == contents(whole[0])


@pytest.mark.timeout(900)  # Ray starts a handful of processes; on a busy machine that takes long
@pytest.mark.filterwarnings("ignore")
def test_ray_gives_the_same_bytes(whole, people, pack, tmp_path):
    pytest.importorskip("ray", reason="the extra is not installed")
    output = tmp_path / "set"
    prepare(places(people, output, pack), OPTIONS, replace(ALONE, workers=2, engine="ray"))
    assert contents(output) == contents(whole[0])


def test_ray_is_missed_only_when_asked_for(people, pack, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackageError, match="ray"):
        prepare(places(people, tmp_path / "o", pack), OPTIONS, replace(ALONE, engine="ray"))


def test_a_ray_that_does_not_start_is_named(people, pack, tmp_path, monkeypatch):
    def fail(**_):
        raise Exception("The current node timed out during startup.")

    fake = SimpleNamespace(is_initialized=lambda: False, init=fail)
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setitem(sys.modules, "ray.data", SimpleNamespace())
    with pytest.raises(EngineError, match=r"did not start \(The current node timed out"):
        prepare(places(people, tmp_path / "o", pack), OPTIONS, replace(ALONE, engine="ray"))


class Fatal:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (1,)


def test_a_lost_worker_is_named(tmp_path):
    target = Target(record=tmp_path / "0.json", outputs=(), fingerprint="f")
    task = stages.Task(stage="detect", target=target, arguments=Fatal())
    with (
        engines.open_engine(RunOptions(workers=2)) as engine,
        pytest.raises(EngineError, match="same command again"),
    ):
        list(engine.run([task]))


# --- command line ----------------------------------------------------------------------------


def test_the_command_line_with_the_embedded_pack(people, tmp_path, capsys):
    arguments = ["prepare", people, tmp_path / "set", "--face-models", files.FACE_MODELS,
                 "--detector-size", "256", "--purify-cosine", "-1", "--workers", "1",
                 "--provider", "cpu", "--no-report", "--no-progress"]  # fmt: skip
    assert cli.main([str(a) for a in arguments]) == 0
    said = capsys.readouterr().out
    assert "20 photos of 5 people" in said and "photos left out: none\n" in said
    _, info = read_index(tmp_path / "set")
    assert info.recogniser == "microworld/rec"
    assert cli.main(["prepare", str(tmp_path / "none"), *map(str, arguments[2:])]) == 1
    assert "FileMissingError" in capsys.readouterr().err
    archive = tmp_path / "people.zip"
    archive.write_bytes(b"PK")
    assert cli.main(["prepare", *map(str, (archive, tmp_path / "no", *arguments[3:]))]) == 1
    assert "unpack the archive" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    with pytest.raises(SystemExit):
        cli.main(["prepare"])
