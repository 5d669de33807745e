"""BM25, teacher and student on the test queries -> scores and the report."""

import json
import sys
from typing import Any

import pyarrow.compute as pc

from disranker import report, trec
from disranker.engine import Engine
from disranker.metrics import Qrels, Run
from disranker.recipe import Recipe
from disranker.retrieval import BM25
from disranker.stages import Step
from disranker.store import Store
from jobs import launch, parts
from jobs.score import Teacher

TEST = pc.field("split") == "test"
MODELS = ("bm25", "teacher", "student")
TRAINED = {"pretrain": "decoder", "finetune": "teacher", "distill": "student"}  # stage -> artefact


def run(recipe: Recipe, store: Store, step: Step) -> dict[str, Any]:
    counts = parts.total(parts.each_by(recipe.ingest.parts, Judge, recipe, store))
    groups = store.read("groups", where=TEST).to_pylist()
    qrels = {group["query"]: {doc["doc_id"]: doc["grade"] for doc in group["docs"]} for group in groups}
    titles = {doc["doc_id"]: doc["title"] for group in groups for doc in group["docs"]}
    runs = _runs(store)
    found = report.evaluate(
        qrels, runs, recipe.evaluate, recipe.seed, {group["query"]: group["band"] for group in groups}
    )
    found["click_models"] = store.manifest("evidence")["counts"].get("model")
    found["training"] = {stage: made["counts"] for stage, name in TRAINED.items() if (made := store.finished(name))}
    _write(found, qrels, runs, titles, recipe, store)
    return counts | {name: _headline(found, name) for name in MODELS}


class Judge:
    """Scores the test lists of one part with all three models."""

    def __init__(self, recipe: Recipe, store: Store):
        self.store, self.teacher = store, Teacher.of(recipe, store)
        self.student = Engine(store.folder("student"))
        documents = store.read("documents").to_pylist()
        self.bm25 = BM25(
            [row["doc_id"] for row in documents], [f"{row['title']} {row['summary']}" for row in documents]
        )

    def __call__(self, part: int) -> dict[str, int]:
        groups = self.store.read("groups", part=part, where=TEST).to_pylist()
        rows: list[dict[str, Any]] = []
        for group, teacher in zip(groups, self.teacher.scores(groups), strict=True):
            doc_ids = [doc["doc_id"] for doc in group["docs"]]
            scores = {
                "bm25": self.bm25.scores(group["query"], doc_ids),
                "teacher": teacher,
                "student": self._student(group),
            }
            for model, given in scores.items():
                rows += [
                    {"query": group["query"], "doc_id": doc_id, "model": model, "score": score}
                    for doc_id, score in zip(doc_ids, given, strict=True)
                    if score is not None  # the teacher failed on it
                ]
        self.store.write("scores", part, rows)
        return {"queries": len(groups), "scores": len(rows)}

    def _student(self, group: dict[str, Any]) -> list[float]:
        docs = group["docs"]
        return self.student.scores(
            [group["query"]] * len(docs), [d["title"] for d in docs], [d["summary"] for d in docs]
        )


def _runs(store: Store) -> dict[str, Run]:
    runs: dict[str, dict[str, dict[str, float]]] = {model: {} for model in MODELS}
    for row in store.read_files("scores", store.written("scores")).to_pylist():
        runs[row["model"]].setdefault(row["query"], {})[row["doc_id"]] = row["score"]
    return dict(runs)


def _write(
    found: report.Report, qrels: Qrels, runs: dict[str, Run], titles: dict[str, str], recipe: Recipe, store: Store
) -> None:
    examples = report.examples(qrels, runs, "student", "bm25", titles)
    title = "disranker on a made-up world" if recipe.made_up else "disranker"
    store.put_text(
        report.html(found, title=title, facts=_facts(recipe, store), examples=examples), "report", "report.html"
    )
    for name, scores in runs.items():
        store.put_text("".join(f"{line}\n" for line in trec.run_lines(scores, name)), "report", f"{name}.run")
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
