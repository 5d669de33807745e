"""One training as one JSON line: ours, by `disranker.fit`, or sentence-transformers' CrossEncoderTrainer.

Both learn the same lists in one process, without a cluster, a checkpoint or a validation: with RankNet as in
`finetune`, or with Margin-MSE as in `distill`. Read by `bench.train`, which gives both a process of their own.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disranker import recipe as recipes
from disranker.contract import Tokens
from disranker.recipe import Recipe, Training
from disranker.store import Store

if TYPE_CHECKING:
    from torch import nn

Row = dict[str, Any]
TURNED_OFF = ("sorting", "tokenising once")  # of ours, each to see what it is worth


@dataclass
class Seen:
    """What went through a model; numbers or tensors of one number, so that a GPU is not waited for."""

    tokens: Any = 0  # real ones
    squares: Any = 0  # of each row's real tokens, which attention costs
    area: int = 0  # tokens with padding

    def watch(self, model: "nn.Module") -> "Seen":
        """Counts from here on what a Hugging Face model is given."""
        inner: Any = model  # its head is called as a method by some, which no hook sees
        inner.base_model.register_forward_pre_hook(self._count, with_kwargs=True)
        return self

    def _count(self, model: "nn.Module", given: Any, named: dict[str, Any]) -> None:
        lengths = named["attention_mask"].sum(1)
        self.tokens, self.squares = self.tokens + lengths.sum(), self.squares + lengths.square().sum()
        self.area += named["attention_mask"].numel()

    def padding(self) -> float:
        """Its share."""
        return 1 - int(self.tokens) / self.area


def lists(recipe: Recipe) -> list[Row]:
    """The training lists of a store, as rows of the table `groups`."""
    rows: list[Row] = Store(recipe.root).read("groups").to_pylist()
    return rows


def finetuned(recipe: Recipe, off: Sequence[str] = ()) -> dict[str, Any]:
    """The loop of the stage `finetune`; from texts on, so that tokenising counts."""
    from disranker import dropout, fit, teacher

    dropout.quicken()
    rows, cfg = lists(recipe), recipe.finetune
    tokens, model = start(recipe)
    seen = Seen().watch(teacher.hugging_face(model))
    began = time.monotonic()
    task = teacher.Ranking(rows, [], tokens, cfg)
    if "tokenising once" in off:
        task.batch = _tokenised_again(rows, tokens, recipe)  # type: ignore[method-assign]
    planned = fit.steps(task, cfg, recipe.seed)
    if "sorting" in off:
        planned = unsorted(len(task.sizes), len(planned), recipe.seed)
    run = fit.Fit(model, task, planned, cfg, recipe.seed)
    losses = [progress.loss for progress in run.steps()]
    return _measured(rows, time.monotonic() - began, seen, losses)


def distilled(recipe: Recipe) -> dict[str, Any]:
    """The loop of the stage `distill`, with grades for the teacher's scores; from texts on, too."""
    from disranker import fit, student, teacher

    rows, cfg = lists(recipe), recipe.distill
    with tempfile.TemporaryDirectory() as folder:
        student.shortened(recipe.student.base, folder, recipe.student, recipe.seed)
        tokens, model = Tokens.agree(folder, "encoder", recipe.student), student.load(folder)
    seen = Seen().watch(teacher.hugging_face(model))
    began = time.monotonic()
    labelled = [(row, scores) for row, scores in zip(rows, grades(rows), strict=True)]
    task = student.Distillation(student.taught(labelled, tokens, 0.0, 1.0), [], [], tokens.contract.pad, cfg)
    run = fit.Fit(model, task, fit.steps(task, cfg, recipe.seed), cfg, recipe.seed)
    losses = [progress.loss for progress in run.steps()]
    return _measured(rows, time.monotonic() - began, seen, losses)


def grades(rows: Sequence[Row]) -> list[list[float]]:
    return [[float(doc["grade"]) for doc in row["docs"]] for row in rows]


def start(recipe: Recipe) -> tuple[Tokens, Any]:
    """Tokens and model as the stage `finetune` starts from them, without the cluster."""
    from disranker import teacher

    with tempfile.TemporaryDirectory() as folder:
        teacher.copy(recipe.teacher.base, folder, "encoder", recipe.teacher.max_tokens)
        tokens = Tokens.agree(folder, "encoder", recipe.teacher)
        return tokens, teacher.scorer(folder, tokens, recipe.seed)


def unsorted(count: int, steps: int, seed: int) -> list[list[list[int]]]:
    """A plan of as many steps of one batch each, in an order that knows no length."""
    import numpy as np

    order = np.random.default_rng(seed).permutation(count)
    return [[part.tolist()] for part in np.array_split(order, steps)]


def _tokenised_again(rows: Sequence[Row], tokens: Tokens, recipe: Recipe) -> Callable[[list[int]], Any]:
    """A `Ranking.batch` that tokenises the texts of a batch each time it is asked for."""
    from disranker.teacher import Ranking

    def batch(places: list[int]) -> Any:
        asked = Ranking([rows[place] for place in places], [], tokens, recipe.finetune)
        return asked.batch(list(range(len(places))))

    return batch


