"""Searches -> evidence per (query, document), and the queries with their frequency band and split.

A part of `searches` holds all that some clients did, and is counted alone. The counts of some queries are exchanged to
fit click models on; then all, as pairs of query and document that the chosen model has weighted. What is exchanged goes
through files, by query; no search and no single impression is moved.
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

Judged = dict[int, dict[str, str]]  # by part: queries that people graded, with their split


def run(recipe: Recipe, store: Store, step: Step) -> dict[str, Any]:
    cfg, count, scratch = recipe.aggregate, recipe.ingest.parts, Scratch(store, step)
    judged = _judged(store, recipe)
    validation = [query for part in judged.values() for query, split in part.items() if split == "validation"]
    share = fitting.SEARCHES / max(1, store.manifest("searches")["rows"])
    first = partial(counting.count, store=store, scratch=scratch, recipe=recipe, share=share, always=validation)
    said = parts.each(count, first, "aggregate: parts counted")
    asked = parts.each(count, partial(counting.queries, scratch=scratch, min_clients=recipe.cleaning.min_clients))
    launch.say("aggregate: searches counted")

    some = fitting.Some(count, scratch, cfg)
    models = fitting.fit(some, cfg)
    launch.say("aggregate: click models fitted")
    rows = fitting.compared(models, some, _grades(store, validation), recipe)
    launch.say("aggregate: click models compared")
    name, why = click_choice.choose(rows)
    if cfg.click_model != "auto":
        name, why = cfg.click_model, "the recipe asks for it"
    parts.each(count, partial(counting.pair, scratch=scratch, fitted=models[name], count=count))
    launch.say("aggregate: pairs counted")

    searches = Counter(parts.total(one["frequencies"] for one in asked))
    limits = sampling.band_limits(list(searches.elements()), cfg.head_share, cfg.torso_share)
    only = not fitting.unclicked(some.totals)

    def write(part: int) -> dict[str, int]:
        asked = scratch.frame("queries", part, counting.QUERIES)
        pairs = counting.paired(part, scratch, asked, only)
        evidence = click_models.evidence(click_models.attractive(pairs, models[name], cfg.prior_impressions))
        store.write("evidence", part, evidence)
        queries = _queries(asked, judged.get(part, {}), limits, recipe)
        store.write("queries", part, queries)
        return {"evidence": evidence.num_rows, "queries": queries.num_rows}

    counts: dict[str, Any] = parts.total(parts.each(count, write))
    cleaned = {rule: parts.total(one["cleaning"][rule] for one in said) for rule in said[0]["cleaning"]}
    cleaned["few_clients"] = parts.total(one["few_clients"] for one in asked)
    examination = {name: fitted.examination for name, fitted in models.items()}
    seen = click_models.interventional(clicks.add([one["shuffled"] for one in said])).to_dicts()
    return counts | {
        "bots": sum(one["bots"] for one in said),
        "searches_left_out": sum(rule.get("searches", 0) for rule in cleaned.values()),
        "head_searches": limits[0],
        "torso_searches": limits[1],
        "cleaning": cleaned,
        "model": {"click_model": name, "why": why, "examination": examination, "interventional": seen, "models": rows},
    }


def _grades(store: Store, queries: list[str]) -> pl.DataFrame:
    grades = pl.DataFrame(pl.from_arrow(store.read("judgments", ["query", "doc_id", "grade"])))
    return grades.filter(pl.col("query").is_in(queries))


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
