"""Log lines (UBI 1.3) -> search rows, or rejects with a reason.

A line becomes a record; records that share a query_id meet in one part, where queries and events are joined.
"""

import io
import json
import unicodedata
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, Literal

import polars as pl
import pyarrow as pa

from disranker import store, tables
from disranker.recipe import Refused

CLICKS = frozenset({"click", "item_click", "product_click", "result_click"})
CONVERSIONS = frozenset({"add_to_cart", "purchase"})
RAW_CHARACTERS = 500  # of a refused line that are kept
LINES_PER_BLOCK = 20_000
LONGEST_DWELL_S = 1e9  # what is longer, or infinite, was not measured

RECORD = pa.schema(
    [
        ("part", pa.int32()),
        ("kind", pa.string()),  # query, click, conversion, other or reject
        ("query_id", pa.string()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("time", pa.timestamp("ms", tz="UTC")),
        ("query", pa.string()),
        ("client", pa.string()),
        ("start", pa.int32()),
        ("hits", pa.list_(pa.string())),
        ("doc_id", pa.string()),
        ("dwell_s", pa.float32()),
        ("reason", pa.string()),
        ("raw", pa.string()),
    ]
)

Kind = Literal["queries", "events"]


class Broken(ValueError):
    """Why one line is refused."""


def normalise(query: str) -> str:
    """One spelling for the ways to type a query: NFKC, case folded, single spaces."""
    folded = unicodedata.normalize("NFKC", query).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())  # folding may leave accents in another order


def records(file: str, kind: Kind, parts: int) -> Iterator[pa.Table]:
    """All lines of a file (plain, gzip or zstd by its name) as records, in blocks.

    Raises `Refused` where it cannot be read on.
    """
    block: list[dict[str, Any]] = []
    for number, line in _lines(file):
        block.append(record(line, file, number, kind))
        if len(block) == LINES_PER_BLOCK:
            yield _table(block, parts)
            block = []
    yield _table(block, parts)


def record(line: bytes, file: str, number: int, kind: Kind) -> dict[str, Any]:
    """One line as a record; a broken one as a reject with its reason."""
    place = {"file": file, "line": number}
    try:
        entry = _entry(line)
        return place | (_query(entry) if kind == "queries" else _event(entry))
    except Broken as fault:
        raw = line[:RAW_CHARACTERS].decode(errors="replace").rstrip("\n")
        return place | {"kind": "reject", "query_id": f"{file}:{number}", "reason": str(fault), "raw": raw}


def join(part: pa.Table) -> tuple[pa.Table, pa.Table, dict[str, int]]:
    """The records of one part -> (searches, rejects, counts): each result page once, with what was clicked on it."""
    rows = pl.DataFrame(pl.from_arrow(part)).sort("time", "file", "line")
    queries = rows.filter(pl.col("kind") == "query")
    pages = queries.unique("query_id", keep="first", maintain_order=True)
    events = rows.filter(pl.col("kind").is_in(["click", "conversion"]))
    once = events.unique(["query_id", "doc_id", "kind", "time"], keep="first", maintain_order=True)

    hits = _hits(pages)
    strays = once.join(pages, on="query_id", how="anti").with_columns(reason=pl.lit("no result page has this query_id"))
    known = once.join(pages, on="query_id", how="semi")
    unseen = known.join(hits, on=["query_id", "doc_id"], how="anti").with_columns(
        reason=pl.lit("the document was not on the result page")
    )
    refused = pl.concat([rows.filter(pl.col("kind") == "reject"), strays, unseen]).sort("file", "line")
    counts = {
        "lines": rows.height,
        "duplicate_queries": queries.height - pages.height,
        "duplicate_events": events.height - once.height,
        "other_events": rows.filter(pl.col("kind") == "other").height,
        "clicks": known.filter(pl.col("kind") == "click").height - unseen.filter(pl.col("kind") == "click").height,
    }
    searches = tables.conform("searches", _searches(pages, hits, known).to_arrow())
    rejects = refused.select("file", "line", "reason", pl.col("raw").fill_null(pl.format("query_id {}", "query_id")))
    return searches, tables.conform("rejects", rejects.to_arrow()), counts


def _hits(pages: pl.DataFrame) -> pl.DataFrame:
    """(query_id, doc_id, position from 1 over all pages), each document once a page."""
    return (
        pages.select("query_id", "start", doc_id="hits")
        .with_columns(index=pl.int_ranges(pl.col("doc_id").list.len()))
        .explode("doc_id", "index")
        .select("query_id", "doc_id", position=pl.col("start") + pl.col("index") + 1)
        .unique(["query_id", "doc_id"], keep="first", maintain_order=True)
    )


