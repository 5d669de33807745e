"""Counts -> evidence per (query, document): what shoppers would click if they looked, by one of four click models.

ctr   clicks over impressions, wherever shown.
coec  clicks over the clicks expected at the ranks shown, by the click rate of each rank (Zhang & Jones, WWW 2007).
pbm   position-based: P(click) = examination[position] * attractiveness[query, document] (Richardson et al. 2007),
      fitted by expectation-maximisation as in chapter 4 of Chuklin et al. 2015, "Click Models for Web Search".
dbn   simplified dynamic Bayesian network (Chapelle & Zhang 2009): attractive if clicked when examined, relevant if the
      click also satisfied.

No UBM: a row for each distance to the click above makes 1.7 times the counts, and on the log of the ESCI sample it
agreed with human grades no better than pbm (0.651 against 0.649, intervals of 0.03 to each side).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from disranker import clicks, tables
from disranker.clicks import PAIR

MODELS = ("ctr", "coec", "pbm", "dbn")
Z_95 = 1.96  # standard errors on each side of a 95% interval
UNKNOWN = -1  # a position that the log does not have
LEAST, MOST = 1e-3, 0.999  # examination stays within; attractiveness may be a tenth of the least


@dataclass(frozen=True)
class Fitted:
    """A click model: all of it but the attractiveness of each document, which `attractive` has."""

    name: str
    examination: dict[int | None, float]  # by position; coec: the first is 1, pbm: the largest
    mean: float  # attractiveness, clicks over examined impressions; what a document hardly shown is pulled to
    satisfaction: float = 1.0  # mean share of clicks that satisfy (dbn)


@dataclass(frozen=True)
class Statistics:
    """What one part has to say after a round of EM; those of several parts add up."""

    examined: dict[int, float]  # impressions by position that were examined, in expectation
    attracted: float  # impressions of a document that attracted, in expectation


Numbers = npt.NDArray[np.float64]
Expect = Callable[[dict[int, float], float], Iterable[Statistics]]


class Part:
    """The counts of some queries, all of each, as the rounds of EM need them."""

    def __init__(self, counted: pl.DataFrame, prior_impressions: float):
        self.prior_impressions = prior_impressions
        self.positions, self.place = np.unique(counted["position"].to_numpy(), return_inverse=True)
        pair = counted.select(pl.struct(PAIR).rank("dense")).to_series()
        self.pair = pair.to_numpy().astype(np.int64) - 1
        self.shown = counted["impressions"].to_numpy().astype(float)
        self.clicked = counted["clicks"].to_numpy().astype(float)
        self.shown_by_pair = np.bincount(self.pair, self.shown)

    def expect(
        self, examined: dict[int, float], center: float, attracted: Numbers | None
    ) -> tuple[Statistics, Numbers]:
        """One round of EM, given examination and mean attractiveness of all parts, and what the last one attracted.

        -> (statistics, impressions of each pair that attracted, for the next round). The prior pulls a pair that was
        hardly shown to the mean; without it such pairs explain their own clicks away and the curve comes out flat.
        """
        e = np.array([examined[int(p)] for p in self.positions])[self.place]
        a = self._attractive(center, attracted)[self.pair]
        unclicked = (self.shown - self.clicked) / (1 - e * a)
        by_place = np.bincount(self.place, self.clicked + unclicked * e * (1 - a), len(self.positions))
        now = np.bincount(self.pair, self.clicked + unclicked * a * (1 - e)).astype(float)
        found = {int(p): float(x) for p, x in zip(self.positions, by_place, strict=True)}
        return Statistics(found, float(now.sum())), now

    def _attractive(self, center: float, attracted: Numbers | None) -> Numbers:
        if attracted is None:
            return np.full(len(self.shown_by_pair), center)
        smoothed = (attracted + self.prior_impressions * center) / (self.shown_by_pair + self.prior_impressions)
        return np.clip(smoothed, LEAST / 10, MOST)


def pbm(totals: pl.DataFrame, expect: Expect, rounds: int) -> Fitted:
    """The position-based model, its largest examination 1: only products with attractiveness are observed.

    `totals` of all parts; `expect(examined, center)` gives the statistics of each by `Part.expect`, wherever they are.
    """
    shown = dict(totals.select("position", "impressions").iter_rows())
    clicked, impressions = float(totals["clicks"].sum()), float(totals["impressions"].sum())
    if not clicked:
        return _fitted("pbm", totals, dict.fromkeys(shown, 1.0))
    examined = {p: min(MOST, 1 / np.sqrt(rank)) for rank, p in enumerate(shown, start=1)}
    center = clicked / impressions
    for _ in range(rounds):
        parts = list(expect(examined, center))
        sums = {p: sum(part.examined.get(p, 0.0) for part in parts) for p in shown}
        examined = {p: float(np.clip(sums[p] / shown[p], LEAST, MOST)) for p in shown}
        center = sum(part.attracted for part in parts) / impressions
    largest = max(examined.values())
    return _fitted("pbm", totals, {p: x / largest for p, x in examined.items()})


def ctr(totals: pl.DataFrame) -> Fitted:
    """Every position counts as examined."""
    return _fitted("ctr", totals, dict.fromkeys(totals["position"].to_list(), 1.0))


def coec(totals: pl.DataFrame) -> Fitted:
    """Examination is the click rate of a rank over that of the first, as if all ranks showed equally good documents."""
    rates = dict(totals.select("position", pl.col("clicks") / pl.col("impressions")).iter_rows())
    first = next(iter(rates.values()), 0.0)
    return _fitted("coec", totals, {p: rate / first if first else 1.0 for p, rate in rates.items()})


def dbn(totals: pl.DataFrame) -> Fitted:
    """Examined is what stands at or above the last click of its page, and all of a page without clicks."""
    curve = dict(totals.select("position", pl.col("examined") / pl.col("impressions")).iter_rows())
    sums = totals.sum().row(0, named=True)
    return Fitted(
        "dbn",
        curve,
        mean=_share(sums["clicks"], sums["examined"]),
        satisfaction=_share(sums["satisfied"], sums["clicks"]),
    )


def impossible(totals: pl.DataFrame) -> dict[str, str]:
    """The models that this log cannot give, each with the reason; plain CTR needs no positions and is always there."""
    unknown = int(totals.filter(pl.col("position").is_null())["impressions"].sum())
    if not unknown:
        return {}
    shown = int(totals["impressions"].sum())
    reason = f"{unknown:,} of {shown:,} impressions have no position"
    return {
        "coec": f"{reason}, so clicks expected at a rank are not known",
        "pbm": f"{reason}, so examination by position cannot be estimated",
        "dbn": f"{reason}, so what stood above the last click of a page is not known",
    }


def pairs(counted: pa.Table, fitted: Fitted) -> pa.Table:
    """(query, doc_id, sums of COUNTED, looks) of `clicks.counts`, in order; those of several tables add up.

    looks: how often the model says that the document was examined.
    """
    if fitted.name == "dbn":
        looks = counted["examined"].cast(pa.float64())
    else:
        looks = pa.array(counted["impressions"].to_numpy() * _examined(counted["position"], fitted))
    return clicks.summed(counted.drop_columns("position").append_column("looks", looks), PAIR)


def shown_by_each_search(found: pl.DataFrame) -> pl.DataFrame:
    """`pairs` with the `searches` of their query, of a log of clicks alone: each search counts as showing them."""
    shown = pl.max_horizontal("searches", "clicks")
    return found.with_columns(impressions=shown, examined=shown, looks=shown.cast(pl.Float64))


def attractive(found: pl.DataFrame, fitted: Fitted, prior_impressions: float) -> pl.DataFrame:
    """`pairs` with clickable and attractiveness, both pulled to their means by `prior_impressions`.

    clickable: P(click | examined). attractiveness: what feeds the evidence, for dbn times P(satisfied | click), else
    the same.
    """
    satisfied = (pl.col("satisfied") + prior_impressions * fitted.satisfaction) / (pl.col("clicks") + prior_impressions)
    clickable = (pl.col("clicks") + prior_impressions * fitted.mean) / (pl.col("looks") + prior_impressions)
    return found.with_columns(clickable=clickable.clip(0, 1)).with_columns(
        attractiveness=pl.col("clickable") * (satisfied if fitted.name == "dbn" else 1.0)
    )


def by_pair(counted: pa.Table, fitted: Fitted, prior_impressions: float) -> pl.DataFrame:
    """`attractive` of counts with all positions of each pair, in order."""
    return attractive(clicks.frame(pairs(counted, fitted)), fitted, prior_impressions)


def evidence(found: pl.DataFrame) -> pa.Table:
    """The table `evidence` of rows as `attractive` makes them."""
    dwell = pl.when(pl.col("dwells") > 0).then(pl.col("dwell_sum_s") / pl.col("dwells"))
    return tables.conform("evidence", found.with_columns(dwell_s=dwell).to_arrow())


def predicted(counted: pl.DataFrame, by_pair: pl.DataFrame, fitted: Fitted) -> pl.DataFrame:
    """`counted` with `p`, the click probability of each row by `by_pair`; the mean for pairs that are not in it."""
    known = counted.join(by_pair.select(*PAIR, "clickable"), on=PAIR, how="left", maintain_order="left")
    p = pl.Series(_examined(counted["position"].to_arrow(), fitted)) * pl.col("clickable").fill_null(fitted.mean)
    return known.with_columns(p=p.clip(1e-6, 1 - 1e-6)).drop("clickable")


def interventional(shuffled: pl.DataFrame) -> pl.DataFrame:
    """(position, examination, low, high) of `clicks.shuffled`; no row without clicks on the first position.

    On shuffled pages each position shows equally good documents, so the ratio of click rates is that of examinations.
    The 95% interval is that of a ratio of two proportions, normal in its logarithm (Katz et al., Biometrics 1978), with
    half a click and half an impression added where a position has none (Walter 1975).
    """
    first = shuffled.head(1)
    if not first["clicks"].sum():
        return shuffled.head(0).select("position", examination=0.0, low=0.0, high=0.0)
    half = pl.when(pl.col("clicks") == 0).then(0.5).otherwise(0.0)
    c, n = pl.col("clicks") + half, pl.col("impressions") + half
    c1, n1 = float(first["clicks"][0]), float(first["impressions"][0])
    ratio, error = (c / n) / (c1 / n1), (1 / c - 1 / n + 1 / c1 - 1 / n1).sqrt()
    error = pl.when(pl.col("position") == first["position"][0]).then(0.0).otherwise(error)
    return shuffled.select(
        "position",
        examination=pl.when(pl.col("clicks") == 0).then(0.0).otherwise(ratio),
        low=pl.when(pl.col("clicks") == 0).then(0.0).otherwise(ratio * (-Z_95 * error).exp()),
        high=ratio * (Z_95 * error).exp(),
    )


def _fitted(name: str, totals: pl.DataFrame, examined: dict[int | None, float]) -> Fitted:
    looks = sum(examined[p] * n for p, n in totals.select("position", "impressions").iter_rows())
    return Fitted(name, examined, mean=_share(float(totals["clicks"].sum()), looks))


def _examined(position: pa.Array | pa.ChunkedArray, fitted: Fitted) -> Numbers:
    """Examination of each row; a position that the model has not seen counts as its least examined one."""
    curve = {UNKNOWN if place is None else place: x for place, x in fitted.examination.items()}
    if not curve:
        return np.ones(len(position))
    places, values = np.array(sorted(curve)), np.array([curve[place] for place in sorted(curve)])
    wanted = pc.fill_null(position, UNKNOWN).to_numpy(zero_copy_only=False)
    near = np.minimum(np.searchsorted(places, wanted), len(places) - 1)
    return np.where(places[near] == wanted, values[near], values.min())


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0
