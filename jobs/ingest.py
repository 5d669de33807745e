"""Logs, documents and judgments -> searches, documents, judgments, and rejects with a reason."""

import sys
from functools import partial
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset

from disranker import logs, sources, tables
from disranker import store as stores
from disranker.recipe import Recipe, Refused
from disranker.stages import Step
from disranker.store import Store
from jobs import launch, parts


def run(recipe: Recipe, store: Store, step: Step) -> dict[str, Any]:
    count = recipe.ingest.parts
    files = _files(recipe, store)
    counts = _documents(files["documents"], count, store)
    counts |= _judgments(files["judgments"], 2 * count, store)
    counts |= _searches(files["queries"], files["events"], count, store)
    rejects = store.read_files("rejects", store.written("rejects"), ["reason"])
    return counts | {"rejects": rejects.num_rows, "reasons": logs.refusals(rejects["reason"].to_pylist())}


def _files(recipe: Recipe, store: Store) -> dict[str, list[str]]:
    if not recipe.made_up:
        return {what: stores.expand(getattr(recipe.data, what), what) for what in type(recipe.data).model_fields}
    world = f"{store.uri}/world"
    names = {
        "documents": "documents.parquet",
        "judgments": "judgments.parquet",
        "queries": "ubi_queries-*",
        "events": "ubi_events-*",
    }
    return {what: stores.expand([f"{world}/{name}"], what) for what, name in names.items()}


def _searches(queries: list[str], events: list[str], count: int, store: Store) -> dict[str, int]:
    files = [(file, "queries") for file in queries] + [(file, "events") for file in events]
    lines = parts.flat(files, lambda file: logs.records(*file, parts=count))

    def write(part: int, rows: pa.Table) -> dict[str, int]:
        searches, rejects, counted = logs.join(rows)
        store.write("searches", part, searches)
        store.write("rejects", part, rejects)
        return counted | {"searches": searches.num_rows}

    counts = parts.total(parts.gather(lines, count, write))
    if not counts.get("searches"):
        raise Refused(_no_search(queries, store))
    return counts


def _no_search(queries: list[str], store: Store) -> str:
    where = f"data.queries: {queries[0]}" + (f" and {len(queries) - 1} more" if len(queries) > 1 else "")
    here = pc.field("file").isin(queries)  # without a search, every line of a query file is a reject
    reasons = store.read_files("rejects", store.written("rejects"), ["reason"], here)["reason"].to_pylist()
    if not reasons:
        return f"{where}: the log is empty; UBI 1.3 query records, one JSON object a line, are expected"
    return f"{where}: not one valid query in {len(reasons)} lines, mostly: {next(iter(logs.refusals(reasons)))}"


def _documents(files: list[str], count: int, store: Store) -> dict[str, int]:
    def write(part: int, rows: pa.Table) -> dict[str, int]:
        documents, rejects, counted = sources.unique_documents(rows)
        store.write("documents", part, documents)
        store.write("rejects", count + part, rejects)
        return counted | {"documents": documents.num_rows}

    for file in files:  # a wrong file is refused before anything is read
        next(sources.rows(file, "documents"), None)
    counts = parts.total(parts.gather(parts.flat(files, partial(sources.documents, parts=count)), count, write))
    if not counts.get("documents"):
        raise Refused(
            f"data.documents: no usable document in {', '.join(files)}; each needs a doc_id and a title or summary"
        )
    return counts


def _judgments(files: list[str], part: int, store: Store) -> dict[str, int]:
    graded, refused = sources.judgments(files)
    wanted = pc.field("doc_id").isin(pa.array(graded["doc_id"].unique().to_list(), pa.string()))
    known = store.read_files("documents", store.written("documents"), ["doc_id"], wanted)["doc_id"].to_pylist()
    missing = ~pl.col("doc_id").is_in(known)
    unknown = graded.filter(missing).select(
        "file", "line", reason=pl.lit("no such document"), raw=pl.format("{}: {}", "query", "doc_id")
    )
    good = graded.filter(~missing).unique(["query", "doc_id"], keep="last", maintain_order=True).sort("query", "doc_id")
    if files and not good.height:
        raise Refused(
            f"data.judgments: none of the {graded.height + len(refused)} grades in {', '.join(files)} is of a document "
            "in data.documents"
        )
    store.write("judgments", 0, good.drop("file", "line").to_arrow())
    store.write(
        "rejects",
        part,
        pa.concat_tables([tables.conform("rejects", refused), tables.conform("rejects", unknown.to_arrow())]),
    )
    return {"judgments": good.height, "judgments_replaced": graded.height - unknown.height - good.height}


if __name__ == "__main__":
    sys.exit(launch.main("ingest"))
