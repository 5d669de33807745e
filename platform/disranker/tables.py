"""The columns of every table, and the check that given ones are there."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from disranker.recipe import Refused

BANDS = ("head", "torso", "tail")  # of queries, by frequency

HIT = pa.struct(
    [
        ("doc_id", pa.string()),
        ("position", pa.int32()),
        ("clicked", pa.bool_()),
        ("dwell_s", pa.float32()),
        ("converted", pa.bool_()),
    ]
)
CANDIDATE = pa.struct(
    [
        ("doc_id", pa.string()),
        ("title", pa.string()),
        ("summary", pa.string()),
        ("source", pa.string()),  # judged, shown, bm25 or random
        ("grade", pa.int8()),  # null where nobody graded it
        ("attractiveness", pa.float32()),  # null where it was never shown
        ("impressions", pa.int32()),
        ("asked", pa.bool_()),  # whether the teacher is asked for a score
    ]
)

SCHEMAS = {
    "documents": pa.schema([("doc_id", pa.string()), ("title", pa.string()), ("summary", pa.string())]),
    "judgments": pa.schema(
        [("query", pa.string()), ("doc_id", pa.string()), ("grade", pa.int8()), ("split", pa.string())]
    ),
    "searches": pa.schema(
        [
            ("query_id", pa.string()),
            ("query", pa.string()),  # normalised
            ("client", pa.string()),
            ("time", pa.timestamp("ms", tz="UTC")),
            ("hits", pa.list_(HIT)),
            ("shuffled", pa.bool_()),  # whether the log says that the order of the page was left to chance
        ]
    ),
    "rejects": pa.schema([("file", pa.string()), ("line", pa.int64()), ("reason", pa.string()), ("raw", pa.string())]),
    "evidence": pa.schema(
        [
            ("query", pa.string()),
            ("doc_id", pa.string()),
            ("impressions", pa.int32()),
            ("clicks", pa.int32()),
            ("satisfied", pa.int32()),  # clicks that satisfied, as `aggregate.satisfied_dwell_s` tells
            ("attractiveness", pa.float32()),
            ("dwell_s", pa.float32()),  # mean over clicks that carry one, null without
        ]
    ),
    "queries": pa.schema(
        [
            ("query", pa.string()),
            ("searches", pa.int32()),
            ("clients", pa.int32()),
            ("band", pa.string()),  # head, torso, tail, or unseen: judged but never searched
            ("split", pa.string()),  # train, validation or test
        ]
    ),
    "clicked": pa.schema(
        [
            ("query", pa.string()),
            ("split", pa.string()),  # train, or validation for the held-out perplexity
            ("band", pa.string()),  # of the query
            ("title", pa.string()),
            ("summary", pa.string()),
            ("attractiveness", pa.float32()),
            ("satisfied_share", pa.float32()),  # of its clicks
        ]
    ),
    "groups": pa.schema(
        [("query", pa.string()), ("split", pa.string()), ("band", pa.string()), ("docs", pa.list_(CANDIDATE))]
    ),
    "scores": pa.schema(
        [("query", pa.string()), ("doc_id", pa.string()), ("model", pa.string()), ("score", pa.float32())]
    ),
    "perturbed": pa.schema(
        [
            ("query", pa.string()),  # as it was
            ("kind", pa.string()),  # one of perturb.KINDS
            ("text", pa.string()),  # as it was scored
            ("doc_id", pa.string()),
            ("model", pa.string()),
            ("score", pa.float32()),
        ]
    ),
}


def conform(name: str, rows: list[dict[str, Any]] | pa.Table) -> pa.Table:
    """Rows as the table `name`: its columns, in order, of its types."""
    schema = SCHEMAS[name]
    if isinstance(rows, list):
        return pa.Table.from_pylist(rows, schema=schema)
    return rows.select(schema.names).cast(schema)


def require(columns: Iterable[str], found: Iterable[str], where: str) -> None:
    """Raises `Refused` that names the missing columns of a file and the ones it has."""
    found = list(found)
    missing = [column for column in columns if column not in found]
    if missing:
        raise Refused(f"{where}: no column {', '.join(missing)}; it has {', '.join(found) or 'none'}")


def part_of(keys: Iterable[str], parts: int) -> np.ndarray:
    """The part, from 0, that each key belongs to: stable between runs, machines and Python processes."""
    return (slots(keys) % parts).astype(np.int32)


def slots(keys: Iterable[str]) -> np.ndarray:
    """A number of 64 bits for each key, of which its part is the remainder."""
    return np.asarray(pd.util.hash_array(np.asarray(list(keys), dtype=object)))
