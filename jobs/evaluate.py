"""BM25, teacher, student and runs of others on the test queries -> scores and the report."""

import json
import sys
from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc

from disranker import metrics, page, perturb, report, slices, trec
from disranker import store as stores
from disranker.engine import Engine
from disranker.metrics import Qrels, Run
from disranker.recipe import Recipe
from disranker.retrieval import BM25
from disranker.slices import Slices
from disranker.stages import Step
from disranker.store import Store
from jobs import launch, parts
from jobs.score import Teacher

TEST = pc.field("split") == "test"
MODELS = ("bm25", "teacher", "student")
TRAINED = {"pretrain": "decoder", "finetune": "teacher", "distill": "student"}  # stage -> artefact
Group = dict[str, Any]


def run(recipe: Recipe, store: Store, step: Step) -> dict[str, Any]:
    groups = store.read("groups", where=TEST).to_pylist()
    qrels = metrics.judged(groups)
    # Before the models: a bad file, or labels of another teacher, are known in a second.
    Teacher.labelled(recipe, store)
    files = stores.expand(recipe.evaluate.runs, "runs", "evaluate")
    outside = trec.outside(files, qrels, MODELS) if qrels else {}
    counts = parts.total(parts.each_by(recipe.ingest.parts, Judge, recipe, store))
    runs = _runs(store, outside)
    found = report.evaluate(qrels, runs, recipe.evaluate, recipe.seed, sliced(groups, store))
    found["perturbed"] = perturb.drops(qrels, runs, _perturbed(store), recipe.evaluate, recipe.seed)
    found["click_models"] = store.manifest("evidence")["counts"].get("model")
    found["training"] = {stage: made["counts"] for stage, name in TRAINED.items() if (made := store.finished(name))}
    titles = {doc["doc_id"]: doc["title"] for group in groups for doc in group["docs"]}
    _write(found, qrels, runs, titles, recipe, store)
    return {name: _headline(found, name) for name in runs} | counts


class Judge:
    """Scores the test lists of one part with all three models."""

    def __init__(self, recipe: Recipe, store: Store):
        self.store, self.teacher, self.recipe = store, Teacher.of(recipe, store), recipe
        self.student = Engine(store.folder("student"))
        self.bm25 = BM25.of(store.read("documents").to_pylist())

    def __call__(self, part: int) -> dict[str, int]:
        groups = self.store.read("groups", part=part, where=TEST).to_pylist()
        rows: list[dict[str, Any]] = []
        for group, teacher in zip(groups, self.teacher.scores(groups), strict=True):
            doc_ids = [doc["doc_id"] for doc in group["docs"]]
            for model, given in (self._scores(group, group["query"]) | {"teacher": teacher}).items():
                rows += [
                    {"query": group["query"], "doc_id": doc_id, "model": model, "score": score}
                    for doc_id, score in zip(doc_ids, given, strict=True)
                    if score is not None  # the teacher failed on it
                ]
        self.store.write("scores", part, rows)
        self.store.write("perturbed", part, [row for group in groups for row in self._perturbed(group)])
        return {"queries": len(groups), "scores": len(rows)}

    def _scores(self, group: Group, query: str) -> dict[str, list[float]]:
        """Of the documents of a list, by the models that are at hand, for a query that need not be its own."""
        docs = group["docs"]
        titles, summaries = [doc["title"] for doc in docs], [doc["summary"] for doc in docs]
        return {
            "bm25": self.bm25.scores(query, [doc["doc_id"] for doc in docs]),
            "student": self.student.scores([query] * len(docs), titles, summaries),
        }

    def _perturbed(self, group: Group) -> Iterator[dict[str, Any]]:
        if not self.recipe.evaluate.perturb:
            return
        for kind, text in perturb.perturbed(group["query"], self.recipe.seed).items():
            for model, given in self._scores(group, text).items():
                for doc, score in zip(group["docs"], given, strict=True):
                    known = {"query": group["query"], "kind": kind, "text": text}
                    yield known | {"doc_id": doc["doc_id"], "model": model, "score": score}


