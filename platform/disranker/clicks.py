"""Searches -> how often each document was shown for a query at a position, clicked, examined and found satisfying.

Counts are all that click models need (`click_models`), and counts of batches add up.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from disranker import tables

PAIR = ["query", "doc_id"]
COUNTS = {
    "query": pl.String,
    "doc_id": pl.String,
    "position": pl.Int32,  # null where the log has none
    "impressions": pl.Int64,
    "clicks": pl.Int64,
    "dwell_sum_s": pl.Float64,
    "dwells": pl.Int64,  # hits with a known dwell
    "examined": pl.Int64,  # impressions at or above the last click of their page; all where it has none
    "satisfied": pl.Int64,  # clicks that ended the search
}
COUNTED = [name for name in COUNTS if name not in (*PAIR, "position")]
TOTALS = {name: COUNTS[name] for name in ("position", "impressions", "clicks", "examined", "satisfied")}
SHUFFLED = {name: COUNTS[name] for name in ("position", "impressions", "clicks")}
Codes = npt.NDArray[np.int64]


def counts(searches: pa.Table, satisfied_dwell_s: float) -> pl.DataFrame:
    """(query, doc_id, position) with the columns of `COUNTS`, in order. Counts of batches add up: `merge`.

    Shoppers read from the top of their page and stop where they are satisfied (the simplified DBN, Chapelle & Zhang
    2009), so what stands at or above the last click was examined, and all of a page without clicks (as Chuklin et al.
    2015 count it). A click satisfied if the shopper stayed `satisfied_dwell_s`; where the log does not tell, if it is
    the last of its page.
    """
    page, docs, shown = _flat(searches)
    last = _last_click(page, shown, searches.num_rows)
    known, click = pl.col("dwell_s").is_not_null(), pl.col("clicked").fill_null(False)
    rows = shown.with_columns(last=pl.Series(last)).select(
        "position",
        impressions=pl.lit(1, pl.Int64),
        clicks=click,
        dwell_sum_s=pl.col("dwell_s").fill_null(0).cast(pl.Float64),
        dwells=known,
        examined=click | (pl.col("position") <= pl.col("last")).fill_null(False),
        satisfied=click
        & pl.when(known)
        .then(pl.col("dwell_s") >= satisfied_dwell_s)
        .otherwise((pl.col("position") == pl.col("last")).fill_null(False)),
    )
    queries = _encoded(searches["query"].combine_chunks())
    return _summed(_Names(queries.codes[page], queries.names), _encoded(docs), rows)


def merge(batches: pl.DataFrame) -> pl.DataFrame:
    """Counts of several batches as counts of all, in one order."""
    return _summed(_encoded(batches["query"].to_arrow()), _encoded(batches["doc_id"].to_arrow()), batches)


def shuffled(searches: pa.Table) -> pl.DataFrame:
    """(position, impressions, clicks) of the first pages marked as shuffled. Those of batches add up: `add`.

    Later pages are left out: they shuffle other, worse documents, so that their clicks compare with each other only.
    """
    page, _, shown = _flat(searches.filter(pc.fill_null(searches["shuffled"], False)))
    first = shown.with_columns(page=pl.Series(page)).filter(pl.col("position").min().over("page") == 1)
    return (
        first.group_by("position")
        .agg(impressions=pl.len().cast(pl.Int64), clicks=pl.col("clicked").sum().cast(pl.Int64))
        .sort("position")
    )


def totals(counted: pl.DataFrame) -> pl.DataFrame:
    """The columns of `TOTALS` by position: all that the models without a parameter per document are fitted on."""
    return add([counted.select(list(TOTALS))])


def add(parts: list[pl.DataFrame]) -> pl.DataFrame:
    """Rows by position of several parts, as `totals` and `shuffled` make them, as those of all."""
    return pl.concat(parts).group_by("position").agg(pl.all().sum()).sort("position")


def thin(counted: pl.DataFrame, share: float, seed: list[int]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(kept, held): counts as if each impression had been held out with probability `share`, alone.

    An impression is a satisfied click, another click, examined without a click, or neither; of each kind a binomial
    number is held, which is what tossing a coin for each of them would give. Dwell stays with what is kept.
    """
    rng = np.random.default_rng(seed)
    held = {"dwell_sum_s": pl.zeros(counted.height, eager=True), "dwells": pl.zeros(counted.height, eager=True)}
    inner = drawn = np.zeros(counted.height, np.int64)
    for name in ("satisfied", "clicks", "examined", "impressions"):  # each holds the one before
        whole = counted[name].to_numpy()
        drawn, inner = drawn + rng.binomial(whole - inner, share), whole
        held[name] = pl.Series(drawn)
    apart = counted.with_columns(values.alias(name).cast(COUNTS[name]) for name, values in held.items())
    kept = counted.with_columns(pl.col(name) - apart[name] for name in COUNTED)
    return kept.filter(pl.col("impressions") > 0), apart.filter(pl.col("impressions") > 0)


