"""Small files that take minutes or gigabytes to decode: told before any pixel is decoded."""

from __future__ import annotations

import re

from PIL import Image

from ..errors import DamagedPictureError

MAX_SCANS = 256  # encoders write about ten
_SCANNED = 2**32  # pixels times scans: seconds
_TILE = 2**22  # pixels of a tile, whatever the size of its picture

_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]", re.DOTALL)  # but for those in a scan
_FIRST, _SCAN, _END = 0xC0, 0xDA, 0xD9
_TILE_WIDTH, _TILE_HEIGHT = 322, 323  # tags


def check_cost(image: Image.Image, data: bytes) -> None:
    """``data``: the bytes of the file that ``image`` was opened from. Raises
    ``DamagedPictureError``."""
    pixels = image.width * image.height
    if image.format in ("JPEG", "MPO"):
        most = min(MAX_SCANS, _SCANNED // max(1, pixels))
        if _scans(data, most) > most:
            raise DamagedPictureError(
                f"a JPEG of {image.width} x {image.height} pixels in more than {most} scans; save "
                "it again as a plain JPEG",
                too_large=True,
            )
    elif image.format == "TIFF":
        tags = getattr(image, "tag_v2", {})
        width, height = (tags.get(tag, 0) for tag in (_TILE_WIDTH, _TILE_HEIGHT))
        if width * height > max(_TILE, 2 * pixels):
            raise DamagedPictureError(
                f"a TIFF of {image.width} x {image.height} pixels in tiles of {width} x {height}",
                too_large=True,
            )


def _scans(jpeg: bytes, most: int) -> int:
    """The scans of the first picture of a file, counted to one more than ``most``.

    What stands in a segment or after the picture (thumbnails, a film) does not count.
    """
    at, scans = 2, 0
    while scans <= most:
        found = _MARKER.search(jpeg, at)
        if found is None or jpeg[found.end() - 1] == _END:
            break
        scans += jpeg[found.end() - 1] == _SCAN
        length = int.from_bytes(jpeg[found.end() : found.end() + 2], "big")
        # A decoder steps over marks that mean nothing, and finds the next scan behind them.
        is_segment = jpeg[found.end() - 1] >= _FIRST
        at = found.end() + (max(2, length) if is_segment else 0)
    return scans
