"""Who is who, and what is left out: the one stage that sees all photos at once.

Order: same files, then people (by label, or by face), then photos unlike their person, then
near-duplicates, then people with too few photos. Everything is a pure function of its arrays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from infinite_id_core.packages import require

from .options import PrepareOptions

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Texts = NDArray[Any]

EXACT_LIMIT = 100_000  # faces; above, neighbours are searched in cells of a coarse quantiser
LINKAGE_LIMIT = 4_000  # faces of one group whose distances are all compared
ALWAYS_HELD_OUT = 10  # people; from here on at least one of them is held out
GROUP_VERSION = 2  # counts up when this stage, alone, gives another result for the same input
_KEY_DIGITS = 24


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


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns decisions are made from; one row per face."""

    photo: Ints
    """Number of the photo, over all parts."""
    face: Ints
    sha256: Texts
    key: Texts
    """Unique among what may be kept: of the photo, or where each face counts of the face."""
    label: Texts
    name: Texts
    """The photo's name for people."""
    embedding: Floats
    """Unit length, ``[rows, 512]``."""
    phash: Texts
    quality: Doubles
    """Pixels, bytes, sharpness ``[rows, 3]``: of near-duplicates the one with most stays."""


def group_photos(table: pa.Table, labelled: bool, options: PrepareOptions) -> Grouped:
    """Decide for every row of ``table`` (``FACES`` and ``EMBEDDINGS``, parts in order)."""
    every = options.faces == "all"
    columns = columns_of(table, every=every)
    reason = Reasons(table)
    _drop_same_files(columns, reason)
    if labelled:
        reason.drop(reason.open & (columns.label == ""), "no_person", "no name in its record")
        names = columns.label
        _choose_faces(columns, reason)
        if every:
            names = _share_out(columns, reason, options.link_cosine)
    else:
        if not every:
            others = reason.open & (columns.face > 0)
            reason.drop(others, "other_face", "not the largest of its photo")
        names = _name_groups(columns, reason.open, options)
    if every:
        _one_face_each(columns, names, reason)
    similarity = _purify(columns, names, reason, options.purify_cosine)
    group = _drop_near_duplicates(columns, names, reason, options)
    _drop_singles(names, reason, options.min_photos)
    return _result(table, columns, names, similarity, group, reason, labelled, options)


class Reasons:
    """Why each row is left out; a row keeps its first reason."""

    def __init__(self, table: pa.Table) -> None:
        self.dropped = _text(table, "dropped")
        self.detail = _text(table, "detail")

    @property
    def open(self) -> Bools:
        """Rows not left out so far."""
        return cast(Bools, self.dropped == "")

    def drop(self, rows: Bools, reason: str, detail: str | Sequence[str]) -> None:
        """Leave rows out; ``detail`` is one text or one per row of ``rows``."""
        self.dropped[rows] = reason
        self.detail[rows] = detail if isinstance(detail, str) else np.array(detail, object)


def columns_of(table: pa.Table, *, every: bool = False) -> Columns:
    """Columns for decisions from a table of faces; rows without a face have embedding 0.

    ``every``: each face of a photo may be kept.
    """
    column = table["embedding"].combine_chunks().fill_null(pa.scalar([0.0] * 512, _EMBEDDING))
    raw = column.flatten().to_numpy().reshape(len(table), -1)
    length = np.linalg.norm(raw, axis=1, keepdims=True)
    pixels = _number(table, "width") * _number(table, "height")
    face, sha256 = _number(table, "face").astype(np.int64), _text(table, "source_sha256")
    return Columns(
        photo=_number(table, "photo").astype(np.int64),
        face=face,
        sha256=sha256,
        key=_keys(sha256, face if every else np.zeros_like(face)),
        label=_text(table, "identity"),
        name=_text(table, "name"),
        embedding=(raw / np.maximum(length, 1e-12)).astype(np.float32),
        phash=_text(table, "phash"),
        quality=np.stack([pixels, _number(table, "length"), _number(table, "blur")], axis=1),
    )


_EMBEDDING = pa.list_(pa.float32(), 512)


def _text(table: pa.Table, name: str) -> Texts:
    values = table[name].fill_null("").to_numpy(zero_copy_only=False)
    return np.array(values, dtype=object)