@dataclass(frozen=True)
class _Names:
    """Strings as numbers from 0 in the order of the strings."""

    codes: Codes  # a row each
    names: pl.Series  # by code


def _flat(searches: pa.Table) -> tuple[Codes, pa.Array, pl.DataFrame]:
    """(page from 0, doc_id, the rest) of each hit. Strings are what costs, so the query is not copied to each."""
    lists = searches["hits"].cast(pa.list_(tables.HIT)).combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    hits = pa.Table.from_struct_array(lists.flatten())
    rest = pl.DataFrame(pl.from_arrow(hits.drop_columns("doc_id")))
    return np.repeat(np.arange(len(lengths)), lengths), hits["doc_id"].combine_chunks(), rest


def _last_click(page: Codes, shown: pl.DataFrame, pages: int) -> Codes:
    """The position of the last click of each hit's page; below all positions where there is none."""
    limits = np.iinfo(np.int64)
    last = np.full(pages, limits.min)
    clicked = (shown["clicked"] & shown["position"].is_not_null()).fill_null(False).to_numpy()
    np.maximum.at(last, page[clicked], shown["position"].filter(pl.Series(clicked)).to_numpy())
    last[last == limits.min] = limits.max
    return np.asarray(last[page])


def _encoded(strings: pa.Array) -> _Names:
    found = strings.dictionary_encode()
    names = pl.Series(found.dictionary, dtype=pl.String)
    order = names.arg_sort().to_numpy()
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return _Names(rank[found.indices.to_numpy(zero_copy_only=False)], names.gather(order))


def _summed(query: _Names, doc: _Names, rows: pl.DataFrame) -> pl.DataFrame:
    """Counts by query, document and position, in their order.

    The three are packed into one number to sort by: for these seven columns that takes half of what grouping takes.
    """
    position = rows["position"].cast(pl.Int64)
    known = position.drop_nulls().to_numpy()
    low = int(known.min(initial=0)) - 1  # stands for a position that is not known
    width, docs = int(known.max(initial=0)) - low + 1, max(1, len(doc.names))
    assert len(query.names) * docs * width < 1 << 63, "too many queries, documents and positions for one batch"
    key = (query.codes * docs + doc.codes) * width + (position.fill_null(low) - low).to_numpy()
    order = np.argsort(key)
    start = np.flatnonzero(np.diff(key[order], prepend=-1))
    pair, place = np.divmod(key[order[start]], width)
    found = {"query": query.names.gather(pair // docs), "doc_id": doc.names.gather(pair % docs)}
    found["position"] = pl.Series(place + low).replace(low, None)
    for name in COUNTED:
        values = rows[name].cast(COUNTS[name]).to_numpy()
        found[name] = pl.Series(np.add.reduceat(values[order], start) if len(start) else values)
    return pl.DataFrame(found, schema_overrides=COUNTS)
