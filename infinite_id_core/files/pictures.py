"""Opening a picture's file: the one place, and the list of formats that are read.

Pillow chooses the decoder by what a file holds, and one of its decoders (EPS) starts another
program, whatever the file is called. So the format is told here from the first bytes, and only
that format's decoder is called. Text in PNG files (a ComfyUI workflow may be larger than Pillow
allows) is left out before decoding; orientation is kept.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageFile, JpegImagePlugin, UnidentifiedImageError

from ..errors import DamagedPictureError, UnknownPictureError
from ..packages import require
from .picture_costs import check_cost

HEAD = 64  # bytes that tell a format
MAX_PIXELS = 2**28

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
    (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
)
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_AVIF_BRANDS = {b"avif", b"avis"}
_BMP_HEADERS = {12, 16, 40, 52, 56, 64, 108, 124}

SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib",
    ".tif", ".tiff", ".gif", ".avif", ".avifs", ".heic", ".heif", ".hif", ".jp2", ".j2k", ".j2c",
    ".jpc", ".jpf", ".jpx", ".tga", ".ppm", ".pgm", ".pbm", ".pnm",
}  # fmt: skip
"""Names of pictures that may be read; the contents decide."""


def picture_format(data: bytes) -> str | None:
    """Pillow's name of the format of a file that starts with ``data``; None: none that is read.

    ``HEAD`` bytes are enough, but for TGA, which has no mark: its header must agree with itself.
    """
    for magic, name in _MAGIC:
        if data.startswith(magic):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        return _iso_format(data)
    if data[:2] == b"BM" and len(data) >= 18:
        return "BMP" if struct.unpack_from("<I", data, 14)[0] in _BMP_HEADERS else None
    if data[:1] == b"P" and data[1:2] in b"123456" and data[2:3] in (b" ", b"\n", b"\r", b"\t"):
        return "PPM"
    return "TGA" if _is_tga(data) else None


def _iso_format(data: bytes) -> str | None:
    """AVIF or HEIF, by the brands of the first box."""
    size = min(struct.unpack_from(">I", data)[0], len(data))
    brands = {data[8:12], *(data[at : at + 4] for at in range(16, size - 3, 4))}
    if brands & _AVIF_BRANDS:
        return "AVIF"
    return "HEIF" if brands & _HEIF_BRANDS else None


def _is_tga(data: bytes) -> bool:
    if len(data) < 18:
        return False
    has_map, kind = data[1:3]
    map_length, map_depth = struct.unpack_from("<HB", data, 5)
    width, height, depth, flags = struct.unpack_from("<HHBB", data, 12)
    depths = {1: (8,), 9: (8,), 2: (16, 24, 32), 10: (16, 24, 32), 3: (8, 16), 11: (8, 16)}
    mapped = map_length > 0 and map_depth in (15, 16, 24, 32)
    return (
        depth in depths.get(kind, ())
        and has_map == (kind in (1, 9))
        and (mapped if has_map else map_length == 0 and map_depth == 0)
        and width > 0
        and height > 0
        and flags & 0xC0 == 0
    )


def readable_formats() -> tuple[str, ...]:
    """The formats that can be read here, by Pillow's names, in alphabetical order."""
    names = {name for _, name in _MAGIC} | {"WEBP", "BMP", "PPM", "TGA", "AVIF", "HEIF"}
    return tuple(sorted(name for name in names if _has_decoder(name)))


def _has_decoder(name: str) -> bool:
    if name == "HEIF":
        try:
            _register_heif()
        except ImportError:
            return False
    if name not in Image.OPEN:
        Image.init()
    return name in Image.OPEN


def _register_heif() -> None:
    reader = require("pillow_heif", "to read HEIC photos (or save them as JPEG)", "pillow-heif")
    if "HEIF" not in Image.OPEN:
        reader.register_heif_opener()


def open_picture(data: bytes) -> ImageFile.ImageFile:
    """The picture of a file's bytes, before its pixels are decoded (Pillow's lazy object).

    A JPEG is opened whatever its size; check ``size`` before its pixels are asked for. Raises
    ``UnknownPictureError`` for a format that is not read, ``MissingPackageError`` for HEIC where
    its package is absent, ``DamagedPictureError``.
    """
    name = picture_format(data)
    if name is None:
        raise UnknownPictureError(
            f"no picture of a known format (it starts with {data[:8]!r}). Read are JPEG, PNG, "
            "WebP, TIFF, BMP, GIF, AVIF, JPEG 2000, TGA, PPM and, with the package pillow-heif, "
            "HEIC; save it as one of them."
        )
    if name == "HEIF":
        _register_heif()
    if not _has_decoder(name):
        raise UnknownPictureError(
            f"a picture of the format {name}, which this Pillow cannot read. Update Pillow (pip "
            "install -U pillow), or save the picture as JPEG or PNG."
        )
    try:
        image = _opened(name, data)
        check_cost(image, data)
        return image
    except DamagedPictureError:
        raise
    except Image.DecompressionBombError as error:
        raise DamagedPictureError(str(error).partition(",")[0], too_large=True) from error
    except Exception as error:  # decoders raise anything on damaged files
        raise damaged(error) from error


