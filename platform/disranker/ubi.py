"""Lines of UBI 1.3 -> records.

`record` is what a line means. `table` gives the same for many lines at a time: those that Arrow reads into the columns
below, and that need no second look, never become Python objects.
"""

import functools
from typing import Any, Literal

import polars as pl
import pyarrow as pa
import pyarrow.json

from disranker import logs
from disranker.cleaning import normalise
from disranker.logs import LAST_POSITION, LONGEST_DWELL_S, Broken

CLICKS = frozenset({"click", "item_click", "product_click", "result_click"})
CONVERSIONS = frozenset({"add_to_cart", "purchase"})
SHOWN = frozenset({"impression"})
# Nested brackets, `_source`, and halves of characters are left to Python.
UNSURE = (b"[[[[", b"\\ud", b"\\uD", b'"_source"')
LONG = 800  # a shorter line without the first of these cannot be nested 300 deep
MANY_BRACKETS = 300  # in one line
FEW = 32  # lines that are read one by one rather than halved again

Kind = Literal["queries", "events"]

_QUERY: list[tuple[str, pa.DataType]] = [
    ("query_id", pa.string()),
    ("client_id", pa.string()),
    ("user_query", pa.string()),
    ("query_response_hit_ids", pa.list_(pa.string())),
    ("query_attributes", pa.struct([("start", pa.int64()), ("shuffled", pa.bool_())])),
]
_OBJECT = pa.struct([("object_id", pa.string())])
_POSITION = pa.struct([("ordinal", pa.int64())])
_EVENT: list[tuple[str, pa.DataType]] = [
    ("action_name", pa.string()),
    ("query_id", pa.string()),
    ("client_id", pa.string()),
    ("user_query", pa.string()),
    ("event_attributes", pa.struct([("object", _OBJECT), ("position", _POSITION), ("dwell_time", pa.float64())])),
]
_TIMES = (pa.string(), pa.int64())  # ISO 8601 or milliseconds
# The times that Polars and `datetime.fromisoformat` are sure to read alike.
_ISO = r"^(19|20)\d\d-\d\d-\d\dT\d\d:\d\d:[0-5]\d(\.\d{1,6})?(Z|[+-](0\d|1[0-3]):[0-5]\d)$"
_LATEST_MS = 4_000_000_000_000


def table(numbers: list[int], lines: list[bytes], file: str, kind: Kind) -> pa.Table:
    """The lines of a block as `logs.RECORD`: first those that could be read together, then the others."""
    plain = pl.concat(
        [pl.DataFrame(schema={"row": pl.UInt32(), **logs.FRAME}), *_plain(lines, 0, kind)], how="diagonal"
    )
    rest = sorted(set(range(len(lines))) - set(plain["row"].to_list()))
    slow = [record(lines[row], file, numbers[row], kind) for row in rest]
    read = plain.with_columns(file=pl.lit(file), line=pl.Series(numbers, dtype=pl.Int64).gather(plain["row"]))
    return pa.concat_tables([logs.table(read.select(list(logs.FRAME)).to_arrow()), logs.table(slow)])


def record(line: bytes, file: str, number: int, kind: Kind) -> dict[str, Any]:
    """One line as a record; a broken one as a reject with its reason."""
    place = {"file": file, "line": number}
    try:
        entry = _entry(line)
        return place | (_query(entry) if kind == "queries" else _event(entry))
    except Broken as fault:
        return place | logs.reject(line, str(fault))


# Line by line


def _entry(line: bytes) -> dict[str, Any]:
    if not line.strip():
        raise Broken("empty line")
    entry = logs.parsed(line)
    if not isinstance(entry, dict):
        raise Broken("not a JSON object")
    source = entry.get("_source")  # a hit of an export
    return source if isinstance(source, dict) else entry


def _query(entry: dict[str, Any]) -> dict[str, Any]:
    attributes = _inner(entry, "query_attributes")
    start = attributes.get("start")
    start = 0 if start is None else start
    if not isinstance(start, int) or isinstance(start, bool) or not 0 <= start < LAST_POSITION:
        raise Broken("query_attributes.start is no offset")
    return {
        "kind": "query",
        "query_id": _text(entry, "query_id"),
        "query": _searched(_text(entry, "user_query")),
        "client": _text(entry, "client_id"),
        "time": logs.moment(entry.get("timestamp")),
        "start": start,
        "hits": _hits(entry.get("query_response_hit_ids")),
        "shuffled": attributes.get("shuffled") is True,
    }


