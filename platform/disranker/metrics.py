"""NDCG, MRR, precision and PNR of a run, how sure they are, and whether two runs differ.

Every metric here is a ratio of two sums over queries, so one array holds what all intervals and tests need:
a tally (queries, metrics, 2) of numerators and denominators, its queries in sorted order. For a mean such as NDCG the
denominators are ones; for PNR the two are concordant and discordant pairs, for pair accuracy concordant and all that
are one or the other. Resampling queries is then one product.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import ir_measures
import numpy as np
import numpy.typing as npt
from ir_measures import RR, P, nDCG

from disranker.recipe import Evaluate

Qrels = Mapping[str, Mapping[str, int]]  # query -> document -> grade
Run = Mapping[str, Mapping[str, float]]  # query -> document -> score, larger is better
Array = npt.NDArray[np.float64]

MEASURES = {nDCG @ k: f"ndcg@{k}" for k in (1, 3, 5, 10)} | {RR: "mrr@10"} | {P @ k: f"p@{k}" for k in (1, 5, 10)}
METRICS = (*MEASURES.values(), "pair_accuracy", "pnr")
UNJUDGED = "unjudged@10"
RELEVANT = 2  # the lowest grade that ends the search in MRR and counts in precision
DEEPEST = 10  # no metric looks further down a ranking
BLOCK = 1 << 22  # resampled counts held at once, 32 MiB


@dataclass(frozen=True)
class Interval:
    """A metric of one run; None where it has no finite value (PNR without a discordant pair)."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference:
    """A metric of one run less that of another, over the same queries; `p` is two-sided."""

    difference: float | None
    low: float | None
    high: float | None
    p: float


def ranking(scores: Mapping[str, float]) -> list[str]:
    """Documents, best first; equal scores by document id, larger ids first as trec_eval has it.

    Raises `ValueError` for a score that is not finite: it would stand anywhere, and no metric would tell.
    """
    for document, score in scores.items():
        if not isfinite(score):
            raise ValueError(f"score of document {document!r} is {score}; a run needs finite scores")
    return sorted(scores, key=lambda document: (scores[document], document), reverse=True)


def per_query(qrels: Qrels, run: Run) -> dict[str, Array]:
    """NDCG, MRR and precision of each query of `qrels`, in sorted order; 0 where the run lacks the query.

    Gain 2^grade - 1, discount log2(rank + 1). A document without a grade counts as grade 0, and a query without any
    relevant document as 0. MRR and precision take grades from `RELEVANT` up; P@10 is out of 10 for a shorter list too.
    """
    judged = {query: {document: int(grade) for document, grade in grades.items()} for query, grades in qrels.items()}
    gains = {grade: 2 ** max(grade, 0) - 1 for grades in judged.values() for grade in grades.values()}
    # Ranks go in for scores: trec_eval keeps scores as float32, so near ones would tie, and ir_measures hands RR with a
    # cutoff to another library, which breaks ties the other way round. Cutting here makes that cutoff needless.
    ranked = {
        query: {document: -float(rank) for rank, document in enumerate(ranking(run[query])[:DEEPEST])}
        for query in judged
        if run.get(query)
    }
    measures = {
        (measure(gains=gains) if measure.NAME == nDCG.NAME else measure(rel=RELEVANT)): name
        for measure, name in MEASURES.items()
    }
    found: dict[str, dict[str, float]] = {name: dict.fromkeys(sorted(judged), 0.0) for name in measures.values()}
    for metric in ir_measures.pytrec_eval.iter_calc(list(measures), judged, ranked):
        found[measures[metric.measure]][metric.query_id] = metric.value
    return {name: np.array(list(values.values())) for name, values in found.items()}


def pairs(qrels: Qrels, run: Run) -> tuple[Array, Array]:
    """Concordant and discordant pairs of documents of each query of `qrels`, in sorted order.

    A pair is two documents with different grades; equal scores are neither. Documents that nobody graded make no pair.
    One that the run lacks stands below all that it has, and a pair of which it lacks both is discordant: else a run
    could raise its PNR by leaving out hard queries.
    """
    counts = [_pairs(qrels[query], run.get(query, {})) for query in sorted(qrels)]
    concordant, discordant = np.array(counts, dtype=float).reshape(-1, 2).T
    return concordant, discordant


def tally(qrels: Qrels, run: Run) -> Array:
    """Numerators and denominators (queries, metrics, 2) of `METRICS`, queries in sorted order."""
    means = [np.stack([values, np.ones_like(values)], axis=-1) for values in per_query(qrels, run).values()]
    concordant, discordant = pairs(qrels, run)
    accuracy, ratio = np.stack([concordant, concordant + discordant], -1), np.stack([concordant, discordant], -1)
    return np.stack([*means, accuracy, ratio], axis=1)


def unjudged(qrels: Qrels, run: Run) -> Array:
    """A tally (queries, 1, 2) of `UNJUDGED`: documents without a grade among the first 10, and how many those are.

    What a run finds beyond the judged documents counts as grade 0, so a large share says that the run may be better
    than its NDCG.
    """
    top = [(qrels[query], ranking(run.get(query, {}))[:DEEPEST]) for query in sorted(qrels)]
    counts = [(sum(document not in grades for document in first), len(first)) for grades, first in top]
    return np.array(counts, dtype=float).reshape(-1, 1, 2)