def _opened(name: str, data: bytes) -> ImageFile.ImageFile:
    if name == "JPEG":
        # Image.open refuses very large pictures; this one can be decoded at an eighth.
        return JpegImagePlugin.JpegImageFile(io.BytesIO(data))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Image.open(io.BytesIO(_without_text(data)), formats=(name,))


def read_picture(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A file's bytes as an upright picture in its own mode, decoded.

    Raises as ``open_picture``; ``DamagedPictureError`` also for more than ``max_pixels``.
    """
    image = open_picture(data)
    if image.width * image.height > max_pixels:
        size = f"{image.width} x {image.height} pixels; at most {max_pixels} are decoded"
        raise DamagedPictureError(size, too_large=True)
    return decoded(image)


def decoded(image: Image.Image) -> Image.Image:
    """The picture upright, its pixels in memory. Raises ``DamagedPictureError``."""
    turn = _TURNS.get(orientation(image))
    try:
        image.load()
        return image if turn is None else image.transpose(turn)
    except Exception as error:  # decoders raise anything on damaged files
        raise damaged(error) from error


def orientation(image: Image.Image) -> int:
    """How the pixels as decoded are to be turned: EXIF's 1 to 8; 1 where EXIF is damaged."""
    if image.format == "TIFF":  # Pillow turns it while it decodes
        return 1
    try:
        found = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:
        return 1
    return int(found) if isinstance(found, int) and 1 <= found <= 8 else 1


_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def damaged(error: Exception) -> DamagedPictureError:
    """What a decoder raised, by its name here."""
    # Pillow names the object in memory of a file that it does not know.
    text = "no picture, or its first bytes are damaged"
    if not isinstance(error, UnidentifiedImageError):
        text = str(error)
    cut = "truncated" in text.lower() or isinstance(error, EOFError)
    return DamagedPictureError(text or type(error).__name__, truncated=cut)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode as RGB: 16-bit grey is scaled, palettes resolved, alpha laid over white."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise DamagedPictureError("holds numbers that are none")
        top = 255.0 if values.max(initial=0.0) <= 255.0 else 65535.0
        image = Image.fromarray((values.clip(0, top) * (255.0 / top)).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        under = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(under, image)
    return image.convert("RGB")


# --- text in PNG files -----------------------------------------------------------------------

_TEXT = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # colour profiles are not applied anywhere here
_ORIENTATION = (b"Raw profile type exif", b"XML:com.adobe.xmp")
_TEXT_LIMIT = 2**19  # bytes, unpacked; Pillow's own limit is the double
_CHUNKS = 2**18  # of 8 kB, as encoders write them: 2 GB


def _without_text(data: bytes) -> bytes:
    """A PNG without its text, but for what may hold the orientation; other formats as they are."""
    if not data.startswith(b"\x89PNG"):
        return data
    dropped = [(start, end) for start, end in _png_chunks(data) if _is_needless(data, start, end)]
    if not dropped:
        return data
    starts = [0, *(end for _, end in dropped)]
    ends = [*(start for start, _ in dropped), len(data)]
    view = memoryview(data)
    return b"".join(view[a:b] for a, b in zip(starts, ends, strict=True))


def _png_chunks(data: bytes) -> Iterator[tuple[int, int]]:
    """Start and end of every whole chunk; a damaged rest is left to the decoder."""
    at = 8
    for _ in range(_CHUNKS):
        if at + 12 > len(data):
            return
        end = at + 12 + int(struct.unpack_from(">I", data, at)[0])
        if end > len(data):
            return
        yield at, end
        at = end
    raise ValueError(f"more than {_CHUNKS} chunks")


def _is_needless(data: bytes, start: int, end: int) -> bool:
    kind = data[start + 4 : start + 8]
    if kind not in _TEXT:
        return False
    content = data[start + 8 : end - 4]
    key, _, rest = content.partition(b"\0")
    if kind == b"iCCP" or key not in _ORIENTATION or len(rest) > _TEXT_LIMIT:
        return True
    packed = kind == b"zTXt" or (kind == b"iTXt" and rest[:1] == b"\x01")
    if not packed:
        return False
    # In iTXt a language and a translated key stand before the text.
    text = rest[2:].split(b"\0", 2)[-1] if kind == b"iTXt" else rest[1:]
    try:
        return len(zlib.decompressobj().decompress(text, _TEXT_LIMIT + 1)) > _TEXT_LIMIT
    except zlib.error:
        return True
