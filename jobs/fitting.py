"""The click models that `aggregate` fits on the counts of some queries, and how they compare."""

from typing import Any

import polars as pl
import ray

from disranker import click_choice, click_models, clicks
from disranker.click_models import Fitted, Part, Statistics
from disranker.recipe import Aggregate, Recipe, Refused
from jobs import counting
from jobs.counting import Scratch

SEARCHES = 200_000  # of queries taken by chance: a curve has few numbers, and all queries are read by it

Rows = list[dict[str, Any]]


@ray.remote(num_returns=3)
def _load(numbers: list[int], scratch: Scratch, prior_impressions: float) -> tuple[Any, ...]:
    read = {number: counting.some(number, scratch) for number in numbers}
    models = [Part(counted, prior_impressions) for counted in read.values()]
    return read, clicks.add([clicks.totals(counted) for counted in read.values()]), models


@ray.remote(num_returns=2)
def _expect(models: list[Part], examined: dict[int, float], center: float, last: list[Any]) -> tuple[Any, ...]:
    found = [part.expect(examined, center, one) for part, one in zip(models, last or [None] * len(models), strict=True)]
    return [said for said, _ in found], [attracted for _, attracted in found]


@ray.remote
def _compare(
    read: dict[int, pl.DataFrame], models: dict[str, Fitted], grades: pl.DataFrame, cfg: Aggregate, seed: int
) -> Rows:
    """For each part and model: the attractiveness of graded queries, and the loss on impressions held out."""
    found = []
    for number, counted in read.items():
        kept, held = clicks.thin(counted, cfg.held_out_share, [seed, number])
        graded = counted.join(grades.select("query").unique(), on="query", how="semi")
        both = [clicks.coded(rows) for rows in (graded, kept)]
        for name, fitted in models.items():
            pairs, known = (click_models.by_pair(rows, fitted, cfg.prior_impressions) for rows in both)
            loss = click_choice.loss(held, known, fitted)
            found.append({"model": name, "loss": loss, "pairs": pairs.select(*clicks.PAIR, "attractiveness")})
    return found


class Some:
    """The counts of the queries to fit on, in the memory of the cluster: some parts for each CPU."""

    def __init__(self, parts: int, scratch: Scratch, cfg: Aggregate):
        groups = min(parts, max(1, int(ray.cluster_resources().get("CPU", 1))))
        numbers = [list(range(first, parts, groups)) for first in range(groups)]
        loaded = [_load.remote(mine, scratch, cfg.prior_impressions) for mine in numbers]
        self.read, totals, self._models = zip(*loaded, strict=True)
        self.totals = clicks.add(ray.get(list(totals)))
        self._attracted: Any = [None] * groups

    def expect(self, examined: dict[int, float], center: float) -> list[Statistics]:
        """One round of EM on all parts at once, which goes on from the one before."""
        rounds = zip(self._models, self._attracted, strict=True)
        found = [_expect.remote(models, examined, center, last) for models, last in rounds]
        said, self._attracted = zip(*found, strict=True)
        return [one for several in ray.get(list(said)) for one in several]


def unclicked(totals: pl.DataFrame) -> int:
    return int(totals["impressions"].sum() - totals["clicks"].sum())


def fit(some: Some, cfg: Aggregate) -> dict[str, Fitted]:
    """All click models that the log can give. Raises `Refused` where the one that is asked for is not among them."""
    totals = some.totals
    impossible = click_models.impossible(totals)
    if not unclicked(totals):
        alone = "the log shows clicked documents alone, so nothing is known of those that were passed over"
        impossible |= dict.fromkeys(("coec", "pbm", "dbn"), alone)
    if impossible and cfg.click_model != "ctr":
        reasons = "; ".join(f"{name}: {reason}" for name, reason in impossible.items())
        raise Refused(f"aggregate.click_model {cfg.click_model} is impossible on this log: {reasons}; ctr is possible")
    if impossible:
        return {"ctr": click_models.ctr(clicks.add([totals.with_columns(position=pl.lit(None, pl.Int32))]))}

    pbm = click_models.pbm(totals, some.expect, cfg.em_rounds)
    fitted = (click_models.ctr(totals), click_models.coec(totals), pbm, click_models.dbn(totals))
    return {model.name: model for model in fitted}


def compared(models: dict[str, Fitted], some: Some, grades: pl.DataFrame, recipe: Recipe) -> Rows:
    """How well each model agrees with people on the queries of `grades`, and predicts clicks that were held out."""
    cfg = recipe.aggregate
    asked = [_compare.remote(read, models, grades, cfg, recipe.seed) for read in some.read]
    said = [row for rows in ray.get(asked) for row in rows]
    of = {name: [one for one in said if one["model"] == name] for name in models}
    schema = {"query": pl.String, "doc_id": pl.String, "attractiveness": pl.Float64}
    pairs = {name: pl.concat([pl.DataFrame(schema=schema), *(one["pairs"] for one in of[name])]) for name in models}
    rows = click_choice.agreement(pairs, grades, recipe.seed)
    return [row | {"log_loss": click_choice.log_loss(one["loss"] for one in of[row["model"]])} for row in rows]
