"""How fast each engine scores real lists, how near it comes to torch, and which of them a bundle chooses."""

import math
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from disranker import metrics
from disranker.engine import Engine, Prompt
from disranker.engines import FILES, Name, unable
from disranker.metrics import Qrels, Run
from disranker.report import HEADLINE

CHOICE: tuple[Name, ...] = ("torch", "openvino", "openvino-bf16", "openvino-int8")  # of two as fast, the plainer

Measured = dict[str, dict[str, Any]]  # by engine


def runs(folder: str, names: Sequence[Name], groups: Sequence[Mapping[str, Any]]) -> dict[Name, Run]:
    """engine -> query -> document -> score, of rows of `groups`."""
    return {name: run(Engine(folder, engine=name), groups) for name in names}


def run(engine: Engine, groups: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """query -> document -> score, of rows of `groups`."""
    return {
        group["query"]: dict(
            zip(
                [doc["doc_id"] for doc in group["docs"]],
                engine.logits(engine.tokens.listed(group["query"], group["docs"])),
                strict=True,
            )
        )
        for group in groups
    }


def agreement(qrels: Qrels, found: Mapping[str, Run]) -> Measured:
    """NDCG@10 of each engine's run; of all but torch also the largest difference of a score, and Kendall's tau.

    None for each of them where a score of the engine is no finite number. Raises `ValueError` where one of torch's is.
    """
    return {
        name: _ndcg(qrels, scores) if name == "torch" else _beside(qrels, scores, found["torch"])
        for name, scores in found.items()
    }


def measure(
    folder: str, names: Sequence[Name], lists: Sequence[Sequence[Prompt]], rounds: int, cores: int | None = None
) -> Measured:
    """Pairs a second of each engine, by how many threads it had: one, and all (`cores`; None: those of this process).

    Medians of so many rounds over the lists, one list at a time as a request brings them, tokenised before. Engines
    take turns within a round, so that what else the machine does meets all of them.
    """
    cores = cores or len(os.sched_getaffinity(0))
    speeds: Measured = {name: {"threads": [], "pairs_per_s": []} for name in names}
    with _threads_restored():
        for threads in sorted({1, cores}):
            made: dict[str, Engine] = {name: Engine(folder, threads, engine=name) for name in names}
            for name, rate in rates(made, lists, rounds).items():
                speeds[name]["threads"].append(threads)
                speeds[name]["pairs_per_s"].append(round(rate, 1))
    return speeds


def rates(made: Mapping[str, Engine], lists: Sequence[Sequence[Prompt]], rounds: int) -> dict[str, float]:
    """Pairs a second of each engine, as `measure` has it."""
    for engine in made.values():
        _seconds(engine, lists)  # the first time, graphs are planned for each length
    turns = [{name: _seconds(engine, lists) for name, engine in made.items()} for _ in range(rounds)]
    pairs = sum(len(prompts) for prompts in lists)
    return {name: pairs / statistics.median(turn[name] for turn in turns) for name in made}


def choose(speeds: Mapping[str, Mapping[str, Any]]) -> Name:
    """The fastest with all threads, but onnx, which is for others; what is rounded only where that made it faster."""
    present = [name for name in CHOICE if name in speeds]
    return max(present, key=lambda name: speeds[name]["pairs_per_s"][-1])  # of equals, the first


def present(bf16: bool, int8: bool) -> tuple[Name, ...]:
    """The engines of a bundle that this CPU can run, with those of rounded numbers or without."""
    wanted = {"openvino-bf16": bf16, "openvino-int8": int8}
    return tuple(name for name in FILES if wanted.get(name, True) and not unable(name))


def spread(groups: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """At most so many of them, evenly over all."""
    most = min(most, len(groups))
    return [groups[place * len(groups) // most] for place in range(most)]


def _seconds(engine: Engine, lists: Sequence[Sequence[Prompt]]) -> float:
    began = time.perf_counter()
    for prompts in lists:
        engine.logits(prompts)
    return time.perf_counter() - began


def _beside(qrels: Qrels, scores: Run, exact: Run) -> dict[str, float | None]:
    if not all(math.isfinite(score) for of in scores.values() for score in of.values()):
        return dict.fromkeys((HEADLINE, "max_difference", "kendall_tau"))
    gaps = [abs(scores[query][document] - exact[query][document]) for query in exact for document in exact[query]]
    near = {"max_difference": max(gaps), "kendall_tau": metrics.kendall_tau(scores, exact)}
    return _ndcg(qrels, scores) | near


def _ndcg(qrels: Qrels, scores: Run) -> dict[str, float | None]:
    return {HEADLINE: float(np.mean(metrics.per_query(qrels, scores)[HEADLINE]))}


@contextmanager
def _threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
