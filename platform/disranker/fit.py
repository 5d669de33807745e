"""The training loop over a plan of batches; knows no cluster.

All that decides a step is its number: the plan of every epoch is made before the first, from the seed, and so is what
dropout drops. So a run that died goes on at the step after its last checkpoint and neither repeats nor skips a group.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from disranker import batches, spread
from disranker.recipe import Refused, Training

Measured = dict[str, float]
Plan = Sequence[list[list[int]]]  # of each step: its batches, each the places of its items


class Task(Protocol):
    """What one training stage learns, held in memory."""

    sizes: list[tuple[int, int]]  # of each item: rows, ids of the longest
    metric: str  # of those that `validate` gives, the one that decides which weights are best
    larger_is_better: bool

    def batch(self, places: list[int]) -> Any:
        """The items at these places as tensors with `.to(device)`."""

    def query(self, place: int) -> str:
        """What the item at this place belongs to."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """A number to make small."""

    def validate(self, model: nn.Module) -> Measured:
        """How good the model is on the validation queries."""


class Diverged(FloatingPointError):
    """A step that would have made the weights no finite numbers, and was not taken; every rank raises it at that step.

    `loss` is the mean over the batches of this rank. `queries` are those of this rank whose loss is not finite, or all
    of its step where the gradient alone is not.
    """

    def __init__(self, step: int, loss: float, norm: float, queries: list[str]):
        super().__init__(step, loss, norm, queries)
        self.step, self.loss, self.norm, self.queries = step, loss, norm, queries

    def __str__(self) -> str:
        return f"loss {self.loss:.4g} and gradient norm {self.norm:.4g} at step {self.step}"


@dataclass(frozen=True)
class Progress:
    step: int  # steps done
    loss: float  # mean over the batches of this rank
    lr: float
    gradient_norm: float  # before it is clipped, over all ranks
    tokens: int  # real tokens in the batches of this rank


def steps(task: Task, cfg: Training, seed: int, rank: int = 0, ranks: int = 1) -> list[list[list[int]]]:
    """The batches of each step of all epochs for one rank; every rank has equally many, and a batch goes to one only.

    What is left over of an epoch, less than one batch a rank, is dealt in the next epoch's shuffle, and after the last
    epoch not at all; the last step of an epoch may have fewer batches than `accumulate`. Raises `Refused` where there
    is nothing to train on.
    """
    if not task.sizes:
        raise Refused("nothing to train on: no row of the training split has what this stage learns from")
    found: list[list[list[int]]] = []
    for epoch in range(cfg.epochs):
        planned = batches.plan(task.sizes, cfg.tokens_per_batch, seed=seed * 1000 + epoch)
        each = len(planned) // ranks or 1
        mine = [planned[place % len(planned)] for place in range(rank, each * ranks, ranks)]
        found += [mine[at : at + cfg.accumulate] for at in range(0, each, cfg.accumulate)]
    return found


def optimizer(model: nn.Module, cfg: Training, total: int) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW, with a learning rate that rises over the warm-up and falls along a cosine to zero."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    # Fused: one pass over the weights, where the other kind makes a copy for each of its operations.
    adam = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    warmup = max(1, round(cfg.warmup_share * total))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    return adam, torch.optim.lr_scheduler.LambdaLR(adam, factor)


class Fit:
    """A model in training, in place: how far it is, how it went, and its weights when it was best."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        planned: Plan,
        cfg: Training,
        seed: int = 0,
        agreed: Callable[[Measured], Measured] = dict,
    ):
        """`seed` differs between ranks; `agreed` gives what the first rank measured, to all."""
        self.model, self.task, self.planned, self.cfg = model, task, planned, cfg
        self._seed, self._agreed = seed, agreed
        self._device = next(model.parameters()).device
        self._adam, self._schedule = optimizer(model, cfg, len(planned))
        self._validated_at = {round(len(planned) * n / cfg.validations) for n in range(1, cfg.validations + 1)}
        self._best: spread.Weights = {}
        self.done = 0
        self.curve: list[dict[str, float]] = []  # a `Progress` for each step
        self.validations: list[Measured] = []  # with the step after which they were made, first of all 0
        self.best: dict[str, Any] | None = None  # step, metric, value

    def steps(self) -> Iterator[Progress]:
        """Trains one step each time it is asked, to the end of the plan or of its patience.

        Raises `Diverged` where the gradient is not finite.
        """
        if not self.validations:
            self._validate()
        self.model.train()
        while self.done < len(self.planned) and not self._tired():
            progress = self._step()
            self.curve.append(asdict(progress))
            if self.done in self._validated_at:
                self._validate()
            yield progress

    def finish(self) -> None:
        """Takes the best weights, where something was measured."""
        if self._best:
            spread.put(self.model, self._best)

    def state(self) -> dict[str, Any]:
        """What `load` goes on from, of this rank's share of the model."""
        return {
            "step": self.done,
            "model": spread.mine(self.model),
            "optimizer": spread.optimizer_state(self._adam),
            "schedule": self._schedule.state_dict(),
            "curve": self.curve,
            "validations": self.validations,
            "best": self.best,
            "best_model": self._best,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.done, self.curve, self.validations = state["step"], state["curve"], state["validations"]
        self.best, self._best = state["best"], state["best_model"]
        spread.put(self.model, state["model"])
        spread.put_optimizer_state(self._adam, state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])

    def _step(self) -> Progress:
        torch.manual_seed(self._seed * 1_000_003 + self.done)
        self._adam.zero_grad()
        together = [self.task.batch(places).to(self._device) for places in self.planned[self.done]]
        losses = [self._backward(batch, len(together), batch is together[-1]) for batch in together]
        found: Any = nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.clip_norm)
        norm = float(found.full_tensor() if hasattr(found, "full_tensor") else found)
        if not math.isfinite(norm):  # of all ranks together, so that all stop here
            raise Diverged(self.done + 1, sum(losses) / len(losses), norm, self._not_finite(losses))
        self._adam.step()
        lr = self._schedule.get_last_lr()[0]
        self._schedule.step()
        self.done += 1
        tokens = sum(int(batch.rows.real.sum()) for batch in together)
        return Progress(self.done, sum(losses) / len(losses), lr, norm, tokens)

    def _backward(self, batch: Any, batches: int, last: bool) -> float:
        with spread.exchanging(self.model, last):
            with self._computing():
                loss = self.task.loss(self.model, batch)
            (loss / batches).backward()
        return float(loss.item())

    def _not_finite(self, losses: Sequence[float]) -> list[str]:
        """Queries of the items of this step whose loss alone is not finite; of all of them, where no loss is such.

        Of all items of a batch with such a loss where no item alone has one, or under FSDP, where no rank can compute
        alone.
        """
        planned = self.planned[self.done]
        bad = [batch for batch, loss in zip(planned, losses, strict=True) if not math.isfinite(loss)]
        items = [place for batch in bad or planned for place in batch]
        if bad and not isinstance(self.model, FSDPModule):
            items = [place for place in items if not math.isfinite(self._loss_alone(place))] or items
        return sorted({self.task.query(place) for place in items})

    @torch.no_grad()
    def _loss_alone(self, place: int) -> float:
        with self._computing():
            return self.task.loss(spread.plain(self.model), self.task.batch([place]).to(self._device)).item()

    def _validate(self) -> None:
        with self._computing():
            measured = self._agreed(self.task.validate(spread.plain(self.model)))
        known = {name: value for name, value in measured.items() if math.isfinite(value)}
        self.validations.append({"step": self.done, **known})
        value = known.get(self.task.metric)
        # Before the first step there is nothing to keep: a stage gives what it trained.
        if self.done and value is not None and self._better(value):
            self.best = {"step": self.done, "metric": self.task.metric, "value": value}
            self._best = spread.mine(self.model)

    def _better(self, value: float) -> bool:
        if self.best is None:
            return True
        gain = float(value - self.best["value"])
        return gain > 0 if self.task.larger_is_better else gain < 0

    def _tired(self) -> bool:
        """Whether as many validations as the recipe has patience for went by since the best."""
        if not self.cfg.patience or self.best is None:
            return False
        since = [one for one in self.validations if one["step"] > self.best["step"]]
        return len(since) >= self.cfg.patience

    def _computing(self) -> Any:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self.cfg.precision == "bfloat16")
