"""Files of documents and judgments -> rows of the tables, or rejects with a reason."""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import polars as pl
import pyarrow as pa

from disranker import formats, logs, tables, trec
from disranker.cleaning import normalise
from disranker.formats import Row, Unreadable
from disranker.recipe import Refused

ROWS_PER_BLOCK = 20_000
HIGHEST_GRADE = 10  # beyond, a gain of 2^grade is surely a mistake

DOCUMENT = pa.schema(
    [
        ("part", pa.int32()),
        *tables.SCHEMAS["documents"],
        *(field for field in tables.SCHEMAS["rejects"]),
    ]
)


def rows(file: str, what: str) -> Iterator[list[tuple[int, Row | Unreadable]]]:
    """Rows with their number, as `formats.rows` has them, in blocks.

    Raises `Refused` for a column that is missing or a file of another kind.
    """
    try:
        found = formats.rows(file, what)
        while block := list(islice(found, ROWS_PER_BLOCK)):
            yield block
    except (OSError, EOFError, pa.ArrowException) as error:
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


def judgments(files: Sequence[str], topics: Sequence[str] = ()) -> tuple[pl.DataFrame, list[dict[str, Any]]]:
    """(graded pairs with file and line, rejects). Human grades are few: they fit in memory.

    `topics` are files with the texts of queries that the judgments name by id.
    """
    good: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    texts = trec.topics(topics)
    for file in files:
        for number, row in _with_texts(file, texts):
            place = {"file": file, "line": number}
            reason = _unusable(row)
            if reason:
                refused.append(place | {"reason": reason, "raw": _raw(row)})
            elif isinstance(row, dict):
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


def _with_texts(file: str, topics: dict[str, str]) -> Iterator[tuple[int, Row | Unreadable]]:
    """Judgments of one file; where queries have ids, with the texts. Raises `Refused` where there are none."""
    texts: dict[str, str] | None = None
    for block in rows(file, "judgments"):
        for number, row in block:
            if isinstance(row, dict) and "query_id" in row:
                texts = _texts(file, topics) if texts is None else texts
                yield number, _with_text(row, texts)
            else:
                yield number, row


def _texts(file: str, topics: dict[str, str]) -> dict[str, str]:
    queries = trec.beside(file)
    texts = topics | (trec.topics([queries]) if queries else {})  # what lies beside a file is about that file
    if not texts:
        raise Refused(
            f"data.judgments: {file} names queries by id; give data.topics their texts (id<TAB>text lines, or BEIR's "
            "queries.jsonl, which is also found beside the file or one folder above)"
        )
    return texts


def _with_text(row: Row, texts: dict[str, str]) -> Row | Unreadable:
    name = row["query_id"]
    if str(name) not in texts:
        return Unreadable(f"no text for query id {name}", _raw(row))
    return row | {"query": texts[str(name)]}


def _judgment(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "query": normalise(str(row["query"])),
        "doc_id": str(row["doc_id"]),
        "grade": int(row["grade"]),
        "split": row.get("split"),
    }


def _unusable(row: Row | Unreadable) -> str | None:
    if isinstance(row, Unreadable):
        return row.reason
    if row["query"] in (None, "") or not normalise(str(row["query"])):
        return "no query"
    if row["doc_id"] in (None, ""):
        return "no doc_id"
    grade = row["grade"]
    whole = isinstance(grade, int | float) and not isinstance(grade, bool) and grade == grade // 1
    if not whole or not 0 <= grade <= HIGHEST_GRADE:
        return f"grade is no whole number from 0 to {HIGHEST_GRADE}"
    if row.get("split") not in (None, "train", "validation", "test"):
        return "split is none of train, validation, test"
    return None


def _document(file: str, number: int, row: Row | Unreadable) -> dict[str, Any]:
    if isinstance(row, Unreadable):
        return {"file": file, "line": number, "reason": row.reason, "raw": row.raw, "doc_id": ""}
    title, summary = (str(row[name] or "").strip() for name in ("title", "summary"))
    reason = (
        "no doc_id" if row["doc_id"] in (None, "") else "neither title nor summary" if not title + summary else None
    )
    found = {"file": file, "line": number, "reason": reason, "raw": _raw(row) if reason else None}
    return found | {"doc_id": "" if row["doc_id"] is None else str(row["doc_id"]), "title": title, "summary": summary}


def _raw(row: Row | Unreadable) -> str:
    if isinstance(row, Unreadable):
        return row.raw
    return json.dumps(row, ensure_ascii=False, default=str)[: logs.RAW_CHARACTERS]
