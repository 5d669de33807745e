"""The evaluation: one JSON for machines, one table and one HTML page for people."""

import importlib.resources
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import jinja2
import numpy as np

from disranker import metrics, pictures
from disranker.metrics import METRICS, Array, Qrels, Run
from disranker.recipe import Evaluate, Refused

Report = dict[str, Any]  # the content of report.json

BANDS = ("head", "torso", "tail", "unseen")
HEADLINE = "ndcg@10"  # the metric of the sentences, the pictures and the gate
MINUS, NONE = "\N{MINUS SIGN}", "\N{EN DASH}"
FIRST = 5  # documents compared at the top of two rankings
DEEPEST = 20  # positions of the examination plot
CLICK_MODELS = {
    "ctr": "plain click rate (CTR)",
    "coec": "clicks over expected clicks (COEC)",
    "pbm": "position-based model (PBM)",
    "dbn": "dynamic Bayesian network (DBN)",
}
LEARNED = {"pretrain": "Decoder, pre-trained", "finetune": "Teacher, fine-tuned", "distill": "Student, distilled"}


def evaluate(
    qrels: Qrels,
    runs: Mapping[str, Run],
    cfg: Evaluate,
    seed: int,
    bands: Mapping[str, str] | None = None,
) -> Report:
    """The content of report.json: every run with intervals, every later run against every earlier one.

    `bands` names the frequency band of a query; one without stands under "unseen". `holm` is p corrected over the pairs
    of one metric. Raises `Refused` without a judged query.
    """
    if not qrels:
        raise Refused(
            "no judged query to evaluate on; grade queries of the test split, or enlarge aggregate.test_share"
        )
    tallies = {name: metrics.tally(qrels, run) for name, run in runs.items()}
    return {
        "queries": len(qrels),
        "resamples": cfg.resamples,
        "confidence": cfg.confidence,
        "missing": {name: sum(not run.get(query) for query in qrels) for name, run in runs.items()},
        "runs": _intervals(tallies, cfg, seed),
        "pairs": _differences(tallies, cfg, seed),
        "agreement": [
            {"a": a, "b": b, "kendall_tau": metrics.kendall_tau(runs[a], runs[b])}
            | {f"overlap@{FIRST}": metrics.overlap(runs[a], runs[b], FIRST)}
            for b, a in combinations(runs, 2)
        ],
        "bands": _by_band(sorted(qrels), tallies, bands, cfg, seed) if bands else {},
    }


def read(content: str | bytes) -> Report:
    """A report from the text of report.json."""
    found: Report = json.loads(content)
    return found


