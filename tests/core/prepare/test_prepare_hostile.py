"""``trainer prepare`` on files that mean harm: what is good is kept, the rest is counted."""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import tarfile
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from trainer.data_index import Dataset, Filters
from trainer.errors import NoFacesError
from trainer.index_file import read_index
from trainer.prepare.options import Places, PrepareOptions, RunOptions
from trainer.prepare.run import prepare

from ..prepare_world import encoded, make_pack, make_people, picture

OPTIONS = PrepareOptions(detector_size=256, min_detection=0.6)
ALONE = RunOptions(workers=1, threads=1, provider="cpu", report=True, progress=False)
SMALL = Filters(min_short_side=0, min_face_size=0, max_pair_cosine=1.0)


@pytest.fixture(scope="module")
def pack(tmp_path_factory) -> Path:
    return make_pack(tmp_path_factory.mktemp("face models"))


def run(source: Path, output: Path, pack: Path, **options):
    places = Places(source=source, output=output, face_models=pack)
    return prepare(places, replace(OPTIONS, **options), ALONE)


def reasons(output: Path) -> dict[str, str]:
    table, _ = read_index(output)
    rows = table.to_pylist()
    return {row["source"].rpartition("/")[2]: row["dropped"] for row in rows if row["dropped"]}


def giant_png(side: int = 30_000) -> bytes:
    """A PNG of a hundred bytes that claims 900 million pixels."""
    image = encoded(Image.new("1", (8, 8)), "PNG")
    head = b"IHDR" + struct.pack(">II", side, side) + image[24:29]
    return image[:12] + head + struct.pack(">I", zlib.crc32(head)) + image[33:]


def container(kind: str, png: bytes) -> bytes:
    """An ICO or ICNS file around a PNG."""
    size = len(png)
    if kind == "ICO":
        return struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, size, 22) + png
    return b"icns" + struct.pack(">I4sI", 16 + size, b"ic10", 8 + size) + png


def test_bad_photos_and_sidecars_end_no_run_and_no_second_one(pack, tmp_path):
    source, output = make_people(tmp_path / "in", people=2, photos=2), tmp_path / "set"
    p0 = source / "p0"
    bad = {
        "icon.jpg": (container("ICO", giant_png()), "not_an_image"),
        "icns.jpg": (container("ICNS", giant_png()), "not_an_image"),
        "eps.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image"),
        "giant.png": (giant_png(), "too_large"),
        "strip.png": (encoded(Image.new("RGB", (16, 20_000), "red"), "PNG"), "no_face"),
        "line.png": (encoded(Image.new("RGB", (20_000, 16), "red"), "PNG"), "no_face"),
        "song.mp3": (b"ID3 and much more that is no picture", "other_file"),
    }
    for name, (data, _) in bad.items():
        (p0 / name).write_bytes(data)
    (p0 / "0.json").write_bytes(b'{"caption": "half \\ud800", "url": "\\udfff", "license": "l"}')
    (p0 / "1.json").write_bytes(b"[" * 100_000)
    (source / "p1" / "0.txt").write_bytes("in café".encode("utf-16"))
    (source / "p1" / "1.json").write_bytes(b'{"licence": "' + "人".encode() * 340_000 + b'"}')
    wanted = {name: reason for name, (_, reason) in bad.items()} | {"1.json": "bad_sidecar"}
    if os.name == "posix":
        os.mkfifo(p0 / "a.jpg")
        secret = tmp_path / "secret.txt"
        secret.write_text("my secret", encoding="utf-8")
        (source / "p1" / "1.txt").symlink_to(secret)
        wanted |= {"a.jpg": "unreadable", "1.txt": "link"}
    for _ in range(2):
        summary = run(source, output, pack, licence="mine")
        assert summary.info.counts["kept"] == 4 and reasons(output) == wanted
    rows = {row["source"]: row for row in Dataset(output, SMALL, None).table.to_pylist()}
    assert sorted(row["licence"] for row in rows.values()) == ["", "", "l", "mine"]
    assert rows["p0/1.jpg"]["licence"] == ""  # its record may have named another
    assert rows["p1/1.jpg"]["licence"] == ""  # longer than any licence
    assert rows["p1/0.jpg"]["caption"] == "in café"
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "secret" not in page and str(tmp_path) not in page


def test_a_workflow_picture_of_comfyui_is_kept_with_its_bytes(pack, tmp_path):
    source, output = make_people(tmp_path / "in", people=1, photos=1), tmp_path / "set"
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", json.dumps({"nodes": "n" * 2**21}), zip=True)
    data = encoded(picture(0, 1), "PNG", pnginfo=info)
    (source / "p0" / "1.png").write_bytes(data)
    assert run(source, output, pack).info.counts == {"kept": 2}
    dataset = Dataset(output, SMALL, None)
    (number,) = (n for n in range(2) if dataset.row(n).source == "p0/1.png")
    assert dataset.photo_bytes(number) == data
    assert (np.asarray(dataset.photo(number)) == np.asarray(picture(0, 1))).all()


def test_shards_as_people_and_as_nobody_should_make_them(pack, tmp_path):
    source, output = tmp_path / "in", tmp_path / "set"
    source.mkdir()
    record = json.dumps({"license": "cc0", "who": "x", "caption": "\ud800"}).encode()
    for shard in range(2):
        with tarfile.open(source / f"{shard}.tar", "w") as archive:
            for photo in range(2):
                stem = f"p.{shard}/IMG_2024.05.0{photo}"
                who = record.replace(b"x", b"p%d" % shard)
                for name, content in (
                    (f"p.{shard}/._{photo}.jpg", b"mac"),
                    (f"{stem}.jpg", encoded(picture(shard, photo))),
                    (f"p.{shard}/._{photo}.json", b"mac"),
                    (f"{stem}.json", who),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    with tarfile.open(source / "empty.tar", "w"):
        pass
    (source / "none.tar").write_bytes(b"")
    (source / "packed.tar.gz").write_bytes(b"\x1f\x8b")
    counts = run(source, output, pack, identity_field="who").info.counts
    assert counts == {"kept": 4, "hidden": 8, "no_photos": 1, "not_a_shard": 2}
    dataset = Dataset(output, replace(SMALL, licences=("cc0",)), None)
    assert set(dataset.identities) == {"p0", "p1"} and len(dataset) == 4


@pytest.mark.parametrize("name", ["empty", "no photos"])
def test_shards_without_a_photo_are_named(pack, tmp_path, name):
    source = tmp_path / "in"
    source.mkdir()
    with tarfile.open(source / "0.tar", "w") as archive:
        if name == "no photos":
            archive.addfile(tarfile.TarInfo("a.cls"))
    with pytest.raises(NoFacesError, match="0 photos .*1 no_photos"):
        run(source, tmp_path / "set", pack)


@pytest.mark.skipif(os.name != "posix", reason="links need rights on Windows")
def test_people_that_are_links_are_prepared(pack, tmp_path):
    store, source = make_people(tmp_path / "store", people=2, photos=2), tmp_path / "in"
    source.mkdir()
    for name in ("p0", "p1"):
        (source / name).symlink_to(store / name)
    (source / "p0_again").symlink_to(store / "p0")
    with contextlib.suppress(FileExistsError):
        (store / "p0" / "up").symlink_to(store)
    output = tmp_path / "set"
    summary = run(source, output, pack)
    assert Counter(summary.info.counts) == {"kept": 4, "link": 2} and summary.identities == 2
