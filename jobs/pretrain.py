"""Continued pre-training: query -> clicked title and summary, with a share of general text."""

import sys
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import ray.train
from torch import nn

from disranker import passages, pretraining, teacher
from disranker import store as stores
from disranker.contract import Tokens
from disranker.pretraining import Pretraining
from disranker.recipe import Recipe, Refused
from disranker.stages import Step
from disranker.store import Store
from jobs import launch, training


def run(recipe: Recipe, store: Store, step: Step) -> dict[str, Any]:
    recipe = checked(recipe, store)
    with tempfile.TemporaryDirectory() as folder:
        start(recipe, store, Path(folder))
        return training.run(recipe, store, step, Path(folder))


def checked(recipe: Recipe, store: Store) -> Recipe:
    """The recipe with the full names of its general text: a worker may stand in another folder.

    Raises `Refused` where there is nothing to learn, or such a file is not readable: before a worker would fail on it.
    """
    if not store.read("clicked", ["split"], where=pc.field("split") == "train").num_rows:
        raise Refused("pretrain: no clicked document; lower sample.min_clicks, or look at the clicks counted by ingest")
    files = stores.expand(recipe.pretrain.general, "general", "pretrain")
    for file in files:
        next(passages.texts(file), None)
    return recipe.model_copy(update={"pretrain": recipe.pretrain.model_copy(update={"general": files})})


def start(recipe: Recipe, store: Store, folder: Path) -> None:
    """The language model to begin with: the base, or for `scratch` a small one with a tokenizer of the texts."""
    if recipe.teacher.base == "scratch":
        teacher.scratch(folder, training.texts(store), recipe.teacher, recipe.seed)
    else:
        teacher.copy(recipe.teacher.base, folder, "decoder", recipe.teacher.max_tokens)
    Tokens.agree(folder, "decoder", recipe.teacher).contract.save(folder)


def task(recipe: Recipe, store: Store, tokens: Tokens) -> Pretraining:
    cfg = recipe.pretrain
    train, validation = (
        store.read("clicked", where=pc.field("split") == split).to_pylist() for split in ("train", "validation")
    )
    general = chain.from_iterable(map(passages.texts, cfg.general))
    found = Pretraining(train, validation, tokens, cfg, general, recipe.seed)
    if cfg.general and ray.train.get_context().get_world_rank() == 0:
        launch.say(f"pretrain: {_share(found, cfg.general_share)}")
    return found


def _share(found: Pretraining, wanted: float) -> str:
    share = found.general_tokens / max(1, found.general_tokens + found.clicked_tokens)
    short = found.general_tokens < pretraining.wanted(found.clicked_tokens, wanted)
    said = f"{found.general_tokens} tokens of general text, {share:.1%} of an epoch"
    return said + (f" where {wanted:.1%} were wanted: the files hold no more" if short else "")


def model(folder: str, tokens: Tokens, seed: int) -> nn.Module:
    return teacher.language_model(folder)


if __name__ == "__main__":
    sys.exit(launch.main("pretrain"))
