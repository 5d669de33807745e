"""Searches -> how often each document was shown for a query at a position, clicked, examined and found satisfying.

Counts are all that click models need (`click_models`), and counts of batches add up. While they are many they are Arrow
tables, with queries and documents as codes into a dictionary: strings are what costs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

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
PLACE = [*PAIR, "position"]
NAME = pa.dictionary(pa.int32(), pa.string())
# Half as wide as in `COUNTS`: the numbers of one pair are far below 2^31, and moving them is what takes time.
SUMS = [(name, pa.float64() if name == "dwell_sum_s" else pa.int32()) for name in COUNTED]
TABLE = pa.schema([*((name, NAME) for name in PAIR), ("position", pa.int32()), *SUMS])
Codes = npt.NDArray[np.int64]


def counts(searches: pa.Table, satisfied_dwell_s: float) -> pa.Table:
    """(query, doc_id, position) with the columns of `COUNTS`, in order, as `TABLE`. Those of batches add up: `summed`.

    Shoppers read from the top of their page and stop where they are satisfied (the simplified DBN, Chapelle & Zhang
    2009), so what stands at or above the last click was examined, and all of a page without clicks (as Chuklin et al.
    2015 count it). A click satisfied if the shopper stayed `satisfied_dwell_s`; where the log does not tell, if it is
    the last of its page.
    """
    page, hits = _flat(searches)
    query = _Names.of(searches["query"])
    key = _Key.of([_Names(query.codes[page], query.names), _Names.of(hits["doc_id"]), _Names.of(hits["position"])])
    # What was done is part of the number that is sorted: a sort of numbers alone is the fastest way to count.
    rows = np.sort(key.codes * 4 + _done(page, hits, searches.num_rows, satisfied_dwell_s))
    start = _starts(rows >> 2)
    codes, done = rows[start] >> 2, rows & 3
    timed = hits["dwell_s"].is_valid().to_numpy()
    stayed = np.flatnonzero(timed)[np.argsort(key.codes[timed])]  # in order, they are found fast
    of_stayed = np.searchsorted(codes, key.codes[stayed])
    sums = {
        "impressions": np.diff(start, append=len(rows)),
        **{name: _reduced(done >= least, start) for least, name in enumerate(("examined", "clicks", "satisfied"), 1)},
        "dwell_sum_s": np.bincount(of_stayed, hits["dwell_s"].to_numpy()[stayed], len(codes)),
        "dwells": np.bincount(of_stayed, minlength=len(codes)),
    }
    return _table(key, codes, PLACE, {name: sums[name] for name in COUNTED}).cast(TABLE)


def summed(rows: pa.Table, by: list[str]) -> pa.Table:
    """One row for all that are equal in `by`, in the order of these columns; all others are added up."""
    key = _Key.of([_Names.of(rows[name]) for name in by])
    order = np.argsort(key.codes, kind="stable")  # what is in order already, or nearly, takes no time
    start = _starts(key.codes[order])
    others = [name for name in rows.column_names if name not in by]
    return _table(
        key, key.codes[order[start]], by, {name: _reduced(rows[name].to_numpy()[order], start) for name in others}
    )


def sampled(counted: pa.Table, share: float, always: list[str]) -> pa.Table:
    """The rows of some queries: a share of all, by chance but the same in every table, and those always wanted."""
    query = _Names.of(counted["query"])
    # By the high bits of the number of which the low ones decide the part.
    by_chance = tables.slots(query.names.to_pylist()) >> np.uint64(32) < share * 2**32
    wanted = by_chance | pc.is_in(query.names, pa.array(always, pa.string())).to_numpy(zero_copy_only=False)
    return counted.filter(pa.array(wanted[query.codes]))


def by_part(rows: pa.Table, parts: int) -> Iterator[tuple[int, pa.Table]]:
    """(part, rows) of each part that a query among the rows belongs to, in their order."""
    query = _Names.of(rows["query"])
    part = tables.part_of(query.names.to_pylist(), parts)[query.codes]
    order = np.argsort(part, kind="stable")
    for start, end in pairwise(np.append(_starts(part[order]), len(order)).tolist()):
        yield int(part[order[start]]), _compact(rows.take(pa.array(order[start:end])))


def frame(counted: pa.Table) -> pl.DataFrame:
    """Counts with the names of queries and documents in place of codes, as the click models take them."""
    plain = [field.with_type(pa.string()) if field.type == NAME else field for field in counted.schema]
    rows = pl.DataFrame(pl.from_arrow(counted.cast(pa.schema(plain))))
    return rows.cast({name: COUNTS[name] for name in rows.columns if name in COUNTS})


def coded(counted: pl.DataFrame) -> pa.Table:
    """The other way round."""
    rows = counted.to_arrow()
    return pa.table({name: _encoded(rows[name]) if name in PAIR else rows[name] for name in rows.column_names})


def shuffled(searches: pa.Table) -> pl.DataFrame:
    """(position, impressions, clicks) of the first pages marked as shuffled. Those of batches add up: `add`.

    Later pages are left out: they shuffle other, worse documents, so that their clicks compare with each other only.
    """
    page, hits = _flat(searches.filter(pc.fill_null(searches["shuffled"], False)))
    shown = pl.DataFrame(pl.from_arrow(hits.select(["position", "clicked"])))
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
    """Values as numbers from 0 in the order of the values."""

    codes: Codes  # a row each
    names: pa.Array  # by code

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> Self:
        whole = _encoded(column)
        order = pc.sort_indices(whole.dictionary).to_numpy()
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        return cls(rank[whole.indices.to_numpy()], whole.dictionary.take(pa.array(order)))


@dataclass(frozen=True)
class _Key:
    """Several columns as one number a row, in the order of the columns: fast to sort by."""

    codes: Codes
    names: Sequence[pa.Array]

    @classmethod
    def of(cls, columns: Sequence[_Names]) -> Self:
        codes, size = np.zeros(len(columns[0].codes), np.int64), 4
        for column in columns:
            codes, size = codes * max(1, len(column.names)) + column.codes, size * max(1, len(column.names))
        assert size < 1 << 63, "too many queries, documents and positions for one batch"
        return cls(codes, [column.names for column in columns])

    def columns(self, codes: Codes) -> list[pa.Array]:
        """The columns of these numbers: strings with their dictionary, others as they were."""
        found = []
        for names in reversed(self.names):
            whole = codes // max(1, len(names))
            codes, code = whole, codes - whole * max(1, len(names))
            found.append(_coded(names, code) if pa.types.is_string(names.type) else names.take(pa.array(code)))
        return found[::-1]


def _compact(rows: pa.Table) -> pa.Table:
    """The rows, their dictionaries without names that do not occur."""
    columns = {name: rows[name] for name in rows.column_names}
    found = {name: _encoded(column) for name, column in columns.items() if pa.types.is_dictionary(column.type)}
    return pa.table(columns | {name: _coded(all.dictionary, all.indices.to_numpy()) for name, all in found.items()})


def _encoded(column: pa.ChunkedArray) -> pa.DictionaryArray:
    if pa.types.is_large_string(column.type):  # as Polars hands them out
        column = column.cast(pa.string())
    if pa.types.is_dictionary(column.type):
        return column.unify_dictionaries().combine_chunks()
    return column.combine_chunks().dictionary_encode("encode")


def _coded(names: pa.Array, codes: npt.NDArray[np.integer]) -> pa.DictionaryArray:
    there = np.zeros(len(names), bool)
    there[codes] = True
    return pa.DictionaryArray.from_arrays(
        pa.array((np.cumsum(there) - 1)[codes], pa.int32()), names.filter(pa.array(there))
    )


def _table(key: _Key, codes: Codes, by: list[str], sums: dict[str, npt.NDArray[Any]]) -> pa.Table:
    return pa.table(dict(zip(by, key.columns(codes), strict=True)) | sums)


def _starts(ordered: Codes) -> Codes:
    """Where each run of equal numbers begins."""
    new = np.ones(len(ordered), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    return np.flatnonzero(new)


def _reduced(values: npt.NDArray[Any], start: Codes) -> npt.NDArray[Any]:
    """The sum of each run of rows; of true and false, how many are true."""
    kind = np.dtype(np.int32) if values.dtype == bool else values.dtype
    return np.asarray(np.add.reduceat(values, start, dtype=kind) if len(start) else np.zeros(0, kind))


def _flat(searches: pa.Table) -> tuple[Codes, pa.Table]:
    """(page from 0 of each hit, the hits)."""
    lists = searches["hits"].combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    hits = pa.Table.from_struct_array(lists.flatten())
    return np.repeat(np.arange(len(lengths)), lengths), hits


def _done(page: Codes, hits: pa.Table, pages: int, satisfied_dwell_s: float) -> Codes:
    """0 for a hit that was passed over, 1 examined, 2 clicked too, 3 to satisfaction: each holds the one before."""
    position, dwell = hits["position"], hits["dwell_s"]
    placed, timed = (column.is_valid().to_numpy() for column in (position, dwell))
    place = pc.fill_null(position, 0).to_numpy().astype(np.int64)
    clicked = pc.fill_null(hits["clicked"], False).to_numpy()
    last = _last_click(page, np.flatnonzero(clicked & placed), place, pages)
    examined = clicked | (placed & (place <= last))
    stayed = pc.fill_null(dwell, 0).to_numpy().astype(np.float64) >= satisfied_dwell_s
    satisfied = clicked & np.where(timed, stayed, placed & (place == last))
    return np.asarray(examined.astype(np.int64) + clicked + satisfied)


def _last_click(page: Codes, clicks: Codes, place: Codes, pages: int) -> Codes:
    """The place of the last click of each hit's page, of the hits `clicks`; beyond all places where there is none."""
    limits = np.iinfo(np.int64)
    last = np.full(pages, limits.min)
    np.maximum.at(last, page[clicks], place[clicks])
    last[last == limits.min] = limits.max
    return np.asarray(last[page])
