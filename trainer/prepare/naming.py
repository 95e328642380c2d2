"""Which person each face is given to, where folders, records or likeness say who is who."""

from __future__ import annotations

import numpy as np

from .cluster import group_faces
from .columns import Bools, Columns, Floats, Ints, Reasons, Texts, centroid, rows_of_people
from .options import PrepareOptions


def choose_faces(columns: Columns, reason: Reasons) -> None:
    """One face per labelled photo: the one most like the person's other largest faces."""
    out = np.zeros(len(columns.photo), bool)
    for rows in rows_of_people(columns.label, reason.open):
        if not (columns.face[rows] > 0).any():
            continue
        largest = rows[columns.face[rows] == 0]
        cosine = columns.embedding[rows] @ centroid(columns.embedding[largest])
        if len(largest) < 3:  # too few to tell whose centroid it is
            cosine = -columns.face[rows].astype(np.float32)
        out[_not_most_alike(columns, rows, cosine)] = True
    reason.drop(out, "other_face", "another face of this photo is the person's")


def share_out(columns: Columns, reason: Reasons, cosine: float) -> Texts:
    """Names of all rows: the faces that are not their folder's person go to whom they look like.

    Only to people who have photos of their own, and never a second time to the photo's own.
    """
    names: Texts = columns.label.copy()
    others = np.nonzero(reason.dropped == "other_face")[0]
    people = [(columns.label[rows[0]], rows) for rows in rows_of_people(columns.label, reason.open)]
    if not len(others) or not people:
        return names
    centroids = np.stack([centroid(columns.embedding[rows]) for _, rows in people])
    alike = columns.embedding[others] @ centroids.T
    best = alike.argmax(axis=1)
    owner = np.array([name for name, _ in people], dtype=object)[best]
    found = (alike[np.arange(len(others)), best] >= cosine) & (owner != columns.label[others])
    names[others[found]] = owner[found]
    reason.dropped[others[found]] = reason.detail[others[found]] = ""
    reason.detail[others[~found]] = "a face of nobody else who has photos here"
    return names


def one_face_each(columns: Columns, names: Texts, reason: Reasons) -> None:
    """Nobody is twice in a photo: of faces with one name the one most like the person stays."""
    out = np.zeros(len(names), bool)
    for rows in rows_of_people(names, reason.open):
        cosine = columns.embedding[rows] @ centroid(columns.embedding[rows])
        out[_not_most_alike(columns, rows, cosine)] = True
    reason.drop(out, "other_face", "another face of this photo is more like this person")


def _not_most_alike(columns: Columns, rows: Ints, cosine: Floats) -> Ints:
    """Those of a person's rows whose photo has one with a higher cosine."""
    order = rows[np.lexsort((columns.face[rows], -cosine, columns.photo[rows]))]
    photos = columns.photo[order]
    return order[np.r_[False, photos[1:] == photos[:-1]]]


def name_groups(columns: Columns, rows: Bools, options: PrepareOptions) -> Texts:
    """Group unlabelled faces; a group's name comes from its first file by SHA-256."""
    names = np.full(len(rows), "", dtype=object)
    numbers = np.nonzero(rows)[0]
    for members in group_faces(columns.embedding[numbers], options):
        own = numbers[members]
        name = "person-" + min(columns.key[own])[:12]
        names[own] = name
    return names
