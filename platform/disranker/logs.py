"""Records of a log -> search rows, or rejects with a reason.

Whatever its format, a log line becomes a record (`ubi.py`, `flat.py`). All records of a client meet in one part, and
those of a period in one cell of it, where they are joined.
"""

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from disranker import tables
from disranker.inputs import Ingest

RAW_CHARACTERS = 500  # of a refused line that are kept
MS = 1000
DAY_MS = 24 * 60 * 60 * MS
LONGEST_DWELL_S = 1e9  # what is longer, or infinite, was not measured
LAST_POSITION = 1_000_000

RECORD = pa.schema(
    [
        ("kind", pa.string()),  # query, shown, click, conversion, row (of a flat log), other or reject
        ("query_id", pa.string()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("time", pa.timestamp("ms", tz="UTC")),
        ("query", pa.string()),
        ("client", pa.string()),
        ("start", pa.int32()),
        ("hits", pa.list_(pa.string())),
        ("shuffled", pa.bool_()),
        ("doc_id", pa.string()),
        ("position", pa.int32()),
        ("clicked", pa.bool_()),  # of a row
        ("converted", pa.bool_()),  # of a row
        ("dwell_s", pa.float32()),
        ("reason", pa.string()),
        ("raw", pa.string()),
    ]
)
FRAME = dict(pl.DataFrame(pl.from_arrow(RECORD.empty_table())).schema)
# Which of two lines that say different things of one search counts must not hang on the files they lie in.
ORDER = ["time", "query_id", "kind", "doc_id", "query", "position", "dwell_s", "file", "line"]
PAGE = ["query_id", "query", "client", "time", "start", "hits", "shuffled"]
STRAY = "no result page has this query_id"
LOST = "no result page of this client and query was shown in time"
UNSEEN = "the document was not on the result page"
EMPTY = "no query_response_hit_ids, and no impression"


class Broken(ValueError):
    """Why one line is refused."""


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


def moment(value: Any) -> datetime:
    """ISO 8601, or milliseconds since 1970; without a zone, UTC. Raises `Broken`."""
    try:
        if isinstance(value, int | float):
            return datetime.fromtimestamp(value / MS, UTC)
        found = datetime.fromisoformat(str(value))
        return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
    except (ValueError, OverflowError, OSError):
        raise Broken("timestamp is neither ISO 8601 nor milliseconds") from None


def reject(line: bytes, reason: str) -> dict[str, Any]:
    """What is kept of a line that cannot be used."""
    raw = line[:RAW_CHARACTERS].decode(errors="replace").rstrip("\r\n")
    return {"kind": "reject", "reason": reason, "raw": raw}


def table(rows: list[dict[str, Any]] | pa.Table) -> pa.Table:
    """Records as a table of `RECORD`."""
    return pa.Table.from_pylist(rows, schema=RECORD) if isinstance(rows, list) else rows.cast(RECORD)


def period(cfg: Ingest, margin_s: float = 0) -> pl.Expr:
    """The period, counted from 1970, that `time` (plus a margin) falls into."""
    return (pl.col("time").cast(pl.Int64) + round(margin_s * MS)).floordiv(cfg.period_days * DAY_MS)


def join(part: pa.Table, cfg: Ingest, only: int | None = None) -> tuple[pa.Table, pa.Table, dict[str, int]]:
    """Records of one cell -> (searches, rejects, counts): each result page once, with what was done on it.

    `part` also holds what lies up to `cfg.late_s` before and after the period `only`; what falls into that comes out.
    Without a period, all does.
    """
    rows = pl.DataFrame(pl.from_arrow(part)).sort(ORDER, nulls_last=True)
    rows = _with_pages_named(rows, cfg)
    queries = _pages(rows)
    pages = queries.unique("query_id", keep="first", maintain_order=True).sort("query_id").with_row_index("page")
    events = _with_pages_found(rows.filter(pl.col("kind").is_in(["shown", "click", "conversion"])), pages, cfg)
    once = events.unique(["query_id", "doc_id", "kind", "time", "client"], keep="first", maintain_order=True)

    known = once.filter(pl.col("reason").is_null())
    flat = rows.filter(pl.col("kind") == "row").with_columns(found=pl.lit(False))
    hits = _hits(pages, pl.concat([known.filter(pl.col("kind") == "shown"), flat]))
    done = pl.concat([known.filter(pl.col("kind") != "shown"), _as_events(flat)])
    searches, used, empty = _searches(pages, hits, done)
    unseen = done.join(used, on=["query_id", "doc_id"], how="anti").with_columns(reason=pl.lit(UNSEEN))
    refused = [once.filter(pl.col("reason").is_not_null()), unseen, empty.with_columns(reason=pl.lit(EMPTY))]
    own = pl.lit(True) if only is None else period(cfg) == only
    counted = done.join(used, on=["query_id", "doc_id"], how="semi").filter(own)
    counts = {
        "searches": searches.filter(own).height,
        "duplicate_queries": queries.filter(own).height - pages.filter(own).height,
        "duplicate_events": events.filter(own).height - once.filter(own).height,
        "clicks": counted.filter(pl.col("kind") == "click").height,
        "conversions": counted.filter(pl.col("kind") == "conversion").height,
        "found_by_client_and_query": known.filter(own, pl.col("found")).height,
    }
    rejects = pl.concat(refused, how="diagonal").filter(own).sort("file", "line")
    rejects = rejects.select("file", "line", "reason", raw=_said())
    table = tables.conform("searches", searches.filter(own).to_arrow())
    return table, tables.conform("rejects", rejects.to_arrow()), {name: int(n) for name, n in counts.items()}


def _said() -> pl.Expr:
    """What stands for the line of a record that was whole, without the words of its query."""
    page, document = pl.col("query_id").fill_null("?"), pl.col("doc_id").fill_null("none")
    return pl.format("{} of query_id {}, document {}", "kind", page, document)


def _with_pages_named(rows: pl.DataFrame, cfg: Ingest) -> pl.DataFrame:
    """Rows of a flat log without a query_id get one: a page is what one client sees for one query without a gap."""
    nameless = (pl.col("kind") == "row") & pl.col("query_id").is_null()
    if not rows.select(nameless.any()).item():
        return rows
    who = ["client", "query"]
    found = rows.filter(nameless).sort(*who, "time")
    # A page ends at the border of its period, so that each period can be joined alone.
    late = pl.col("time").diff().over(who) > pl.duration(seconds=cfg.page_gap_s)
    begins = late | (period(cfg).diff().over(who) > 0)
    numbered = found.with_columns(page=begins.fill_null(True).cum_sum().over(who))
    first = pl.col("time").first().over(*who, "page").cast(pl.Int64)
    named = numbered.with_columns(query_id=pl.format("{} {} {}", "client", first, "query")).drop("page")
    return pl.concat([rows.filter(~nameless), named]).sort(ORDER, nulls_last=True)


def _pages(rows: pl.DataFrame) -> pl.DataFrame:
    """Result pages, of query records and of the rows of flat logs, earliest first."""
    queries = rows.filter(pl.col("kind") == "query").select(*PAGE, "kind", "file", "line", "doc_id")
    flat = rows.filter(pl.col("kind") == "row").group_by("query_id", maintain_order=True)
    first = flat.agg(
        pl.col("query", "client", "time", "hits", "kind", "file", "line", "doc_id").first(),
        start=pl.lit(0, pl.Int32),
        shuffled=pl.col("shuffled").any(),
    )
    return pl.concat([queries, first.select(queries.columns)]).sort("time", maintain_order=True)


def _with_pages_found(events: pl.DataFrame, pages: pl.DataFrame, cfg: Ingest) -> pl.DataFrame:
    """Events with the query_id of their page and `found` where that was looked up; a reason where there is no page."""
    late = pl.duration(seconds=cfg.late_s)
    shown_at = pages.select("query_id", shown_at="time")
    named = events.filter(pl.col("query_id").is_not_null()).join(shown_at, on="query_id", how="left")
    in_time = (pl.col("time") - pl.col("shown_at")).abs() <= late
    named = named.with_columns(reason=pl.when(in_time.fill_null(False)).then(None).otherwise(pl.lit(STRAY)))

    nameless = events.filter(pl.col("query_id").is_null()).drop("query_id").sort("time")
    candidates = pages.select("query_id", "client", "query", "time").with_columns(shown_at="time").sort("time")
    looked = nameless.join_asof(
        candidates,
        on="time",
        by=["client", "query"],
        strategy="backward",
        tolerance=f"{cfg.page_gap_s}s",
        check_sortedness=False,  # both are, just above
    ).with_columns(reason=pl.when(pl.col("query_id").is_null()).then(pl.lit(LOST)))
    both = [named.with_columns(found=pl.lit(False)), looked.with_columns(found=pl.lit(True))]
    return pl.concat([frame.select(*events.columns, "found") for frame in both]).sort(ORDER, nulls_last=True)


def _hits(pages: pl.DataFrame, shown: pl.DataFrame) -> pl.DataFrame:
    """(page, doc_id, position from 1 over all pages) in the order of pages and positions, each document once a page.

    Of a page whose query record lists none, the documents that other lines say were shown.
    """
    listed = (
        pages.select("page", "start", doc_id="hits")
        .filter(pl.col("doc_id").is_not_null())
        .with_columns(index=pl.int_ranges(pl.col("doc_id").list.len(), dtype=pl.Int32))
        .explode("doc_id", "index")
        .select("page", "doc_id", position=pl.col("start") + pl.col("index") + 1)
    )
    # Impressions of some senders count from 0.
    from_zero = (pl.col("position").min().over("query_id") == 0) & (pl.col("kind") == "shown")
    seen = shown.with_columns(position=pl.col("position") + from_zero.fill_null(False).cast(pl.Int32))
    bare = pages.filter(pl.col("hits").is_null()).select("page", "query_id")
    other = seen.join(bare, on="query_id").select("page", "doc_id", "position")
    ordered = listed
    if other.height:
        ordered = pl.concat([listed, other]).sort("page", "position", "doc_id", nulls_last=True, maintain_order=True)
    if ordered.select(_key().is_duplicated().any()).item():
        return ordered.unique(["page", "doc_id"], keep="first", maintain_order=True)
    return ordered


def _key() -> pl.Expr:
    """A number that two hits share only if they are the same document of the same page, or by a rare accident."""
    return pl.struct("page", pl.col("doc_id").hash()).hash()


def _as_events(flat: pl.DataFrame) -> pl.DataFrame:
    """Clicks and conversions of the rows of a flat log."""
    clicks = flat.filter("clicked").with_columns(kind=pl.lit("click"))
    conversions = flat.filter("converted").with_columns(kind=pl.lit("conversion"))
    return pl.concat([clicks, conversions])


def _searches(
    pages: pl.DataFrame, hits: pl.DataFrame, events: pl.DataFrame
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """(searches by query_id, (query_id, doc_id) on which something was done, pages on which nothing was shown)."""
    click = pl.col("kind") == "click"
    named = pages.select("page", "query_id")
    done = (
        events.join(named, on="query_id")
        .group_by("page", "doc_id")
        .agg(
            pl.col("query_id").first(),
            clicked=click.any(),
            converted=(pl.col("kind") == "conversion").any(),
            # A sum of nothing known is unknown, not zero seconds.
            dwell_s=pl.when((click & pl.col("dwell_s").is_not_null()).any()).then(
                pl.col("dwell_s").filter(click).sum()
            ),
        )
    )
    # Most hits are left alone: those of the others are looked up by a number first, and by name among the few.
    keys = done.select(_key()).to_series().implode()
    few = hits.with_row_index("at").filter(_key().is_in(keys))
    used = few.join(done, on=["page", "doc_id"])
    shown = pages.join(hits.select("page").unique(), on="page", how="semi", maintain_order="left")
    lists = _lists(hits, used)
    searches = shown.select("query_id", "query", "client", "time", pl.col("shuffled").fill_null(False), hits=lists)
    empty = pages.join(shown.select("page"), on="page", how="anti")
    return searches, used.select("query_id", "doc_id"), empty


def _lists(hits: pl.DataFrame, used: pl.DataFrame) -> pl.Series:
    """The hits of each page as a list, in their order; `used` says what was done at which of them."""
    at, dwell = used["at"].to_numpy(), used["dwell_s"]
    flags = {name: np.zeros(hits.height, bool) for name in ("clicked", "converted")}
    for name, flag in flags.items():
        flag[at] = used[name].to_numpy()
    seconds, known = np.zeros(hits.height, np.float32), np.zeros(hits.height, bool)
    seconds[at], known[at] = dwell.fill_null(0).to_numpy(), dwell.is_not_null().to_numpy()
    columns = [hits["doc_id"].to_arrow().cast(pa.string()), hits["position"].to_arrow(), pa.array(flags["clicked"])]
    columns += [pa.array(seconds, mask=~known), pa.array(flags["converted"])]
    lengths = hits["page"].rle().struct.field("len").to_numpy() if hits.height else np.zeros(0, np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)
    return pl.Series(
        pl.from_arrow(pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(columns, fields=list(tables.HIT))))
    )


def refusals(reasons: Iterable[str]) -> dict[str, int]:
    """How often each reason occurs, most frequent first."""
    counted = pl.Series("reason", list(reasons), dtype=pl.String).value_counts(sort=True)
    return dict(counted.iter_rows())
