"""Opening pictures: the formats that are read, and that no other decoder ever runs."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile, PngImagePlugin

from infinite_id_core.errors import (
    DamagedPictureError,
    MissingPackageError,
    UnknownPictureError,
)
from infinite_id_core.files import pictures
from tools import demo, without_comfyui
from trainer.errors import ReferencePhotoError
from trainer.evaluate.figures import contact_sheet
from trainer.evaluate.manifest import Row
from trainer.photos import read_reference
from trainer.prepare.photo import PhotoError, open_photo, read_pixels
from trainer.shards import decode_photo

ROOT = Path(__file__).resolve().parents[3]
LIMITS = {"max_side": 2048, "max_pixels": 100_000_000}
EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n"
    b"0 0 moveto 100 100 lineto stroke\nshowpage\n%%EOF\n"
)


def smooth() -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((64, 48), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# --- which decoders run ----------------------------------------------------------------------


@pytest.fixture
def ghostscript(tmp_path, monkeypatch) -> Path:
    """A ``gs`` in the path that leaves a file when it is started."""
    started, folder = tmp_path / "started", tmp_path / "bin"
    folder.mkdir()
    program = folder / "gs"
    program.write_text(f"#!/bin/sh\necho >> '{started}'\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return started


@pytest.mark.skipif(os.name == "nt", reason="the program that must not start is a shell script")
def test_a_photo_starts_no_other_program_wherever_it_is_opened(ghostscript, tmp_path):
    path = tmp_path / "c.jpg"
    path.write_bytes(EPS)
    with pytest.raises(PhotoError) as caught:
        open_photo(EPS, **LIMITS)
    assert caught.value.reason == "not_an_image"
    with pytest.raises(PhotoError):
        read_pixels(path)
    with pytest.raises(ReferencePhotoError, match="not_an_image"):
        read_reference(path)
    for opened in (decode_photo, without_comfyui.load_image, pictures.read_picture):
        with pytest.raises(UnknownPictureError):
            opened(EPS)
    with pytest.raises(UnknownPictureError):
        demo.strip_of(EPS, [])
    contact_sheet([Row(image=path, reference=path, identity="a", method="m")])
    assert not ghostscript.exists()
    with contextlib.suppress(OSError), Image.open(path) as image:  # what would start it
        image.load()
    assert ghostscript.exists()


def test_one_function_opens_pictures():
    found = []
    for folder in ("infinite_id_core", "trainer", "nodes", "tools", "microworld"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    called = ast.unparse(node.func)
                    if called == "Image.open" or called.endswith((".imread", ".imdecode")):
                        found.append((path.relative_to(ROOT).as_posix(), called))
    assert found == [("infinite_id_core/files/pictures.py", "Image.open")]


@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000", "TGA", "PPM", "MPO"]
)
def test_the_formats_people_have_are_read(kind):
    image = smooth()
    options = {"save_all": True, "append_images": [image]} if kind == "MPO" else {}
    read = pictures.to_rgb(pictures.read_picture(encoded(image, kind, **options)))
    assert np.abs(np.asarray(read, float) - np.asarray(image, float)).mean() < 20


def test_tga_is_known_by_a_header_that_agrees_with_itself():
    for image, options in (
        (smooth(), {"compression": "tga_rle"}),
        (smooth().convert("L"), {}),
        (smooth().convert("RGBA"), {}),
        (smooth().quantize(16), {}),
    ):
        data = encoded(image, "TGA", **options)
        assert pictures.picture_format(data) == "TGA"
        footless = data.removesuffix(b"\0" * 8 + b"TRUEVISION-XFILE.\0")
        assert pictures.read_picture(footless).size == image.size
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, 64, dtype=np.uint8).tobytes() for _ in range(20_000)]
    assert [pictures.picture_format(data) for data in noise] == [None] * len(noise)


@pytest.mark.parametrize("kind", ["ICO", "ICNS", "EPS", "PCX", "IM", "MSP", "SGI", "DDS", "PDF"])
def test_other_formats_are_not_tried_under_any_name(kind):
    size = (256, 256)
    image = Image.new("1" if kind == "MSP" else "RGB", size)
    with pytest.raises(UnknownPictureError, match="JPEG"):
        pictures.open_picture(encoded(image, kind))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000"])
def test_damage_has_one_name_whatever_the_decoder_raises(kind):
    whole = encoded(smooth(), kind)
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(60):
        data = bytearray(whole[: int(rng.integers(4, len(whole) + 1))])
        for at in rng.integers(0, len(data), 4):
            data[at] = rng.integers(0, 256)
        try:
            pictures.read_picture(bytes(data), max_pixels=10**6)
        except (DamagedPictureError, UnknownPictureError):
            refused += 1
    assert refused


def test_too_many_pixels_are_refused_undecoded():
    image = Image.new("L", (400, 300))
    for kind in ("PNG", "JPEG"):
        with pytest.raises(DamagedPictureError, match="400 x 300") as caught:
            pictures.read_picture(encoded(image, kind), max_pixels=100_000)
        assert caught.value.too_large


def with_scans(image: Image.Image, scans: int) -> bytes:
    """A progressive JPEG whose last scan stands there ``scans`` times more."""
    whole = encoded(image, "JPEG", progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + last * scans + whole[-2:]


@pytest.mark.parametrize(("side", "scans", "sound"), [(64, 200, True), (64, 300, False)])
def test_a_jpeg_of_hundreds_of_scans_is_refused_undecoded(side, scans, sound, monkeypatch):
    data = with_scans(Image.new("L", (side, side), 100), scans)
    if sound:
        assert pictures.read_picture(data).size == (side, side)
        return
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    with pytest.raises(DamagedPictureError, match="256 scans") as caught:
        pictures.read_picture(data)
    assert caught.value.too_large


def test_scans_behind_a_mark_that_means_nothing_are_counted():
    whole = with_scans(Image.new("L", (64, 64), 100), 0)
    at = whole.rindex(b"\xff\xda")
    scan = b"\xff\x02\xff\xff" + whole[at:-2]
    with pytest.raises(DamagedPictureError, match="256 scans"):
        pictures.open_picture(whole[:-2] + scan * 300 + whole[-2:])


def test_a_tiff_of_numbers_that_are_none_is_damaged():
    image = Image.fromarray(np.full((32, 32), np.nan, np.float32))
    with pytest.raises(PhotoError) as caught:
        open_photo(encoded(image, "TIFF"), **LIMITS)
    assert caught.value.reason == "corrupt"


def test_a_large_jpeg_may_have_fewer_scans():
    data = with_scans(Image.new("L", (8000, 8000), 100), 70)
    with pytest.raises(DamagedPictureError, match="more than 67 scans"):
        pictures.open_picture(data)


def test_marks_of_scans_in_a_film_or_thumbnail_are_none():
    film = b"\xff\xda" * 1000
    comment = b"\xff\xfe" + struct.pack(">H", 2 + len(film)) + film
    whole = encoded(smooth(), "JPEG", progressive=True)
    assert pictures.read_picture(whole[:2] + comment + whole[2:] + film).size == smooth().size


def giant_tile(side: int, compression: int) -> bytes:
    """A TIFF of 100 x 100 pixels in one tile of ``side``."""
    values = [(256, 100), (257, 100), (258, 8), (259, compression), (262, 1), (277, 1)]
    values += [(322, side), (323, side), (324, 8), (325, 40)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values)
    head = b"II*\0" + struct.pack("<I", 48) + zlib.compress(bytes(1000), 9).ljust(40, b"\0")
    return head + struct.pack("<H", len(values)) + entries + bytes(4)


@pytest.mark.parametrize("compression", [1, 5, 8])
def test_a_tile_far_larger_than_its_tiff_is_refused_undecoded(compression):
    with pytest.raises(DamagedPictureError, match="tiles of 40960 x 40960") as caught:
        pictures.open_picture(giant_tile(40960, compression))
    assert caught.value.too_large
    assert pictures.open_picture(giant_tile(1024, compression)).size == (100, 100)


@pytest.mark.parametrize("data", [b"BM" + bytes(12) + struct.pack("<I", 40), b"P6\n", b"II*\0"])
def test_what_pillow_does_not_know_is_said_without_an_address(data):
    with pytest.raises(DamagedPictureError) as caught:
        pictures.open_picture(data + b"\xff" * 60)
    assert "0x" not in str(caught.value) and "BytesIO" not in str(caught.value)


# --- HEIC ------------------------------------------------------------------------------------

HEIC = struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic" + bytes(100)


def test_heic_names_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    with pytest.raises(MissingPackageError, match="pip install pillow-heif"):
        pictures.open_picture(HEIC)
    with pytest.raises(PhotoError) as caught:
        open_photo(HEIC, **LIMITS)
    assert caught.value.reason == "needs_package" and "pillow-heif" in caught.value.detail
    assert sys.executable not in caught.value.detail  # it goes into reports
    assert "HEIF" not in pictures.readable_formats()


def test_heic_is_read_where_its_package_is(monkeypatch):
    """The package's part is played by a plugin that takes the file's last bytes for a PNG."""

    class Plugin(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self) -> None:
            self.fp.seek(0)
            with Image.open(io.BytesIO(self.fp.read()[len(HEIC) :])) as inner:
                self.kept = inner.convert("RGB")
            self._size, self._mode, self.tile = self.kept.size, "RGB", []

        def load(self):
            self.im = self.kept.im
            return self.im.pixel_access(False)

    def register() -> None:
        Image.register_open("HEIF", Plugin, lambda prefix: prefix[4:8] == b"ftyp")

    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    monkeypatch.setattr(Image, "OPEN", {k: v for k, v in Image.OPEN.items() if k != "HEIF"})
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    found = open_photo(HEIC + encoded(smooth(), "PNG"), **LIMITS)
    assert (found.picture == np.asarray(smooth())).all()
    assert (found.extension, found.keep_bytes) == ("jpg", False)
    assert "HEIF" in pictures.readable_formats()


def test_avif_and_heic_are_told_apart_by_all_their_brands():
    def box(*brands: bytes) -> bytes:
        return struct.pack(">I", 12 + 4 * len(brands)) + b"ftyp" + brands[0] + bytes(4) + b"".join(
            brands[1:]
        )  # fmt: skip

    assert pictures.picture_format(box(b"mif1", b"avif", b"miaf")) == "AVIF"
    assert pictures.picture_format(box(b"mif1", b"heic")) == "HEIF"
    assert pictures.picture_format(box(b"isom", b"mp42")) is None  # a film


# --- text and orientation --------------------------------------------------------------------


def with_text(texts: dict[str, str], packed: bool = False, international: bool = False) -> bytes:
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        (info.add_itxt if international else info.add_text)(key, text, zip=packed)
    return encoded(smooth(), "PNG", pnginfo=info)


@pytest.mark.parametrize("international", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_png_with_a_large_workflow_is_a_photo(packed, international):
    size = 3 * 2**20 if packed else 70 * 2**20  # above Pillow's limits for one and for all texts
    data = with_text({"workflow": "x" * size}, packed, international)
    found = open_photo(data, **LIMITS)
    assert found.keep_bytes and (found.picture == np.asarray(smooth())).all()
    assert (np.asarray(decode_photo(data)) == found.picture).all()


def test_a_giant_colour_profile_does_not_cost_the_photo():
    data = encoded(smooth(), "PNG", icc_profile=bytes(3 * 2**20))
    assert (open_photo(data, **LIMITS).picture == np.asarray(smooth())).all()


def exif_text(turn: int) -> str:
    exif = Image.Exif()
    exif[0x0112] = turn
    raw = exif.tobytes()
    return f"\nexif\n{len(raw):8}\n{raw.hex()}\n"


def test_orientation_in_the_text_of_a_png_is_kept():
    turned = with_text({"Raw profile type exif": exif_text(6), "workflow": "y" * 2**20}, True)
    assert open_photo(turned, **LIMITS).picture.shape == (64, 48, 3)
    xmp = with_text({"XML:com.adobe.xmp": '<x tiff:Orientation="8"/>'}, True, True)
    assert open_photo(xmp, **LIMITS).picture.shape == (64, 48, 3)


def test_orientation_that_is_a_bomb_or_damaged_costs_only_itself():
    bomb = with_text({"Raw profile type exif": "0" * (5 * 2**20)}, packed=True)
    assert len(bomb) < 40_000 and open_photo(bomb, **LIMITS).picture.shape == (48, 64, 3)
    chunk = b"zTXtRaw profile type exif\0\0no deflate stream"
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    plain = encoded(smooth(), "PNG")
    assert open_photo(plain[:33] + chunk + plain[33:], **LIMITS).picture.shape == (48, 64, 3)
    broken = encoded(smooth(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 9)
    assert open_photo(broken, **LIMITS).picture.shape == (48, 64, 3)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_every_orientation_is_turned_and_the_size_agrees(kind, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    upright = smooth()
    back = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270, 5: 5, 7: 6, 2: 0, 4: 1,
            3: Image.Transpose.ROTATE_180}  # fmt: skip
    stored = upright.transpose(Image.Transpose(back[turn])) if turn in back else upright
    options = {"quality": 98, "subsampling": 0} if kind == "JPEG" else {}
    found = open_photo(encoded(stored, kind, exif=exif, **options), **LIMITS)
    assert found.stored_size == (64, 48) and found.picture.shape == (48, 64, 3)
    assert np.abs(found.picture.astype(float) - np.asarray(upright, float)).mean() < 3
