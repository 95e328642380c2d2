"""What is left out: the same files, strangers, near-duplicates, people with too few photos."""

from __future__ import annotations

import numpy as np

from .cluster import near_duplicates
from .columns import Bools, Columns, Floats, Reasons, Texts, centroid, rows_of_people
from .options import PrepareOptions


def drop_same_files(columns: Columns, reason: Reasons) -> None:
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


def purify(columns: Columns, names: Texts, reason: Reasons, limit: float) -> Floats:
    """Leave out photos unlike their person's centroid; the cosine of every row to it.

    The worst go first and the centroid is taken anew, so that strangers do not pull it.
    """
    similarity = np.full(len(names), np.nan, np.float32)
    out = np.zeros(len(names), bool)
    for rows in rows_of_people(names, reason.open):
        left = rows
        while len(left):
            cosine = columns.embedding[left] @ centroid(columns.embedding[left])
            similarity[left] = cosine
            below = int((cosine < limit).sum())
            if below == 0 or len(left) == 1:
                break
            worst = np.argsort(cosine, kind="stable")[: max(1, below // 8)]
            out[left[worst]] = True
            left = np.delete(left, worst)
        gone = rows[out[rows]]
        similarity[gone] = columns.embedding[gone] @ centroid(columns.embedding[left])
    details = [f"cosine {similarity[i]:.2f} to its person" for i in np.nonzero(out)[0]]
    reason.drop(out, "outlier", details)
    return similarity


def drop_near_duplicates(
    columns: Columns, names: Texts, reason: Reasons, options: PrepareOptions
) -> Texts:
    """Keep the best of each set of near-duplicates; the key of the kept one for every row."""
    keys = columns.key
    group = np.where(reason.open, keys, "")
    original = np.array(columns.name)
    out = np.zeros(len(names), bool)
    if options.duplicate_bits >= 0:
        for rows in rows_of_people(names, reason.open):
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


def _bits(hashes: Texts) -> Bools:
    raw = np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8).reshape(len(hashes), 8)
    return np.unpackbits(raw, axis=1).astype(bool)


def drop_singles(names: Texts, reason: Reasons, min_photos: int) -> None:
    out = np.zeros(len(names), bool)
    for rows in rows_of_people(names, reason.open):
        if len(rows) < min_photos:
            out[rows] = True
    reason.drop(out, "too_few", f"fewer than {min_photos} usable photos of this person")
