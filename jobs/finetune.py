"""Fine-tuning with a rank loss: the teacher learns to score, on grades, on evidence, or both."""

import sys
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from disranker import teacher
from disranker.contract import Tokens
from disranker.recipe import Recipe, Refused
from disranker.stages import Step
from disranker.store import Store
from jobs import launch, training


def run(recipe: Recipe, store: Store, step: Step) -> dict[str, Any]:
    check(recipe, store)
    if "decoder" in step.reads:
        return training.run(recipe, store, step, Path(store.folder("decoder")))
    with tempfile.TemporaryDirectory() as folder:
        teacher.copy(recipe.teacher.base, Path(folder), "encoder", recipe.teacher.max_tokens)
        Tokens.agree(folder, "encoder", recipe.teacher).contract.save(folder)
        return training.run(recipe, store, step, Path(folder))


def check(recipe: Recipe, store: Store) -> None:
    """Raises `Refused`, before any worker starts, where no training list has anything to compare."""
    cfg = recipe.finetune
    if training.comparable(recipe, store, cfg, "finetune")["lists"]:
        return
    mend = "set other finetune.labels"
    if cfg.labels != "grades":
        mend += f", or lower finetune.min_impressions ({cfg.min_impressions})"
    raise Refused(f"finetune: no training list has two different targets with labels {cfg.labels}; {mend}")


def task(recipe: Recipe, store: Store, tokens: Tokens) -> teacher.Ranking:
    groups = training.groups(store)
    return teacher.Ranking(groups["train"], groups["validation"], tokens, recipe.finetune)


def model(folder: str, tokens: Tokens, seed: int) -> nn.Module:
    return teacher.scorer(folder, tokens, seed)


if __name__ == "__main__":
    sys.exit(launch.main("finetune"))
