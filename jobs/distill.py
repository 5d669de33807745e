"""Distillation: the student learns to give the teacher's scores, or for comparison to order by hard labels."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from torch import nn

from disranker import student, teacher
from disranker.contract import Tokens
from disranker.recipe import Finetune, Recipe
from disranker.retrieval import BM25
from disranker.stages import Step
from disranker.store import Store
from jobs import launch, parts, training
from jobs.score import Group, Teacher

SPLITS = ("train", "validation")
GRADES = Finetune(labels="grades")


def run(recipe: Recipe, store: Store, step: Step) -> dict[str, Any]:
    check(recipe, store)
    others = baselines(recipe, store) if recipe.distill.targets == "teacher" else {}
    if others:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in others.items())
        launch.say(f"distill: pairs in the order of the grades of validation queries: {shares}")
    with tempfile.TemporaryDirectory() as folder:
        start(recipe, store, Path(folder))
        return training.run(recipe, store, step, Path(folder)) | {"baselines": others}


def check(recipe: Recipe, store: Store) -> None:
    """Raises `Refused`, before any worker starts, where there is not what the student is to learn."""
    if recipe.distill.targets != "teacher":
        student.check_labels(training.comparable(recipe, store, hard(recipe), "distill"), recipe.distill)
        return
    judge, scores = Teacher.labelled(recipe, store), store.manifest("labels")["counts"]["scores"]
    student.check_scale(scores["mean"], scores["deviation"])

    def count(part: int) -> dict[str, int]:
        groups = store.read("groups", part=part, where=pc.field("split") != "test").to_pylist()
        return parts.total(map(student.asked, groups, judge.scores(groups)))

    counts = parts.total(parts.each(recipe.ingest.parts, count, "distill: labels of parts looked up"))
    student.check_labels(counts, recipe.distill)


def baselines(recipe: Recipe, store: Store) -> dict[str, float]:
    """What `pair_accuracy` of the student will be beside: that of BM25 and the teacher; empty without any grades."""
    groups = store.read("groups", where=pc.field("split") == "validation").to_pylist()
    index, judge = BM25.of(store.read("documents").to_pylist()), Teacher.of(recipe, store)
    lists: dict[str, list[tuple[Sequence[float], Sequence[float]]]] = {"bm25": [], "teacher": []}
    for group, given in zip(groups, judge.scores(groups), strict=True):
        docs = group["docs"]
        lexical = index.scores(group["query"], [doc["doc_id"] for doc in docs])
        rows = zip(teacher.targets(docs, GRADES), lexical, given, strict=True)
        if known := [row for row in rows if None not in row]:
            targets, *models = zip(*known, strict=True)
            for found, scores in zip(lists.values(), models, strict=True):
                found.append((targets, scores))
    shares = {name: teacher.in_order(found) for name, found in lists.items()}
    return {name: share for name, share in shares.items() if share is not None}


def start(recipe: Recipe, store: Store, folder: Path) -> None:
    """The BERT to begin with: some layers of the base, or for `scratch` a small one with a tokenizer of the texts."""
    if recipe.student.base == "scratch":
        student.scratch(folder, training.texts(store), recipe.student, recipe.seed)
    else:
        student.shortened(recipe.student.base, folder, recipe.student, recipe.seed)
    Tokens.agree(folder, "encoder", recipe.student).contract.save(folder)


def task(recipe: Recipe, store: Store, tokens: Tokens) -> student.Distillation:
    return learned(recipe, store, tokens, training.groups(store))


def learned(recipe: Recipe, store: Store, tokens: Tokens, groups: dict[str, list[Group]]) -> student.Distillation:
    """What is learned of these training and validation lists."""
    cfg = recipe.distill
    if cfg.targets != "teacher":
        train, validation = (teacher.lists(groups[split], tokens, hard(recipe)) for split in SPLITS)
        return student.Distillation(train, validation, [], tokens.contract.pad, cfg)
    stats = store.manifest("labels")["counts"]["scores"]
    judge = Teacher.of(recipe, store)
    train, validation = (
        student.taught(labelled(groups[split], judge), tokens, stats["mean"], stats["deviation"]) for split in SPLITS
    )
    graded = teacher.lists(groups["validation"], tokens, GRADES)
    return student.Distillation(train, validation, graded, tokens.contract.pad, cfg)


def hard(recipe: Recipe) -> Finetune:
    """Which labels the student learns without the teacher, as fine-tuning takes them."""
    return recipe.finetune.model_copy(update={"labels": recipe.distill.targets})


def labelled(groups: list[Group], teacher: Teacher) -> list[tuple[Group, list[float]]]:
    """Lists with their scores, without documents that have none, and without lists of which fewer than two remain."""
    found = []
    for group, scores in zip(groups, teacher.scores(groups), strict=True):
        pairs = [(doc, score) for doc, score in zip(group["docs"], scores, strict=True) if score is not None]
        if len(pairs) > 1:
            found.append((group | {"docs": [doc for doc, _ in pairs]}, [score for _, score in pairs]))
    return found


def model(folder: str, tokens: Tokens, seed: int) -> nn.Module:
    return student.load(folder)


if __name__ == "__main__":
    sys.exit(launch.main("distill"))