def _searched(typed: str) -> str:
    query = normalise(typed)
    if not query:
        raise Broken("user_query is blank")
    return query


def _hits(listed: Any) -> list[str] | None:
    """The documents of a page in order, or None where the log says them in other lines."""
    if listed in (None, []):
        return None
    if not isinstance(listed, list) or any(isinstance(hit, bool | dict | list) or hit in (None, "") for hit in listed):
        raise Broken("query_response_hit_ids is no list of ids")
    return [str(hit) for hit in listed]


def _event(entry: dict[str, Any]) -> dict[str, Any]:
    kind = _kind(_text(entry, "action_name"))
    if kind == "other":
        return {"kind": kind}
    attributes = _inner(entry, "event_attributes")
    typed = entry.get("user_query")
    return {
        "kind": kind,
        "query_id": _named(entry),
        "query": normalise(typed) if isinstance(typed, str) else None,
        "client": _text(entry, "client_id"),
        "time": logs.moment(entry.get("timestamp")),
        "doc_id": _object_id(attributes),
        "position": _ordinal(_inner(attributes, "position").get("ordinal")),
        "dwell_s": _dwell(attributes.get("dwell_time")),
    }


def _named(entry: dict[str, Any]) -> str | None:
    """The query_id, or None where the page has to be found by client and query."""
    found = entry.get("query_id")
    if isinstance(found, str) and found:
        return found
    if not isinstance(entry.get("user_query"), str) or not normalise(entry["user_query"]):
        raise Broken("neither query_id nor user_query")
    return None


def _object_id(attributes: dict[str, Any]) -> str:
    """The document, under the names that it has in the wild."""
    for place in ("object", "data"):
        for name in ("object_id", "internal_id"):
            found = _inner(attributes, place).get(name)
            if isinstance(found, str | int) and not isinstance(found, bool) and found != "":
                return str(found)
    raise Broken("no event_attributes.object.object_id")


def _dwell(value: Any) -> float | None:
    measured = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= LONGEST_DWELL_S
    return float(value) if measured else None


def _ordinal(value: Any) -> int | None:
    """A position that may have come as text; None where it is none."""
    try:
        found = int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if 0 <= found <= LAST_POSITION else None


def _inner(entry: dict[str, Any], name: str) -> dict[str, Any]:
    found = entry.get(name)
    return found if isinstance(found, dict) else {}


def _text(entry: dict[str, Any], name: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str) or not value:
        raise Broken(f"no {name}")
    return value


@functools.lru_cache(maxsize=1000)
def _kind(action: str) -> str:
    action = action.casefold()
    named = {"click": CLICKS, "conversion": CONVERSIONS, "shown": SHOWN}
    return next((kind for kind, actions in named.items() if action in actions), "other")


# Many at a time


def _plain(lines: list[bytes], first: int, kind: Kind) -> list[pl.DataFrame]:
    """The records of lines that can be read together, with `row`, their number in the block from `first`."""
    columns = _columns(lines, kind)
    if columns is not None:
        read = _queries(columns) if kind == "queries" else _events(columns)
        return [read.with_columns(pl.col("row") + first)]
    if len(lines) <= FEW:
        return []
    half = len(lines) // 2
    return _plain(lines[:half], first, kind) + _plain(lines[half:], first + half, kind)


def _columns(lines: list[bytes], kind: Kind) -> pl.DataFrame | None:
    """The columns of lines, null for those that Python has to look at; None where Arrow cannot read the others."""
    text = _text_of(lines)
    for time in _TIMES:
        read = _arrow(text, pa.schema([*(_QUERY if kind == "queries" else _EVENT), ("timestamp", time)]))
        if read is not None and read.num_rows == len(lines):
            return pl.DataFrame(pl.from_arrow(read)).with_row_index("row")
    return None


