"""Judgments of 40 queries, and three runs of known order of merit."""

import numpy as np

from disranker.recipe import Evaluate

CFG = Evaluate(resamples=300)
DOCUMENTS = [f"d{i}" for i in range(12)]


def judgments(queries=40):
    rng = np.random.default_rng(1)
    return {
        f"red shoes {i:02}": dict(zip(DOCUMENTS, rng.integers(0, 5, 12).tolist(), strict=True)) for i in range(queries)
    }


def run(qrels, noise, seed=0):
    rng = np.random.default_rng([seed, 7])
    return {q: {d: g + noise * rng.normal() for d, g in of.items()} for q, of in qrels.items()}


def three(qrels):
    return {"bm25": run(qrels, 6.0, 1), "teacher": run(qrels, 0.5, 2), "student": run(qrels, 0.7, 3)}


def cut(qrels):
    """Two ways to slice 40 queries: into 20 and 19, and into 1 and 39."""
    queries = sorted(qrels)
    return {
        "band": {"head": queries[2::2], "tail": queries[1::2], "never clicked": queries[:1]},
        "query_words": {"1 word": queries[:1], "3 words": queries[1:]},
    }
