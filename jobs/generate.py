"""Writes the made-up world: documents, judgments and a click log in UBI 1.3."""

import sys
from typing import Any

import ray

from disranker import world
from disranker.inputs import World
from disranker.recipe import Recipe
from disranker.stages import Step
from disranker.store import Store
from jobs import launch


@ray.remote
def shard(cfg: World, seed: int, index: int, store: Store) -> None:
    """One log file of queries and one of events."""
    world.write_shard(cfg, seed, index, store.fs, store.at("world"))


def run(recipe: Recipe, store: Store, step: Step) -> dict[str, Any]:
    cfg, seed = recipe.world, recipe.seed
    documents, judgments = world.documents(cfg, seed), world.judgments(cfg, seed)
    store.put_table(documents, "world", "documents.parquet")
    store.put_table(judgments, "world", "judgments.parquet")
    ray.get([shard.remote(cfg, seed, index, store) for index in range(cfg.shards)])
    return {"documents": documents.num_rows, "judgments": judgments.num_rows, "searches": cfg.searches}


if __name__ == "__main__":
    sys.exit(launch.main("generate"))
