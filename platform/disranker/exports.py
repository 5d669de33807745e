"""Tables in the forms of the field: what to write, file by file, and how.

What a form cannot hold is refused before anything is written.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import IO

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from disranker import tables, trec
from disranker.recipe import Refused

Writer = Callable[[IO[bytes]], None]
Parts = Iterable[pa.Table]
SPLITS = {"train": "train", "validation": "dev", "test": "test"}  # as BEIR calls them


def files(what: str, form: str, parts: Parts) -> dict[str, Writer]:
    """File name -> what writes it, in the order to write. The name is empty where the form is one file.

    Raises `Refused` for a table that the form has no place for, and for a value that it cannot hold.
    """
    forms = FORMS[what]
    if form not in forms:
        raise Refused(f"{what} cannot be written as {form}; as {', '.join(forms)} they can")
    return forms[form](what, parts)


def _parquet(what: str, parts: Parts) -> dict[str, Writer]:
    def write(out: IO[bytes]) -> None:
        with pq.ParquetWriter(out, tables.SCHEMAS[what]) as writer:
            for part in parts:
                writer.write_table(part)

    return {"": write}


def _jsonl(what: str, parts: Parts) -> dict[str, Writer]:
    return {"": _blocks(_frame(part).write_ndjson().encode() for part in parts)}


def _csv(what: str, parts: Parts) -> dict[str, Writer]:
    header = ",".join(tables.SCHEMAS[what].names) + "\n"
    return {"": _blocks(_first(header, (_frame(part).write_csv(include_header=False) for part in parts)))}


def _corpus(what: str, parts: Parts) -> dict[str, Writer]:
    named = (_frame(part).select(_id="doc_id", title="title", text="summary") for part in parts)
    return {"corpus.jsonl": _blocks(block.write_ndjson().encode() for block in named)}


def _beir(what: str, parts: Parts) -> dict[str, Writer]:
    graded = _graded(parts)
    queries = graded.select(_id="query_id", text="query").unique(maintain_order=True)
    found = {"queries.jsonl": _blocks([queries.write_ndjson().encode()])}
    for split, rows in _by_split(graded):
        qrels = rows.select(pl.col("query_id").alias("query-id"), pl.col("doc_id").alias("corpus-id"), score="grade")
        name = f"qrels/{SPLITS[split]}.tsv" if split else "qrels.tsv"
        found[name] = _blocks([qrels.write_csv(separator="\t").encode()])
    return found


def _trec(what: str, parts: Parts) -> dict[str, Writer]:
    graded = _graded(parts)
    topics = dict(graded.select("query_id", "query").iter_rows())
    found = {"topics.tsv": _lines(f"{name}\t{_topic(text)}" for name, text in topics.items())}
    for split, rows in _by_split(graded):
        listed = rows.select("query_id", "doc_id", "grade").iter_rows()
        name = f"qrels.{SPLITS[split]}.txt" if split else "qrels.txt"
        found[name] = _lines(f"{query} 0 {_document(document)} {grade}" for query, document, grade in listed)
    return found


def _workbench(what: str, parts: Parts) -> dict[str, Writer]:
    lists = [
        {
            "query": query,
            "ratings": [
                {"docId": row["doc_id"], "rating": f"{row['grade']:.1f}"}  # the plugin takes numbers in text alone
                for row in rows.iter_rows(named=True)
            ],
        }
        for (query,), rows in _graded(parts).group_by("query", maintain_order=True)
    ]
    request = {"name": "disranker", "type": "IMPORT_JUDGMENT", "judgmentRatings": lists}
    return {"": _lines([json.dumps(request, ensure_ascii=False, indent=1)])}


def _runs(what: str, parts: Parts) -> dict[str, Writer]:
    runs: dict[str, dict[str, dict[str, float]]] = {}
    for query, document, model, score in (row for part in parts for row in _frame(part).iter_rows()):
        runs.setdefault(model, {}).setdefault(query, {})[document] = score
    return {f"{model}.run": _lines(trec.run_lines(runs[model], model, _document)) for model in sorted(runs)}


def _graded(parts: Parts) -> pl.DataFrame:
    """Judgments, with the ids of their queries: few enough to be held."""
    graded = _frame(pa.concat_tables([tables.SCHEMAS["judgments"].empty_table(), *parts]))
    return graded.with_columns(query_id=pl.col("query").map_elements(trec.field, pl.String))


def _by_split(graded: pl.DataFrame) -> Iterator[tuple[str | None, pl.DataFrame]]:
    for split in (*SPLITS, None):
        rows = graded.filter(pl.col("split").eq_missing(split))
        if rows.height:
            yield split, rows


def _document(name: str) -> str:
    if not name or any(sign.isspace() for sign in name):
        raise Refused(
            f"TREC files are split at white space and cannot hold the document id {name!r}; other formats can"
        )
    return name


def _topic(query: str) -> str:
    if any(sign in query for sign in "\t\r\n"):
        raise Refused(f"a file of topics has a line for each query and cannot hold {query!r}; other formats can")
    return query


def _frame(part: pa.Table) -> pl.DataFrame:
    return pl.DataFrame(pl.from_arrow(part))


def _lines(lines: Iterable[str]) -> Writer:
    """A small file, made before it is opened: what is refused leaves nothing."""
    return _blocks(["".join(f"{line}\n" for line in lines).encode()])


def _first(header: str, blocks: Iterable[str]) -> Iterator[bytes]:
    yield header.encode()
    yield from (block.encode() for block in blocks)


def _blocks(blocks: Iterable[bytes]) -> Writer:
    def write(out: IO[bytes]) -> None:
        for block in blocks:
            out.write(block)

    return write


FORMS: dict[str, dict[str, Callable[[str, Parts], dict[str, Writer]]]] = {
    "judgments": {
        "trec": _trec,
        "beir": _beir,
        "workbench": _workbench,
        "jsonl": _jsonl,
        "csv": _csv,
        "parquet": _parquet,
    },
    "documents": {"beir": _corpus, "jsonl": _jsonl, "csv": _csv, "parquet": _parquet},
    "scores": {"trec": _runs, "jsonl": _jsonl, "csv": _csv, "parquet": _parquet},
}