def _text_of(lines: list[bytes]) -> bytes:
    """An object for each line: itself, or an empty one where Arrow and Python might read it differently."""
    text = b"\n".join(lines)
    if b"\r" in text:
        lines = [line.rstrip(b"\r") for line in lines]
    sure = [line[:1] == b"{" and line[-1:] == b"}" and (len(line) < LONG or _is_flat(line)) for line in lines]
    if any(mark in text for mark in UNSURE) or not _is_utf8(text):
        sure = [alike and _is_sure(line) for line, alike in zip(lines, sure, strict=True)]
    if all(sure):
        return text
    return b"\n".join([line if alike else b"{}" for line, alike in zip(lines, sure, strict=True)])


def _is_flat(line: bytes) -> bool:
    """Whether no bracket may be nested deeper than Python's parser goes; Arrow's goes on."""
    return line.count(b"[") + line.count(b"{") <= MANY_BRACKETS


def _is_sure(line: bytes) -> bool:
    return _is_flat(line) and _is_utf8(line) and not any(mark in line for mark in UNSURE[1:])


def _arrow(text: bytes, schema: pa.Schema) -> pa.Table | None:
    # One block, one thread: the parallelism is that of the files.
    whole = pyarrow.json.ReadOptions(use_threads=False, block_size=len(text) + 1)
    known = pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    try:
        return pyarrow.json.read_json(pa.BufferReader(text), whole, known)
    except (pa.ArrowException, UnicodeDecodeError):
        return None


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _queries(found: pl.DataFrame) -> pl.DataFrame:
    start = pl.col("query_attributes").struct.field("start").fill_null(0)
    hits = pl.col("query_response_hit_ids")
    read = found.select(
        "row",
        "query_id",
        kind=pl.lit("query"),
        query=_each(found["user_query"], normalise),
        client="client_id",
        time=_time(found["timestamp"]),
        start=start.cast(pl.Int32, strict=False),
        hits=pl.when(hits.list.len() > 0).then(hits),
        shuffled=pl.col("query_attributes").struct.field("shuffled").fill_null(False),
    )
    clean = read.filter(_given("query_id", "query", "client"), pl.col("time").is_not_null(), _offset("start"))
    every = clean["hits"].drop_nulls().explode()
    if every.has_nulls() or (every == "").any():  # an id that is none: rare, and slow to find in its list
        odd = pl.col("hits").list.eval(pl.element().is_null() | (pl.element() == "")).list.any().fill_null(False)
        return clean.filter(~odd)
    return clean


def _events(found: pl.DataFrame) -> pl.DataFrame:
    attributes = pl.col("event_attributes").struct
    dwell = attributes.field("dwell_time")
    position = attributes.field("position").struct.field("ordinal")
    read = found.select(
        "row",
        "query_id",
        kind=_each(found["action_name"], lambda action: _kind(action) if action else None),
        query=_each(found["user_query"], normalise),
        client="client_id",
        time=_time(found["timestamp"]),
        doc_id=attributes.field("object").struct.field("object_id"),
        position=pl.when(position.is_between(0, LAST_POSITION)).then(position).cast(pl.Int32, strict=False),
        dwell_s=pl.when(dwell.is_between(0, LONGEST_DWELL_S)).then(dwell).cast(pl.Float32),
    )
    other = read.filter(pl.col("kind") == "other").select("row", "kind")
    known = read.filter(pl.col("kind") != "other", _given("query_id", "client", "doc_id"), pl.col("time").is_not_null())
    return pl.concat([other, known], how="diagonal")


def _given(*names: str) -> pl.Expr:
    return pl.all_horizontal(pl.col(name).str.len_bytes() > 0 for name in names)


def _offset(name: str) -> pl.Expr:
    return pl.col(name).is_between(0, LAST_POSITION - 1)


def _each(column: pl.Series, function: Any) -> pl.Series:
    """A function of a text over a column; a text that comes often is worked on once."""
    found = column.drop_nulls().unique()
    return column.replace_strict(found, [function(text) for text in found], default=None, return_dtype=pl.String)


def _time(column: pl.Series) -> pl.Series:
    """Times where they are sure, null elsewhere."""
    if column.dtype == pl.Int64:
        sure = pl.when(column.is_between(0, _LATEST_MS)).then(column)
        return pl.select(sure.cast(pl.Datetime("ms", "UTC"))).to_series()
    text = pl.when(column.str.contains(_ISO)).then(column)
    return pl.select(text.str.to_datetime("%+", time_unit="ms", time_zone="UTC", strict=False)).to_series()