def _runs(store: Store, outside: Mapping[str, Run]) -> dict[str, Run]:
    """Every later run is compared with every earlier one: the student comes last."""
    runs: dict[str, dict[str, dict[str, float]]] = {model: {} for model in MODELS}
    for row in store.read_files("scores", store.written("scores")).to_pylist():
        runs[row["model"]].setdefault(row["query"], {})[row["doc_id"]] = row["score"]
    student = runs.pop("student")
    return {**runs, **outside, "student": student}


def _perturbed(store: Store) -> dict[tuple[str, str], Run]:
    runs: dict[tuple[str, str], dict[str, dict[str, float]]] = {
        (kind, model): {} for kind in perturb.KINDS for model in ("bm25", "student")
    }
    for row in store.read_files("perturbed", store.written("perturbed")).to_pylist():
        runs[row["kind"], row["model"]].setdefault(row["query"], {})[row["doc_id"]] = row["score"]
    return dict(runs)


def sliced(groups: list[Group], store: Store) -> dict[str, Slices]:
    queries = [group["query"] for group in groups]
    of_test = pc.field("query").isin(pa.array(queries, pa.string()))
    clicked = set(store.read("evidence", ["query"], where=of_test & (pc.field("clicks") > 0))["query"].to_pylist())
    return {
        "band": slices.by_band({group["query"]: group["band"] for group in groups}, clicked),
        "query_words": slices.by_words(queries),
        "document_words": slices.by_length({group["query"]: _words(group) for group in groups}),
    }


def _words(group: Group) -> float:
    """Mean length of the documents of a list, in words."""
    return fmean(len(f"{doc['title']} {doc['summary']}".split()) for doc in group["docs"])


def _write(
    found: report.Report, qrels: Qrels, runs: dict[str, Run], titles: dict[str, str], recipe: Recipe, store: Store
) -> None:
    examples = [one for b in ("bm25", "teacher") for one in report.examples(qrels, runs, "student", b, titles)]
    title = "disranker on a made-up world" if recipe.made_up else "disranker"
    html = page.html(found, title=title, facts=_facts(recipe, store), examples=examples)
    store.put_text(html, "report", "report.html")
    for name, scores in runs.items():
        lines = trec.run_lines(scores, name)
        store.put_text("".join(f"{line}\n" for line in lines), "report", f"{quote(name, safe='')}.run")
    store.put_text("".join(f"{line}\n" for line in trec.qrels_lines(qrels)), "report", "qrels.txt")
    store.put_text(json.dumps(found, indent=1), "report", "report.json")


def _facts(recipe: Recipe, store: Store) -> dict[str, str]:
    searches, groups = store.manifest("searches"), store.manifest("groups")
    teacher, labels, student = (store.manifest(name) for name in ("teacher", "labels", "student"))
    return {
        "Data": "a made-up world: nothing here is a result on real users"
        if recipe.made_up
        else ", ".join(recipe.data.queries),
        "Searches": f"{searches['rows']:,}, and {store.manifest('rejects')['rows']:,} lines refused",
        "Documents": f"{store.manifest('documents')['rows']:,}",
        "Lists": ", ".join(f"{groups['counts'][split]:,} {split}" for split in ("train", "validation", "test")),
        "Teacher": f"{recipe.teacher.base}, {teacher['counts']['steps']:,} steps of {recipe.finetune.loss}",
        "Labels": f"{labels['counts']['pairs']:,} pairs",
        "Student": f"{recipe.student.base}, {recipe.student.layers} layers, {student['counts']['steps']:,} steps",
        "Seed": str(recipe.seed),
        "Versions": ", ".join(f"{name} {version}" for name, version in student["versions"].items()),
    }


def _headline(found: report.Report, name: str) -> str:
    return f"{found['runs'][name][report.HEADLINE]['value']:.3f}"


if __name__ == "__main__":
    sys.exit(launch.main("evaluate"))
