"""Who is who, and what is left out: the one stage that sees all photos at once.

Order: same files, then people (by label, or by face), then photos unlike their person, then
near-duplicates, then people with too few photos. Everything is a pure function of its arrays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import pyarrow as pa

from .cluster import nearest
from .columns import (
    Bools,
    Columns,
    Floats,
    Ints,
    Reasons,
    Texts,
    centroid,
    columns_of,
    rows_of_people,
)
from .leave_out import drop_near_duplicates, drop_same_files, drop_singles, purify
from .naming import choose_faces, name_groups, one_face_each, share_out
from .options import PrepareOptions

ALWAYS_HELD_OUT = 10  # people; from here on at least one of them is held out
GROUP_VERSION = 2  # counts up when this stage, alone, gives another result for the same input


@dataclass(frozen=True, kw_only=True)
class Grouped:
    """The result: kept photos in shard order, and the others with their reasons."""

    kept: pa.Table
    """Rows of ``FACES`` and ``EMBEDDINGS`` with ``key``, ``split``, ``similarity``, ``group``."""
    dropped: pa.Table
    shards: tuple[tuple[int, int], ...]
    """Row ranges of ``kept``, one per shard; no person is in two."""
    alike: tuple[tuple[str, str, float], ...]
    """Labelled people whose centroids are so alike that they may be one."""


def group_photos(table: pa.Table, labelled: bool, options: PrepareOptions) -> Grouped:
    """Decide for every row of ``table`` (``FACES`` and ``EMBEDDINGS``, parts in order)."""
    every = options.faces == "all"
    columns = columns_of(table, every=every)
    reason = Reasons(table)
    drop_same_files(columns, reason)
    if labelled:
        reason.drop(reason.open & (columns.label == ""), "no_person", "no name in its record")
        names = columns.label
        choose_faces(columns, reason)
        if every:
            names = share_out(columns, reason, options.link_cosine)
    else:
        if not every:
            others = reason.open & (columns.face > 0)
            reason.drop(others, "other_face", "not the largest of its photo")
        names = name_groups(columns, reason.open, options)
    if every:
        one_face_each(columns, names, reason)
    similarity = purify(columns, names, reason, options.purify_cosine)
    group = drop_near_duplicates(columns, names, reason, options)
    drop_singles(names, reason, options.min_photos)
    return _result(table, columns, names, similarity, group, reason, labelled, options)


def splits_of(people: Collection[str], held_out: float, seed: int) -> dict[str, str]:
    """``held_out`` or ``train`` for everybody, by a hash of the name.

    Adding people moves nobody, but for one: from ``ALWAYS_HELD_OUT`` people on, the one of the
    smallest hash is held out in any case, unless ``held_out`` is 0.
    """
    hashes = {name: _hash_of(name, seed) for name in people}
    edge = held_out * 2**64
    if held_out and len(hashes) >= ALWAYS_HELD_OUT:
        edge = max(edge, min(hashes.values()) + 1)
    return {name: "held_out" if value < edge else "train" for name, value in hashes.items()}


def _hash_of(identity: str, seed: int) -> int:
    digest = hashlib.sha256(f"{seed}:{identity}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def _result(
    table: pa.Table,
    columns: Columns,
    names: Texts,
    similarity: Floats,
    group: Texts,
    reason: Reasons,
    labelled: bool,
    options: PrepareOptions,
) -> Grouped:
    kept = np.nonzero(reason.open)[0]
    keys = columns.key
    splits = dict.fromkeys(names, "train")  # people without a photo left are in no split
    splits |= splits_of(set(names[kept]), options.held_out, options.seed)
    new = {
        "identity": names,
        "key": keys,
        "split": np.array([splits[name] for name in names], dtype=object),
        "similarity": similarity,
        "group": group,
        "dropped": reason.dropped,
        "detail": reason.detail,
    }
    for name, values in new.items():
        # A photo that was compared with nobody has no similarity.
        array = pa.array(values, from_pandas=True)
        at = table.schema.get_field_index(name)
        table = table.append_column(name, array) if at < 0 else table.set_column(at, name, array)
    dropped = np.nonzero(~reason.open)[0]
    if options.faces != "all":
        dropped = _dropped_photos(columns, reason)
    order = kept[_shard_order(names[kept], keys[kept])]
    sizes = table["length"].fill_null(0).to_numpy()[order]
    return Grouped(
        kept=table.take(pa.array(order)),
        dropped=table.take(pa.array(dropped)),
        shards=tuple(_cut_shards(names[order], sizes, options.shard_bytes)),
        alike=_alike(columns, names, reason.open, options.link_cosine) if labelled else (),
    )


def _dropped_photos(columns: Columns, reason: Reasons) -> Ints:
    """One row for each photo of which no face is kept: of the face that was considered."""
    kept = np.unique(columns.photo[reason.open])
    rows = np.nonzero(~np.isin(columns.photo, kept))[0]
    considered = reason.dropped[rows] != "other_face"
    order = rows[np.lexsort((columns.face[rows], ~considered, columns.photo[rows]))]
    return order[np.r_[True, np.diff(columns.photo[order]) != 0]] if len(order) else order


def _shard_order(names: Texts, keys: Texts) -> Ints:
    """People in the order of a hash of their names, so that every shard is a fair sample."""
    hashes = np.array([hashlib.sha256(str(name).encode()).hexdigest() for name in names], str)
    return cast(Ints, np.lexsort((keys.astype(str), hashes)) if len(names) else np.zeros(0, int))


def _cut_shards(names: Texts, sizes: Ints, limit: int) -> Iterator[tuple[int, int]]:
    start, total = 0, 0
    for row in range(len(names)):
        new_person = row > 0 and names[row] != names[row - 1]
        if new_person and total >= limit:
            yield start, row
            start, total = row, 0
        total += int(sizes[row])
    if len(names):
        yield start, len(names)


def _alike(
    columns: Columns, names: Texts, kept: Bools, cosine: float
) -> tuple[tuple[str, str, float], ...]:
    people = [
        (str(names[m[0]]), centroid(columns.embedding[m])) for m in rows_of_people(names, kept)
    ]
    if len(people) < 2:
        return ()
    centroids = np.stack([c for _, c in people]).astype(np.float32)
    values, other = nearest(centroids, min(len(people), 6))
    found = {
        (people[a][0], people[b][0], round(float(v), 3))
        for a, (vs, bs) in enumerate(zip(values, other, strict=True))
        for v, b in zip(vs, bs, strict=True)
        if a < b and v >= cosine
    }
    return tuple(sorted(found, key=lambda pair: (-pair[2], pair)))
