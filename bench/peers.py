"""The rate of a peer on the pairs of a store, as one JSON line: bare vLLM on one list, or transformers in batches."""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import made_up
from disranker import recipe as recipes
from disranker.contract import Tokens
from disranker.recipe import Recipe
from disranker.store import Store

BATCH = 32  # of transformers
ORDERS = ("contiguous", "shuffled")
Ids = list[list[int]]


def pairs(recipe: Recipe, most: int | None = None) -> Ids:
    """Token ids of the first pairs of a store, one query's documents together, in the order of the stage `score`."""
    store = Store(recipe.root)
    tokens = Tokens.load(store.folder("teacher"))
    found: Ids = []
    for part in range(recipe.ingest.parts):
        for group in store.read("groups", part=part).to_pylist():
            found += [ids for ids, _ in tokens.listed(group["query"], group["docs"])]
        if most and len(found) >= most:
            break
    return found[:most]


def vllm(
    recipe: Recipe, ids: Ids, orders: Sequence[str] = ("contiguous",), cache_blocks: int | None = None
) -> dict[str, Any]:
    """One call of `LLM.classify` for each order of the pairs, each with an empty cache; the start stands apart.

    The cache is as large as the recipe says, or holds `cache_blocks`.
    """
    began = time.monotonic()
    engine = _engine(recipe, **({"num_gpu_blocks_override": cache_blocks} if cache_blocks else {}))
    said: dict[str, Any] = {"start_s": time.monotonic() - began}
    for order in orders:
        engine.reset_prefix_cache()
        given = random.Random(0).sample(ids, len(ids)) if order == "shuffled" else ids
        said[order] = _classified(engine, given)
    return said


def _engine(recipe: Recipe, **more: Any) -> Any:
    """That of the stage `score`, outside of Ray, with all cores to itself whatever pool the stage has."""
    from jobs import scorer
    from jobs.score import ONE

    folder = Store(recipe.root).folder("teacher")
    return scorer.engine(folder, Tokens.load(folder).contract, recipe.score.model_copy(update=ONE), **more)


def _classified(engine: Any, ids: Ids) -> dict[str, Any]:
    from vllm import PoolingParams
    from vllm.inputs import TokensPrompt

    began = time.monotonic()
    prompts = [TokensPrompt(prompt_token_ids=row) for row in ids]
    outputs = engine.classify(prompts, pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
    seconds = time.monotonic() - began
    cached = sum(output.num_cached_tokens or 0 for output in outputs)
    scores = [output.outputs.probs[0] for output in outputs]
    return {"cached_tokens": cached} | _measured(ids, seconds, scores)


def transformers(recipe: Recipe, ids: Ids, threads: int) -> dict[str, Any]:
    """Batches of pairs of like length, padded; one batch of the longest before the clock starts."""
    began = time.monotonic()
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.set_num_threads(threads)
    folder = Store(recipe.root).folder("teacher")
    pad = Tokens.load(folder).contract.pad
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=getattr(torch, recipe.score.dtype))
    order = sorted(range(len(ids)), key=lambda place: -len(ids[place]))
    batches = [order[start : start + BATCH] for start in range(0, len(ids), BATCH)]
    scores = [0.0] * len(ids)
    with torch.inference_mode():
        _forward(model.eval(), [ids[place] for place in batches[0]], pad)
        ready = time.monotonic()
        for batch in batches:
            for place, score in zip(batch, _forward(model, [ids[place] for place in batch], pad), strict=True):
                scores[place] = score
    return {"start_s": ready - began} | _measured(ids, time.monotonic() - ready, scores)


def _forward(model: Any, rows: Ids, pad: int) -> list[float]:
    import torch

    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    scores: list[float] = model(input_ids=ids, attention_mask=real).logits.squeeze(-1).float().tolist()
    return scores


def _measured(ids: Ids, seconds: float, scores: list[float]) -> dict[str, Any]:
    said = {"pairs": len(ids), "tokens": sum(map(len, ids)), "seconds": seconds, "rate": len(ids) / seconds}
    return said | {"lowest": min(scores), "highest": max(scores)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("peer", choices=("vllm", "transformers"))
    parser.add_argument("--recipe", type=Path, help="of a store with teacher and groups; default: one is made up")
    parser.add_argument("--pairs", type=int, help="the first so many pairs; default all")
    parser.add_argument("--dtype", help="default that of the recipe")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=ORDERS[:1], help="vllm: of a query's documents")
    parser.add_argument("--cache-blocks", type=int, help="vllm: size of the cache; default as the recipe says")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="transformers")
    parser.add_argument("--small", action="store_true", help="make up a tiny store")
    given = parser.parse_args(argv)
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    with tempfile.TemporaryDirectory() as folder:
        size = made_up.TINY if given.small else made_up.FULL
        path = given.recipe or made_up.make(Path(folder), range(10 if given.small else 100), size)
        recipe = recipes.load(path, [f"score.dtype={given.dtype}"] if given.dtype else [])
        ids = pairs(recipe, given.pairs)
        said = (
            vllm(recipe, ids, given.orders, given.cache_blocks)
            if given.peer == "vllm"
            else transformers(recipe, ids, given.threads)
        )
    print(json.dumps(said), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
