"""How fast the stage `score` is: against bare vLLM and transformers, from the cache, with nothing or little to do.

Every measurement has a process of its own, one at a time. Ours is always the real command, with a Ray of its own.
"""

import functools
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import claims, made_up, runs
from bench.claims import Line
from bench.made_up import PLAIN, Shape, Size
from disranker import recipe as recipes

PREFIXES = {
    "plain pairs": PLAIN,
    "an instruction of 128 tokens": Shape(instruction_tokens=128),
    "queries of 72 tokens": Shape(query_tokens=72, pair_tokens=164),
}
FEW_BLOCKS = 128  # of a prefix cache that the pairs outgrow: 4,096 tokens
MOST_WAIT_S, MOST_MEMORY_MIB = 20, 1024  # with nothing to do
CORES = os.cpu_count() or 1
POOLS: dict[str, dict[str, Any]] = {
    "one engine on all cores": {},
    # One core's worth is left to read; small batches, so that all engines end together.
    "an engine on each core": {"actors": CORES, "cpus_per_actor": (CORES - 1) / CORES, "pairs_per_batch": 64},
}


@dataclass(frozen=True)
class Plan:
    """Sizes of the full run; a setting that is a number is also an option of the command line."""

    folder: Path
    size: Size = made_up.FULL
    prefixes: tuple[str, ...] = tuple(PREFIXES)
    pairs: int = 20_000  # against bare vLLM
    sample_pairs: int = 2_000  # against transformers
    bf16_pairs: int = 200  # a CPU without bfloat16 takes six times as long
    prefix_pairs: int = 1_000
    labels: int = 1_000_000
    runs: int = 3
    big_runs: int = 1  # of the measurements with all pairs
    seed: int = 1

    def pairs_of(self, dtype: str) -> int:
        """How many pairs are enough for a rate."""
        return self.sample_pairs if dtype == "float32" else self.bf16_pairs

    def store(self, name: str, pairs: range, shape: Shape = PLAIN, **score: Any) -> Path:
        """The recipe of a store with these pairs, whole lists of them."""
        queries = range(pairs.start // shape.documents, pairs.stop // shape.documents)
        return made_up.make(self.folder / name, queries, self.size, shape, score, self.seed)

    def run(self, recipe: Path, labels: Path | None = None) -> dict[str, Any]:
        """The manifest of one run of the real command, on a copy of these labels, or without any."""
        there = runs.labels(recipe)
        shutil.rmtree(there, ignore_errors=True)
        if labels:
            shutil.copytree(labels, there, ignore=shutil.ignore_patterns("manifest.json"))
        return runs.done(recipe, self.folder / "log")


SMALL = {
    "size": made_up.TINY,
    "prefixes": ("an instruction of 128 tokens",),
    **{"pairs": 400, "sample_pairs": 200, "bf16_pairs": 200, "prefix_pairs": 200, "labels": 10_000, "runs": 1},
}


def bare_vllm(plan: Plan) -> Iterator[Line]:
    """The stage, with keys, label store and Ray, against one call of the engine; by turns, as machines are noisy."""
    ours, peer = [], []
    for _ in range(plan.big_runs):
        ours.append(plan.run(whole(plan))["counts"])
        peer.append(runs.measured("bench.peers", "vllm", "--recipe", whole(plan)))
    starts = [[said["start_s"] for said in each] for each in (ours, peer)]
    rates = [each["contiguous"]["rate"] for each in peer]
    more = {"pairs": plan.pairs, "pool": pool(plan, "float32")}
    yield claims.against("score: vs bare vllm", _rates(ours), rates, "pairs/s", 0.95, **more)
    yield claims.against("score: start of the engine vs bare vllm", *starts, "s", None)


def transformers(plan: Plan, dtype: str = "float32", bar: float = 1.5) -> Iterator[Line]:
    """The stage against padded batches of like length, with the better number of threads; by turns."""
    recipe = sample(plan, dtype, pool(plan, dtype))
    ours: list[dict[str, Any]] = []
    rates: dict[int, list[float]] = {threads: [] for threads in sorted({1, CORES})}
    for _ in range(plan.runs):
        ours.append(plan.run(recipe)["counts"])
        for threads, measured in rates.items():
            said = runs.measured("bench.peers", "transformers", "--recipe", recipe, "--threads", threads)
            measured.append(said["rate"])
    best = max(rates, key=lambda threads: statistics.median(rates[threads]))
    more = {"pairs": plan.pairs_of(dtype), "pool": pool(plan, dtype), "peer_threads": best}
    yield claims.against(f"score: vs transformers, {dtype}", _rates(ours), rates[best], "pairs/s", bar, **more)


def prefix_cache(plan: Plan) -> Iterator[Line]:
    """Bare engine: documents of a query one after the other, against the same pairs shuffled.

    Once with the whole cache and once with one that the pairs outgrow, as they outgrow any in a long run.
    """
    for name in plan.prefixes:
        recipe = plan.store(f"prefix {name}", range(plan.prefix_pairs), PREFIXES[name])
        orders = [("contiguous", "shuffled"), ("shuffled", "contiguous")]
        for size, cache in (("", []), (", small cache", ["--cache-blocks", FEW_BLOCKS])):
            said = [
                runs.measured("bench.peers", "vllm", "--recipe", recipe, "--orders", *orders[run % 2], *cache)
                for run in range(plan.runs)
            ]
            ours, peer = ([each[order] for each in said] for order in ("contiguous", "shuffled"))
            rates = ([each["rate"] for each in measured] for measured in (ours, peer))
            more = {"pairs": plan.prefix_pairs, "hits": _hits(ours[0]), "peer_hits": _hits(peer[0])}
            claim = f"score: prefix cache, contiguous vs shuffled, {name}{size}"
            yield claims.against(claim, *rates, "pairs/s", None, **more)


def nothing_to_do(plan: Plan) -> Iterator[Line]:
    """No pair is new, and most labels belong to pairs that are no longer there."""
    yield from _nothing(plan, plan.store("nothing", range(plan.pairs)), plan.pairs)


def million_pairs(plan: Plan) -> Iterator[Line]:
    """No pair is new, and every label belongs to one; making the store takes minutes."""
    yield from _nothing(plan, plan.store("million", range(plan.labels)), plan.labels)


def new_pairs(plan: Plan) -> Iterator[Line]:
    """A scored store grows by a tenth: the new pairs alone are scored, as fast as in a store of their own."""
    before = runs.labels(whole(plan))
    if not before.exists():
        plan.run(whole(plan))
    new = plan.pairs // 9 // PLAIN.documents * PLAIN.documents
    engines = POOLS[pool(plan, "float32")]
    grown = plan.store("grown", range(plan.pairs + new), **engines)
    alone = plan.store("alone", range(plan.pairs, plan.pairs + new), **engines)
    ours, peer = [], []
    for _ in range(plan.runs):
        ours.append(plan.run(grown, before)["counts"])
        peer.append(plan.run(alone)["counts"])
    found = {said["scored"] for said in ours + peer}
    if found != {new}:
        raise runs.Broken(f"{new} pairs are new, and the runs scored {sorted(found)}")
    seconds = ([said["scoring_s"] for said in each] for each in (ours, peer))
    claim = "score: a tenth of the pairs is new, scoring time vs those alone"
    yield claims.against(claim, *seconds, "s", 0.9, pairs=plan.pairs + new, scored=new)


CLAIMS: dict[str, Callable[[Plan], Iterator[Line]]] = {
    "bare-vllm": bare_vllm,
    "transformers": transformers,
    "transformers-bf16": functools.partial(transformers, dtype="bfloat16", bar=1.1),
    "prefix-cache": prefix_cache,
    "nothing-to-do": nothing_to_do,
    "new-pairs": new_pairs,
    "million-pairs": million_pairs,
}
ASKED_FOR = ("million-pairs",)  # not done unless named


@functools.cache
def whole(plan: Plan) -> Path:
    """The recipe of the store with all pairs."""
    return plan.store("whole", range(plan.pairs), **POOLS[pool(plan, "float32")])


@functools.cache
def pool(plan: Plan, dtype: str) -> str:
    """The faster way to spread the cores over engines."""
    rates = {name: _rates([plan.run(sample(plan, dtype, name))["counts"]]) for name in POOLS}
    return max(rates, key=lambda name: rates[name])


def sample(plan: Plan, dtype: str, engines: str) -> Path:
    """The recipe of a store with enough pairs for a rate, scored by that pool."""
    return plan.store(f"{engines} {dtype}", range(plan.pairs_of(dtype)), dtype=dtype, **POOLS[engines])


def _nothing(plan: Plan, recipe: Path, pairs: int) -> Iterator[Line]:
    made_up.label(recipes.load(recipe), plan.labels, plan.seed)
    kept = runs.labels(recipe).rename(recipe.with_name("kept"))
    said = [plan.run(recipe, kept) for _ in range(plan.runs)]
    if any(manifest["counts"]["scored"] for manifest in said):
        raise runs.Broken("pairs were scored where every pair had a label")
    claim, more = "score: nothing to do", {"pairs": pairs, "labels": plan.labels}
    yield claims.within(f"{claim}, time", [manifest["seconds"] for manifest in said], MOST_WAIT_S, "s", **more)
    memory = [manifest["peak_memory_mib"] for manifest in said]
    yield claims.within(f"{claim}, memory", memory, MOST_MEMORY_MIB, "MiB", **more)


def _rates(counts: list[dict[str, Any]]) -> list[float]:
    return [said["scored"] / said["scoring_s"] for said in counts]


def _hits(said: dict[str, Any]) -> float:
    """The share of prompt tokens that came from the cache."""
    return claims.shown(said["cached_tokens"] / said["tokens"])


def main(argv: list[str] | None = None) -> int:
    return claims.command("bench.score", Plan, CLAIMS, SMALL, argv, __doc__ or "", ASKED_FOR)


if __name__ == "__main__":
    sys.exit(main())
