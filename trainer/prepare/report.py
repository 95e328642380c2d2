"""``report.html``: what was found, who is who, what was left out and why, as a page to look at."""

from __future__ import annotations

import base64
import html
import io
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from infinite_id_core.files.atomic import replacing
from infinite_id_core.packages import require

from ..config import Data
from ..data_index import Filters
from ..errors import disk_errors
from ..histograms import bucket_counts, distributions, people_of_splits, spread
from ..index_file import DatasetInfo
from .group import Grouped
from .parts import NOT_PHOTOS, Blob
from .photo import PhotoError, open_photo
from .reading import read_blob

PEOPLE, PHOTOS_EACH, PER_REASON, PAIRS, SINGLES = 24, 8, 24, 20, 200
_THUMB = 150  # pixels
_DEFAULTS = Data(folder="-")
_COLUMNS = ("name", "path", "place", "length", "width", "height", "box", "landmarks", "identity",
            "similarity", "dropped", "detail", "face_size", "blur", "yaw")  # fmt: skip

REASONS = {
    "other_face": "A face that is nobody's who has photos here, or a second one of its person.",
    "no_face": "The detector found no face.",
    "duplicate": "The same file is there already.",
    "near_duplicate": "Nearly the same picture of the same person; the best one stays.",
    "outlier": "Unlike the other photos of its person: somebody else, or a wrong detection.",
    "too_few": "Its person has too few usable photos; reference and target are two photos.",
    "no_person": "It belongs to nobody: outside the folders, or without a name in its record.",
    "unreadable": "The system refused to read it.",
    "empty": "The file has no bytes.",
    "not_an_image": "No picture of a format that is read.",
    "needs_package": "A format that needs a package which is not installed here.",
    "truncated": "The file ends before the picture does.",
    "corrupt": "The file is damaged.",
    "too_large": "More pixels or bytes than allowed; it was not decoded.",
    "too_small": "Too few pixels to hold a face.",
    "shard_cut": "The shard is cut or damaged; what was whole was read.",
    "not_a_shard": "Not a plain tar.",
    "no_photos": "A shard without a photo.",
    "scattered": "A caption or record that stands apart from its photo in a shard.",
    "bad_sidecar": "A caption or record that cannot be read; its photo was used without it, and "
    "without a licence if that was in it.",
    "link": "A link that is not followed: to nowhere, in a circle, out of a tar, to something that "
    "is read already, or no photo.",
    "hidden": "Hidden, or made by the system beside the files (._*, .DS_Store, Thumbs.db).",
    "other_file": "No photo, and no caption or record of one.",
}


def write_report(path: Path, root: Path, grouped: Grouped, info: DatasetInfo) -> None:
    """Write the page, pictures inside it. ``root``: the input, for thumbnails."""
    kept, dropped = grouped.kept, grouped.dropped
    body = [
        _head(kept, dropped, info),
        _filters(kept),
        _spread(kept),
        _histograms(kept),
        _people(kept, root),
        _alike(grouped.alike),
        _dropped(dropped, root),
    ]
    page = _PAGE.replace("{body}", "\n".join(part for part in body if part))
    with disk_errors(path), replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def photos_with_more_faces(kept: pa.Table, options: Mapping[str, Any]) -> int:
    """Kept photos with faces that were not used, because one of each was wanted."""
    if options.get("faces") == "all":
        return 0
    return int((kept["faces"].to_numpy() > 1).sum())


# --- parts of the page -----------------------------------------------------------------------


def _head(kept: pa.Table, dropped: pa.Table, info: DatasetInfo) -> str:
    names = set(kept["identity"].to_pylist())
    splits = zip(kept["identity"].to_pylist(), kept["split"].to_pylist(), strict=True)
    held = {name for name, split in splits if split == "held_out"}
    more = photos_with_more_faces(kept, info.options)
    told = (
        f"<p>{more:,} of the kept photos show more than one face; one face of each was used "
        "(the largest; in a person's folder the one most like the person). <code>--faces all"
        "</code> uses each for its own person.</p>"
        if more
        else ""
    )
    others = sum(reason in NOT_PHOTOS for reason in dropped["dropped"].to_pylist())
    figures = [
        (len(kept) + len(dropped) - others, "photos read"),
        (len(kept), "kept"),
        (len(names), "people"),
        (len(held), "of them held out"),
        (len(dropped) - others, "left out"),
        (others, "other files, not used"),
    ]
    tiles = "".join(f"<div class=tile><b>{n:,}</b>{label}</div>" for n, label in figures)
    facts = "".join(
        f"<tr><td>{_text(name)}<td class=code>{_text(value)}"
        for name, value in [
            ("recogniser", info.recogniser),
            ("fingerprint", info.fingerprint[:16]),
            *((name, value) for name, value in info.options.items()),
        ]
        if value not in ("", None)
    )
    return (
        f"<h1>Prepared photos</h1><div class=tiles>{tiles}</div>{told}"
        f"<details><summary>Options of this run</summary><table>{facts}</table></details>"
    )


