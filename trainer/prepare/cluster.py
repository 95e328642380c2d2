"""Faces to people: neighbours, connected components, average linkage. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from infinite_id_core.packages import require

from .columns import Bools, Floats, Ints, rows_by
from .options import PrepareOptions

EXACT_LIMIT = 100_000  # faces; above, neighbours are searched in cells of a coarse quantiser
LINKAGE_LIMIT = 4_000  # faces of one group whose distances are all compared


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
    values, other = nearest(embedding, min(n, neighbours + 1))
    linked = (values >= cosine) & (other >= 0)
    yield from _connected(np.repeat(np.arange(n), linked.sum(1)), other[linked], n)


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
    return [component[members] for members in rows_by(label)]


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


def nearest(embedding: Floats, k: int) -> tuple[Floats, Ints]:
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
    yield from (members for members in _connected(row, other, n) if len(members) > 1)


def _connected(row: Ints, other: Ints, n: int) -> Iterator[Ints]:
    """Connected components of a graph of ``n`` rows with these links."""
    graph = coo_matrix((np.ones(len(row), np.int8), (row, other)), shape=(n, n))
    _, label = connected_components(graph, directed=False)
    yield from rows_by(label)
