"""Searches -> evidence per (query, document), and the queries with their frequency band and split."""

import sys
from collections import Counter
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data.expressions import col

from disranker import clicks, sampling, tables
from disranker.recipe import Aggregate, Recipe
from disranker.stages import Step
from disranker.store import Store
from jobs import launch, parts

ROWS_TO_FIT = 2_000_000  # (query, document, position) that the examination curve is fitted on

QUERIES = {"query": pl.String, "searches": pl.Int64, "clients": pl.UInt32}


def run(recipe: Recipe, store: Store, step: Step) -> dict[str, Any]:
    cfg, count = recipe.aggregate, recipe.ingest.parts
    scratch = f"aggregate-{step.fingerprint}"
    bots = _bots(store, cfg, count)
    frequencies = _count(store, scratch, bots, count)
    limits = sampling.band_limits(list(Counter(frequencies).elements()), cfg.head_share, cfg.torso_share)
    examined, mean = _model(store, scratch, cfg, count)
    judged = _judged(store, count)

    def write(part: int) -> dict[str, int]:
        counted = _read(store, scratch, "counts", part)
        found = clicks.evidence(counted, examined, mean, cfg.prior_impressions)
        store.write("evidence", part, found)
        queries = _queries(_read(store, scratch, "queries", part), judged.get(part, {}), limits, cfg, recipe.seed)
        store.write("queries", part, queries)
        return {"evidence": found.num_rows, "queries": queries.num_rows}

    counts = parts.total(parts.each(count, write))
    model = {"click_model": cfg.click_model, "examination": examined, "mean_attractiveness": mean}
    return counts | {"bots": len(bots), "head_searches": limits[0], "torso_searches": limits[1]} | {"model": model}


def _bots(store: Store, cfg: Aggregate, count: int) -> set[str]:
    clients = (
        ray.data.read_parquet(store.parts("searches"), filesystem=store.fs, columns=["client"])
        .groupby("client", num_partitions=count)
        .count()
    )
    busy = clients.filter(expr=col("count()") > cfg.max_searches_per_client)
    return {row["client"] for row in busy.iter_rows()}


def _count(store: Store, scratch: str, bots: set[str], count: int) -> dict[int, int]:
    """Counts of all searches by part of the query, as scratch files; returns how many queries have so many searches."""
    refused = ray.put(pl.Series(sorted(bots), dtype=pl.String))

    def counted(searches: pa.Table) -> pa.Table:
        people = pl.DataFrame(pl.from_arrow(searches)).filter(~pl.col("client").is_in(ray.get(refused).implode()))
        shown = clicks.counts(people.to_arrow())
        asked = people.group_by("query", "client").agg(searches=pl.len().cast(pl.Int64))
        both = pl.concat([shown, asked], how="diagonal")
        return both.with_columns(part=pl.Series(tables.part_of(both["query"], count))).to_arrow()

    def write(part: int, rows: pa.Table) -> dict[str, int]:
        both = pl.DataFrame(pl.from_arrow(rows))
        shown = clicks.merge(both.filter(pl.col("doc_id").is_not_null()))
        asked = both.filter(pl.col("client").is_not_null()).group_by("query")
        queries = asked.agg(searches=pl.col("searches").sum(), clients=pl.col("client").n_unique()).sort("query")
        store.put_table(shown.to_arrow(), "runs", scratch, f"counts-{part:05d}.parquet")
        store.put_table(queries.to_arrow(), "runs", scratch, f"queries-{part:05d}.parquet")
        return {str(searches): number for searches, number in queries["searches"].value_counts().iter_rows()}

    searches = ray.data.read_parquet(store.parts("searches"), filesystem=store.fs)
    records = searches.map_batches(counted, batch_format="pyarrow", batch_size=None)
    return {int(searches): number for searches, number in parts.total(parts.gather(records, count, write)).items()}


def _model(store: Store, scratch: str, cfg: Aggregate, count: int) -> tuple[dict[int, float], float]:
    """(examination by position, mean attractiveness), fitted on as many parts as fit in memory: each is a sample."""
    read: list[pl.DataFrame] = []
    for part in range(count):
        read.append(_read(store, scratch, "counts", part))
        if sum(frame.height for frame in read) > ROWS_TO_FIT:
            break
    counted = pl.concat(read)
    if cfg.click_model == "ctr":
        examined = dict.fromkeys(counted["position"].unique().sort().to_list(), 1.0)
    else:
        examined = clicks.examination(counted, cfg.em_rounds, cfg.prior_impressions)
    clicked, looks = clicks.expected(counted, examined)
    return examined, clicked / looks


def _judged(store: Store, count: int) -> dict[int, dict[str, str | None]]:
    """Queries that people graded, with the split they asked for, by part."""
    asked = (
        pl.DataFrame(pl.from_arrow(store.read("judgments", ["query", "split"])))
        .group_by("query")
        .agg(pl.col("split").max())
    )
    found: dict[int, dict[str, str | None]] = {}
    for part, (query, split) in zip(tables.part_of(asked["query"], count), asked.iter_rows(), strict=True):
        found.setdefault(int(part), {})[query] = split
    return found


def _queries(
    searched: pl.DataFrame, judged: dict[str, str | None], limits: tuple[int, int], cfg: Aggregate, seed: int
) -> pa.Table:
    rows = {row["query"]: row for row in searched.iter_rows(named=True)}
    rows |= {query: {"query": query, "searches": 0, "clients": 0} for query in judged if query not in rows}
    named = [
        row
        | {
            "band": sampling.band(row["searches"], limits),
            "split": judged.get(query) or sampling.split(query, cfg, seed),
        }
        for query, row in sorted(rows.items())
    ]
    return tables.conform("queries", named)


def _read(store: Store, scratch: str, name: str, part: int) -> pl.DataFrame:
    """A scratch file; without rows where no query fell into the part."""
    path = store.at("runs", scratch, f"{name}-{part:05d}.parquet")
    if path not in store.written(f"runs/{scratch}"):
        return pl.DataFrame(schema=clicks.COUNTS if name == "counts" else QUERIES)
    with store.fs.open_input_file(path) as file:
        return pl.DataFrame(pl.from_arrow(pq.read_table(file)))


if __name__ == "__main__":
    sys.exit(launch.main("aggregate"))