def _number(table: pa.Table, name: str) -> Doubles:
    return cast(Doubles, table[name].fill_null(0).to_numpy().astype(np.float64))


# --- same files ------------------------------------------------------------------------------


def _drop_same_files(columns: Columns, reason: Reasons) -> None:
    """Keep the first photo of each SHA-256; the detail names a different label."""
    has_bytes = columns.sha256 != ""
    _, first, inverse = np.unique(columns.sha256, return_index=True, return_inverse=True)
    original = first[inverse]
    same = has_bytes & (columns.photo != columns.photo[original]) & reason.open
    reason.drop(same, "duplicate", [_same_as(columns, i, original[i]) for i in np.nonzero(same)[0]])


def _same_as(columns: Columns, row: np.intp, original: np.intp) -> str:
    theirs, ours = columns.label[original], columns.label[row]
    other = f", there of {theirs!r}" if theirs != ours else ""
    return f"the same file as {columns.name[original]}{other}"


def _keys(sha256: Texts, face: Ints) -> Texts:
    """The photo's hash; of its second face and later ones a hash of that and the number."""
    keys = [
        hashlib.sha256(f"{photo}:{number}".encode()).hexdigest() if number > 0 else str(photo)
        for photo, number in zip(sha256, face, strict=True)
    ]
    return np.array([key[:_KEY_DIGITS] for key in keys], dtype=object)


# --- people ----------------------------------------------------------------------------------


def _choose_faces(columns: Columns, reason: Reasons) -> None:
    """One face per labelled photo: the one most like the person's other largest faces."""
    for rows in _members(columns.label, reason.open):
        if not (columns.face[rows] > 0).any():
            continue
        largest = rows[columns.face[rows] == 0]
        cosine = columns.embedding[rows] @ _centroid(columns.embedding[largest])
        if len(largest) < 3:  # too few to tell whose centroid it is
            cosine = -columns.face[rows].astype(np.float32)
        order = np.lexsort((columns.face[rows], -cosine, columns.photo[rows]))
        photos = columns.photo[rows][order]
        others = np.r_[False, photos[1:] == photos[:-1]]
        mask = np.zeros(len(columns.photo), bool)
        mask[rows[order[others]]] = True
        reason.drop(mask, "other_face", "another face of this photo is the person's")


def _share_out(columns: Columns, reason: Reasons, cosine: float) -> Texts:
    """Names of all rows: the faces that are not their folder's person go to whom they look like.

    Only to people who have photos of their own, and never a second time to the photo's own.
    """
    names: Texts = columns.label.copy()
    others = np.nonzero(reason.dropped == "other_face")[0]
    people = [(columns.label[rows[0]], rows) for rows in _members(columns.label, reason.open)]
    if not len(others) or not people:
        return names
    centroids = np.stack([_centroid(columns.embedding[rows]) for _, rows in people])
    alike = columns.embedding[others] @ centroids.T
    best = alike.argmax(axis=1)
    owner = np.array([name for name, _ in people], dtype=object)[best]
    found = (alike[np.arange(len(others)), best] >= cosine) & (owner != columns.label[others])
    names[others[found]] = owner[found]
    reason.dropped[others[found]] = reason.detail[others[found]] = ""
    reason.detail[others[~found]] = "a face of nobody else who has photos here"
    return names


def _one_face_each(columns: Columns, names: Texts, reason: Reasons) -> None:
    """Nobody is twice in a photo: of faces with one name the one most like the person stays."""
    out = np.zeros(len(names), bool)
    for rows in _members(names, reason.open):
        cosine = columns.embedding[rows] @ _centroid(columns.embedding[rows])
        order = rows[np.lexsort((columns.face[rows], -cosine, columns.photo[rows]))]
        photos = columns.photo[order]
        out[order[np.r_[False, photos[1:] == photos[:-1]]]] = True
    reason.drop(out, "other_face", "another face of this photo is more like this person")


def _name_groups(columns: Columns, rows: Bools, options: PrepareOptions) -> Texts:
    """Group unlabelled faces; a group's name comes from its first file by SHA-256."""
    names = np.full(len(rows), "", dtype=object)
    numbers = np.nonzero(rows)[0]
    for members in group_faces(columns.embedding[numbers], options):
        own = numbers[members]
        name = "person-" + min(columns.key[own])[:12]
        names[own] = name
    return names


