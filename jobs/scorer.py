"""The teacher on vLLM, as an actor of Ray Data: batches of pairs in, their labels in the store, what was done out."""

import json
import math
import os
import time
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from disranker.contract import Contract, Tokens
from disranker.labels import Labels, isolate
from disranker.recipe import Score
from disranker.store import Store

DEATHS = 2  # of an engine on one pair alone, until the pair is held to be the reason
Row = dict[str, Any]  # key, ids, prompt (how many ids belong to the query), query, doc_id

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("ids", pa.list_(pa.int32())),
        ("prompt", pa.int32()),
        ("query", pa.string()),
        ("doc_id", pa.string()),
    ]
)


class Scorer:
    """One engine. What it scores is in the store before it says so; a batch that Ray repeats is not paid for again."""

    def __init__(self, store: Store, teacher: str, cfg: Score):
        began, folder = time.monotonic(), store.folder("teacher")
        self.labels = Labels(store, teacher)
        self.engine = engine(folder, Tokens.load(folder).contract, cfg)
        # As `Rows.inputs` decides for the trainer.
        self.segments = getattr(self.engine.llm_engine.model_config.hf_config, "type_vocab_size", 0) > 1
        self.start_s = time.monotonic() - began

    def __call__(self, batch: pa.Table) -> pa.Table:
        began, self.cached = time.time(), 0
        rows = batch.to_pylist()
        rejected = self.label(rows)
        return pa.table(
            {
                "pairs": [len(rows)],
                "tokens": [sum(len(row["ids"]) for row in rows)],
                "cached_tokens": [self.cached],
                "start_s": [self.start_s],
                "began": [began],
                "ended": [time.time()],
                "rejected": [json.dumps(rejected)],
            }
        )

    def label(self, rows: list[Row]) -> list[Row]:
        """Scores pairs into the store; gives those that could not be scored, with the reason.

        An engine that died on the pairs takes them in halves, until it dies on one alone.
        """
        keys = [row["key"] for row in rows]
        if self.labels.written(keys):
            return []
        marks = self.labels.begin(keys)
        died = len(marks) - 1
        if died and len(rows) > 1:
            middle = len(rows) // 2
            rejected = self.label(rows[:middle]) + self.label(rows[middle:])
        elif died >= DEATHS:
            rejected = [_reject(rows[0], f"the engine died on it, {died} times")]
        else:
            rejected = self._attempt(rows)
        self.labels.drop(marks)
        return rejected

    def scores(self, rows: Sequence[Row]) -> list[float]:
        """Raw logits: without `use_activation=False` vLLM would give a sigmoid, which ruins Margin-MSE."""
        from vllm.inputs import TokensPrompt

        given = [TokensPrompt(prompt_token_ids=row["ids"]) for row in rows]
        params = [_params(row["prompt"], self.segments) for row in rows]
        try:
            outputs = self.engine.classify(given, pooling_params=params, use_tqdm=False)
        except Exception:
            if self.engine.llm_engine.has_unfinished_requests():
                # It broke on the way and would mix what is left with the next batch. Ray starts another for us.
                os._exit(1)
            raise
        self.cached += sum(output.num_cached_tokens for output in outputs)
        return [output.outputs.probs[0] for output in outputs]

    def _attempt(self, rows: list[Row]) -> list[Row]:
        found = isolate(rows, self.scores)
        good = [(row["key"], score) for row, (score, _) in zip(rows, found, strict=True) if score is not None]
        if good:
            self.labels.write([key for key, _ in good], [score for _, score in good])
        return [_reject(row, reason) for row, (_, reason) in zip(rows, found, strict=True) if reason]


def engine(folder: str, contract: Contract, cfg: Score, **more: Any) -> Any:
    """A vLLM that classifies, with `more` of its settings; in this process, unless several processes share it.

    For a mean it takes every text whole and anew: a token that is cached, or of another chunk, would not be in it.
    """
    os.environ |= _threads(cfg) | {
        "VLLM_CPU_KVCACHE_SPACE": str(cfg.kv_cache_gib),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    from vllm import LLM
    from vllm.config import PoolerConfig

    pooler = PoolerConfig(pooling_type=contract.pooling.upper()) if contract.pooling else None
    several = {"distributed_executor_backend": "ray"} if cfg.tensor_parallel > 1 else {}
    return LLM(
        folder,
        runner="pooling",
        convert="classify",
        pooler_config=pooler,
        dtype=cfg.dtype,
        enforce_eager=True,
        max_model_len=contract.max_tokens,
        max_num_batched_tokens=max(cfg.max_batched_tokens, contract.max_tokens),
        block_size=cfg.block_tokens,
        tensor_parallel_size=cfg.tensor_parallel,
        seed=0,
        **several,
        **more,
    )


def resources(cfg: Score, groups: list[PlacementGroup]) -> dict[str, Any]:
    """What one engine asks of Ray: for several devices a placement group, so that it gets all; added to `groups`."""
    if cfg.tensor_parallel == 1:
        return {"num_cpus": cfg.cpus_per_actor, "num_gpus": cfg.gpus_per_actor or None}
    bundle = {"CPU": cfg.cpus_per_actor, "GPU": 1}

    def together() -> dict[str, Any]:
        groups.append(placement_group([bundle] * cfg.tensor_parallel, strategy="STRICT_PACK"))
        return {
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                groups[-1], placement_group_capture_child_tasks=True
            )
        }

    # The workers that vLLM starts take what the group holds; the actor that calls them takes nothing.
    return {"num_cpus": 0, "ray_remote_args_fn": together}


def _params(prompt: int, segments: bool) -> Any:
    from vllm import PoolingParams

    extra = {"compressed_token_type_ids": prompt} if segments else None
    return PoolingParams(use_activation=False, extra_kwargs=extra)


def _reject(row: Row, reason: str) -> Row:
    return {"key": row["key"], "query": row["query"], "doc_id": row["doc_id"], "reason": reason}


def _threads(cfg: Score) -> dict[str, str]:
    """One engine on CPUs takes every core: vLLM's own default keeps one back, and Ray gives an actor one thread."""
    if cfg.gpus_per_actor or "VLLM_CPU_OMP_THREADS_BIND" in os.environ:
        return {}
    if max(cfg.actors, cfg.max_actors) == 1:
        cores = os.cpu_count() or 1
        return {"VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}", "OMP_NUM_THREADS": str(cores)}
    return {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(math.ceil(cfg.cpus_per_actor))}
