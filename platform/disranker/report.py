"""The evaluation: one JSON for machines, one table for people."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np

from disranker import metrics
from disranker.metrics import METRICS, UNJUDGED, Array, Qrels, Run
from disranker.recipe import Evaluate, Refused
from disranker.slices import Slices

Report = dict[str, Any]  # the content of report.json

SHOWN = ("ndcg@1", "ndcg@5", "ndcg@10", "mrr@10", "pnr")  # of the metrics, where there is room for few
HEADLINE = "ndcg@10"  # the metric of the sentences, the pictures and the gate
MINUS, NONE = "\N{MINUS SIGN}", "\N{EN DASH}"
FIRST = 5  # documents compared at the top of two rankings
TIE = 1e-9  # a smaller difference of two values of a query is of rounding


def evaluate(
    qrels: Qrels,
    runs: Mapping[str, Run],
    cfg: Evaluate,
    seed: int,
    slices: Mapping[str, Slices] | None = None,
) -> Report:
    """The content of report.json: every run with intervals, every later run against every earlier one.

    `slices` has, by what they are cut, the queries of each slice. `holm` is p corrected over the pairs of one metric;
    wins, ties and losses count queries by `HEADLINE`. Raises `Refused` without a judged query.
    """
    if not qrels:
        raise Refused(
            "no judged query to evaluate on; grade queries of the test split, or enlarge aggregate.test_share"
        )
    tallies = {name: metrics.tally(qrels, run) for name, run in runs.items()}
    return {
        "queries": len(qrels),
        "seed": seed,
        "resamples": cfg.resamples,
        "confidence": cfg.confidence,
        "missing": {name: sum(not run.get(query) for query in qrels) for name, run in runs.items()},
        "runs": _intervals(tallies, cfg, seed),
        "unjudged": {name: _unjudged(qrels, run, cfg, seed) for name, run in runs.items()},
        "pairs": _differences(tallies, cfg, seed),
        "outcomes": [{"a": a, "b": b} | _outcome(tallies[a], tallies[b]) for b, a in combinations(runs, 2)],
        "agreement": [
            {"a": a, "b": b, "kendall_tau": metrics.kendall_tau(runs[a], runs[b])}
            | {f"overlap@{FIRST}": metrics.overlap(runs[a], runs[b], FIRST)}
            for b, a in combinations(runs, 2)
        ],
        "slices": {
            by: {name: _slice(sorted(qrels), queries, tallies, cfg, seed) for name, queries in cut.items()}
            for by, cut in (slices or {}).items()
        },
    }


def table(report: Report) -> str:
    """The runs as plain text, a line each, below 120 columns."""
    rows = [["run", *(metric.upper() for metric in SHOWN)]]
    for name, values in report["runs"].items():
        rows.append([name, *(f"{number(values[metric]['value'])} {bounds(values[metric])}" for metric in SHOWN)])
    return "\n".join(aligned(rows))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line for each row, its columns as wide as their longest entry."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def examples(
    qrels: Qrels, runs: Mapping[str, Run], a: str, b: str, titles: Mapping[str, str], *, k: int = 10
) -> list[Any]:
    """The `k` queries where run `a` gains most NDCG@10 on run `b`, then the `k` where it loses most.

    Each has its documents that stand in the first `FIRST` of either run.
    """
    deltas = metrics.per_query(qrels, runs[a])[HEADLINE] - metrics.per_query(qrels, runs[b])[HEADLINE]
    ordered = sorted(zip(deltas.tolist(), sorted(qrels), strict=True), key=lambda pair: (-pair[0], pair[1]))
    wins = [pair for pair in ordered[:k] if pair[0] > TIE]
    losses = [pair for pair in reversed(ordered[-k:]) if pair[0] < -TIE]
    return [
        {"query": query, "delta": delta, "a": a, "b": b}
        | {"documents": _documents(qrels[query], runs[a].get(query, {}), runs[b].get(query, {}), titles)}
        for delta, query in wins + losses
    ]


def _intervals(tallies: Mapping[str, Array], cfg: Evaluate, seed: int) -> dict[str, Any]:
    return {
        name: {metric: asdict(found) for metric, found in metrics.intervals(tally, cfg, seed).items()}
        for name, tally in tallies.items()
    }


def _differences(tallies: Mapping[str, Array], cfg: Evaluate, seed: int) -> list[dict[str, Any]]:
    couples = [(a, b) for b, a in combinations(tallies, 2)]
    found = [metrics.compare(tallies[a], tallies[b], cfg, seed) for a, b in couples]
    rows = []
    for metric in METRICS:
        corrected = metrics.holm([by_metric[metric].p for by_metric in found])
        for (a, b), by_metric, holm in zip(couples, found, corrected, strict=True):
            rows.append({"a": a, "b": b, "metric": metric} | asdict(by_metric[metric]) | {"holm": holm})
    return rows


def _unjudged(qrels: Qrels, run: Run, cfg: Evaluate, seed: int) -> dict[str, Any]:
    return asdict(metrics.intervals(metrics.unjudged(qrels, run), cfg, seed, (UNJUDGED,))[UNJUDGED])


def _outcome(a: Array, b: Array) -> dict[str, int]:
    deltas = (a - b)[:, METRICS.index(HEADLINE), 0]
    wins, losses = int((deltas > TIE).sum()), int((deltas < -TIE).sum())
    return {"wins": wins, "ties": len(deltas) - wins - losses, "losses": losses}


def _slice(
    queries: Sequence[str], wanted: Sequence[str], tallies: Mapping[str, Array], cfg: Evaluate, seed: int
) -> dict[str, Any]:
    inside = np.isin(np.array(queries, dtype=object), np.array(wanted, dtype=object))
    return {
        "queries": int(inside.sum()),
        "runs": _intervals({name: tally[inside] for name, tally in tallies.items()}, cfg, seed),
    }


def _documents(
    grades: Mapping[str, int], a: Mapping[str, float], b: Mapping[str, float], titles: Mapping[str, str]
) -> list[dict[str, Any]]:
    above, below = metrics.ranking(a), metrics.ranking(b)
    ranks = [{document: rank for rank, document in enumerate(order, 1)} for order in (above, below)]
    return [
        {
            "title": titles.get(document, document),
            "grade": grades.get(document),
            "rank_a": ranks[0].get(document),
            "rank_b": ranks[1].get(document),
            "score_a": a.get(document),
            "score_b": b.get(document),
        }
        for document in dict.fromkeys(above[:FIRST] + below[:FIRST])
    ]


def bounds(found: Mapping[str, float | None], form: str = ".2f") -> str:
    return f"[{number(found['low'], form)}, {number(found['high'], form)}]"


def difference(pair: Mapping[str, Any]) -> str:
    return f"{number(pair['difference'], '+.3f')} {bounds(pair, '+.3f')}"


def number(value: float | None, form: str = ".3f") -> str:
    return NONE if value is None else format(value, form).replace("-", MINUS)
