"""The click models that `aggregate` fits on counts, and how they compare."""

from itertools import accumulate
from typing import Any

import polars as pl
import ray

from disranker import click_choice, click_models, clicks
from disranker.click_models import Fitted, Statistics
from disranker.recipe import Aggregate, Recipe, Refused
from disranker.store import Store
from jobs import parts
from jobs.counting import Scratch

ROWS_TO_FIT = 2_000_000  # counts by query, document and position

Rows = list[dict[str, Any]]
Judged = dict[int, dict[str, str]]  # by part: queries that people graded, with their split


def unclicked(totals: pl.DataFrame) -> int:
    return int(totals["impressions"].sum() - totals["clicks"].sum())


def sample(rows: list[int]) -> list[int]:
    """Parts with rows enough to fit and compare on: each holds queries of every kind, and few numbers are fitted."""
    enough = next((part for part, sum_ in enumerate(accumulate(rows), start=1) if sum_ >= ROWS_TO_FIT), len(rows))
    return list(range(enough))


def fit(of_parts: list[pl.DataFrame], some: list[int], scratch: Scratch, cfg: Aggregate) -> dict[str, Fitted]:
    """All click models that the log can give, by the totals of its parts; the position-based one on some of them.

    Raises `Refused` where the one that is asked for is not among them.
    """
    totals = clicks.add(of_parts)
    impossible = click_models.impossible(totals)
    if not unclicked(totals):
        alone = "the log shows clicked documents alone, so nothing is known of those that were passed over"
        impossible |= dict.fromkeys(("coec", "pbm", "dbn"), alone)
    if impossible and cfg.click_model != "ctr":
        reasons = "; ".join(f"{name}: {reason}" for name, reason in impossible.items())
        raise Refused(f"aggregate.click_model {cfg.click_model} is impossible on this log: {reasons}; ctr is possible")
    if impossible:
        return {"ctr": click_models.ctr(clicks.add([totals.with_columns(position=pl.lit(None, pl.Int32))]))}
    with _Fitting(scratch, cfg, some) as expect:
        pbm = click_models.pbm(clicks.add([of_parts[part] for part in some]), expect, cfg.em_rounds)
    return {
        model.name: model
        for model in (click_models.ctr(totals), click_models.coec(totals), pbm, click_models.dbn(totals))
    }


@ray.remote
class _Parts:
    """Counts of some parts, in the memory of a worker for as long as the model is fitted."""

    def __init__(self, numbers: list[int], scratch: Scratch, prior_impressions: float):
        read = (scratch.get("merged", number, clicks.COUNTS) for number in numbers)
        self.parts = [click_models.Part(counted, prior_impressions) for counted in read if counted.height]

    def expect(self, examined: dict[int, float], center: float) -> list[Statistics]:
        return [part.expect(examined, center) for part in self.parts]


class _Fitting:
    """Rounds of EM over all parts at once: one worker for each CPU."""

    def __init__(self, scratch: Scratch, cfg: Aggregate, some: list[int]):
        workers = min(len(some), max(1, int(ray.cluster_resources().get("CPU", 1))))
        mine = [some[first::workers] for first in range(workers)]
        self.actors = [_Parts.remote(numbers, scratch, cfg.prior_impressions) for numbers in mine]

    def __enter__(self) -> Any:
        return lambda examined, center: [
            said for each in ray.get([actor.expect.remote(examined, center) for actor in self.actors]) for said in each
        ]

    def __exit__(self, *_: object) -> None:
        for actor in self.actors:
            ray.kill(actor)


def compared(
    models: dict[str, Fitted], some: list[int], judged: Judged, store: Store, scratch: Scratch, recipe: Recipe
) -> tuple[Rows, str]:
    """How well each model agrees with people on the validation queries, and on some parts predicts clicks held out."""
    grades = pl.DataFrame(pl.from_arrow(store.read("judgments", ["query", "doc_id", "grade"])))
    cfg = recipe.aggregate

    def compare(part: int) -> dict[str, Any]:
        queries = [query for query, split in judged.get(part, {}).items() if split == "validation"]
        counted = scratch.get("merged", part, clicks.COUNTS)
        known = counted if part in some else counted.clear()
        kept, held = clicks.thin(known, cfg.held_out_share, [recipe.seed, part])
        asked = grades.filter(pl.col("query").is_in(queries)).select("query").unique()
        graded = counted.join(asked, on="query", how="semi")
        return {
            name: {
                "pairs": click_models.by_pair(graded, fitted, cfg.prior_impressions)
                .select("query", "doc_id", "attractiveness").to_dicts(),
                "loss": click_choice.loss(held, click_models.by_pair(kept, fitted, cfg.prior_impressions), fitted),
            }
            for name, fitted in models.items()
        }  # fmt: skip

    said = parts.each(recipe.ingest.parts, compare)
    schema = {"query": pl.String, "doc_id": pl.String, "attractiveness": pl.Float64}
    pairs = {name: pl.DataFrame([row for one in said for row in one[name]["pairs"]], schema=schema) for name in models}
    rows = click_choice.agreement(pairs, grades, recipe.seed)
    losses = {name: click_choice.log_loss(tuple(one[name]["loss"]) for one in said) for name in models}
    rows = [row | {"log_loss": losses[row["model"]]} for row in rows]
    return rows, click_choice.choose(rows)[1] if cfg.click_model == "auto" else "the recipe asks for it"
