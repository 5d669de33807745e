"""The model card: what a bundle is, what it was made of and how good it is, from the manifests of the run."""

from collections.abc import Mapping, Sequence
from typing import Any

from disranker import contract, lineage
from disranker.contract import Contract
from disranker.lineage import Chain

NEARNESS = {"ndcg@10": ".4f", "max_difference": ".1e", "kendall_tau": ".4f"}


def text(
    name: str,
    agreed: Contract,
    report: Mapping[str, Any],
    facts: Mapping[str, object],
    engine: str,
    engines: Mapping[str, Mapping[str, Any]],
    chain: Chain,
) -> str:
    """The card in Markdown; `engines` as `Manifest.engines` has them."""
    trained = [f"- {fact}: {value}" for fact, value in facts.items()]
    sections = {
        "Trained on": trained or ["Not stated."],
        "Evaluation": _metrics(report),
        "Engines": [f"This bundle chooses `{engine}`.", "", *_engines(engines)],
        "Input": _input(agreed),
        "Limits": _limits(report),
        "Lineage": _lineage(chain),
    }
    lines = ["---", "library_name: transformers", "pipeline_tag: text-ranking", "---", f"# {name}", ""]
    lines += [
        "A BERT cross-encoder that scores (query, title, summary), distilled by disranker. The score is a raw logit:"
    ]
    lines += ["larger is more relevant, and only the order within one query has a meaning.", ""]
    for title, content in sections.items():
        lines += [f"## {title}", "", *content, ""]
    return "\n".join(lines)


def facts(manifests: Mapping[str, Mapping[str, Any]], made_up: bool) -> dict[str, str]:
    """What a student was made of, a line each, from the manifests of searches, documents, groups, teacher, labels and
    student.
    """
    teacher, student = manifests["teacher"], manifests["student"]
    groups, taught = manifests["groups"]["counts"], teacher["settings"]
    learned, shape = student["settings"]["distill"], student["settings"]["student"]
    lists = ", ".join(f"{groups[split]:,} {split}" for split in ("train", "validation", "test"))
    return {
        "data": "a made-up world: nothing here is a result on real users" if made_up else "click logs",
        "searches": f"{manifests['searches']['rows']:,}",
        "documents": f"{manifests['documents']['rows']:,}",
        "lists": lists,
        "teacher": f"{taught['teacher']['base']}, {teacher['counts']['steps']:,} steps of {taught['finetune']['loss']}",
        "labels": f"{manifests['labels']['counts']['pairs']:,} pairs",
        "student": f"{shape['base']}, {shape['layers']} layers, {student['counts']['steps']:,} steps",
        "loss": _loss(learned),
        "versions": ", ".join(f"{name} {version}" for name, version in student["versions"].items()),
    }


def _loss(learned: Mapping[str, Any]) -> str:
    """What of the settings of `distill` says what the student learned."""
    if learned["loss"] != "hybrid":
        return f"{learned['loss']} on {learned['targets']}"
    return f"hybrid, alpha {learned['alpha']:g}, beta {learned['beta']:g}, {learned['pairs']} pairs"


def _metrics(report: Mapping[str, Any]) -> list[str]:
    """A table with a row for each run and a column for each metric, and intervals where the report has them."""
    runs = report.get("runs", {})
    names = list(dict.fromkeys(metric for metrics in runs.values() for metric in metrics))
    if not names:
        return ["Not evaluated."]
    rows = [[run, *(_interval(metrics.get(metric)) for metric in names)] for run, metrics in runs.items()]
    return [f"On {report.get('queries', '?')} queries.", "", *_table(["run", *names], rows)]


def _engines(engines: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A row for each engine: pairs a second by threads, and how near it is to torch."""
    if not engines:
        return ["Not measured."]
    threads = next(iter(engines.values()))["threads"]
    head = ["engine", *(f"pairs/s, {n} thread{'s' if n > 1 else ''}" for n in threads)]
    head += ["NDCG@10", "largest difference of a score", "Kendall's tau"]
    rows = [
        [
            name,
            *(f"{speed:,.0f}" for speed in of["pairs_per_s"]),
            *(_number(of.get(key), form) for key, form in NEARNESS.items()),
        ]
        for name, of in engines.items()
    ]
    return [
        *_table(head, rows),
        "",
        "Median speed on the machine that made the bundle, without tokenisation. The last two are against torch.",
    ]


def _input(agreed: Contract) -> list[str]:
    return [
        f"`[CLS] query [SEP] title summary [SEP]`, at most {agreed.max_tokens} tokens: {agreed.max_query_tokens} of "
        f"the query, {agreed.max_title_tokens} of the title, the summary in what is left. `{contract.FILE}` is binding "
        f"(digest {agreed.digest}); `bundle.json` has the sha256 of every file.",
        "",
        "`AutoModelForSequenceClassification` and sentence-transformers' `CrossEncoder` load this folder as it is; "
        "give `(query, title + ' ' + summary)`. They cut a long query or title by their own rule, so scores are the "
        "same only where neither is longer than above.",
    ]


def _limits(report: Mapping[str, Any]) -> list[str]:
    missing = {run: count for run, count in report.get("missing", {}).items() if count}
    return [
        "- Scores of different queries cannot be compared, nor with those of another bundle.",
        "- It knows what its teacher learned from clicks: products that were never shown, and other languages or "
        "shops, are outside what was measured.",
        "- Intervals are over the test queries of one log; they say nothing of another season or another public.",
        *(f"- {run} has no ranking for {count:,} test queries, which count as 0." for run, count in missing.items()),
    ]


def _lineage(chain: Chain) -> list[str]:
    if not chain:
        return ["Not stated."]
    files = lineage.log_files(chain)
    made = [
        f"{len(chain) - 1} artefacts lead from {len(files):,} files to this bundle; `bundle.json` has the sha256 of"
    ]
    made += ["each one's manifest, and `python -m jobs.lineage` shows them as a tree.", ""]
    rows = [[name, f"`{node.fingerprint}`", node.finished] for name, node in chain.items() if name != lineage.ROOT]
    resting = sorted({name for node in chain.values() for name in node.rests_on_forgotten})
    warning = [f"Made before somebody asked to be forgotten, from: {', '.join(resting)}.", ""] if resting else []
    return [*made, *warning, *_table(["artefact", "fingerprint", "finished"], rows)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def _interval(metric: Mapping[str, float] | None) -> str:
    if metric is None:
        return "not measured"
    low, high = metric.get("low"), metric.get("high")
    value = _number(metric["value"], ".3f")
    return value + ("" if low is None or high is None else f" ({low:.3f} to {high:.3f})")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