def group_faces(embedding: Floats, options: PrepareOptions) -> list[Ints]:
    """Groups of row numbers of unit embeddings ``[n, 512]``, each a person, in row order.

    Nearest-neighbour graph, connected components, then average linkage inside each: a chain of
    look-alikes joins two people in the graph, and their average distance tells them apart.
    """
    if len(embedding) == 0:
        return []
    groups: list[Ints] = []
    for component in _components(embedding, options.neighbours, options.link_cosine):
        groups += _split(embedding, component, options)
    return sorted(groups, key=lambda members: int(members[0]))


def _components(embedding: Floats, neighbours: int, cosine: float) -> Iterator[Ints]:
    """Connected components of the graph that links faces at least ``cosine`` alike."""
    n = len(embedding)
    values, other = _search(embedding, min(n, neighbours + 1))
    linked = (values >= cosine) & (other >= 0)
    row = np.repeat(np.arange(n), linked.sum(1))
    graph = coo_matrix((np.ones(len(row), np.int8), (row, other[linked])), shape=(n, n))
    _, label = connected_components(graph, directed=False)
    yield from _split_by(label)


def _search(embedding: Floats, k: int) -> tuple[Floats, Ints]:
    """Cosines and row numbers of the ``k`` nearest, ``[n, k]`` each."""
    faiss = require("faiss", "to group photos by face", "faiss-cpu")
    n, width = embedding.shape
    index = faiss.IndexFlatIP(width)
    if n > EXACT_LIMIT:
        cells = int(4 * np.sqrt(n))
        index = faiss.IndexIVFFlat(index, width, cells, faiss.METRIC_INNER_PRODUCT)
        index.train(embedding)
        index.nprobe = max(8, cells // 32)
    index.add(embedding)
    values, other = index.search(embedding, k)
    return values, other


def _split(embedding: Floats, component: Ints, options: PrepareOptions) -> list[Ints]:
    """Cut one component into people by average linkage at ``purify_cosine``."""
    if len(component) < 3:
        return [component]
    if len(component) > LINKAGE_LIMIT:
        return _split_large(embedding, component, options, options.link_cosine)
    vectors = embedding[component].astype(np.float64)
    upper = np.triu_indices(len(component), 1)
    distance = np.clip(1.0 - (vectors @ vectors.T)[upper], 0.0, 2.0)
    label = fcluster(linkage(distance, "average"), 1.0 - options.purify_cosine, "distance")
    return [component[members] for members in _split_by(label)]


def _split_large(
    embedding: Floats, component: Ints, options: PrepareOptions, cosine: float
) -> list[Ints]:
    """A component too large to compare all its pairs: link more strictly until its parts fit."""
    cosine += 0.05
    if cosine >= 0.95:
        return [component]
    groups: list[Ints] = []
    for part in _components(embedding[component], options.neighbours, cosine):
        members = component[part]
        if len(members) > LINKAGE_LIMIT:
            groups += _split_large(embedding, members, options, cosine)
        else:
            groups += _split(embedding, members, options)
    return groups


def _split_by(label: NDArray[Any]) -> Iterator[Ints]:
    """Row numbers of each label, in the order of the labels."""
    order = np.argsort(label, kind="stable")
    bounds = np.nonzero(np.diff(label[order]))[0] + 1
    yield from (np.asarray(rows, np.int64) for rows in np.split(order, bounds) if len(rows))


def _members(names: Texts, rows: Bools) -> Iterator[Ints]:
    """Row numbers of each person among ``rows``."""
    numbers = np.nonzero(rows)[0]
    if len(numbers):
        _, label = np.unique(names[numbers].astype(str), return_inverse=True)
        yield from (numbers[members] for members in _split_by(label))


def _centroid(embedding: Floats) -> Floats:
    mean = embedding.mean(0)
    return cast(Floats, mean / max(float(np.linalg.norm(mean)), 1e-12))


# --- what does not belong --------------------------------------------------------------------


def _purify(columns: Columns, names: Texts, reason: Reasons, limit: float) -> Floats:
    """Leave out photos unlike their person's centroid; the cosine of every row to it.

    The worst go first and the centroid is taken anew, so that strangers do not pull it.
    """
    similarity = np.full(len(names), np.nan, np.float32)
    out = np.zeros(len(names), bool)
    for rows in _members(names, reason.open):
        left = rows
        while len(left):
            cosine = columns.embedding[left] @ _centroid(columns.embedding[left])
            similarity[left] = cosine
            below = int((cosine < limit).sum())
            if below == 0 or len(left) == 1:
                break
            worst = np.argsort(cosine, kind="stable")[: max(1, below // 8)]
            out[left[worst]] = True
            left = np.delete(left, worst)
        gone = rows[out[rows]]
        similarity[gone] = columns.embedding[gone] @ _centroid(columns.embedding[left])
    details = [f"cosine {similarity[i]:.2f} to its person" for i in np.nonzero(out)[0]]
    reason.drop(out, "outlier", details)
    return similarity


def _drop_near_duplicates(
    columns: Columns, names: Texts, reason: Reasons, options: PrepareOptions
) -> Texts:
    """Keep the best of each set of near-duplicates; the key of the kept one for every row."""
    keys = columns.key
    group = np.where(reason.open, keys, "")
    original = np.array(columns.name)
    out = np.zeros(len(names), bool)
    if options.duplicate_bits >= 0:
        for rows in _members(names, reason.open):
            bits = _bits(columns.phash[rows])
            for same in near_duplicates(bits, columns.embedding[rows], options):
                members = rows[same]
                order = np.lexsort((keys[members].astype(str), *-columns.quality[members].T[::-1]))
                best = members[order[0]]
                out[members[order[1:]]] = True
                group[members] = keys[best]
                original[members] = columns.name[best]
    details = [f"nearly the same as {original[i]}" for i in np.nonzero(out)[0]]
    reason.drop(out, "near_duplicate", details)
    return group


def near_duplicates(bits: Bools, embedding: Floats, options: PrepareOptions) -> Iterator[Ints]:
    """Sets of two or more photos whose hashes ``[n, 64]`` and faces ``[n, 512]`` nearly agree."""
    n = len(bits)
    if n < 2:
        return
    signs = bits.astype(np.float32) * 2 - 1
    pairs = []
    for start in range(0, n, 1024):  # a person may have many photos: never all pairs at once
        block = slice(start, start + 1024)
        differing = (64 - signs[block] @ signs.T) / 2
        alike = embedding[block] @ embedding.T >= options.duplicate_cosine
        row, other = np.nonzero((differing <= options.duplicate_bits) & alike)
        pairs.append(np.stack([row + start, other]))
    row, other = np.concatenate(pairs, axis=1)
    graph = coo_matrix((np.ones(len(row), np.int8), (row, other)), shape=(n, n))
    _, label = connected_components(graph, directed=False)
    yield from (members for members in _split_by(label) if len(members) > 1)


def _bits(hashes: Texts) -> Bools:
    raw = np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8).reshape(len(hashes), 8)
    return np.unpackbits(raw, axis=1).astype(bool)


def _drop_singles(names: Texts, reason: Reasons, min_photos: int) -> None:
    out = np.zeros(len(names), bool)
    for rows in _members(names, reason.open):
        if len(rows) < min_photos:
            out[rows] = True
    reason.drop(out, "too_few", f"fewer than {min_photos} usable photos of this person")


# --- the result ------------------------------------------------------------------------------


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
        alike=_alike(columns, names, kept, options.link_cosine) if labelled else (),
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
    columns: Columns, names: Texts, kept: Ints, cosine: float
) -> tuple[tuple[str, str, float], ...]:
    rows = np.zeros(len(names), bool)
    rows[kept] = True
    people = [(str(names[m[0]]), _centroid(columns.embedding[m])) for m in _members(names, rows)]
    if len(people) < 2:
        return ()
    centroids = np.stack([c for _, c in people]).astype(np.float32)
    values, other = _search(centroids, min(len(people), 6))
    found = {
        (people[a][0], people[b][0], round(float(v), 3))
        for a, (vs, bs) in enumerate(zip(values, other, strict=True))
        for v, b in zip(vs, bs, strict=True)
        if a < b and v >= cosine
    }
    return tuple(sorted(found, key=lambda pair: (-pair[2], pair)))