def _searches(pages: pl.DataFrame, hits: pl.DataFrame, events: pl.DataFrame) -> pl.DataFrame:
    click = pl.col("kind") == "click"
    done = events.group_by("query_id", "doc_id").agg(
        clicked=click.any(),
        converted=(pl.col("kind") == "conversion").any(),
        # A sum of nothing known is unknown, not zero seconds.
        dwell_s=pl.when((click & pl.col("dwell_s").is_not_null()).any()).then(pl.col("dwell_s").filter(click).sum()),
    )
    seen = hits.join(done, on=["query_id", "doc_id"], how="left").with_columns(
        pl.col("clicked", "converted").fill_null(False)
    )
    fields = ["doc_id", "position", "clicked", "dwell_s", "converted"]
    lists = seen.sort("query_id", "position").group_by("query_id", maintain_order=True).agg(hits=pl.struct(fields))
    return pages.select("query_id", "query", "client", "time").join(lists, on="query_id").sort("query_id")


def _lines(file: str) -> Iterator[tuple[int, bytes]]:
    filesystem, path = store.locate(file)
    try:
        with filesystem.open_input_stream(path, compression="detect") as stream:
            yield from enumerate(io.BufferedReader(stream), start=1)
    except (OSError, EOFError) as error:
        raise Refused(f"{file} cannot be read to its end: {' '.join(str(error).split())}") from error


def _entry(line: bytes) -> dict[str, Any]:
    if not line.strip():
        raise Broken("empty line")
    entry = parsed(line)
    if not isinstance(entry, dict):
        raise Broken("not a JSON object")
    return entry


def parsed(line: bytes) -> Any:
    """The JSON of a line. Half a surrogate pair, which no table can hold, becomes U+FFFD. Raises `Broken`."""
    try:
        text = line.decode("utf-8-sig")
        found = json.loads(text)
        if "\\ud" in text.lower():
            whole = json.dumps(found, ensure_ascii=False).encode("utf-16", "surrogatepass")
            found = json.loads(whole.decode("utf-16", "replace"))
    except UnicodeDecodeError:
        raise Broken("not UTF-8") from None
    except (ValueError, RecursionError):
        raise Broken("not JSON") from None
    return found


def _query(entry: dict[str, Any]) -> dict[str, Any]:
    query = normalise(_text(entry, "user_query"))
    if not query:
        raise Broken("user_query is blank")
    hits = entry.get("query_response_hit_ids")
    if not isinstance(hits, list) or not hits:
        raise Broken("no query_response_hit_ids")
    attributes = entry.get("query_attributes")
    start = attributes.get("start", 0) if isinstance(attributes, dict) else 0
    if not isinstance(start, int) or isinstance(start, bool) or not 0 <= start < 1_000_000:
        raise Broken("query_attributes.start is no offset")
    return {
        "kind": "query",
        "query_id": _text(entry, "query_id"),
        "query": query,
        "client": _text(entry, "client_id"),
        "time": _time(entry),
        "start": start,
        "hits": [str(hit) for hit in hits],
    }


def _event(entry: dict[str, Any]) -> dict[str, Any]:
    action = _text(entry, "action_name").casefold()
    kind = "click" if action in CLICKS else "conversion" if action in CONVERSIONS else "other"
    found = {"kind": kind, "query_id": _text(entry, "query_id")}
    if kind == "other":
        return found
    attributes = entry.get("event_attributes")
    attributes = attributes if isinstance(attributes, dict) else {}
    thing = attributes.get("object")
    if not isinstance(thing, dict) or thing.get("object_id") in (None, ""):
        raise Broken("no event_attributes.object.object_id")
    dwell = attributes.get("dwell_time")
    seconds = float(dwell) if isinstance(dwell, int | float) and 0 <= dwell <= LONGEST_DWELL_S else None
    return found | {"doc_id": str(thing["object_id"]), "time": _time(entry), "dwell_s": seconds}


def _text(entry: dict[str, Any], name: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str) or not value:
        raise Broken(f"no {name}")
    return value


def _time(entry: dict[str, Any]) -> datetime:
    """ISO 8601, or milliseconds since 1970; without a zone, UTC."""
    value = entry.get("timestamp")
    try:
        if isinstance(value, int | float):
            return datetime.fromtimestamp(value / 1000, UTC)
        found = datetime.fromisoformat(str(value))
        return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
    except (ValueError, OverflowError, OSError):
        raise Broken("timestamp is neither ISO 8601 nor milliseconds") from None


def _table(block: list[dict[str, Any]], parts: int) -> pa.Table:
    table = pa.Table.from_pylist(block, schema=RECORD)
    part = tables.part_of((row["query_id"] for row in block), parts)
    return table.set_column(0, "part", pa.array(part, pa.int32()))


def refusals(reasons: Iterable[str]) -> dict[str, int]:
    """How often each reason occurs, most frequent first."""
    counted = pl.Series("reason", list(reasons), dtype=pl.String).value_counts(sort=True)
    return dict(counted.iter_rows())