def table(report: Report) -> str:
    """The runs as plain text, a line each, below 120 columns."""
    rows = [["run", *(metric.upper() for metric in METRICS)]]
    for name, values in report["runs"].items():
        rows.append([name, *(f"{_number(values[metric]['value'])} {_bounds(values[metric])}" for metric in METRICS)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def examples(
    qrels: Qrels, runs: Mapping[str, Run], a: str, b: str, titles: Mapping[str, str], *, k: int = 5
) -> list[Any]:
    """The `k` queries where run `a` gains most NDCG@10 on run `b`, then the `k` where it loses most.

    Each has its documents that stand in the first `FIRST` of either run.
    """
    deltas = metrics.per_query(qrels, runs[a])[HEADLINE] - metrics.per_query(qrels, runs[b])[HEADLINE]
    ordered = sorted(zip(deltas.tolist(), sorted(qrels), strict=True), key=lambda pair: (-pair[0], pair[1]))
    wins = [pair for pair in ordered[:k] if pair[0] > 0]
    losses = [pair for pair in reversed(ordered[-k:]) if pair[0] < 0]
    return [
        {"query": query, "delta": delta, "a": a, "b": b}
        | {"documents": _documents(qrels[query], runs[a].get(query, {}), runs[b].get(query, {}), titles)}
        for delta, query in wins + losses
    ]


def html(report: Report, *, title: str, facts: Mapping[str, str], examples: list[dict[str, Any]]) -> str:
    """The report as one page that fetches nothing. `examples` as `examples()` makes them."""
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters.update(number=_number, bounds=_bounds, difference=_difference)
    source = importlib.resources.files("disranker").joinpath("report.html.j2").read_text(encoding="utf-8")
    return page.from_string(source).render(
        report=report,
        title=title,
        facts=facts,
        examples=examples,
        metrics=METRICS,
        relevant=metrics.RELEVANT,
        first=FIRST,
        sentences=_sentences(report),
        pictures=_pictures(report),
        clicks=_clicks(report.get("click_models")),
        learned=_learned(report.get("training") or {}),
    )


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


def _by_band(
    queries: Sequence[str], tallies: Mapping[str, Array], bands: Mapping[str, str], cfg: Evaluate, seed: int
) -> dict[str, Any]:
    of = np.array([bands.get(query, BANDS[-1]) for query in queries])
    return {
        band: {
            "queries": int((of == band).sum()),
            "runs": _intervals({name: tally[of == band] for name, tally in tallies.items()}, cfg, seed),
        }
        for band in sorted(set(of.tolist()), key=BANDS.index)
    }


def _documents(
    grades: Mapping[str, int], a: Mapping[str, float], b: Mapping[str, float], titles: Mapping[str, str]
) -> list[dict[str, Any]]:
    top = dict.fromkeys(metrics.ranking(a)[:FIRST] + metrics.ranking(b)[:FIRST])
    return [
        {
            "title": titles.get(document, document),
            "grade": grades.get(document),
            "score_a": a.get(document),
            "score_b": b.get(document),
        }
        for document in top
    ]


def _bounds(found: Mapping[str, float | None], form: str = ".2f") -> str:
    return f"[{_number(found['low'], form)}, {_number(found['high'], form)}]"


def _difference(pair: Mapping[str, Any]) -> str:
    return f"{_number(pair['difference'], '+.3f')} {_bounds(pair, '+.3f')}"


def _number(value: float | None, form: str = ".3f") -> str:
    return NONE if value is None else format(value, form).replace("-", MINUS)


def _called(name: str) -> str:
    return {"bm25": "BM25", "teacher": "the teacher", "student": "the student"}.get(name, name)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _sentences(report: Report) -> list[tuple[str, str]]:
    """(tone, sentence) for each pair of runs; of the student alone, where there is one."""
    pairs = [pair for pair in report["pairs"] if pair["metric"] == HEADLINE]
    return [
        _sentence(report, pair) for pair in reversed(pairs) if pair["a"] == "student" or "student" not in report["runs"]
    ]


def _sentence(report: Report, pair: Mapping[str, Any]) -> tuple[str, str]:
    a, b = _capital(_called(pair["a"])), _called(pair["b"])
    value, other = (report["runs"][pair[side]][HEADLINE]["value"] for side in ("a", "b"))
    numbers = f"NDCG@10 {value:.3f} against {other:.3f}, difference {_difference(pair)}"
    if pair["low"] > 0:
        tone, verdict = "good", f"is better than {b}"
    elif pair["high"] < 0:
        tone, verdict = "bad", f"is worse than {b}"
    else:
        tone, verdict = "open", f"is not shown to be better or worse than {b}: the interval of the difference holds 0"
    if pair["b"] == "teacher" and other > 0:
        return "good" if tone == "good" else "open", (
            f"{a} keeps {value / other:.1%} of the teacher's NDCG@10 and {verdict} ({numbers})."
        )
    return tone, f"{a} {verdict} ({numbers})."


def _clicks(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the page says of the click models; None without any. `found` as the manifest of the evidence has it."""
    if not found:
        return None
    curves = {name: _curve(curve) for name, curve in found["examination"].items()}
    points = [point for point in found["interventional"] if point["position"] <= DEEPEST]
    drawn = {name.upper(): curve for name, curve in curves.items() if len(curve) > 1}
    return {
        "sentence": _looked(found, curves.get(found["click_model"], {})),
        "rows": [row | {"called": CLICK_MODELS.get(row["model"], row["model"])} for row in found["models"]],
        "chosen": found["click_model"],
        "shuffled": bool(points),
        "picture": pictures.curves(drawn, points, "examination") if drawn or points else None,
    }


def _curve(examination: Mapping[Any, float]) -> dict[int, float]:
    """The part of a curve that is drawn; a log without positions has none. JSON made its keys text."""
    known = {int(position): x for position, x in examination.items() if position not in (None, "null")}
    return {position: known[position] for position in sorted(known) if position <= DEEPEST}


def _looked(found: Mapping[str, Any], curve: Mapping[int, float]) -> str:
    called = CLICK_MODELS.get(found["click_model"], found["click_model"])
    said = f"What shoppers clicked is read by the {called}: {found['why']}."
    if found["click_model"] == "ctr" or not curve.get(1) or FIRST not in curve:
        return said
    return f"{said} By it, result {FIRST} is looked at {curve[FIRST] / curve[1]:.0%} as often as the first."


def _learned(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the page says of each stage that trained a model, with (caption, data URI); `found` as manifests have it."""
    trained = {called: found[stage] for stage, called in LEARNED.items() if found.get(stage, {}).get("curve")}
    return [
        {"called": called, "sentence": _outcome(counts), "pictures": _lessons(counts)}
        for called, counts in trained.items()
    ]


def _outcome(counts: Mapping[str, Any]) -> str:
    said, best = f"{counts['steps']:,} steps", counts.get("best")
    if not best:
        return f"{said}, none of them measured on validation queries."
    said += f", best at step {best['step']:,}: {_spaced(best['metric'])} {_short(best['value'])}"
    step, value = next(iter(_measured(counts, best["metric"]).items()))
    return f"{said}." if step == best["step"] else f"{said} ({_short(value)} at step {step:,})."


def _lessons(counts: Mapping[str, Any]) -> list[tuple[str, str]]:
    curve = {point["step"]: point["loss"] for point in counts["curve"]}
    drawn = [("Loss in training", pictures.losses(curve, "loss"))]
    if best := counts.get("best"):
        called = _spaced(best["metric"])
        lines = {name: _measured(counts, metric) for name, metric in _lines(counts, best["metric"]).items()}
        picture = pictures.validations(lines, (best["step"], best["value"]), called)
        drawn.append((f"{_capital(called)} on validation queries", picture))
    return drawn


def _lines(counts: Mapping[str, Any], metric: str) -> dict[str, str]:
    """The lines of a metric: all queries, then each band of them where it was measured apart."""
    apart = {band: f"{metric}_{band}" for band in BANDS if _measured(counts, f"{metric}_{band}")}
    return {"all" if apart else _spaced(metric): metric} | apart


def _measured(counts: Mapping[str, Any], metric: str) -> dict[int, float]:
    return {point["step"]: point[metric] for point in counts["validations"] if metric in point}


def _spaced(metric: str) -> str:
    return metric.replace("_", " ")


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.1f}"


def _pictures(report: Report) -> list[tuple[str, str]]:
    """(caption, data URI)"""
    runs = report["runs"]
    drawn = [
        ("NDCG@10 of each run", pictures.levels(list(runs), [found[HEADLINE] for found in runs.values()], "NDCG@10"))
    ]
    if pairs := [pair | {"value": pair["difference"]} for pair in report["pairs"] if pair["metric"] == HEADLINE]:
        names = [f"{pair['a']} {MINUS} {pair['b']}" for pair in pairs]
        drawn.append(("Differences on the same queries", pictures.differences(names, pairs, "difference in NDCG@10")))
    if bands := report["bands"]:
        names = [f"{band} ({found['queries']:,})" for band, found in bands.items()]
        found = {run: [band["runs"][run][HEADLINE] for band in bands.values()] for run in runs}
        drawn.append(("NDCG@10 by how often a query is asked", pictures.bars(names, found, "NDCG@10")))
    return drawn
