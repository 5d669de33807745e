"""Searches -> evidence per (query, document), and the queries with their frequency band and split.

A part of `searches` holds all that some clients did. Counts of each part are made alone, exchanged by query through
files, and added up; no search and no single impression is moved.
"""

import sys
from collections import Counter
from functools import partial
from typing import Any

import polars as pl
import pyarrow as pa

from disranker import click_choice, click_models, clicks, sampling, tables
from disranker.recipe import Recipe
from disranker.stages import Step
from disranker.store import Store
from jobs import counting, fitting, launch, parts
from jobs.counting import Scratch
from jobs.fitting import Judged


def run(recipe: Recipe, store: Store, step: Step) -> dict[str, Any]:
    cfg, count, scratch = recipe.aggregate, recipe.ingest.parts, Scratch(store, step)
    said = parts.each(
        count, partial(counting.count, store=store, scratch=scratch, recipe=recipe), "aggregate: parts counted"
    )
    launch.say("aggregate: all parts counted")
    shuffled = clicks.add([pl.DataFrame(one["shuffled"], schema=clicks.SHUFFLED) for one in said])
    cleaned = {rule: parts.total(one["cleaning"][rule] for one in said) for rule in said[0]["cleaning"]}

    merged = parts.each(count, partial(counting.merge, scratch=scratch, min_clients=recipe.cleaning.min_clients))
    cleaned["few_clients"] = parts.total(one["few_clients"] for one in merged)
    totals = [pl.DataFrame(one["totals"], schema=clicks.TOTALS) for one in merged]
    frequencies = parts.total(one["frequencies"] for one in merged)
    searches = [int(number) for number in Counter(frequencies).elements()]
    limits = sampling.band_limits(searches, cfg.head_share, cfg.torso_share)

    launch.say("aggregate: counts added up")
    judged = _judged(store, recipe)
    some = fitting.sample([one["rows"] for one in merged])
    models = fitting.fit(totals, some, scratch, cfg)
    launch.say(f"aggregate: click models fitted on {len(some)} of {count} parts")
    rows, why = fitting.compared(models, some, judged, store, scratch, recipe)
    launch.say("aggregate: click models compared")
    name = click_choice.choose(rows)[0] if cfg.click_model == "auto" else cfg.click_model
    chosen, only = models[name], not fitting.unclicked(clicks.add(totals))

    def write(part: int) -> dict[str, int]:
        asked = scratch.get("queries", part, counting.QUERIES)
        found = click_models.evidence(counting.counted(scratch, part, asked, only), chosen, cfg.prior_impressions)
        store.write("evidence", part, found)
        queries = _queries(asked, judged.get(part, {}), limits, recipe)
        store.write("queries", part, queries)
        return {"evidence": found.num_rows, "queries": queries.num_rows}

    counts: dict[str, Any] = parts.total(parts.each(count, write))
    examination = {name: fitted.examination for name, fitted in models.items()}
    seen = click_models.interventional(shuffled).to_dicts()
    return counts | {
        "bots": sum(one["bots"] for one in said),
        "searches_left_out": sum(rule.get("searches", 0) for rule in cleaned.values()),
        "head_searches": limits[0],
        "torso_searches": limits[1],
        "cleaning": cleaned,
        "model": {"click_model": name, "why": why, "examination": examination, "interventional": seen, "models": rows},
    }


def _judged(store: Store, recipe: Recipe) -> Judged:
    asked = (
        pl.DataFrame(pl.from_arrow(store.read("judgments", ["query", "split"])))
        .group_by("query")
        .agg(pl.col("split").max())
    )
    found: Judged = {}
    for part, (query, split) in zip(
        tables.part_of(asked["query"], recipe.ingest.parts), asked.iter_rows(), strict=True
    ):
        found.setdefault(int(part), {})[query] = split or sampling.split(query, recipe.aggregate, recipe.seed)
    return found


def _queries(searched: pl.DataFrame, judged: dict[str, str], limits: tuple[int, int], recipe: Recipe) -> pa.Table:
    rows = {row["query"]: row for row in searched.iter_rows(named=True)}
    rows |= {query: {"query": query, "searches": 0, "clients": 0} for query in judged if query not in rows}
    named = [
        row
        | {
            "band": sampling.band(row["searches"], limits),
            "split": judged.get(query) or sampling.split(query, recipe.aggregate, recipe.seed),
        }
        for query, row in sorted(rows.items())
    ]
    return tables.conform("queries", named)


if __name__ == "__main__":
    sys.exit(launch.main("aggregate"))
