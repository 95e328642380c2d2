"""The parts of ``trainer prepare`` that need no model: files, photos, scores, grouping, filters."""

from __future__ import annotations

import errno
import io
import os
import pickle
import struct
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from infinite_id_core.errors import FileMissingError, NewerVersionError, OptionError
from trainer import index_file
from trainer.data_index import Dataset, Filters, pair_mask
from trainer.errors import (
    DatasetError,
    DiskFullError,
    FilterError,
    InputKindError,
    ShardDamagedError,
    disk_errors,
)
from trainer.index_file import SCHEMA, DatasetInfo, read_index
from trainer.prepare import cluster, group, parts, photo, reading, sources, tar_sources
from trainer.prepare.manifest import Target, finish, finished, remove_leftovers
from trainer.prepare.options import PrepareOptions, RunOptions
from trainer.shards import ShardReader, ShardWriter, decode_photo

INFO = DatasetInfo(recogniser="pack/rec", fingerprint="f", counts={"kept": 4}, options={})


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def jpeg(picture: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


def smooth(seed: int, size: int = 96) -> np.ndarray:
    """A picture [size, size, 3] that survives JPEG."""
    values = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return cv2.resize(values, (size, size), interpolation=cv2.INTER_CUBIC)


# --- shards ----------------------------------------------------------------------------------


def write_shard(path: Path, photos: list[bytes]) -> list:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        writer = ShardWriter(file)
        placed = [
            writer.add(f"k{n}", data, "jpg", np.full(512, n, np.float32), {"caption": f"c{n}"})
            for n, data in enumerate(photos)
        ]
        writer.close()
    return placed


def test_what_a_shard_holds_is_read_back_by_seeking_and_by_webdataset(tmp_path):
    import webdataset

    photos = [jpeg(smooth(n)) for n in range(3)]
    path = tmp_path / "shards" / "00000.tar"
    placed = write_shard(path, photos)
    reader = pickle.loads(pickle.dumps(ShardReader(tmp_path)))
    for n, place in enumerate(placed):
        assert reader.photo("00000.tar", place.offset, place.size) == photos[n]
        assert reader.face("00000.tar", place.face_offset)[5] == n
    samples = list(webdataset.WebDataset(path.as_uri(), shardshuffle=False).decode())
    assert [s["__key__"] for s in samples] == ["k0", "k1", "k2"]
    assert samples[2]["face.npy"].shape == (512,) and samples[2]["json"] == {"caption": "c2"}
    assert samples[1]["txt"] == "c1"


def test_equal_samples_give_equal_bytes_at_any_time(tmp_path, monkeypatch):
    write_shard(tmp_path / "a.tar", [b"one", b"two"])
    monkeypatch.setattr("time.time", lambda: 1.0)
    write_shard(tmp_path / "b.tar", [b"one", b"two"])
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_reader_does_not_share_its_position(tmp_path):
    placed = write_shard(tmp_path / "shards" / "s.tar", [b"a" * 5000, b"b" * 5000])
    reader = ShardReader(tmp_path)
    reader.photo("s.tar", placed[0].offset, 5000)
    before = reader._files["s.tar"].tell()
    child = os.fork()
    if child == 0:
        good = reader.photo("s.tar", placed[1].offset, 5000) == b"b" * 5000
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert reader._files["s.tar"].tell() == before


def test_damage_in_a_shard_is_named(tmp_path):
    path = tmp_path / "shards" / "s.tar"
    (place,) = write_shard(path, [b"a" * 5000])
    reader = ShardReader(tmp_path)
    with pytest.raises(ShardDamagedError, match="not the one"):
        reader.photo("s.tar", place.offset, 5000, "0" * 64)
    with pytest.raises(ShardDamagedError, match="no face"):
        reader.face("s.tar", 0)
    with pytest.raises(DatasetError, match="gone"):
        reader.photo("other.tar", 0, 1)
    with path.open("rb+") as file:
        file.truncate(3000)
    with pytest.raises(ShardDamagedError, match="ends before"):
        reader.photo("s.tar", place.offset, 5000)


# --- the index and its filters ---------------------------------------------------------------


def row(n: int, **values) -> dict:
    return {
        "key": f"k{n}", "shard": "s.tar", "offset": 0, "size": 1, "face_offset": 0,
        "sha256": "", "source_sha256": "", "identity": f"p{n // 2}", "split": "train",
        "source": "", "licence": "cc0", "caption": "", "width": 600, "height": 700,
        "box": [0.0, 0.0, 300.0, 300.0], "landmarks": [float(i) for i in range(10)],
        "det_score": 0.9, "faces": 1, "face_size": 300.0, "face_share": 0.2, "blur": 100.0,
        "yaw": 10.0, "pitch": -10.0, "roll": 20.0, "similarity": 0.8, "phash": "0" * 16,
        "group": f"k{n}", "dropped": "", "detail": "", **values,
    }  # fmt: skip


def write_dataset(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    index_file.write_index(folder / index_file.INDEX, index_file.table_of(rows), INFO)
    return folder


FAILING = {
    "min_short_side": (512, {"height": 511}),
    "min_face_size": (256.0, {"face_size": 255.0}),
    "min_face_share": (0.1, {"face_share": 0.09}),
    "min_det_score": (0.5, {"det_score": 0.4}),
    "min_similarity": (0.5, {"similarity": 0.4}),
    "min_sharpness": (50.0, {"blur": 40.0}),
    "max_yaw": (45.0, {"yaw": -46.0}),
    "max_pitch": (30.0, {"pitch": 31.0}),
    "max_roll": (30.0, {"roll": -31.0}),
    "max_faces": (1, {"faces": 2}),
    "licences": (["cc0"], {"licence": "unknown"}),
}


@pytest.mark.parametrize("name", FAILING)
def test_each_filter_removes_what_it_names_and_only_that(name, tmp_path):
    value, failing = FAILING[name]
    rows = [*(row(n) for n in range(5)), row(5, **failing)]
    folder = write_dataset(tmp_path / "d", rows)
    dataset = Dataset(folder, Filters(**{name: value}))
    # The sixth photo fails, and with it the fifth is alone.
    assert dataset.table["key"].to_pylist() == ["k0", "k1", "k2", "k3"]
    lenient = Filters(min_photos=1, **{name: value})
    assert len(Dataset(folder, lenient)) == 5


def test_the_dataset_knows_its_people_and_rows(tmp_path):
    rows = [row(0), row(1), row(2), row(3), row(4, split="held_out"), row(5, split="held_out"),
            row(6, dropped="no_face", shard=None, box=None)]  # fmt: skip
    folder = write_dataset(tmp_path / "d", rows)
    dataset = Dataset(folder)
    assert dataset.identities == ("p0", "p1") and dataset.rows_of("p1") == range(2, 4)
    assert Dataset(folder, split="held_out").identities == ("p2",)
    assert Dataset(folder, split=None).identities == ("p0", "p1", "p2")
    first = dataset.row(0)
    assert first.box == (0, 0, 300, 300) and first.landmarks[4] == (8.0, 9.0)
    assert dataset.info == INFO


def test_filters_that_leave_nothing_say_which_did_it(tmp_path):
    folder = write_dataset(tmp_path / "d", [row(0), row(1, width=100)])
    with pytest.raises(FilterError, match="min_short_side=512 removes 1"):
        Dataset(folder)
    with pytest.raises(FilterError, match="nobody is held out"):
        Dataset(folder, split="held_out")


@pytest.mark.parametrize(
    "values",
    [
        {"min_short_side": -1},
        {"min_face_share": 1.5},
        {"min_det_score": float("nan")},
        {"min_photos": 0},
        {"min_pair_cosine": 0.9},
        {"max_yaw": 100.0},
    ],
)
def test_impossible_filters_are_refused(values):
    with pytest.raises(OptionError, match=next(iter(values))):
        Filters(**values)


def test_pairs_are_neither_strangers_nor_copies():
    a = np.zeros((1, 512), np.float32)
    a[0, 0] = 3.0  # lengths do not matter
    at = [1.0, 0.9, 0.6, 0.2]
    faces = np.concatenate([a] * 4)
    for n, cosine in enumerate(at):
        faces[n, 0], faces[n, 1 + n] = cosine, np.sqrt(1 - cosine**2)
    allowed = pair_mask(faces, Filters())
    assert allowed[0].tolist() == [False, False, True, False]
    assert not allowed.diagonal().any() and (allowed == allowed.T).all()


def test_what_is_no_index_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="prepare did not finish"):
        read_index(tmp_path)
    path = tmp_path / index_file.INDEX
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(DatasetError, match="Parquet"):
        read_index(tmp_path)
    pa.parquet.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(DatasetError, match="not an index"):
        read_index(tmp_path)
    newer = {index_file.METADATA: b'{"format": "infinite-id-dataset", "version": 2}'}
    pa.parquet.write_table(pa.table({"a": [1]}).replace_schema_metadata(newer), path)
    with pytest.raises(NewerVersionError):
        read_index(tmp_path)


# --- photos ----------------------------------------------------------------------------------

LIMITS = {"max_side": 2048, "max_pixels": 100_000_000}


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels: opening it must not allocate them."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + chunks + struct.pack(">I", 0) + b"IDAT"


def reason(data: bytes, **limits) -> str:
    with pytest.raises(photo.PhotoError) as caught:
        photo.open_photo(data, **{**LIMITS, **limits})
    assert caught.value.detail
    return caught.value.reason


def test_every_mode_becomes_upright_rgb():
    half = Image.new("RGBA", (40, 30), (255, 0, 0, 0))
    half.paste((0, 0, 255, 255), (0, 0, 20, 30))
    picture = photo.open_photo(encoded(half), **LIMITS).picture
    assert picture[5, 5].tolist() == [0, 0, 255] and picture[5, 35].tolist() == [255] * 3
    grey = photo.open_photo(encoded(Image.new("L", (20, 20), 77)), **LIMITS).picture
    assert grey.shape == (20, 20, 3) and (grey == 77).all()
    deep = Image.fromarray(np.full((20, 20), 32896, np.uint16))
    assert (photo.open_photo(encoded(deep), **LIMITS).picture == 128).all()
    palette = half.convert("RGB").quantize(4)
    assert photo.open_photo(encoded(palette), **LIMITS).picture[5, 5].tolist() == [0, 0, 255]
    cmyk = Image.new("CMYK", (20, 20), (0, 255, 255, 0))
    assert photo.open_photo(encoded(cmyk, "JPEG"), **LIMITS).picture[0, 0, 0] > 200


def test_exif_rotation_is_applied_to_picture_and_size():
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:10, :10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise
    data = jpeg(picture, exif=exif)
    found = photo.open_photo(data, **LIMITS)
    assert found.picture.shape == (60, 40, 3) and found.stored_size == (40, 60)
    assert found.picture[3, 36].min() > 200 and found.keep_bytes
    assert (np.asarray(decode_photo(data)) == found.picture).all()


def test_damaged_files_have_their_reasons():
    whole = jpeg(smooth(0, 256))
    assert reason(b"") == "empty"
    assert reason(b"hello, I am text") == "not_an_image"
    assert reason(whole[: len(whole) // 2]) == "truncated"
    assert reason(encoded(Image.fromarray(smooth(0, 256)))[:2000]) in ("truncated", "corrupt")
    assert reason(whole[:20] + b"\xff" * 200) in ("corrupt", "truncated", "not_an_image")
    assert reason(encoded(Image.new("RGB", (8, 100)))) == "too_small"


def test_a_huge_picture_is_refused_before_its_pixels_exist():
    # Decoding would need 1.2 GB and fail on the missing data; the size alone decides.
    assert reason(png_header(20000, 20000)) == "too_large"
    assert reason(png_header(9000, 9000), max_pixels=80_000_000) == "too_large"


def test_a_huge_baseline_jpeg_is_decoded_at_an_eighth():
    wide = encoded(Image.new("L", (20000, 1600), 90), "JPEG")
    found = photo.open_photo(wide, max_side=2048, max_pixels=1_000_000)
    assert found.picture.shape == (200, 2500, 3)
    assert found.stored_size == (2048, 164) and not found.keep_bytes
    assert Image.open(io.BytesIO(photo.reencoded(found))).size == (2048, 164)
    slow = encoded(Image.new("L", (5000, 1600), 90), "JPEG", progressive=True)
    assert reason(slow, max_pixels=1_000_000) == "too_large"


def test_other_formats_are_stored_as_jpeg_and_known_ones_as_they_are():
    image = Image.fromarray(smooth(1))
    for kind, extension, keep in (("JPEG", "jpg", True), ("PNG", "png", True),
                                  ("WEBP", "webp", True), ("BMP", "jpg", False)):  # fmt: skip
        found = photo.open_photo(encoded(image, kind), **LIMITS)
        assert (found.extension, found.keep_bytes) == (extension, keep)


def test_sharpness_falls_with_blur_and_hashes_survive_recompression():
    picture = smooth(2)
    noisy = np.clip(picture + np.random.default_rng(0).normal(0, 20, picture.shape), 0, 255)
    noisy = noisy.astype(np.uint8)
    assert photo.sharpness(noisy) > 10 * photo.sharpness(cv2.GaussianBlur(noisy, (0, 0), 3))

    def bits(a, b):
        return (photo.difference_hash(a) ^ photo.difference_hash(b)).bit_count()

    again = np.asarray(Image.open(io.BytesIO(jpeg(picture))).resize((50, 50)))
    assert bits(picture, again) <= 2
    assert bits(picture, smooth(3)) > 12


@pytest.mark.parametrize("angles", [(0, 0, 0), (40, 0, 0), (-30, 15, 0), (10, -20, 35)])
def test_pose_is_recovered_from_a_turned_head(angles):
    yaw, pitch, roll = np.radians(angles)
    ry = [[np.cos(yaw), 0, -np.sin(yaw)], [0, 1, 0], [np.sin(yaw), 0, np.cos(yaw)]]
    rx = [[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)], [0, np.sin(pitch), np.cos(pitch)]]
    rz = [[np.cos(roll), -np.sin(roll), 0], [np.sin(roll), np.cos(roll), 0], [0, 0, 1]]
    turned = photo._FACE_3D @ (np.array(ry) @ rx @ rz).T
    points = (turned[:, :2] * 2.5 + 40).astype(np.float32)
    assert photo.pose(points) == pytest.approx(angles, abs=0.1)


# --- input -----------------------------------------------------------------------------------


def touch(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_the_layout_is_recognised(tmp_path):
    options = PrepareOptions()
    touch(tmp_path / "a" / "anna" / "1.jpg")
    touch(tmp_path / "a" / "anna" / "deep" / "2.PNG")
    touch(tmp_path / "a" / "anna" / "notes.txt")
    listing = sources.list_input(tmp_path / "a", options)
    assert listing.kind == "folders" and listing.labelled
    assert [s.identity for s in listing.parts[0].sources] == ["anna", "anna"]
    touch(tmp_path / "b" / "1.jpg")
    touch(tmp_path / "b" / "1.json")
    heap = sources.list_input(tmp_path / "b", options)
    assert heap.kind == "heap" and heap.parts[0].sources[0].record is not None
    touch(tmp_path / "c" / "0.tar")
    assert sources.list_input(tmp_path / "c", options).kind == "webdataset"
    touch(tmp_path / "b" / "bob" / "2.jpg")
    with pytest.raises(InputKindError, match="--kind"):
        sources.list_input(tmp_path / "b", options)
    forced = sources.list_input(tmp_path / "b", replace(options, kind="folders"))
    assert [p.reason for p in forced.parts[0].problems] == ["no_person"]
    touch(tmp_path / "d" / "readme.md")
    with pytest.raises(InputKindError, match="none of them"):
        sources.list_input(tmp_path / "d", options)
    with pytest.raises(FileMissingError):
        sources.list_input(tmp_path / "none", options)


def test_names_that_are_no_text_can_be_listed(tmp_path):
    folder = os.fsencode(tmp_path / "p")
    os.mkdir(folder)
    try:
        with open(folder + b"/b\xe4d.jpg", "wb") as file:
            file.write(b"x")
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    (part,) = sources.list_input(tmp_path, PrepareOptions()).parts
    assert part.sources[0].name.encode() == rb"p/b\xe4d.jpg"
    assert reading.read_blob(tmp_path, part.sources[0].photo, 10) == b"x"


def test_a_changed_file_changes_only_its_part(tmp_path):
    for n in range(40):
        touch(tmp_path / "p" / f"{n:02}.jpg")
    first = sources.list_input(tmp_path, PrepareOptions()).parts
    touch(tmp_path / "p" / "20.jpg", b"longer")
    second = sources.list_input(tmp_path, PrepareOptions()).parts
    assert [a.fingerprint == b.fingerprint for a, b in zip(first, second, strict=True)] == [
        True, False, True,
    ]  # fmt: skip


def make_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_a_tar_gives_samples_and_a_cut_one_says_so(tmp_path):
    members = {}
    for n in range(4):
        members |= {f"{n:04}.jpg": bytes(2000), f"{n:04}.json": b"{}", f"{n:04}.txt": b"a cat"}
    path = make_tar(tmp_path / "x.tar", members)
    found, problems = tar_sources.list_tar(tmp_path, "x.tar")
    assert [s.name for s in found] == [f"x.tar/{n:04}.jpg" for n in range(4)] and not problems
    assert found[1].record and found[1].caption
    blob = found[2].caption
    assert blob and reading.read_blob(tmp_path, blob, 100) == b"a cat"
    data = path.read_bytes()
    offset = found[2].photo.offset
    for end in (offset + 700, offset - 100, offset - 512):
        path.write_bytes(data[:end])
        found, problems = tar_sources.list_tar(tmp_path, "x.tar")
        assert len(found) == 2 and [p.reason for p in problems] == ["shard_cut"]
    path.write_bytes(b"this is no tar" * 100)
    found, problems = tar_sources.list_tar(tmp_path, "x.tar")
    assert not found and [p.reason for p in problems] == ["not_a_shard"]


def test_blobs_that_cannot_be_had_have_their_reasons(tmp_path):
    touch(tmp_path / "a.jpg", b"12345")
    for blob, limit, wanted in (
        (parts.Blob(path="none.jpg"), 10, "unreadable"),
        (parts.Blob(path="a.jpg"), 4, "too_large"),
        (parts.Blob(path="a.jpg", offset=2, size=9), 10, "truncated"),
    ):
        with pytest.raises(photo.PhotoError) as caught:
            reading.read_blob(tmp_path, blob, limit)
        assert caught.value.reason == wanted


# --- who is who ------------------------------------------------------------------------------


def crowd(people: int, each: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit embeddings [people * each, 512] in random order, and whose they are."""
    rng = np.random.default_rng(seed)
    centres = unit(rng.normal(size=(people, 512)))
    label = rng.permutation(np.repeat(np.arange(people), each))
    spread = rng.normal(size=(len(label), 512)) * noise / np.sqrt(512)
    return unit(centres[label] + spread), label


def assert_same_groups(groups: list, label: np.ndarray) -> None:
    found = np.full(len(label), -1)
    for number, rows in enumerate(groups):
        found[rows] = number
    pairs = set(zip(found.tolist(), label.tolist(), strict=True))
    assert len(pairs) == len(set(label)) == len(groups)


def test_faces_are_grouped_by_person():
    embedding, label = crowd(20, 8, noise=0.5)  # cosine 0.8 within
    assert_same_groups(cluster.group_faces(embedding, PrepareOptions()), label)
    assert cluster.group_faces(embedding[:0], PrepareOptions()) == []


def test_large_sets_take_other_paths_to_the_same_groups(monkeypatch):
    embedding, label = crowd(12, 30, noise=0.5)
    monkeypatch.setattr(cluster, "EXACT_LIMIT", 100)
    assert_same_groups(cluster.group_faces(embedding, PrepareOptions()), label)
    monkeypatch.setattr(cluster, "LINKAGE_LIMIT", 40)
    joined = PrepareOptions(link_cosine=-0.2, neighbours=360)  # everybody in one component
    assert_same_groups(cluster.group_faces(embedding, joined), label)


def test_a_look_alike_does_not_join_two_people():
    embedding, label = crowd(2, 12, noise=0.4)
    a, b = (unit(embedding[label == n].mean(0)) for n in (0, 1))
    between = unit(a + b)[None]
    groups = cluster.group_faces(np.concatenate([embedding, between]), PrepareOptions())
    assert min(between @ a, between @ b) > 0.6  # it is linked to both
    for rows in groups:
        people = {int(label[r]) for r in rows if r < len(label)}
        assert len(people) <= 1
    assert sorted(len(rows) for rows in groups)[-2:] in ([12, 12], [12, 13])


def test_near_duplicates_need_hash_and_face():
    embedding, _ = crowd(3, 1, noise=0.0)
    same = np.stack([embedding[0], embedding[0], embedding[1], embedding[0]])
    bits = np.zeros((4, 64), bool)
    bits[1, :4] = True  # at the limit
    bits[3, :30] = True  # another picture of the same person
    found = list(cluster.near_duplicates(bits, same, PrepareOptions()))
    assert [rows.tolist() for rows in found] == [[0, 1]]


def held_out(people, share=0.05, seed=0):
    splits = group.splits_of(people, share, seed)
    assert set(splits) == set(people)
    return [name for name in people if splits[name] == "held_out"]


def test_the_split_is_stable_and_has_the_asked_share():
    names = [f"person-{n}" for n in range(4000)]
    held = held_out(names)
    assert 140 < len(held) < 260
    assert set(held) <= set(held_out(names, 0.10))  # more only adds
    assert held_out(names[:2000]) == [name for name in held if name in names[:2000]]
    assert held_out(names, seed=1) != held
    assert held_out(["x"], 0.0) == [] and held_out(["x"], 1.0) == ["x"]


@pytest.mark.parametrize("seed", range(20))
def test_from_ten_people_on_somebody_is_held_out(seed):
    names = [f"person-{n}" for n in range(13)]
    assert len(held_out(names, 1e-9, seed)) == 1
    assert held_out(names[:9], 1e-9, seed) == []
    assert held_out(names, 0.0, seed) == []
    assert set(held_out(names, 1e-9, seed)) <= set(held_out(names, 0.05, seed))


# --- what is done ----------------------------------------------------------------------------


def test_a_record_counts_only_for_whole_outputs_of_the_same_input(tmp_path):
    output = tmp_path / "0.parquet"
    target = Target(record=tmp_path / "0.json", outputs=(output,), fingerprint="f")
    output.write_bytes(b"12345")
    assert finished(target) is None
    finish(target, {"photos": 3})
    assert finished(target) == {"photos": 3}
    assert finished(replace(target, fingerprint="other")) is None
    output.write_bytes(b"12346")
    assert finished(target) is None
    output.write_bytes(b"1234")
    assert finished(target) is None
    target.record.write_text("{half", encoding="utf-8")
    assert finished(target) is None


def test_leftovers_of_a_killed_run_go(tmp_path):
    touch(tmp_path / "work" / ".00000.parquet.ab12.part")
    touch(tmp_path / "work" / "00000.parquet")
    remove_leftovers(tmp_path)
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["00000.parquet"]


def test_a_full_disk_has_a_name_and_other_errors_keep_theirs():
    with pytest.raises(DiskFullError, match="out"), disk_errors("out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(PermissionError), disk_errors("out"):
        raise PermissionError(errno.EACCES, "no")


@pytest.mark.parametrize(
    "make",
    [
        lambda: PrepareOptions(detector_size=100),
        lambda: PrepareOptions(held_out=1.5),
        lambda: PrepareOptions(kind="zip"),
        lambda: PrepareOptions(min_detection=0.0),
        lambda: RunOptions(engine="slurm"),
        lambda: RunOptions(workers=-1),
    ],
)
def test_impossible_options_are_refused(make):
    with pytest.raises(OptionError):
        make()


def test_the_schema_is_what_other_people_read():
    assert SCHEMA.names[:8] == [
        "key", "shard", "offset", "size", "face_offset", "sha256", "source_sha256", "identity",
    ]  # fmt: skip
    wanted = {"source", "licence", "box", "landmarks", "blur", "pitch", "yaw", "roll", "dropped"}
    assert wanted <= set(SCHEMA.names)
