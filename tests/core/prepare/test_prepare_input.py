"""People's folders and shards: every photo, sidecar and member is used or counted."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from trainer import tars
from trainer.errors import InputKindError
from trainer.prepare import parts, reading, sources, tar_sources
from trainer.prepare.options import PrepareOptions
from trainer.prepare.photo import PhotoError
from trainer.texts import decode_text

JPEG = b"\xff\xd8\xff\xe0 a photo"
FOLDERS = PrepareOptions(kind="folders")
posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no pipes and few links")


def touch(path: Path, data: bytes = JPEG) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def make_tar(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def listed(folder: Path, options: PrepareOptions = FOLDERS):
    """Sources by name, and reasons of what is not used by name."""
    parts = sources.list_input(folder, options).parts
    found = {s.name: s for part in parts for s in part.sources}
    return found, {p.name: p.reason for part in parts for p in part.problems}


def in_tar(folder: Path, name: str = "x.tar"):
    found, problems = tar_sources.list_tar(folder, name)
    return (
        {s.name.removeprefix(f"{name}/"): s for s in found},
        {p.name.removeprefix(f"{name}/"): p.reason for p in problems},
    )


def captions(folder: Path, found) -> dict[str, str]:
    return {name: reading.read_sidecars(folder, s).caption for name, s in found.items()}


# --- shards ----------------------------------------------------------------------------------


def test_dots_in_names_of_members_hide_nothing(tmp_path):
    members = []
    for n in range(3):
        stem = f"p.1/IMG_2024.05.0{n}"
        members += [(f"{stem}.jpg", JPEG), (f"{stem}.txt", f"c{n}".encode()),
                    (f"{stem}.json", json.dumps({"license": f"l{n}"}).encode())]  # fmt: skip
    make_tar(tmp_path / "x.tar", members)
    found, problems = in_tar(tmp_path)
    assert captions(tmp_path, found) == {f"p.1/IMG_2024.05.0{n}.jpg": f"c{n}" for n in range(3)}
    licences = [reading.read_sidecars(tmp_path, s).record["license"] for s in found.values()]
    assert licences == ["l0", "l1", "l2"] and problems == {}


def test_every_photo_of_a_sample_is_seen_and_has_its_sidecars(tmp_path):
    make_tar(
        tmp_path / "x.tar",
        [
            ("x.input.jpg", JPEG),
            ("x.target.PNG", JPEG),
            ("x.txt", b"of both"),
            ("x.face.npy", b"\x93NUMPY"),
            ("y.jpg", JPEG),
            ("y.png", JPEG),
            ("y.jpg.txt", b"of the first"),
            ("y.cls", b"7"),
        ],
    )
    found, problems = in_tar(tmp_path)
    assert captions(tmp_path, found) == {
        "x.input.jpg": "of both",
        "x.target.PNG": "of both",
        "y.jpg": "of the first",
        "y.png": "",
    }
    assert problems == {"x.face.npy": "other_file", "y.cls": "other_file"}


def test_what_macos_adds_to_a_tar_takes_nothing_from_the_photos(tmp_path):
    members = []
    for n in range(2):
        for end, data in (("jpg", JPEG), ("json", b'{"license": "cc0"}'), ("txt", b"hi")):
            members += [(f"./._p{n}.{end}", b"\0\x05\x16\x07"), (f"./p{n}.{end}", data)]
    members += [("__MACOSX/._p0.jpg", b"x"), (".DS_Store", b"x")]
    make_tar(tmp_path / "x.tar", members)
    found, problems = in_tar(tmp_path)
    assert captions(tmp_path, found) == {"./p0.jpg": "hi", "./p1.jpg": "hi"}
    for source in found.values():
        assert reading.read_sidecars(tmp_path, source).record == {"license": "cc0"}
    assert Counter(problems.values()) == {"hidden": 8}


def test_members_apart_from_their_sample_are_joined_or_counted(tmp_path):
    order = ["a.jpg", "b.jpg", "a.txt", "b.txt", "lonely.txt"]
    make_tar(tmp_path / "x.tar", [(n, JPEG if "jpg" in n else n.encode()) for n in order])
    found, problems = in_tar(tmp_path)
    assert captions(tmp_path, found) == {"a.jpg": "a.txt", "b.jpg": "b.txt"}
    assert problems == {"lonely.txt": "scattered"}
    # Two samples of one name: whose it is cannot be told.
    order = ["a.jpg", "b.jpg", "a.jpg", "b.txt", "a.txt"]
    make_tar(tmp_path / "x.tar", [(n, JPEG if "jpg" in n else n.encode()) for n in order])
    found, problems = tar_sources.list_tar(tmp_path, "x.tar")
    assert [s.caption is not None for s in found] == [False, True, False]
    assert [p.name for p in problems if p.reason == "scattered"] == ["x.tar/a.txt"]


def test_a_sidecar_stays_with_its_own_of_two_samples_of_one_name(tmp_path):
    order = [("a.jpg", JPEG), ("b.jpg", JPEG), ("a.jpg", JPEG), ("a.json", b'{"license": "x"}')]
    make_tar(tmp_path / "x.tar", order)
    found, _ = tar_sources.list_tar(tmp_path, "x.tar")
    assert [s.record is not None for s in found] == [False, False, True]


@pytest.mark.parametrize("members", [[], [("a.cls", b"1"), ("b.json", b"{}")]])
def test_a_tar_without_photos_says_so(tmp_path, members):
    make_tar(tmp_path / "x.tar", members)
    found, problems = in_tar(tmp_path)
    assert not found and problems.pop("x.tar") == "no_photos" and len(problems) == len(members)
    touch(tmp_path / "y.tar", b"")
    assert in_tar(tmp_path, "y.tar") == ({}, {"y.tar": "not_a_shard"})


def test_links_pipes_and_sparse_files_in_a_tar_are_counted(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, kind in (("a.jpg", tarfile.SYMTYPE), ("b.jpg", tarfile.LNKTYPE),
                           ("c.jpg", tarfile.FIFOTYPE), ("d", tarfile.DIRTYPE)):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        info = tarfile.TarInfo("e.jpg")
        info.size = len(JPEG)
        archive.addfile(info, io.BytesIO(JPEG))
    found, problems = in_tar(tmp_path)
    assert list(found) == ["e.jpg"]
    assert problems == {"a.jpg": "link", "b.jpg": "link", "c.jpg": "unreadable"}


def test_a_member_with_a_name_that_no_index_takes_is_counted(tmp_path):
    make_tar(tmp_path / "x.tar", [("a" * 10**6 + ".jpg", JPEG), ("b.jpg", JPEG)])
    found, problems = tar_sources.list_tar(tmp_path, "x.tar")
    assert [source.name for source in found] == ["x.tar/b.jpg"]
    assert [(len(p.name) <= 2**12, p.reason) for p in problems] == [(True, "unreadable")]


def test_tars_that_were_joined_are_read_to_the_end(tmp_path):
    one = make_tar(tmp_path / "1.tar", [("a.jpg", JPEG)]).read_bytes()
    two = make_tar(tmp_path / "2.tar", [("b.jpg", JPEG)]).read_bytes()
    touch(tmp_path / "x.tar", one + two)
    found, problems = in_tar(tmp_path)
    assert list(found) == ["a.jpg", "b.jpg"] and not problems
    assert reading.read_blob(tmp_path, found["b.jpg"].photo, 100) == JPEG
    touch(tmp_path / "x.tar", one + b"something else" * 100)
    found, problems = in_tar(tmp_path)
    assert list(found) == ["a.jpg"] and problems == {"x.tar": "shard_cut"}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_tar_is_read_as_tarfile_reads_it(tmp_path, form):
    long = "/".join(["d" * 40] * (3 if form == tarfile.USTAR_FORMAT else 9))
    names = ["a.jpg", f"{long}/b.jpg", "é/ü.jpg", f"{long}/é.txt"]
    if form != tarfile.PAX_FORMAT:
        names.append("bytes\udce4.jpg")
    options = {"format": form, "errors": "surrogateescape"}
    path = make_tar(
        tmp_path / "x.tar", [(n, n.encode("utf-8", "replace")) for n in names], **options
    )
    with tarfile.open(path, errors="surrogateescape") as archive:
        wanted = [(m.name, m.offset_data, m.size) for m in archive]
    with path.open("rb") as file:
        found = list(tars.read_members(file, path.stat().st_size))
    assert [(m.name, m.offset, m.size) for m in found] == wanted
    assert [m.kind for m in found] == ["file"] * len(names)


def header(name: bytes, kind: bytes, size: int) -> bytes:
    block = bytearray(512)
    block[: len(name)] = name
    block[124:136] = b"%011o\0" % size
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[257:265] = b"ustar  \0"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def timed(path: Path) -> tuple[list[str], str]:
    started = time.process_time()
    names, problem = [], ""
    with path.open("rb") as file:
        try:
            for member in tars.read_members(file, path.stat().st_size):
                names.append(member.name)
        except tars.TarError as error:
            problem = str(error)
    assert time.process_time() - started < 20
    return names, problem


PHOTO = header(b"last.jpg", b"0", len(JPEG)) + padded(JPEG)


def test_headers_that_cost_tarfile_its_stack_or_its_time_cost_nothing(tmp_path):
    end = bytes(1024)
    chain = (header(b"././@LongLink", b"L", 5) + padded(b"name\0")) * 5000
    path = touch(tmp_path / "long.tar", chain + PHOTO + end)
    assert timed(path) == (["name"], "")
    pax = b"10 a=b\n" * 100_000
    path = touch(tmp_path / "pax.tar", header(b"pax", b"x", len(pax)) + padded(pax) + PHOTO + end)
    assert timed(path) == (["last.jpg"], "")
    pax = b"6 a=b\nrest"  # after which nothing moved on any more
    path = touch(tmp_path / "odd.tar", header(b"pax", b"x", len(pax)) + padded(pax) + PHOTO + end)
    assert timed(path) == (["last.jpg"], "")
    digits = b"1" * 1_000_000
    path = touch(tmp_path / "dig.tar", header(b"pax", b"x", 10**6) + padded(digits) + PHOTO + end)
    assert timed(path) == (["last.jpg"], "")
    sparse = bytearray(header(b"s.jpg", b"S", 0))
    sparse[482] = 1
    sparse[148:156] = b" " * 8
    sparse[148:156] = b"%06o\0 " % sum(sparse)
    block = bytearray(512)
    block[504] = 1
    path = touch(tmp_path / "sparse.tar", bytes(sparse) + bytes(block) * 4000 + end + PHOTO + end)
    assert timed(path) == (["s.jpg", "last.jpg"], "")
    giant = header(b"giant", b"x", 8**10)
    path = touch(tmp_path / "giant.tar", PHOTO + giant + PHOTO)
    assert timed(path)[0] == ["last.jpg"]
    assert "ends inside" in timed(path)[1]


def test_mutated_tars_end_in_members_or_a_named_end(tmp_path):
    import numpy as np

    whole = make_tar(
        tmp_path / "x.tar", [(f"{'d' * 120}/{n}.jpg", JPEG) for n in range(4)]
    ).read_bytes()[:8192]
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(500):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), 6):
            data[at] = rng.integers(0, 256)
        if rng.random() < 0.5:  # with a checksum that holds
            start = int(rng.integers(0, 16)) * 512
            data[start + 148 : start + 156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
        touch(tmp_path / "y.tar", bytes(data))
        names, problem = timed(tmp_path / "y.tar")
        refused += bool(problem)
    assert refused


# --- folders ---------------------------------------------------------------------------------


def test_all_names_of_pictures_and_files_without_one_are_read(tmp_path):
    for name in ("a.jfif", "b.jpe", "c.tga", "d.ppm", "e.jp2", "f.HEIC", "noname", "g.jpg_large"):
        touch(tmp_path / "p" / name)
    for name in ("notes", "song.mp3", "lonely.txt", "old.zip", "data.npy"):
        touch(tmp_path / "p" / name, b"no picture of any kind, but long enough for every header")
    found, problems = listed(tmp_path)
    assert sorted(found) == [
        f"p/{n}" for n in ("a.jfif", "b.jpe", "c.tga", "d.ppm", "e.jp2", "f.HEIC", "g.jpg_large",
                           "noname")
    ]  # fmt: skip
    assert problems == {
        f"p/{n}": "other_file" for n in ("notes", "song.mp3", "lonely.txt", "old.zip", "data.npy")
    }


def test_what_the_system_made_is_counted_and_not_read(tmp_path):
    for name in ("p/._a.jpg", "p/a.jpg", "p/Thumbs.db", "p/.hidden/b.jpg", ".DS_Store",
                 "__MACOSX/p/._a.jpg"):  # fmt: skip
        touch(tmp_path / name)
    found, problems = listed(tmp_path)
    assert list(found) == ["p/a.jpg"]
    assert problems == dict.fromkeys(
        ("p/._a.jpg", "p/Thumbs.db", "p/.hidden/", ".DS_Store", "__MACOSX/"), "hidden"
    )


def test_sidecars_are_found_in_any_case_and_by_the_whole_name(tmp_path):
    p = tmp_path / "p"
    for name in ("UPPER.JPG", "a.jpg", "b.c.jpg", "Mixed.jpeg"):
        touch(p / name)
    for name in ("UPPER.TXT", "a.jpg.txt", "b.c.Txt", "mixed.txt"):
        touch(p / name, name.encode())
    found, problems = listed(tmp_path)
    assert captions(tmp_path, found) == {
        "p/UPPER.JPG": "UPPER.TXT",
        "p/a.jpg": "a.jpg.txt",
        "p/b.c.jpg": "b.c.Txt",
        "p/Mixed.jpeg": "mixed.txt",
    }
    assert problems == {}


def test_compressed_tars_are_counted_or_named(tmp_path):
    touch(tmp_path / "a" / "1.tar.gz", b"\x1f\x8b")
    with pytest.raises(InputKindError, match="unpack"):
        sources.list_input(tmp_path / "a", PrepareOptions())
    make_tar(tmp_path / "a" / "2.tar", [("a.jpg", JPEG)])
    make_tar(tmp_path / "a" / "._2.tar", [("a.jpg", JPEG)])
    touch(tmp_path / "a" / "loose.jpg")
    listing = sources.list_input(tmp_path / "a", replace(FOLDERS, kind="webdataset"))
    assert [part.tar for part in listing.parts] == ["2.tar"]
    assert {p.name: p.reason for p in listing.parts[0].problems} == {
        "1.tar.gz": "not_a_shard",
        "._2.tar": "hidden",
        "loose.jpg": "other_file",
    }


@posix
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("x.tar.gz", "gunzip"),
        ("x.tgz", "gunzip"),
        ("x.zip", "unpack the archive"),
        ("x.7z", "unpack the archive"),
        ("x.jpg", "give the folder"),
        ("x", "give the folder"),
    ],
)
@pytest.mark.parametrize("kind", ["auto", "webdataset", "heap"])
def test_a_single_file_that_is_no_shard_says_what_to_give(tmp_path, name, told, kind):
    touch(tmp_path / name)
    with pytest.raises(InputKindError, match=told):
        sources.list_input(tmp_path / name, PrepareOptions(kind=kind))


@pytest.mark.parametrize("name", ["old.tar.gz", "old.zip"])
def test_an_archive_beside_people_hides_nobody(tmp_path, name):
    touch(tmp_path / name, b"\x1f\x8b")
    touch(tmp_path / "anna" / "1.jpg")
    listing = sources.list_input(tmp_path, PrepareOptions())
    assert listing.kind == "folders" and len(listing.parts[0].sources) == 1
    assert [(p.name, p.reason) for p in listing.parts[0].problems] == [(name, "other_file")]


def test_a_shard_beside_people_is_asked_about(tmp_path):
    make_tar(tmp_path / "old.tar", [("a.jpg", JPEG)])
    (tmp_path / "log").mkdir()
    assert sources.list_input(tmp_path, PrepareOptions()).kind == "webdataset"
    touch(tmp_path / "anna" / "1.jpg")
    with pytest.raises(InputKindError, match="--kind webdataset or --kind folders"):
        sources.list_input(tmp_path, PrepareOptions())


@posix
def test_a_file_without_a_suffix_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    path = touch(tmp_path / "anna" / "1")

    def no_right(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", no_right)
    found, problems = listed(tmp_path)
    assert list(found) == ["anna/1"] and not problems
    with pytest.raises(PhotoError, match="Permission denied"):
        reading.read_blob(tmp_path, found["anna/1"].photo, 2**20)
    assert path.is_file()


def test_links_to_people_and_photos_are_followed_once_each(tmp_path):
    store, root = tmp_path / "store", tmp_path / "in"
    touch(store / "anna" / "1.jpg")
    touch(store / "anna" / "1.txt", b"anna")
    touch(store / "x.jpg")
    touch(root / "bob" / "1.jpg")
    touch(root / "bob" / "2.jpg")
    touch(tmp_path / "secret.txt", b"secret")
    links = {
        "anna": store / "anna",  # a person
        "anna_again": store / "anna",
        "bob/3.jpg": store / "x.jpg",  # a photo
        "bob/4.jpg": store / "x.jpg",
        "a_of_bob": root / "bob",  # a folder that is there anyway
        "bob/5.jpg": root / "bob" / "1.jpg",
        "bob/up": root,  # circles
        "bob/self": root / "bob" / "self",
        "bob/gone.jpg": tmp_path / "nothing.jpg",  # nowhere
        "nobody": tmp_path / "nothing",
        "bob/2.txt": tmp_path / "secret.txt",  # a sidecar
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    found, problems = listed(root)
    assert sorted(found) == ["anna/1.jpg", "bob/1.jpg", "bob/2.jpg", "bob/3.jpg"]
    assert captions(root, found) == {**dict.fromkeys(found, ""), "anna/1.jpg": "anna"}
    assert found["anna/1.jpg"].identity == "anna"
    assert reading.read_blob(root, found["bob/3.jpg"].photo, 100) == JPEG
    assert problems == {
        "anna_again": "link",
        "bob/4.jpg": "link",
        "a_of_bob": "link",
        "bob/5.jpg": "link",
        "bob/up": "link",
        "bob/self": "link",
        "bob/gone.jpg": "link",
        "nobody": "link",
        "bob/2.txt": "link",
    }


@posix
def test_linked_shards_are_read(tmp_path):
    make_tar(tmp_path / "store" / "0.tar", [("a.jpg", JPEG)])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").symlink_to(tmp_path / "store" / "0.tar")
    (part,) = sources.list_input(tmp_path / "in", PrepareOptions()).parts
    assert list(in_tar(tmp_path / "in", part.tar)[0]) == ["a.jpg"]


@posix
def test_a_pipe_with_a_photos_name_does_not_hang(tmp_path):
    touch(tmp_path / "p" / "1.jpg")
    os.mkfifo(tmp_path / "p" / "a.jpg")
    os.mkfifo(tmp_path / "p" / "b")
    found, problems = listed(tmp_path)
    assert list(found) == ["p/1.jpg"]
    assert problems == {"p/a.jpg": "unreadable", "p/b": "unreadable"}
    with pytest.raises(reading.PhotoError, match="a pipe"):
        reading.read_blob(tmp_path, parts.Blob(path="p/a.jpg"), 100)
    os.mkfifo(tmp_path / "x.tar")
    assert in_tar(tmp_path) == ({}, {"x.tar": "unreadable"})


# --- text ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"]
)
def test_captions_and_records_are_read_in_the_encodings_people_have(tmp_path, encoding):
    text = "une photo de café à Nîmes, “été”"
    record = json.dumps({"license": "cc-by", "person": "Zoë"}, ensure_ascii=False)
    touch(tmp_path / "p" / "1.jpg")
    touch(tmp_path / "p" / "1.txt", text.encode(encoding))
    touch(tmp_path / "p" / "1.json", record.encode(encoding))
    found, _ = listed(tmp_path)
    beside = reading.read_sidecars(tmp_path, found["p/1.jpg"])
    assert (beside.caption, beside.record["person"], beside.problems) == (text, "Zoë", ())


@pytest.mark.parametrize("encoding", ["cp1251", "koi8-r", "shift-jis", "gb18030"])
def test_text_that_would_be_read_wrongly_is_told(encoding):
    text = "фото человека" if encoding in ("cp1251", "koi8-r") else "人物の写真"
    with pytest.raises(ValueError, match="UTF-8"):
        decode_text(text.encode(encoding))


@pytest.mark.parametrize(
    "record",
    [
        b"[1]",
        b"null",
        b'{"license": ',
        b"[" * 100_000,
        b"\xff\xfe{",
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
)
def test_a_record_that_cannot_be_read_is_counted_and_not_taken_for_none(tmp_path, record):
    touch(tmp_path / "p" / "1.jpg")
    touch(tmp_path / "p" / "1.json", record)
    touch(tmp_path / "p" / "1.txt", "фото".encode("cp1251"))
    found, _ = listed(tmp_path)
    beside = reading.read_sidecars(tmp_path, found["p/1.jpg"])
    assert beside.record == {} and beside.record_is_bad
    assert [(p.name, p.reason) for p in beside.problems] == [
        ("p/1.json", "bad_sidecar"),
        ("p/1.txt", "bad_sidecar"),
    ]


def test_texts_that_are_longer_than_an_index_takes_are_counted_and_left_out(tmp_path):
    long = "\u4eba" * 2**15  # of three bytes each
    for name, record in {
        "1": {"caption": long, "license": "l"},
        "2": {"licence": long, "url": "u" * 2**15, "who": long, "workflow": "w" * 2**15},
    }.items():
        touch(tmp_path / "p" / f"{name}.jpg")
        touch(tmp_path / "p" / f"{name}.json", json.dumps(record).encode())
    touch(tmp_path / "p" / "1.txt", long.encode())
    found, _ = listed(tmp_path)
    first, second = (reading.read_sidecars(tmp_path, found[f"p/{n}.jpg"], "who") for n in (1, 2))
    assert (first.caption, first.record, first.record_is_bad) == ("", {"license": "l"}, False)
    assert [p.name for p in first.problems] == ["p/1.json", "p/1.txt"]
    assert second.record_is_bad and list(second.record) == ["workflow"]
    assert all("16384 letters" in problem.detail for problem in second.problems)
    assert len(second.problems) == 3 and {p.reason for p in second.problems} == {"bad_sidecar"}


@pytest.mark.parametrize(
    "record", [{"licence": ["CC BY-NC"]}, {"licence": {"name": "x"}}, {"license": True}]
)
def test_a_licence_that_is_no_text_is_unknown(tmp_path, record):
    touch(tmp_path / "p" / "1.jpg")
    touch(tmp_path / "p" / "1.json", json.dumps(record).encode())
    found, _ = listed(tmp_path)
    beside = reading.read_sidecars(tmp_path, found["p/1.jpg"])
    assert beside.record_is_bad and [p.reason for p in beside.problems] == ["bad_sidecar"]


def test_names_of_a_record_may_be_capitalised(tmp_path):
    touch(tmp_path / "p" / "1.jpg")
    touch(tmp_path / "p" / "1.json", b'{"Licence": "CC BY-NC", "Caption": "a person"}')
    found, _ = listed(tmp_path)
    beside = reading.read_sidecars(tmp_path, found["p/1.jpg"])
    assert (beside.record["licence"], beside.caption) == ("CC BY-NC", "a person")


@posix
@pytest.mark.parametrize("linked", [False, True])
def test_a_record_that_is_not_read_leaves_the_licence_unknown(tmp_path, linked):
    touch(tmp_path / "in" / "p" / "1.jpg")
    other = touch(tmp_path / "other.json", b'{"licence": "CC BY-NC"}')
    if linked:
        (tmp_path / "in" / "p" / "1.json").symlink_to(other)
    else:
        touch(tmp_path / "in" / "p" / "1.json", b'{"licence": "CC0", "caption": "x"}')
        touch(tmp_path / "in" / "p" / "1.jpg.json", other.read_bytes())
    found, problems = listed(tmp_path / "in")
    beside = reading.read_sidecars(tmp_path / "in", found["p/1.jpg"])
    assert beside.record_is_bad and "licence" not in beside.record
    assert list(problems.values()) == ["link" if linked else "other_file"]


def test_a_sample_written_again_has_its_own_record(tmp_path):
    members = [("a.jpg", JPEG), ("a.json", b'{"licence": "CC0"}')]
    make_tar(tmp_path / "x.tar", [*members, ("a.jpg", JPEG), ("a.json", b'{"licence": "NC"}')])
    found, problems = tar_sources.list_tar(tmp_path, "x.tar")
    records = [reading.read_sidecars(tmp_path, source).record for source in found]
    assert [record["licence"] for record in records] == ["CC0", "NC"] and not problems


def test_accents_are_matched_however_they_are_spelt(tmp_path):
    touch(tmp_path / "p" / "e\u0301.jpg")
    touch(tmp_path / "p" / "\u00e9.txt", b"a caption")
    found, problems = listed(tmp_path)
    assert list(captions(tmp_path, found).values()) == ["a caption"] and not problems


def test_text_with_control_characters_is_told():
    with pytest.raises(ValueError, match="Save it as UTF-8"):
        decode_text("一张照片".encode("utf-16-le"))


def test_half_letters_of_json_can_be_written():
    record = json.loads('{"caption": "\\ud800 a \\udfff \\udc80 \\ud83d\\ude00"}')
    text = reading.text_of(record, "caption")
    assert text.encode() and text.endswith("\U0001f600")
