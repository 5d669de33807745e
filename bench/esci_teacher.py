"""What a click log adds to human grades, for an encoder teacher on products that have both; and both against BM25.

    python -m bench.esci_teacher --data <folder> --model <folder> --folder runs/esci-teacher

The folder of data holds documents.parquet, judgments.parquet with a split (train or test) of each query, ubi_queries*
and ubi_events*; that of the model a BERT. No arm sees a test query before it is measured on it, the weights are those
of the last step, and nothing was tuned; `--sweep` compares learning rates on a part of the training queries.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from bench import arms, claims, runs
from bench.arms import CORES, Comparison, Job
from bench.claims import Line
from disranker import sampling
from disranker.metrics import METRICS
from disranker.recipe import Recipe
from disranker.report import HEADLINE, MINUS

Settings = Mapping[str, Any]

HELD_OUT = 0.3  # of the training queries, in a sweep
SWEEP_SEED = 100  # none of those that are measured
NONE = dict.fromkeys(("head", "torso", "tail"), 0.0)
TEXTS = {"max_query_tokens": 12, "max_title_tokens": 28, "max_tokens": 64}
TRAINING = {"tokens_per_batch": 1024, "validations": 1}


@dataclass(frozen=True)
class Arm:
    """What a teacher learns from: its lists, which labels of them, and how."""

    name: str
    sample: Settings
    finetune: Settings


GRADED = {"judged": 100, "shown": 0, "bm25": 0, "random": 0, "ungraded": NONE, "tail_floor": 0.0}
LOGGED = {"judged": 100, "shown": 8, "bm25": 0, "random": 4, "ungraded": dict.fromkeys(NONE, 0.1)}
ARMS = (
    Arm("grades", GRADED, {"labels": "grades", "lr": 5e-5, "epochs": 2}),
    # Half of its lists are of the log: one epoch is as much computing.
    Arm("grades and log", LOGGED, {"labels": "grades_then_evidence", "lr": 5e-5, "epochs": 1}),
)
SWEPT = tuple({"lr": lr} for lr in (2e-5, 5e-5, 1e-4))


@dataclass(frozen=True)
class Plan:
    folder: Path
    data: Path
    model: Path
    seeds: int
    small: bool  # few lists, of few words

    def recipe(self, arm: Arm, held_out: bool = False) -> Recipe:
        """The store with the lists of an arm; with `held_out`, some training queries are there for validation alone."""
        name = f"{arm.name}, held out" if held_out else arm.name
        judgments = self.data / "judgments.parquet"
        return arms.lists(
            self.folder / name, self.content(arm, held(judgments, self.folder) if held_out else judgments)
        )

    def content(self, arm: Arm, judgments: Path) -> dict[str, Any]:
        return content(self.data, self.model, arm, judgments, self.small)


def content(data: Path, model: Path, arm: Arm, judgments: Path, small: bool) -> dict[str, Any]:
    """A recipe without its root; small: one epoch of short lists."""
    few = {name: min(most, arm.sample[name]) for name, most in {"judged": 6, "shown": 3, "random": 1}.items()}
    files = {name: [str((data / f"ubi_{name}*").absolute())] for name in ("queries", "events")}
    files |= {"documents": [str((data / "documents.parquet").absolute())], "judgments": [str(judgments.absolute())]}
    return {
        "data": files,
        # The judgments say what is held out; with nothing to validate on, no click model could be chosen.
        "aggregate": {"test_share": 0.0, "validation_share": 0.0, "click_model": "pbm"},
        "sample": {**arm.sample, **(few if small else {})},
        "teacher": {"base": str(model.absolute()), **TEXTS},
        "finetune": {**TRAINING, **arm.finetune, **({"epochs": 1} if small else {})},
    }


def measure(plan: Plan) -> Iterator[Line]:
    """All arms under all seeds, and BM25, on the test queries; writes the files that show them."""
    began = time.monotonic()
    recipes = [plan.recipe(arm) for arm in ARMS]
    trials = product(zip(ARMS, recipes, strict=True), range(1, plan.seeds + 1))
    found = arms.found([job(plan, arm, arms.seeded(recipe, seed)) for (arm, recipe), seed in trials])
    learned = np.array([one["tally"] for one in found]).reshape(len(ARMS), plan.seeds, -1, len(METRICS), 2)
    tallies = {"BM25": np.stack([arms.bm25(recipes[0])] * plan.seeds)}
    tallies |= dict(zip((arm.name for arm in ARMS), learned, strict=True))
    pairs = [Comparison(f"{a} {MINUS} {b}", tallies[a], tallies[b]) for b, a in combinations(tallies, 2)]
    rows = arms.compared(pairs, recipes[0])
    facts = {"cores": CORES, "seconds": round(time.monotonic() - began), "test_queries": learned.shape[2]}
    arms.show(plan.folder, [arms.summary(name, tally) for name, tally in tallies.items()], rows, facts)
    yield from arms.lines(rows, "log and grades")


def sweep(plan: Plan) -> Iterator[Line]:
    """Each arm under several settings, on training queries that it did not learn from."""
    trials = list(product(zip(ARMS, [plan.recipe(arm, held_out=True) for arm in ARMS], strict=True), SWEPT))
    jobs = [
        job(plan, arm, arms.seeded(recipe, SWEEP_SEED, **settings), "validation") for (arm, recipe), settings in trials
    ]
    for ((arm, _), settings), one in zip(trials, arms.found(jobs), strict=True):
        sums = np.array(one["tally"]).sum(0)
        measured = {name: claims.shown(sums[at, 0] / sums[at, 1]) for at, name in enumerate(METRICS)}
        yield {"claim": f"sweep: {arm.name}", **settings, HEADLINE: measured[HEADLINE], "pnr": measured["pnr"]}


def job(plan: Plan, arm: Arm, recipe: Recipe, split: str = "test") -> Job:
    folder = plan.folder / "trained"
    folder.mkdir(exist_ok=True)
    return Job(arm.name, recipe, plan.model, folder, split)


def held(judgments: Path, folder: Path) -> Path:
    """A copy of the judgments in which a share of the training queries, by their hash, is for validation."""
    given = pl.read_parquet(judgments)
    chosen = [q for q in given["query"].unique() if sampling.uniform(q, SWEEP_SEED) < HELD_OUT]
    moved = pl.col("query").is_in(chosen) & (pl.col("split") == "train")
    path = folder / "judgments-held-out.parquet"
    given.with_columns(split=pl.when(moved).then(pl.lit("validation")).otherwise("split")).write_parquet(path)
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.esci_teacher", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with documents, judgments and a log")
    parser.add_argument("--model", type=Path, required=True, help="a folder with a BERT")
    parser.add_argument("--folder", type=Path, required=True, help="where lists and results stay")
    parser.add_argument("--small", action="store_true", help="one epoch of short lists: that it runs, not how good")
    parser.add_argument("--sweep", action="store_true", help="what the settings were chosen from, instead")
    parser.add_argument("--seeds", type=int, help="default 3, or 2")
    parser.add_argument("--out", type=Path, help="a file to add the lines to")
    given = parser.parse_args(argv)
    runs.end_on_sigterm()
    plan = Plan(given.folder, given.data, given.model, given.seeds or (2 if given.small else 3), given.small)
    for line in sweep(plan) if given.sweep else measure(plan):
        claims.emit(line, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