def intervals(tally: Array, cfg: Evaluate, seed: int, names: Sequence[str] = METRICS) -> dict[str, Interval]:
    """Each metric of a tally, by its name, with its percentile bootstrap interval over queries."""
    values = _ratio(tally.sum(axis=0))
    low, high = _bounds(_bootstrap(tally, cfg.resamples, seed), cfg.confidence)
    return {metric: Interval(_finite(values[i]), _finite(low[i]), _finite(high[i])) for i, metric in enumerate(names)}


def compare(a: Array, b: Array, cfg: Evaluate, seed: int) -> dict[str, Difference]:
    """Each metric of tally `a` less that of tally `b`: paired bootstrap interval, paired randomisation test.

    Under the null hypothesis a query's two results might as well have come from each other's run, so p is the share of
    random swaps that give a difference at least as large (Smucker et al., CIKM 2007), the observed one counted in.
    """
    with np.errstate(invalid="ignore"):
        difference = _ratio(a.sum(axis=0)) - _ratio(b.sum(axis=0))
        # The same seed draws the same queries for both, which is what pairs them.
        drawn = _bootstrap(a, cfg.resamples, seed) - _bootstrap(b, cfg.resamples, seed)
        swapped = _swap(a, b, cfg.resamples, seed)
    low, high = _bounds(drawn, cfg.confidence)
    # Written as "not smaller", an undefined difference (infinite less infinite) speaks against a finding, never for it;
    # the margin is for sums rounded in another order, which would halve the p of runs that differ in one query.
    extreme = (~(np.abs(swapped) < np.abs(difference) - 1e-12)).sum(axis=0)
    p = (extreme + 1) / (cfg.resamples + 1)
    return {
        metric: Difference(_finite(difference[i]), _finite(low[i]), _finite(high[i]), float(p[i]))
        for i, metric in enumerate(METRICS)
    }


def holm(p: Sequence[float]) -> list[float]:
    """The p-values of several tests of one question, corrected (Holm 1979), in the order given."""
    order = np.argsort(p)
    stepped = np.sort(p) * np.arange(len(p), 0, -1)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
    return [float(value) for value in corrected]


def judged(groups: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """The judgments that stand in rows of `groups`, whose documents all have a grade."""
    return {group["query"]: {doc["doc_id"]: doc["grade"] for doc in group["docs"]} for group in groups}


def kendall_tau(a: Run, b: Run) -> float | None:
    """Mean over queries of Kendall's tau-b between two runs, on the documents that both score.

    0 where one lacks the query or ties all its documents. Queries with a single document, or that both tie, say nothing
    and are left out; None if none remains.
    """
    from scipy.stats import kendalltau  # takes a second to import, and serving has no use for it

    found = []
    for query in sorted({*a, *b}):
        one, other = a.get(query, {}), b.get(query, {})
        if max(len(one), len(other)) < 2 or len({*one.values()}) == 1 == len({*other.values()}):
            continue
        shared = sorted(one.keys() & other.keys())
        tau = kendalltau([one[d] for d in shared], [other[d] for d in shared]).statistic if len(shared) > 1 else 0.0
        found.append(_finite(tau) or 0.0)
    return float(np.mean(found)) if found else None


def overlap(a: Run, b: Run, k: int) -> float | None:
    """Mean over queries of the share of documents common to the first `k` of two runs; None without a query."""
    found = []
    for query in sorted({*a, *b}):
        one, other = (set(ranking(run.get(query, {}))[:k]) for run in (a, b))
        if one or other:
            found.append(len(one & other) / max(len(one), len(other)))
    return float(np.mean(found)) if found else None


def _pairs(grades: Mapping[str, int], scores: Mapping[str, float]) -> tuple[int, int]:
    grade = np.array(list(grades.values()))
    score = np.array([scores.get(document, -np.inf) for document in grades])
    preferred = grade[:, None] > grade  # (documents, documents): the row is graded above the column
    above = score[:, None] > score
    neither = np.isneginf(score)[:, None] & np.isneginf(score)
    return int((preferred & above).sum()), int((preferred & (above.T | neither)).sum())


def _ratio(sums: Array) -> Array:
    """(..., 2) -> (...), infinite or nan over a denominator of 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1])


def _bootstrap(tally: Array, resamples: int, seed: int) -> Array:
    """(resamples, metrics) of as many queries, drawn with replacement."""
    rng, n = np.random.default_rng(seed), len(tally)
    drawn = (rng.multinomial(n, np.full(n, 1 / n), size=size) for size in _blocks(resamples, n))
    return _ratio(np.concatenate([np.tensordot(times, tally, axes=1) for times in drawn]))


def _swap(a: Array, b: Array, resamples: int, seed: int) -> Array:
    """(resamples, metrics) differences when each query's results are swapped between the runs by the toss of a coin."""
    rng, n = np.random.default_rng([seed, 1]), len(a)
    tossed = (rng.integers(2, size=(size, n)) for size in _blocks(resamples, n))
    moved = np.concatenate([np.tensordot(swapped, b - a, axes=1) for swapped in tossed])
    return _ratio(a.sum(axis=0) + moved) - _ratio(b.sum(axis=0) - moved)


def _blocks(resamples: int, queries: int) -> Iterator[int]:
    size = max(1, BLOCK // queries)
    while resamples > 0:
        yield min(size, resamples)
        resamples -= size


def _bounds(drawn: Array, confidence: float) -> Array:
    """(2, metrics): low and high. Order statistics: between infinite draws nothing can be interpolated."""
    outside = (1 - confidence) / 2
    return np.asarray(np.quantile(drawn, [outside, 1 - outside], axis=0, method="inverted_cdf"))


def _finite(value: float) -> float | None:
    """A value JSON can hold."""
    return float(value) if isfinite(value) else None