def _filters(kept: pa.Table) -> str:
    if not len(kept):
        return ""
    filters = Filters()
    rows = "".join(
        f"<tr><td>{name}<td class=number>{_value(getattr(filters, name))}"
        f"<td class=number>{int((~mask).sum()):,}"
        for name, mask in filters.masks(kept).items()
    )
    left = int(filters.mask(kept).sum())
    return (
        "<h2>Filters at read time</h2><p>Nothing of this is decided yet: the trainer's "
        f"<code>[filters]</code> act when it reads. With the defaults {left:,} of {len(kept):,} "
        "photos would be used.</p><table><tr><th>filter<th>default<th>photos it would remove"
        f"{rows}</table>"
    )


def _histograms(kept: pa.Table) -> str:
    if not len(kept):
        return ""
    figures = require("matplotlib.figure", "for the report page", "matplotlib")
    filters = Filters()
    found = distributions(kept)
    photo, face = "short side of the photo, px", "short side of the face, px"
    panels: list[tuple[str, Any, float | None]] = [
        (photo, found[photo], filters.min_short_side),
        (face, found[face], filters.min_face_size),
        ("cosine to the person's centroid", kept["similarity"].to_numpy(), filters.min_similarity),
        ("people by their photos", found["photos of a person"], None),
        ("faces in the photo", found["faces in a photo"], None),
        ("detector's confidence", kept["det_score"].to_numpy(), filters.min_det_score),
        ("sharpness (variance of the Laplacian)", kept["blur"].to_numpy(), None),
        ("yaw, degrees", kept["yaw"].to_numpy(), None),
        ("pitch, degrees", kept["pitch"].to_numpy(), None),
    ]
    figure = figures.Figure(figsize=(16, 5))  # not pyplot's: no display, no global state
    axes = figure.subplots(2, 5, gridspec_kw={"hspace": 0.35, "wspace": 0.2}).ravel()
    _bucket_bars(axes[-1], kept)
    for axis, (title, values, limit) in zip(axes[:-1], panels, strict=True):
        low, high = float(np.min(values)), float(np.max(values))
        reach = (low, high) if limit is None else (min(low, limit), max(high, limit))
        axis.hist(values, bins=min(40, max(8, len(values) // 4)), range=reach, color="#4c78a8")
        if limit:
            axis.axvline(limit, color="#e45756", linestyle="--", label="default filter")
            axis.legend(fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.subplots_adjust(left=0.03, right=0.99, top=0.93, bottom=0.06)
    figure.savefig(buffer, format="png", dpi=90)
    return f"<h2>Scores of the kept photos</h2>{_image(buffer.getvalue(), 'png', 'histograms')}"


def _bucket_bars(axis: Any, kept: pa.Table) -> None:
    counts = bucket_counts(kept, _DEFAULTS)
    names = [f"{width}x{height}" for height, width in counts]
    axis.bar(names, list(counts.values()), color="#4c78a8")
    axis.tick_params(axis="x", labelrotation=90, labelsize=7)
    axis.set_title("buckets, px (defaults of [data])", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def _spread(kept: pa.Table) -> str:
    if not len(kept):
        return ""
    splits = people_of_splits(kept)
    rows = "".join(
        f"<tr><td>{_text(name)}" + "".join(f"<td class=number>{value:,.0f}" for value in values)
        for name, values in spread(kept).items()
    )
    sizes = "".join(
        f"<tr><td>{width} x {height}<td class=number>{n:,}"
        for (height, width), n in bucket_counts(kept, _DEFAULTS).items()
    )
    return (
        f"<h2>People and photos</h2><p>{splits['train']:,} people to train on, "
        f"{splits['held_out']:,} held out.</p>"
        "<table><tr><th><th>least<th>a quarter has less<th>half<th>three quarters<th>most"
        f"{rows}</table><details><summary>Buckets</summary><p>The sizes these photos are trained "
        "at with the defaults of <code>[data]</code>; <code>train --dry-run</code> counts them "
        f"for yours.</p><table><tr><th>px<th>photos{sizes}</table></details>"
    )


def _people(kept: pa.Table, root: Path) -> str:
    if not len(kept):
        return ""
    rows_of: dict[str, list[int]] = defaultdict(list)
    for number, name in enumerate(kept["identity"].to_pylist()):
        rows_of[name].append(number)
    parts = []
    for name in sorted(rows_of)[:PEOPLE]:
        numbers = rows_of[name]
        rows = kept.select(_COLUMNS).take(pa.array(numbers[:PHOTOS_EACH])).to_pylist()
        split = kept["split"][numbers[0]].as_py()
        held = " <span class=held>held out</span>" if split == "held_out" else ""
        cards = "".join(_card(root, row, f"cos {row['similarity']:.2f}") for row in rows)
        parts.append(f"<h3>{_text(name)} · {len(numbers)} photos{held}</h3>{_cards(cards)}")
    more = f"<p>{len(rows_of) - PEOPLE:,} more people.</p>" if len(rows_of) > PEOPLE else ""
    return "<h2>People</h2>" + "".join(parts) + more


def _alike(pairs: Sequence[tuple[str, str, float]]) -> str:
    if not pairs:
        return ""
    rows = "".join(
        f"<tr><td>{_text(a)}<td>{_text(b)}<td class=number>{cosine:.2f}"
        for a, b, cosine in pairs[:PAIRS]
    )
    return (
        f"<h2>Possibly the same person</h2><p>Pairs of folders whose centroids are as alike as "
        f"photos of one person: {len(pairs):,}. Merge the folders if they are.</p>"
        f"<table><tr><th>folder<th>folder<th>cosine{rows}</table>"
    )


def _dropped(dropped: pa.Table, root: Path) -> str:
    if not len(dropped):
        return "<h2>Left out</h2><p>Nothing.</p>"
    reasons = np.array(dropped["dropped"].to_pylist())
    parts = []
    for reason in sorted(set(reasons), key=lambda r: (-int((reasons == r).sum()), r)):
        numbers = np.nonzero(reasons == reason)[0]
        rows = dropped.select(_COLUMNS).take(pa.array(numbers[:PER_REASON])).to_pylist()
        cards = "".join(_card(root, row, row["detail"]) for row in rows)
        names = dropped["name"].take(pa.array(numbers[:SINGLES])).to_pylist()
        more = f"<li>{len(numbers) - SINGLES:,} more in index.parquet" if (
            len(numbers) > SINGLES
        ) else ""  # fmt: skip
        listed = "".join(f"<li>{_text(name)}" for name in names) + more
        parts.append(
            f"<h3>{_text(reason)} · {len(numbers):,}</h3><p>{REASONS.get(reason, '')}</p>"
            f"{_cards(cards)}<details><summary>List</summary><ul>{listed}</ul></details>"
        )
    return "<h2>Left out</h2>" + "".join(parts)


# --- pictures --------------------------------------------------------------------------------


def _card(root: Path, row: dict[str, Any], note: str) -> str:
    thumb = _thumb(root, row)
    picture = thumb or "<div class=blank>no picture</div>"
    name = _text(row["name"] or "")
    short = "/".join(name.split("/")[-2:])
    return (
        f"<figure>{picture}<figcaption title='{name}'>{short}<br>"
        f"<i>{_text(note or '')}</i></figcaption></figure>"
    )


def _thumb(root: Path, row: dict[str, Any]) -> str:
    """The photo, small, its face marked; empty where it cannot be read."""
    if not row["path"] or not row["width"]:
        return ""
    blob = Blob(path=os.fsdecode(row["path"]), offset=row["place"], size=row["length"])
    try:
        data = read_blob(root, blob, 2**31)
        photo = open_photo(data, max_side=_THUMB, max_pixels=2**31)
    except PhotoError:
        return ""
    image = Image.fromarray(photo.picture)
    image.thumbnail((_THUMB, _THUMB))
    if row["box"]:
        _mark(image, row, image.width / row["width"])
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return _image(buffer.getvalue(), "jpeg", "")


def _mark(image: Image.Image, row: dict[str, Any], scale: float) -> None:
    draw = ImageDraw.Draw(image)
    draw.rectangle([value * scale for value in row["box"]], outline=(64, 200, 96), width=2)
    points = [value * scale for value in row["landmarks"]]
    for x, y in zip(points[0::2], points[1::2], strict=True):
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=(235, 90, 70))


def _image(data: bytes, kind: str, alt: str) -> str:
    return f"<img alt='{alt}' src='data:image/{kind};base64,{base64.b64encode(data).decode()}'>"


def _cards(cards: str) -> str:
    return f"<div class=cards>{cards}</div>"


def _value(value: object) -> str:
    return "any" if value == () else _text(value)


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


_PAGE = """<!doctype html>
<html lang=en><meta charset=utf-8><title>Prepared photos</title>
<meta name=viewport content="width=device-width">
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 84rem; padding: 0 1rem }
h1 { margin: 0 0 1rem } h2 { margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line) }
h3 { margin: 1.2rem 0 .3rem; font-size: 1rem } p { margin: .3rem 0 .7rem }
.tiles { display: flex; gap: .8rem; flex-wrap: wrap; margin-bottom: 1rem }
.tile { background: var(--soft); border-radius: .5rem; padding: .6rem 1rem }
.tile b { display: block; font-size: 1.6rem }
.cards { display: flex; gap: .6rem; flex-wrap: wrap }
figure { margin: 0; width: 150px; font-size: 12px; overflow-wrap: anywhere }
figure img { max-width: 150px; border-radius: .3rem; display: block }
.blank { width: 150px; height: 100px; background: var(--soft); border-radius: .3rem;
  display: grid; place-items: center; opacity: .7 }
.held { background: #4c78a8; color: #fff; border-radius: .3rem; padding: 0 .4rem; font-size: 12px }
table { border-collapse: collapse } td, th { padding: .15rem .9rem .15rem 0; text-align: left;
  border-bottom: 1px solid var(--line) } .number { text-align: right }
.code { font-family: monospace }
img { max-width: 100% }
</style>
{body}
</html>
"""
