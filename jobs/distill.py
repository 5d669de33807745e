"""Distillation: the student learns to give the teacher's scores."""

import sys
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from disranker import student
from disranker.contract import Tokens
from disranker.recipe import Recipe
from disranker.stages import Step
from disranker.store import Store
from jobs import launch, training
from jobs.score import Group, Teacher


def run(recipe: Recipe, store: Store, step: Step) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        start(recipe, store, Path(folder))
        return training.run(recipe, store, step, Path(folder))


def start(recipe: Recipe, store: Store, folder: Path) -> None:
    """The BERT to begin with: some layers of the base, or for `scratch` a small one with a tokenizer of the texts."""
    if recipe.student.base == "scratch":
        student.scratch(folder, training.texts(store), recipe.student, recipe.seed)
    else:
        student.shortened(recipe.student.base, folder, recipe.student, recipe.seed)
    Tokens.agree(folder, "encoder", recipe.student).contract.save(folder)


def task(recipe: Recipe, store: Store, tokens: Tokens) -> student.Distillation:
    stats = store.manifest("labels")["counts"]["scores"]
    teacher = Teacher.of(recipe, store)
    groups = training.groups(store)
    train, validation = (labelled(groups[split], teacher) for split in ("train", "validation"))
    return student.Distillation(train, validation, tokens, recipe.distill, stats["mean"], stats["deviation"])


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
