"""Continued pre-training: query -> clicked title and summary."""

import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from torch import nn

from disranker import teacher
from disranker.contract import Tokens
from disranker.recipe import Recipe, Refused
from disranker.stages import Step
from disranker.store import Store
from jobs import launch, training


def run(recipe: Recipe, store: Store, step: Step) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        start(recipe, store, Path(folder))
        return training.run(recipe, store, step, Path(folder))


def start(recipe: Recipe, store: Store, folder: Path) -> None:
    """The language model to begin with: the base, or for `scratch` a small one with a tokenizer of the texts."""
    if recipe.teacher.base == "scratch":
        teacher.scratch(folder, training.texts(store), recipe.teacher, recipe.seed)
    else:
        teacher.copy(recipe.teacher.base, folder, "decoder")
    Tokens.agree(folder, "decoder", recipe.teacher).contract.save(folder)


def task(recipe: Recipe, store: Store, tokens: Tokens) -> teacher.Pretraining:
    examples = {
        split: store.read("clicked", where=pc.field("split") == split).to_pylist() for split in ("train", "validation")
    }
    if not examples["train"]:
        raise Refused("pretrain: no clicked document; lower sample.min_clicks, or look at the clicks counted by ingest")
    return teacher.Pretraining(examples["train"], examples["validation"], tokens)


def model(folder: str, tokens: Tokens, seed: int) -> nn.Module:
    return teacher.language_model(folder)


if __name__ == "__main__":
    sys.exit(launch.main("pretrain"))
