"""Files of documents and judgments (parquet or JSON lines) -> rows, or rejects with a reason."""

import io
import json
from collections.abc import Iterator
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from disranker import logs, store, tables
from disranker.recipe import Refused

ROWS_PER_BLOCK = 20_000
COLUMNS = {"documents": ("doc_id", "title", "summary"), "judgments": ("query", "doc_id", "grade")}
HIGHEST_GRADE = 10  # beyond, a gain of 2^grade is surely a mistake

DOCUMENT = pa.schema(
    [
        ("part", pa.int32()),
        *tables.SCHEMAS["documents"],
        *(field for field in tables.SCHEMAS["rejects"]),
    ]
)


def rows(file: str, what: str) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """Rows with their number from 1, in blocks.

    Raises `Refused` for a column that is missing or a file of another kind.
    """
    reader = _parquet if store.locate(file)[1].endswith(".parquet") else _json_lines
    try:
        yield from reader(file, what)
    except (OSError, pa.ArrowException) as error:
        raise Refused(f"{file} cannot be read as {what}: {' '.join(str(error).split())}") from error


def documents(file: str, parts: int) -> Iterator[pa.Table]:
    """Blocks of `DOCUMENT`: rows with a doc_id, and rejects with a reason."""
    for block in rows(file, "documents"):
        cleaned = [_document(file, number, row) for number, row in block]
        table = pa.Table.from_pylist(cleaned, schema=DOCUMENT)
        part = tables.part_of((row["doc_id"] or "" for row in cleaned), parts)
        yield table.set_column(0, "part", pa.array(part, pa.int32()))


def unique_documents(part: pa.Table) -> tuple[pa.Table, pa.Table, dict[str, int]]:
    """The rows of one part -> (documents, rejects, counts): each doc_id once, the first by file and line."""
    found = pl.DataFrame(pl.from_arrow(part)).sort("file", "line")
    good = found.filter(pl.col("reason").is_null())
    once = good.unique("doc_id", keep="first", maintain_order=True).sort("doc_id")
    counts = {"duplicate_documents": good.height - once.height}
    refused = found.filter(pl.col("reason").is_not_null())
    return tables.conform("documents", once.to_arrow()), tables.conform("rejects", refused.to_arrow()), counts


def judgments(files: list[str]) -> tuple[pl.DataFrame, list[dict[str, Any]]]:
    """(graded pairs with file and line, rejects). Human grades are few: they fit in memory."""
    good: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    for file in files:
        for block in rows(file, "judgments"):
            for number, row in block:
                place = {"file": file, "line": number}
                reason = _unusable(row)
                if reason:
                    refused.append(place | {"reason": reason, "raw": _raw(row)})
                else:
                    good.append(place | _judgment(row))
    schema = {
        "file": pl.String,
        "line": pl.Int64,
        "query": pl.String,
        "doc_id": pl.String,
        "grade": pl.Int8,
        "split": pl.String,
    }
    return pl.DataFrame(good, schema=schema), refused


def _judgment(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "query": logs.normalise(str(row["query"])),
        "doc_id": str(row["doc_id"]),
        "grade": int(row["grade"]),
        "split": row.get("split"),
    }


def _unusable(row: dict[str, Any]) -> str | None:
    if row["query"] in (None, "") or not logs.normalise(str(row["query"])):
        return "no query"
    if row["doc_id"] in (None, ""):
        return "no doc_id"
    grade = row["grade"]
    if not isinstance(grade, int | float) or grade != grade // 1 or not 0 <= grade <= HIGHEST_GRADE:
        return f"grade is no whole number from 0 to {HIGHEST_GRADE}"
    if row.get("split") not in (None, "train", "validation", "test"):
        return "split is none of train, validation, test"
    return None


def _document(file: str, number: int, row: dict[str, Any]) -> dict[str, Any]:
    title, summary = (str(row[name] or "").strip() for name in ("title", "summary"))
    reason = (
        "no doc_id" if row["doc_id"] in (None, "") else "neither title nor summary" if not title + summary else None
    )
    found = {"file": file, "line": number, "reason": reason, "raw": _raw(row) if reason else None}
    return found | {"doc_id": "" if row["doc_id"] is None else str(row["doc_id"]), "title": title, "summary": summary}


def _parquet(file: str, what: str) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    filesystem, path = store.locate(file)
    with filesystem.open_input_file(path) as source:
        parquet = pq.ParquetFile(source)
        tables.require(COLUMNS[what], parquet.schema_arrow.names, f"data.{what}: {file}")
        wanted = [name for name in (*COLUMNS[what], "split") if name in parquet.schema_arrow.names]
        number = 1
        for batch in parquet.iter_batches(ROWS_PER_BLOCK, columns=wanted):
            yield list(enumerate(batch.to_pylist(), start=number))
            number += batch.num_rows


def _json_lines(file: str, what: str) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    filesystem, path = store.locate(file)
    block: list[tuple[int, dict[str, Any]]] = []
    with filesystem.open_input_stream(path, compression="detect") as stream:
        for number, line in enumerate(io.BufferedReader(stream), start=1):
            try:
                row = logs.parsed(line)
            except logs.Broken:
                row = None
            row = row if isinstance(row, dict) else {}
            if number == 1:
                tables.require(COLUMNS[what], row, f"data.{what}: {file}")
            block.append((number, dict.fromkeys(COLUMNS[what]) | row))
            if len(block) == ROWS_PER_BLOCK:
                yield block
                block = []
    yield block


def _raw(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, default=str)[: logs.RAW_CHARACTERS]
