"""The tables between the stages: all faces, the groups, the rows of the index."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infinite_id_core.files.atomic import replacing

from ..errors import disk_errors
from ..index_file import SCHEMA
from .group import Grouped
from .manifest import Target
from .stages import FACES, write_table


def faces_table(detected: Sequence[Target], embedded: Sequence[Target]) -> pa.Table:
    """All faces with their embeddings; photos are numbered over all parts."""
    names = [name for name in FACES.names if name != "aligned"]
    tables, first = [], 0
    for faces, vectors in zip(detected, embedded, strict=True):
        table = pq.read_table(faces.outputs[0], columns=names)
        table = table.append_column("embedding", pq.read_table(vectors.outputs[0])["embedding"])
        photo = table["photo"].to_numpy() + first
        first = int(photo.max(initial=first - 1)) + 1
        tables.append(table.set_column(0, "photo", pa.array(photo, pa.int64())))
    return pa.concat_tables(tables)


def write_groups(target: Target, grouped: Grouped) -> None:
    """Kept photos, one row group per shard, and the dropped ones."""
    path, others = target.outputs
    with (
        disk_errors(path),
        replacing(path) as temporary,
        pq.ParquetWriter(temporary, grouped.kept.schema, compression="zstd") as writer,
    ):
        for start, end in grouped.shards:
            writer.write_table(grouped.kept.slice(start, end - start), row_group_size=end - start)
    write_table(others, grouped.dropped)


def read_groups(target: Target, known: dict[str, Any]) -> Grouped:
    return Grouped(
        kept=pq.read_table(target.outputs[0]),
        dropped=pq.read_table(target.outputs[1]),
        shards=tuple((start, end) for start, end in known["shards"]),
        alike=tuple((a, b, cosine) for a, b, cosine in known["alike"]),
    )


def index_rows(table: pa.Table) -> pa.Table:
    """The columns of ``SCHEMA``, null where ``table`` has none."""
    columns = [
        table[field.name].cast(field.type)
        if field.name in table.column_names
        else pa.nulls(len(table), field.type)
        for field in SCHEMA
    ]
    return pa.table(columns, schema=SCHEMA)


def counts_of(grouped: Grouped) -> dict[str, int]:
    """Photos by what became of them."""
    reasons = Counter(grouped.dropped["dropped"].to_pylist())
    return {"kept": len(grouped.kept), **dict(sorted(reasons.items()))}
