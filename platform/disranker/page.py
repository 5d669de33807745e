"""The evaluation as one HTML page that fetches nothing: sentences, pictures, tables, examples."""

import importlib.resources
import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import jinja2

from disranker import metrics, pictures
from disranker.metrics import METRICS
from disranker.report import FIRST, HEADLINE, MINUS, SHOWN, Report, bounds, difference, number
from disranker.tables import BANDS

DEEPEST = 20  # positions of the examination plot
NAME = 22  # letters beside a plot in one line
FEW = 30  # queries of a slice below which even its interval is unsure
CLICK_MODELS = {
    "ctr": "plain click rate (CTR)",
    "coec": "clicks over expected clicks (COEC)",
    "pbm": "position-based model (PBM)",
    "dbn": "dynamic Bayesian network (DBN)",
}
LEARNED = {"pretrain": "Decoder, pre-trained", "finetune": "Teacher, fine-tuned", "distill": "Student, distilled"}

SLICED = {
    "band": "how often a query is asked",
    "query_words": "words in the query",
    "document_words": "length of the documents",
}


def html(report: Report, *, title: str, facts: Mapping[str, str], examples: list[dict[str, Any]]) -> str:
    """The report as one page that fetches nothing. `examples` as `report.examples` makes them, of one pair or more."""
    return render(
        "report.html.j2",
        report=report,
        title=title,
        facts=facts,
        duels=_duels(report, examples),
        shown=SHOWN,
        others=[metric for metric in METRICS if metric not in SHOWN],
        relevant=metrics.RELEVANT,
        first=FIRST,
        few=FEW,
        sentences=_sentences(report),
        pictures=_pictures(report),
        slices=_slices(report),
        sliced=SLICED,
        perturbed=_perturbed(report),
        clicks=_clicks(report.get("click_models")),
        learned=_learned(report.get("training") or {}),
    )


def render(template: str, **values: Any) -> str:
    """A page of this package, with the look that all of them share."""
    loader = jinja2.FunctionLoader(
        lambda name: importlib.resources.files("disranker").joinpath(name).read_text("utf-8")
    )
    page = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=loader
    )
    page.filters.update(number=number, bounds=bounds, difference=difference, called=named)
    return page.get_template(template).render(**values)


def named(metric: str) -> str:
    """A metric as a heading has it."""
    return "Pair accuracy" if metric == "pair_accuracy" else metric.upper()


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
    numbers = f"NDCG@10 {value:.3f} against {other:.3f}, difference {difference(pair)}"
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
    if others := counts.get("baselines"):
        graded = {"student": _measured(counts, "pair_accuracy")}
        picture = pictures.validations(graded, None, "pair accuracy", others)
        drawn.append(("Pairs in the order of human grades, validation queries", picture))
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
        (
            "NDCG@10 of each run",
            pictures.levels(list(map(_folded, runs)), [found[HEADLINE] for found in runs.values()], "NDCG@10"),
        )
    ]
    if pairs := [pair | {"value": pair["difference"]} for pair in report["pairs"] if pair["metric"] == HEADLINE]:
        names = [_less(pair["a"], pair["b"]) for pair in pairs]
        drawn.append(("Differences on the same queries", pictures.differences(names, pairs, "difference in NDCG@10")))
    return drawn


def _folded(name: str) -> str:
    """The name of a run, which others may have given, in lines that leave room for the plot."""
    return "\n".join(textwrap.wrap(name, NAME)) or name


def _less(a: str, b: str) -> str:
    joined = f"{a} {MINUS} {b}"
    return joined if len(joined) <= NAME else f"{_folded(a)}\n{MINUS} {_folded(b)}"


def _slices(report: Report) -> list[tuple[str, str]]:
    """(caption, data URI)"""
    drawn = []
    for by, cut in report["slices"].items():
        names = [f"{name}\n({found['queries']:,})" for name, found in cut.items()]
        levels = {_folded(run): [found["runs"][run][HEADLINE] for found in cut.values()] for run in report["runs"]}
        drawn.append((f"NDCG@10 by {SLICED.get(by, by)}", pictures.bars(names, levels, "NDCG@10")))
    return drawn


def _perturbed(report: Report) -> dict[str, Any] | None:
    """What the page says of perturbed queries; None where the report has none."""
    rows = report.get("perturbed")
    if not rows:
        return None
    names = [f"{row['kind']}, {row['model']}" for row in rows]
    found = [row | {"value": row["difference"]} for row in rows]
    return {
        "rows": rows,
        "unscored": [name for name in report["runs"] if name not in {row["model"] for row in rows}],
        "picture": pictures.differences(names, found, "change of NDCG@10"),
    }


def _duels(report: Report, examples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each pair of runs that has examples: its wins, ties and losses, and the largest of them."""
    counted = {(outcome["a"], outcome["b"]): outcome for outcome in report["outcomes"]}
    found = []
    for pair, shown in groupby(examples, key=lambda example: (example["a"], example["b"])):
        listed = list(shown)
        sides = [[one for one in listed if (one["delta"] > 0) == won] for won in (True, False)]
        found.append({"a": pair[0], "b": pair[1], "counts": counted.get(pair), "wins": sides[0], "losses": sides[1]})
    return found
