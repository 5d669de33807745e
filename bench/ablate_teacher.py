"""What helps the teacher on the embedded world: continued pre-training (CPT), which loss, which pooling.

    python -m bench.ablate_teacher --folder runs/ablation               results.json, results.md, differences.svg
    python -m bench.ablate_teacher --folder runs/ablation --only sweep  what SETTINGS were chosen from

As in the paper, CPT learns from clicks and fine-tuning from grades; in two arms, fine-tuning learns from clicks too.
All arms are measured on the same test queries; a seed decides first weights, head and order.
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from bench import arms, claims
from bench.arms import CORES, Comparison, Job
from bench.claims import Line
from disranker.metrics import METRICS
from disranker.recipe import Recipe
from disranker.report import HEADLINE, MINUS

Settings = Mapping[str, Any]  # of the stage finetune

LOSSES = ("margin", "ranknet", "listwise", "pointwise")
EPOCHS, AS_LONG = 2, 5  # of fine-tuning; of as much computing as CPT and fine-tuning take together, or more
RECIPE: dict[str, Any] = {"sample": {"judged": 8, "random": 3}}  # of a training list; so that all takes an hour
SMALL = {
    "seeds": 2,
    "losses": ("ranknet", "pointwise"),
    "recipe": {
        "world": {"documents": 300, "queries": 120, "judged": 100, "searches": 2000, "shards": 2},
        "ingest": {"parts": 2},
        "aggregate": {"em_rounds": 5},
        "sample": {"judged": 6, "shown": 4, "bm25": 2, "random": 2},
        "teacher": {"vocabulary": 400, "width": 32, "layers": 1, "heads": 1},
        "pretrain": {"epochs": 1},
        "evaluate": {"resamples": 200},
    },
}


@dataclass(frozen=True)
class Arm:
    loss: str = "ranknet"
    pooling: str = "last"
    labels: str = "grades"
    epochs: int = EPOCHS
    continued: bool = False  # pre-trained before

    @property
    def what(self) -> str:
        """All but whether it was pre-trained."""
        more = [f"{self.pooling} pooling"] * (self.pooling != "last") + ["clicks too"] * (self.labels != "grades")
        return ", ".join([self.loss, *more, *[f"{self.epochs} epochs"] * (self.epochs != EPOCHS)])

    @property
    def name(self) -> str:
        return f"{'CPT' if self.continued else 'none'}, {self.what}"


MEAN, CLICKS, LONGER = Arm(pooling="mean"), Arm(labels="grades_then_evidence"), Arm(epochs=AS_LONG)


@dataclass(frozen=True)
class Plan:
    folder: Path
    seeds: int = 5
    sweep_seed: int = 100  # none of those that are measured
    recipe: Mapping[str, Any] = field(default_factory=lambda: RECIPE)
    losses: tuple[str, ...] = LOSSES

    def arms(self) -> list[Arm]:
        return [replace(arm, continued=continued) for continued in (False, True) for arm in self.fine_tuned()]

    def fine_tuned(self) -> list[Arm]:
        """Each without CPT."""
        return [*(Arm(loss) for loss in self.losses), MEAN, CLICKS, LONGER]

    def pairs(self) -> list[tuple[str, Arm, Arm]]:
        """(what is compared, one arm, the other), all in one family of tests."""
        found = [(f"CPT {MINUS} none, {arm.what}", replace(arm, continued=True), arm) for arm in self.fine_tuned()]
        found += [(f"CPT, {EPOCHS} epochs {MINUS} none, {AS_LONG} epochs", Arm(continued=True), LONGER)]
        others = [
            (f"{loss} {MINUS} pointwise", Arm(loss), Arm("pointwise")) for loss in self.losses if loss != "pointwise"
        ]
        for name, a, b in [*others, (f"mean {MINUS} last pooling", MEAN, Arm())]:
            found += [(f"{name}, after CPT", replace(a, continued=True), replace(b, continued=True))]
            found += [(f"{name}, without CPT", a, b)]
        return found


# The best on validation queries (`--only sweep`): the gradients of the losses differ in size, so each has its own.
SLOW, FAST = {"lr": 5e-4}, {"lr": 1e-3}
SETTINGS: dict[Arm, Settings] = {
    Arm("margin"): SLOW | {"margin": 0.1},
    Arm("ranknet"): SLOW,
    Arm("listwise"): SLOW,
    Arm("pointwise"): SLOW,
    MEAN: SLOW,
    Arm("margin", continued=True): SLOW | {"margin": 0.1},
    Arm("ranknet", continued=True): FAST,
    Arm("listwise", continued=True): FAST,
    Arm("pointwise", continued=True): SLOW,
    replace(MEAN, continued=True): FAST,
}
LEARNING_RATES: tuple[Settings, ...] = ({"lr": 2.5e-4}, {"lr": 5e-4}, {"lr": 1e-3}, {"lr": 2e-3})
MARGINS: tuple[Settings, ...] = tuple(
    {"lr": 5e-4, **margin} for margin in ({"margin": 0.1}, {"margin": 1.0}, {"margin_by_gap": True})
)


def ablation(plan: Plan) -> Iterator[Line]:
    """All arms under all seeds; writes the files that show them."""
    began = time.monotonic()
    recipe = arms.lists(plan.folder, plan.recipe)
    seeds = range(1, plan.seeds + 1)
    trials = [(arm, settings(arm), seed) for arm, seed in product(plan.arms(), seeds)]
    found = arms.found(jobs(plan, recipe, trials))
    every = np.array([one["tally"] for one in found]).reshape(len(plan.arms()), plan.seeds, -1, len(METRICS), 2)
    tallies = dict(zip(plan.arms(), every, strict=True))
    rows = arms.compared([Comparison(name, tallies[a], tallies[b]) for name, a, b in plan.pairs()], recipe)
    facts = {"cores": CORES, "seconds": round(time.monotonic() - began), "test_queries": every.shape[2]}
    facts |= {"settings": {arm.name: settings(arm) for arm in plan.arms()}}
    arms.show(plan.folder, [arms.summary(arm.name, tally) for arm, tally in tallies.items()], rows, facts)
    yield from arms.lines(rows, "teacher")


def sweep(plan: Plan) -> Iterator[Line]:
    """Each arm under several learning rates and margins, measured on the validation queries alone."""
    recipe = arms.lists(plan.folder, plan.recipe)
    swept = [arm for arm in plan.arms() if (arm.labels, arm.epochs) == ("grades", EPOCHS)]
    trials = [(arm, chosen, plan.sweep_seed) for arm in swept for chosen in tried(arm)]
    found = arms.found(jobs(plan, recipe, trials, "validation"))
    for (arm, chosen, _), one in zip(trials, found, strict=True):
        ndcg = float(np.array(one["tally"])[:, METRICS.index(HEADLINE), 0].mean())
        measured = {"pair_accuracy": claims.shown(one["best"]["value"]), HEADLINE: claims.shown(ndcg)}
        yield {"claim": f"sweep: {arm.name}", **chosen, **measured, "step": one["best"]["step"]}


def settings(arm: Arm) -> Settings:
    return SETTINGS.get(replace(arm, labels="grades", epochs=EPOCHS), {})


def tried(arm: Arm) -> list[Settings]:
    return [*LEARNING_RATES, *(MARGINS if arm.loss == "margin" else ())]


def jobs(plan: Plan, recipe: Recipe, trials: Sequence[tuple[Arm, Settings, int]], split: str = "test") -> list[Job]:
    """One for each (arm, settings, seed); what they begin with is pre-trained where it is not there."""
    folder = plan.folder / "trained"
    folder.mkdir(exist_ok=True)
    arms.pretrained([arms.seeded(recipe, seed) for seed in sorted({seed for _, _, seed in trials})], folder)
    made = []
    for arm, chosen, seed in trials:
        start = arms.decoders(arms.seeded(recipe, seed), folder)[arm.continued]
        mine = arms.seeded(recipe, seed, loss=arm.loss, labels=arm.labels, epochs=arm.epochs, **chosen)
        mine = mine.model_copy(update={"teacher": mine.teacher.model_copy(update={"pooling": arm.pooling})})
        made.append(Job(arm.name, mine, start, folder, split))
    return made


def main(argv: list[str] | None = None) -> int:
    measurements = {"ablation": ablation, "sweep": sweep}
    return claims.command(
        "bench.ablate_teacher", Plan, measurements, SMALL, argv, __doc__ or "", ("sweep",), keeps=True
    )


if __name__ == "__main__":
    sys.exit(main())
