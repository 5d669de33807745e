"""Searches -> evidence per (query, document): what shoppers would click if they looked.

The position-based model: P(click) = examination[position] * attractiveness[query, document]
(Richardson et al. 2007; fitted by expectation-maximisation as in Chuklin et al. 2015, "Click Models for Web Search").
"""

import numpy as np
import polars as pl
import pyarrow as pa

from disranker import tables

PAIR = ["query", "doc_id"]
COUNTED = ["impressions", "clicks", "dwell_sum_s", "dwells"]
COUNTS = {
    "query": pl.String,
    "doc_id": pl.String,
    "position": pl.Int32,
    "impressions": pl.Int64,
    "clicks": pl.Int64,
    "dwell_sum_s": pl.Float64,
    "dwells": pl.Int64,
}


def counts(searches: pa.Table) -> pl.DataFrame:
    """(query, doc_id, position) with how often shown and clicked, and dwell. Counts of batches add up: `merge`."""
    shown = pl.DataFrame(pl.from_arrow(searches)).select("query", "hits").explode("hits").unnest("hits")
    return (
        shown.group_by(*PAIR, "position")
        .agg(
            impressions=pl.len(),
            clicks=pl.col("clicked").sum(),
            dwell_sum_s=pl.col("dwell_s").sum(),
            dwells=pl.col("dwell_s").count(),
        )
        .select(pl.col(name).cast(kind) for name, kind in COUNTS.items())
    )


def merge(batches: pl.DataFrame) -> pl.DataFrame:
    """Counts of several batches as counts of all, in one order."""
    return batches.group_by(*PAIR, "position").agg(pl.col(COUNTED).sum()).sort(*PAIR, "position").select(list(COUNTS))


def examination(counted: pl.DataFrame, rounds: int, prior_impressions: float) -> dict[int, float]:
    """Examination by position, the largest 1: only products with attractiveness are observed, so scale is a choice.

    The prior pulls a pair that was hardly shown to the mean; without it such pairs explain their own clicks away and
    the curve comes out flat.
    """
    position, place = np.unique(counted["position"].to_numpy(), return_inverse=True)
    pair = counted.select(pl.struct(PAIR).rank("dense")).to_series().to_numpy().astype(np.int64) - 1
    shown, clicked = (counted[name].to_numpy().astype(float) for name in ("impressions", "clicks"))
    if not clicked.sum():
        return {int(p): 1.0 for p in position}
    mean = clicked.sum() / shown.sum()
    examined = 1 / np.sqrt(np.arange(1, len(position) + 1))
    attractive = np.full(pair.max() + 1, mean)
    shown_by_place, shown_by_pair = np.bincount(place, shown), np.bincount(pair, shown)
    for _ in range(rounds):
        e, a = examined[place], attractive[pair]
        unclicked = (shown - clicked) / (1 - e * a)
        examined = np.bincount(place, clicked + unclicked * e * (1 - a)) / shown_by_place
        attracted = np.bincount(pair, clicked + unclicked * a * (1 - e))
        center = attracted.sum() / shown.sum()
        attractive = (attracted + prior_impressions * center) / (shown_by_pair + prior_impressions)
        examined, attractive = np.clip(examined, 1e-3, 0.999), np.clip(attractive, 1e-4, 0.999)
    return {int(p): float(x) for p, x in zip(position, examined / examined.max(), strict=True)}


def expected(counted: pl.DataFrame, examined: dict[int, float]) -> tuple[float, float]:
    """(clicks, examined impressions): their ratio is the mean attractiveness. Sums of parts add up."""
    looks = counted["position"].replace_strict(examined, default=min(examined.values()), return_dtype=pl.Float64)
    return float(counted["clicks"].sum()), float((counted["impressions"] * looks).sum())


def evidence(counted: pl.DataFrame, examined: dict[int, float], mean: float, prior_impressions: float) -> pa.Table:
    """The table `evidence`: attractiveness = clicks over examined impressions, both with the prior at the mean."""
    looks = counted["position"].replace_strict(examined, default=min(examined.values()), return_dtype=pl.Float64)
    grouped = (
        counted.with_columns(looks=pl.col("impressions") * looks)
        .group_by(PAIR)
        .agg(pl.col(*COUNTED, "looks").sum())
        .with_columns(
            attractiveness=((pl.col("clicks") + prior_impressions * mean) / (pl.col("looks") + prior_impressions)).clip(
                0, 1
            ),
            dwell_s=pl.when(pl.col("dwells") > 0).then(pl.col("dwell_sum_s") / pl.col("dwells")),
        )
    )
    return tables.conform("evidence", grouped.sort(PAIR).to_arrow())
