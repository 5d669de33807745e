"""A file of documents or judgments -> its rows under our names, by number.

What a file is follows from its name and its first line: parquet, JSON lines, one JSON array, CSV or TSV with a header,
TREC qrels, or a judgment list of OpenSearch's search relevance workbench.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from disranker import lines, logs, store, tables
from disranker.recipe import Refused

COLUMNS = {"documents": ("doc_id", "title", "summary"), "judgments": ("query", "doc_id", "grade")}
OPTIONAL = {"documents": ("title",), "judgments": ("split",)}
# Files of others are known by these columns, in any case of letters.
OTHERS = {
    "documents": ({"_id": "doc_id", "text": "summary"},),  # BEIR
    "judgments": (
        {"query-id": "query_id", "corpus-id": "doc_id", "score": "grade"},  # BEIR
        {"query": "query", "docid": "doc_id", "rating": "grade"},  # Quepid, and the workbench's own upload
    ),
}
QRELS = ("query-id", "iteration", "corpus-id", "score")  # the columns of TREC, in BEIR's words
LISTS = ("judgmentRatings", "judgmentScores", "hits")  # keys of the workbench; the second before OpenSearch 3.1
SPLITS = {"train": "train", "dev": "validation", "valid": "validation", "validation": "validation", "test": "test"}
BATCH = 20_000  # rows of a parquet file decoded at once


class Unreadable(NamedTuple):
    """What stands in a file where a row should, and why it is none."""

    reason: str
    raw: str


Row = dict[str, Any]
Rows = Iterator[tuple[int, Row | Unreadable]]


@dataclass(frozen=True)
class Layout:
    """Which columns of a file are taken, and as what."""

    what: str
    taken: dict[str, str]  # the file's name -> ours
    ours: bool
    split: str | None  # of judgments that name queries by id, as the name of the file says

    @classmethod
    def of(cls, found: Iterable[str], what: str, file: str) -> "Layout":
        """Raises `Refused` for a file that lacks columns."""
        found = list(found)
        folded = {name.casefold(): name for name in found}
        theirs = next((known for known in OTHERS[what] if known.keys() <= folded.keys()), {})
        ours = not theirs or set(COLUMNS[what]) <= set(found)
        if ours:
            tables.require(COLUMNS[what], found, f"data.{what}: {file}")
        taken = {name: name for name in COLUMNS[what]} if ours else {folded[name]: theirs[name] for name in theirs}
        return cls(what, taken | {name: name for name in OPTIONAL[what]}, ours, _split(file))

    def row(self, values: Mapping[str, Any]) -> Row:
        """The values under our names. Grades in text, as others write them, become numbers."""
        found = dict.fromkeys(COLUMNS[self.what]) | {ours: values.get(name) for name, ours in self.taken.items()}
        if not self.ours and self.what == "judgments":
            found["grade"] = number(found["grade"])
        if "query_id" in found:
            found["split"] = found["split"] or self.split
            if isinstance(found["grade"], int | float) and found["grade"] < 0:
                found["grade"] = 0  # TREC's junk and what nobody judged: nothing gained, as trec_eval counts it
        return found


def rows(file: str, what: str) -> Rows:
    """Rows with their line, or their place from 1 where a file has no lines.

    A judgment without `query` has a `query_id`. Raises `Refused` for a file without the columns that make it one.
    """
    kind = _kind(file, what)
    if kind == "parquet":
        return _parquet(file, what)
    if kind == "lines":
        return _json_lines(file, what)
    if kind == "whole":
        return _json(file, what)
    return _qrels(file) if kind == "qrels" else _delimited(file, what, {"csv": ",", "tsv": "\t"}[kind])


def number(value: Any) -> Any:
    """The number that a text says in plain digits; anything else as it is."""
    plain = isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", value.strip(), re.ASCII)
    return float(value) if plain else value


def unreadable(reason: str, line: bytes) -> Unreadable:
    return Unreadable(reason, line[: logs.RAW_CHARACTERS].decode("utf-8-sig", "replace").rstrip("\r\n"))


def _kind(file: str, what: str) -> str:
    name = PurePosixPath(lines.bare(file)).name
    if name.endswith(".parquet"):
        return "parquet"
    first = next((line for _, line in lines.written(file)), b"").removeprefix(b"\xef\xbb\xbf").strip()
    cells = first.split()
    if what == "judgments" and len(cells) == len(QRELS) and re.fullmatch(rb"[+-]?\d+", cells[-1]):
        return "qrels"
    if first.startswith(b"PAR1"):
        return "parquet"
    if first[:1] in (b"{", b"[") or name.endswith((".json", ".jsonl", ".ndjson")):
        return _json_kind(first, name)
    return "csv" if name.endswith(".csv") or b"\t" not in first else "tsv"


def _json_kind(first: bytes, name: str) -> str:
    if first[:1] == b"[":
        return "whole"
    try:
        found = logs.parsed(first)
    except logs.Broken:
        return "lines" if name.endswith((".jsonl", ".ndjson")) or first[:1] != b"{" else "whole"
    return "whole" if isinstance(found, dict) and any(key in found for key in LISTS) else "lines"


def _split(file: str) -> str | None:
    words = re.split(r"[._-]", PurePosixPath(store.locate(file)[1]).name.casefold())
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def _parquet(file: str, what: str) -> Rows:
    filesystem, path = store.locate(file)
    with filesystem.open_input_file(path) as source:
        parquet = pq.ParquetFile(source)
        names = parquet.schema_arrow.names
        layout = Layout.of(names, what, file)
        batches = parquet.iter_batches(BATCH, columns=[name for name in layout.taken if name in names])
        for at, values in enumerate((values for batch in batches for values in batch.to_pylist()), start=1):
            yield at, layout.row(values)


def _json_lines(file: str, what: str) -> Rows:
    layout = None
    for at, line in lines.written(file):
        try:
            found = logs.parsed(line)
            fault = None if isinstance(found, dict) else "not a JSON object"
        except logs.Broken as broken:
            found, fault = {}, str(broken)
        layout = layout or Layout.of([] if fault else found, what, file)
        yield at, unreadable(fault, line) if fault else layout.row(found)


def _json(file: str, what: str) -> Rows:
    filesystem, path = store.locate(file)
    with filesystem.open_input_stream(path, compression="detect") as stream:
        try:
            found = logs.parsed(stream.read())
        except logs.Broken as broken:
            raise Refused(f"data.{what}: {file} is {broken}, neither as a whole nor line by line") from None
    if isinstance(found, dict) and what == "judgments" and any(key in found for key in LISTS):
        yield from _rated(found, file)
        return
    layout = None
    for at, values in enumerate(found if isinstance(found, list) else [found], start=1):
        good = isinstance(values, dict)
        layout = layout or Layout.of(values if good else [], what, file)
        yield at, layout.row(values) if good else _strange("not a JSON object", values)


def _delimited(file: str, what: str, delimiter: str) -> Rows:
    filesystem, path = store.locate(file)
    with filesystem.open_input_stream(path, compression="detect") as stream:
        # What is not UTF-8 is read on as lone surrogates, so that it spoils its own row alone.
        text = io.TextIOWrapper(io.BufferedReader(stream), "utf-8-sig", "surrogateescape", newline="")
        records = csv.reader(text, delimiter=delimiter, strict=True)
        header = [name.strip() for name in _header(records, what, file)]
        if not header:
            return
        layout = Layout.of(header, what, file)
        for at, cells in _records(records):
            fault = cells if isinstance(cells, Unreadable) else _misfit(cells, header)
            yield at, fault or _cells(layout, dict(zip(header, cells, strict=True)))


def _header(records: Any, what: str, file: str) -> list[str]:
    try:
        header: list[str] = next((record for record in records if record), [])
        "".join(header).encode()
    except (csv.Error, UnicodeEncodeError) as error:
        raise Refused(f"data.{what}: {file}: the first line is no header in UTF-8 with quotes doubled") from error
    return header


def _records(records: Any) -> Iterator[tuple[int, list[str] | Unreadable]]:
    """The records of a CSV file with the line that each begins at; a record may go over several."""
    while True:
        begin = records.line_num + 1
        try:
            cells = next(records, None)
        except csv.Error as error:
            yield begin, Unreadable(f"not CSV: {error}", f"lines {begin} to {records.line_num}")
            continue
        if cells is None:
            return
        if cells:
            yield begin, cells


def _misfit(cells: list[str], header: list[str]) -> Unreadable | None:
    raw = json.dumps(cells, ensure_ascii=False)[: logs.RAW_CHARACTERS].encode("utf-8", "surrogateescape")
    if len(cells) != len(header):
        return unreadable(f"{len(cells)} columns where the header has {len(header)}", raw)
    return (
        unreadable("not UTF-8", raw) if any("\udc80" <= sign <= "\udcff" for cell in cells for sign in cell) else None
    )


def _cells(layout: Layout, values: dict[str, str]) -> Row:
    row = layout.row({name: cell or None for name, cell in values.items()})
    return row | {"grade": number(row["grade"])} if layout.what == "judgments" else row


def _qrels(file: str) -> Rows:
    layout = Layout.of(QRELS, "judgments", file)
    for at, line in lines.written(file):
        try:
            cells = line.decode("utf-8-sig").split()
        except UnicodeDecodeError:
            yield at, unreadable("not UTF-8", line)
            continue
        fits = len(cells) == len(QRELS)
        yield (
            at,
            layout.row(dict(zip(QRELS, cells, strict=True)))
            if fits
            else unreadable("not the 4 columns of TREC qrels: query id, iteration, document id, relevance", line),
        )


def _rated(found: dict[str, Any], file: str) -> Rows:
    """The ratings of all judgment lists in a request or an answer of the workbench, numbered through."""
    at = 0
    for query, rated in _queries(found):
        for rating in rated if isinstance(rated, list) else [rated]:
            at += 1
            if isinstance(rating, dict):
                grade = number(rating.get("rating", rating.get("score")))
                yield at, {"query": query, "doc_id": rating.get("docId"), "grade": grade}
            else:
                yield at, _strange("not a rating with docId and rating", {"query": query, "ratings": rated})
    if not at:
        raise Refused(f"data.judgments: {file} holds no ratings; ask for the list by its id, a search leaves them out")


def _queries(found: Any) -> Iterator[tuple[Any, Any]]:
    """(query, ratings): in a list, or, as early versions had it, by the query."""
    hits = found.get("hits") if isinstance(found, dict) else None
    if isinstance(hits, dict):
        for hit in hits.get("hits") or []:
            yield from _queries(hit.get("_source") if isinstance(hit, dict) else None)
    elif isinstance(found, dict):
        given = found.get("judgmentRatings", found.get("judgmentScores"))
        for entry in given if isinstance(given, list) else []:
            if isinstance(entry, dict):
                yield entry.get("query"), entry.get("ratings", [])
        yield from given.items() if isinstance(given, dict) else ()


def _strange(reason: str, value: Any) -> Unreadable:
    return Unreadable(reason, json.dumps(value, ensure_ascii=False)[: logs.RAW_CHARACTERS])