def ranknet(recipe: Recipe, lists_per_step: int, pairs_at_once: int) -> dict[str, Any]:
    """CrossEncoderTrainer with RankNetLoss; `pairs_at_once` go through the model together."""
    from sentence_transformers.cross_encoder.losses import RankNetLoss

    rows = lists(recipe)
    told = {"query": [row["query"] for row in rows], "docs": _texts(rows), "labels": grades(rows)}
    batches = {"per_device_train_batch_size": lists_per_step}
    model = _cross_encoder(recipe.teacher.base, recipe.teacher.max_tokens)
    loss = RankNetLoss(model, reduction_log="natural", mini_batch_size=pairs_at_once)
    return _sentence_transformers(model, loss, rows, told, recipe, recipe.finetune, batches)


def margin_mse(recipe: Recipe, lists_per_step: int, lists_at_once: int) -> dict[str, Any]:
    """CrossEncoderTrainer with MarginMSELoss, of the first document of a list and each other; it drops nothing out.

    `lists_at_once` go through the model together, the first documents of all, then the second ones and so on, as this
    loss has it, and as many times before a step as makes up `lists_per_step`.
    """
    from sentence_transformers.cross_encoder.losses import MarginMSELoss

    rows = lists(recipe)
    columns = {f"doc_{n}": list(texts) for n, texts in enumerate(zip(*_texts(rows), strict=True))}
    told = {"query": [row["query"] for row in rows], **columns, "labels": grades(rows)}
    batches = {
        "per_device_train_batch_size": lists_at_once,
        "gradient_accumulation_steps": max(1, round(lists_per_step / lists_at_once)),
    }
    dry = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # as a student is
    model = _cross_encoder(recipe.student.base, recipe.student.max_tokens, **dry)
    return _sentence_transformers(model, MarginMSELoss(model), rows, told, recipe, recipe.distill, batches)


def _texts(rows: Sequence[Row]) -> list[list[str]]:
    return [[f"{doc['title']} {doc['summary']}" for doc in row["docs"]] for row in rows]


def _cross_encoder(base: str, max_tokens: int, **config: Any) -> Any:
    from sentence_transformers.cross_encoder import CrossEncoder

    return CrossEncoder(base, num_labels=1, max_length=max_tokens, device="cpu", config_kwargs=config).float()


def _sentence_transformers(
    model: Any,
    loss: "nn.Module",
    rows: Sequence[Row],
    told: dict[str, Any],
    recipe: Recipe,
    cfg: Training,
    batches: dict[str, int],
) -> dict[str, Any]:
    """Measured from its first step to its last; nothing is validated, kept or logged.

    Its `train_sampling_strategy` does not group lists by length: its batch sampler knows no lengths.
    """
    from datasets import Dataset
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments

    seen = Seen().watch(model[0].model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = CrossEncoderTrainingArguments(
            output_dir=folder,
            num_train_epochs=cfg.epochs,
            **batches,
            learning_rate=cfg.lr,
            warmup_steps=cfg.warmup_share,
            weight_decay=cfg.weight_decay,
            max_grad_norm=cfg.clip_norm,
            bf16=cfg.precision == "bfloat16",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=recipe.seed,
        )
        clock = _clock()
        trainer = CrossEncoderTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_dict(told), loss=loss, callbacks=[clock]
        )
        mean_loss = trainer.train().training_loss
    return _measured(rows, clock.seconds, seen, [mean_loss] * clock.steps)


def _clock() -> Any:
    """A callback of transformers that knows how many steps there were and how long they took."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        steps, seconds, began = 0, 0.0, 0.0

        def on_step_begin(self, *given: Any, **named: Any) -> None:
            self.began = self.began or time.monotonic()

        def on_step_end(self, *given: Any, **named: Any) -> None:
            self.steps, self.seconds = self.steps + 1, time.monotonic() - self.began

    return Clock()


def _measured(rows: Sequence[Row], seconds: float, seen: Seen, losses: Sequence[float]) -> dict[str, Any]:
    pairs = sum(len(row["docs"]) for row in rows)
    said = {"pairs": pairs, "seconds": seconds, "rate": pairs / seconds, "steps": len(losses)}
    return said | {"tokens": int(seen.tokens), "padding": seen.padding(), "loss": sum(losses) / len(losses)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.trainers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trainer", choices=("finetune", "distill", "ranknet", "margin-mse"), help="of ours, of theirs")
    parser.add_argument("--recipe", type=Path, required=True, help="of a store with groups")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--off", nargs="+", choices=TURNED_OFF, default=(), help="finetune: done without")
    parser.add_argument("--lists-per-step", type=int, default=8, help="of theirs")
    parser.add_argument("--at-once", type=int, default=8, help="of theirs: pairs through the model; margin-mse: lists")
    given = parser.parse_args(argv)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    import torch

    torch.set_num_threads(given.threads)
    stages = [f"{stage}.precision={given.precision}" for stage in ("finetune", "distill")]
    recipe = recipes.load(given.recipe, stages)
    trainers: dict[str, Callable[[], dict[str, Any]]] = {
        "finetune": lambda: finetuned(recipe, given.off),
        "distill": lambda: distilled(recipe),
        "ranknet": lambda: ranknet(recipe, given.lists_per_step, given.at_once),
        "margin-mse": lambda: margin_mse(recipe, given.lists_per_step, given.at_once),
    }
    print(json.dumps(trainers[given.trainer]()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
