"""Files of documents and judgments -> their tables, and rejects with a reason."""

import contextlib
import json
from functools import partial

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from disranker import sources, stages, tables, trec
from disranker.recipe import Refused, digest
from disranker.stages import Step
from disranker.store import Store
from jobs import parts

NAME = "catalogue"  # begins the names of rejects that are not of the log


def of(name: str) -> bool:
    """Whether a file of rejects is not of the log."""
    return name.startswith(NAME)


def write(files: dict[str, list[str]], count: int, store: Store, step: Step) -> dict[str, int]:
    """The tables, in `count` parts, made anew where a file of them changed; how many rows there are of what.

    These counts are kept beside the documents, written last: they say that all is there.
    """
    ours = {path for what in ("documents", "judgments", "topics") for path in files[what]}
    beside = {queries for file in files["judgments"] if (queries := trec.beside(file))}
    inputs = [found for found in step.inputs if found[0] in ours | beside]
    made = f"made-{digest([stages.FORMAT, count, step.reads, inputs])}.json"
    with contextlib.suppress(FileNotFoundError):
        return store.read_json("documents", made)
    for table in ("documents", "judgments"):
        store.clear(table)
    store.remove("rejects", of)
    counts = _documents(files["documents"], count, store) | _judgments(files["judgments"], files["topics"], store)
    store.put_text(json.dumps(counts), "documents", made)
    return counts


def _documents(files: list[str], count: int, store: Store) -> dict[str, int]:
    def write(part: int, rows: pa.Table) -> dict[str, int]:
        documents, rejects, counted = sources.unique_documents(rows)
        store.write("documents", part, documents)
        store.put_table(rejects, "rejects", f"{NAME}-{part:05d}.parquet")
        return counted | {"documents": documents.num_rows}

    for file in files:  # a wrong file is refused before anything is read
        next(sources.rows(file, "documents"), None)
    counts = parts.total(parts.gather(parts.flat(files, partial(sources.documents, parts=count)), count, write))
    if not counts.get("documents"):
        raise Refused(
            f"data.documents: no usable document in {', '.join(files)}; each needs a doc_id and a title or summary"
        )
    return counts


def _judgments(files: list[str], topics: list[str], store: Store) -> dict[str, int]:
    graded, refused = sources.judgments(files, topics)
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
    rejects = pa.concat_tables([tables.conform("rejects", refused), tables.conform("rejects", unknown.to_arrow())])
    store.put_table(rejects, "rejects", f"{NAME}-judgments.parquet")
    return {"judgments": good.height, "judgments_replaced": graded.height - unknown.height - good.height}
