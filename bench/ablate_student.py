"""What helps the student: which loss, which pairs, how many layers, which candidates.

    python -m bench.ablate_student --folder runs/students               results.json, results.md, differences.svg
    python -m bench.ablate_student --folder runs/students --only sweep  what SETTINGS were chosen from
    python -m bench.ablate_student --folder runs/esci --data DATA --model MODEL --seeds 3

The first is of the embedded world; the last of products with grades and a log, as `bench.esci_teacher` takes them, and
of a pretrained BERT: the teacher is that of its arm with the log, and nothing was tuned. One teacher labels the lists
once; all students are measured on the same test queries, and beside it and BM25. A seed decides first weights, where
they are random, and order.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import ablate_teacher, arms, claims, esci_teacher
from bench.arms import CORES, Comparison, Job
from bench.claims import Line
from disranker import recipe as recipes
from disranker import stages
from disranker.metrics import METRICS, Array
from disranker.recipe import Recipe
from disranker.report import HEADLINE, MINUS
from disranker.store import Store

if TYPE_CHECKING:
    from disranker.contract import Tokens
    from disranker.fit import Task

Settings = Mapping[str, Any]  # of the stage distill

LOSSES: dict[str, Settings] = {
    "hybrid": {},
    "hybrid, beta 0.5": {"beta": 0.5},
    "hybrid, beta 2": {"beta": 2.0},
    "point": {"beta": 0.0},
    "margin": {"alpha": 0.0},
    "ranknet": {"loss": "ranknet"},
    "kl": {"loss": "kl"},
    "hard labels": {"loss": "ranknet", "targets": "grades_then_evidence"},
    "grades alone": {"loss": "ranknet", "targets": "grades"},
}
PAIRS: dict[str, Settings] = {f"hybrid, {pairs}": {"pairs": pairs} for pairs in ("neighbours", "gaps", "sampled")}
PAIRS |= {"hybrid, lexical head": {"lexical": 0.1}}
LAYERS: dict[str, Settings] = {f"hybrid, {layers} layers": {"layers": layers} for layers in (3, 6)}  # the recipe has 2
SOURCES = {"graded alone": ("judged",), "without random": ("judged", "shown", "bm25")}  # of the documents of a list


@dataclass(frozen=True)
class Arm:
    name: str
    settings: Settings = field(default_factory=dict, compare=False)
    student: Settings = field(default_factory=dict, compare=False)
    sources: tuple[str, ...] = ()  # none: all


HYBRID = Arm("hybrid")


@dataclass(frozen=True)
class Plan:
    folder: Path
    seeds: int = 5
    sweep_seed: int = 100  # none of those that are measured
    recipe: Mapping[str, Any] = field(default_factory=lambda: RECIPE)
    losses: tuple[str, ...] = tuple(LOSSES)
    chosen: Mapping[str, Settings] = field(default_factory=lambda: PAIRS)
    layers: Mapping[str, Settings] = field(default_factory=lambda: LAYERS)
    sources: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: SOURCES)
    settings: Mapping[str, Settings] = field(default_factory=lambda: SETTINGS)

    def arms(self) -> list[Arm]:
        arms = [Arm(name, LOSSES[name]) for name in self.losses]
        arms += [Arm(name, settings) for name, settings in self.chosen.items()]
        arms += [Arm(f"hybrid, {name}", sources=sources) for name, sources in self.sources.items()]
        return arms + [Arm(name, student=student) for name, student in self.layers.items()]

    def pairs(self) -> list[tuple[str, str, str]]:
        """(what is compared, one arm, the other), all in one family of tests."""
        others = [arm.name for arm in self.arms() if arm != HYBRID]
        found = [(f"{HYBRID.name} {MINUS} {name}", HYBRID.name, name) for name in others if name in LOSSES]
        found += [(f"{name} {MINUS} {HYBRID.name}", name, HYBRID.name) for name in others if name not in LOSSES]
        return found + [(f"{HYBRID.name} {MINUS} {name}", HYBRID.name, name) for name in ("teacher", "BM25")]


RECIPE = ablate_teacher.RECIPE | {"distill": {"epochs": 2, "validations": 2}}  # about 65 s of a core each
SMALL = {
    "seeds": 2,
    "losses": ("hybrid", "kl", "hard labels"),
    "recipe": ablate_teacher.SMALL["recipe"]
    | {"student": {"vocabulary": 400, "width": 32, "layers": 2, "heads": 2}, "distill": {"epochs": 1}},
}

# Of a loss, what is best on validation queries (`--only sweep`); the others have the learning rate of the recipe, 7e-4.
SETTINGS: dict[str, Settings] = {
    **{name: {"lr": 1.4e-3} for name in ("hybrid, beta 2", "point", "margin", "ranknet", "kl")},
    "hard labels": {"lr": 3.5e-4},
}
LEARNING_RATES: tuple[Settings, ...] = tuple({"lr": lr} for lr in (3.5e-4, 7e-4, 1.4e-3, 2.8e-3))


def ablation(plan: Plan) -> Iterator[Line]:
    """All arms under all seeds; writes the files that show them."""
    began = time.monotonic()
    recipe = arms.lists(plan.folder, plan.recipe, until="score", artefact="labels")
    trials = [
        (arm, plan.settings.get(arm.name, {}), seed) for arm, seed in product(plan.arms(), range(1, plan.seeds + 1))
    ]
    found = arms.found(jobs(plan, recipe, trials))
    every = np.array([one["tally"] for one in found]).reshape(len(plan.arms()), plan.seeds, -1, len(METRICS), 2)
    tallies = {arm.name: tally for arm, tally in zip(plan.arms(), every, strict=True)} | fixed(recipe, plan.seeds)
    rows = arms.compared([Comparison(name, tallies[a], tallies[b]) for name, a, b in plan.pairs()], recipe)
    facts = {"cores": CORES, "seconds": round(time.monotonic() - began), "test_queries": every.shape[2]}
    facts |= {"settings": {arm.name: dict(arm.settings) | dict(plan.settings.get(arm.name, {})) for arm in plan.arms()}}
    arms.show(plan.folder, [arms.summary(name, tally) for name, tally in tallies.items()], rows, facts)
    yield from arms.lines(rows, "student")


def sweep(plan: Plan) -> Iterator[Line]:
    """Each loss under several learning rates, measured on the validation queries alone."""
    recipe = arms.lists(plan.folder, plan.recipe, until="score", artefact="labels")
    swept = [arm for arm in plan.arms() if arm.name in LOSSES]
    trials = [(arm, chosen, plan.sweep_seed) for arm in swept for chosen in LEARNING_RATES]
    for (arm, chosen, _), one in zip(trials, arms.found(jobs(plan, recipe, trials, "validation")), strict=True):
        ndcg = float(np.array(one["tally"])[:, METRICS.index(HEADLINE), 0].mean())
        yield {"claim": f"sweep: {arm.name}", **chosen, HEADLINE: claims.shown(ndcg), "step": one["best"]["step"]}


def jobs(plan: Plan, recipe: Recipe, trials: Sequence[tuple[Arm, Settings, int]], split: str = "test") -> list[Job]:
    """One for each (arm, settings, seed); what they begin with is made where it is not there."""
    folder = plan.folder / "trained"
    folder.mkdir(exist_ok=True)
    made = []
    for arm, chosen, seed in trials:
        mine = arms.seeded(recipe, seed, "distill", **{**arm.settings, **chosen})
        mine = mine.model_copy(update={"student": mine.student.model_copy(update=dict(arm.student))})
        start = started(mine, folder)
        made.append(Job(arm.name, mine, start, folder, split, "distill", partial(task, sources=arm.sources)))
    return made


def started(recipe: Recipe, folder: Path) -> Path:
    """The student of a seed and a number of layers before it learned anything."""
    from jobs import distill

    decides = [recipe.student.model_dump(), recipe.seed, stages.step(recipe, "distill").reads]
    start = folder / f"student-{recipe.student.layers}-{recipe.seed}-{recipes.digest(decides)}"
    if not (start / arms.WHOLE).exists():
        start.mkdir(exist_ok=True)
        distill.start(recipe, Store(recipe.root), start)
        (start / arms.WHOLE).write_text("{}")
    return start


def task(recipe: Recipe, store: Store, tokens: "Tokens", sources: Sequence[str]) -> "Task":
    """As that of the stage, with the training documents of these sources alone."""
    from jobs import distill, training

    groups = training.groups(store)
    if sources:
        kept = [group | {"docs": [d for d in group["docs"] if d["source"] in sources]} for group in groups["train"]]
        groups["train"] = [group for group in kept if len(group["docs"]) > 1]
    return distill.learned(recipe, store, tokens, groups)


def fixed(recipe: Recipe, seeds: int) -> dict[str, Array]:
    """The tallies of the teacher and of BM25, the same under each seed."""
    from jobs.score import Teacher

    store = Store(recipe.root)
    judge = Teacher.labelled(recipe, store)
    taught = arms.tally(lambda group: judge.scores([group])[0], arms.listed(recipe.root, "test"))
    found = {"teacher": taught, "BM25": arms.bm25(recipe)}
    return {name: np.stack([tally] * seeds) for name, tally in found.items()}


def esci(data: Path, model: Path, small: bool = False) -> dict[str, Any]:
    """Of a plan, what differs on products with grades and a log and with a pretrained BERT of six layers."""
    taught = esci_teacher.content(data, model, esci_teacher.ARMS[-1], data / "judgments.parquet", small)
    taught["finetune"] |= {"precision": "bfloat16"}
    student = {**taught["teacher"], "layers": 2, "take": "every_second"}
    distill = {**esci_teacher.TRAINING, "epochs": 1, "lr": 1e-4, "precision": "bfloat16"}
    layers = {"hybrid, 3 layers": {"layers": 3}, "hybrid, 6 layers": {"layers": 6, "take": "first"}}
    # Half of the pairs of its lists have a grade: two epochs are as much computing.
    settings = {"grades alone": {"epochs": 2}}
    return {
        "recipe": taught | {"student": student, "distill": distill},
        "layers": layers,
        "settings": settings,
        # Of these, one of a kind: all would be another half of an hour.
        "chosen": {"hybrid, gaps": PAIRS["hybrid, gaps"]},
        "sources": {"graded alone": SOURCES["graded alone"]},
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--data", type=Path, help="a folder with documents, judgments and a log; with --model")
    parser.add_argument("--model", type=Path, help="a folder with a BERT")
    given, others = parser.parse_known_args(argv)
    if bool(given.data) != bool(given.model):
        parser.error("--data and --model go together")
    shop = esci(given.data, given.model, "--small" in others) if given.data else {}
    # Products have no validation queries to choose anything on.
    asked_for = () if shop else ("sweep",)
    measurements = {
        measure.__name__: lambda plan, measure=measure: measure(replace(plan, **shop))
        for measure in (ablation, *([sweep] if asked_for else []))
    }
    return claims.command(
        "bench.ablate_student", Plan, measurements, SMALL, argv, __doc__ or "", asked_for, keeps=True, parents=[parser]
    )


if __name__ == "__main__":
    sys.exit(main())
