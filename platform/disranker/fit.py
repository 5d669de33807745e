"""The training loop over a plan of batches; knows no cluster.

All that decides a step is its number: the plan of every epoch is made before the first, from the seed. So a run that
died goes on at the step after its last checkpoint and neither repeats nor skips a group.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from disranker import batches
from disranker.recipe import Refused, Training


class Task(Protocol):
    """What one training stage learns, held in memory."""

    sizes: list[tuple[int, int]]  # of each item: rows, ids of the longest

    def batch(self, places: list[int]) -> Any:
        """The items at these places as tensors with `.to(device)`."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """A number to make small."""

    def validate(self, model: nn.Module) -> dict[str, float]:
        """How good the model is on the validation queries."""


@dataclass(frozen=True)
class Progress:
    step: int  # steps done
    steps: int
    loss: float
    lr: float
    tokens: int  # real tokens in the batch of this rank


def steps(task: Task, cfg: Training, seed: int, rank: int = 0, ranks: int = 1) -> list[list[int]]:
    """The batches of all epochs for one rank; every rank gets equally many, and a batch goes to one rank only.

    What is left over of an epoch, less than one batch a rank, is dealt in the next epoch's shuffle. Raises `Refused`
    where there is nothing to train on.
    """
    if not task.sizes:
        raise Refused("nothing to train on: no row of the training split has what this stage learns from")
    whole: list[list[int]] = []
    for epoch in range(cfg.epochs):
        planned = batches.plan(task.sizes, cfg.tokens_per_batch, seed=seed * 1000 + epoch)
        each = len(planned) // ranks or 1
        whole += [planned[place % len(planned)] for place in range(rank, each * ranks, ranks)]
    return whole


def optimizer(model: nn.Module, cfg: Training, total: int) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW, with a learning rate that rises over the warm-up and falls along a cosine to zero."""
    adam = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    warmup = max(1, round(cfg.warmup_share * total))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    return adam, torch.optim.lr_scheduler.LambdaLR(adam, factor)


def fit(
    model: nn.Module,
    task: Task,
    planned: Sequence[list[int]],
    cfg: Training,
    state: dict[str, Any] | None = None,
) -> Iterator[tuple[Progress, Callable[[], dict[str, Any]]]]:
    """Trains in place, one step each time it is asked; yields where it is and a function that gives the state to save.

    Raises `FloatingPointError` where the loss is not a finite number.
    """
    adam, schedule = optimizer(model, cfg, len(planned))
    device = next(model.parameters()).device
    done = 0
    if state:
        done = state["step"]
        plain(model).load_state_dict(state["model"])
        adam.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    model.train()
    for step in range(done, len(planned)):
        batch = task.batch(planned[step]).to(device)
        loss = task.loss(model, batch)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"loss {loss.item()} at step {step + 1}: lower lr {cfg.lr} or clip_norm {cfg.clip_norm}"
            )
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_norm)
        adam.step()
        lr = schedule.get_last_lr()[0]
        schedule.step()
        yield (
            Progress(step + 1, len(planned), loss.item(), lr, int(batch.rows.real.sum())),
            partial(_state, step + 1, model, adam, schedule),
        )


def _state(done: int, model: nn.Module, adam: torch.optim.Optimizer, schedule: Any) -> dict[str, Any]:
    return {
        "step": done,
        "model": plain(model).state_dict(),
        "optimizer": adam.state_dict(),
        "schedule": schedule.state_dict(),
    }


def plain(model: nn.Module) -> nn.Module:
    """The model itself, out of the wrapper that spreads it over ranks."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
