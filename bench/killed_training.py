"""SIGKILL of the worker that trains, at random steps, in one run of `finetune`: the teacher of an undisturbed run.

Ray Train starts the worker again, and it goes on after its last checkpoint.
"""

import random
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bench import arms, claims, runs
from bench.claims import Line
from disranker import recipe as recipes
from disranker.contract import Tokens
from disranker.metrics import METRICS
from disranker.recipe import Recipe
from disranker.store import Store

WORKER = "RayTrainWorker"  # in the title of its process
MOST = 0.5  # thousandths by which a metric may be off: equal to three digits


@dataclass(frozen=True)
class Plan:
    folder: Path
    kills: int = 3
    epochs: int = 12
    checkpoint_every_steps: int = 25
    seed: int = 1
    recipe: Mapping[str, Any] = field(
        default_factory=lambda: {
            "world": {"documents": 600, "queries": 300, "judged": 250, "searches": 5000, "shards": 2},
            "ingest": {"parts": 2},
            "teacher": {"vocabulary": 800, "width": 64, "layers": 2, "heads": 2},
            "pretrain": {"epochs": 1},
        }
    )

    def content(self, root: Path) -> dict[str, Any]:
        finetune = {"epochs": self.epochs, "checkpoint_every_steps": self.checkpoint_every_steps}
        return {**self.recipe, "root": str(root.absolute()), "finetune": finetune}


SMALL = {"kills": 1, "epochs": 6, "checkpoint_every_steps": 10}


def killed(plan: Plan) -> Iterator[Line]:
    """One run with `kills` kills against one without."""
    store = plan.folder / "store"
    began = plan.folder / "began.yaml"
    began.write_text(yaml.safe_dump(plan.content(store)))
    runs.done(began, plan.folder / "log", stage="pipeline", artefact="decoder", options=["--until", "pretrain"])
    paths = {name: _copied(plan, store, name) for name in ("undisturbed", "disturbed")}
    runs.done(paths["undisturbed"], plan.folder / "log", stage="finetune", artefact="teacher")
    seconds = Store(str(runs.root(paths["undisturbed"]))).manifest("teacher")["seconds"]
    log = plan.folder / "disturbed.log"
    _disturbed(paths["disturbed"], log, plan, seconds)
    went_on = resumed(log.read_text(), plan.kills)
    mine, theirs = (_measured(recipes.load(paths[name])) for name in ("disturbed", "undisturbed"))
    off = max(abs(mine[name] - theirs[name]) for name in theirs) * 1000
    more = {"kills": plan.kills, "went_on_after_steps": went_on, "steps": theirs["steps"], "disturbed": mine}
    yield claims.within("killed: metrics of the teacher", [off], MOST, "thousandths off", undisturbed=theirs, **more)


def resumed(log: str, kills: int) -> list[int]:
    """The steps after which the training went on. Raises `Broken` where these are not as many as kills."""
    steps = [int(step) for step in re.findall(r"goes on after step (\d+)", log)]
    if len(steps) != kills:
        raise runs.Broken(f"{kills} kills, but the training went on {len(steps)} times, after steps {steps}")
    return steps


def _copied(plan: Plan, store: Path, name: str) -> Path:
    """The recipe of a copy of a store."""
    root, path = plan.folder / name, plan.folder / f"{name}.yaml"
    shutil.copytree(store, root)
    path.write_text(yaml.safe_dump(plan.content(root)))
    return path


def _disturbed(recipe: Path, log: Path, plan: Plan, seconds: float) -> None:
    """Kills the worker at moments of equal chance in the time that an undisturbed run takes, start-up excluded."""
    draw, process = random.Random(plan.seed), runs.job(recipe, log, stage="finetune")
    try:
        for done in range(plan.kills):
            runs.until(lambda done=done: _going(log, runs.root(recipe), done), process)
            time.sleep(draw.uniform(0, seconds / (2 * plan.kills)))
            for worker in runs.workers([process.pid], WORKER):
                worker.kill()
        if status := process.wait(600):
            raise runs.Broken(f"finetune ended with {status}: {log.read_text()[-3000:]}")
    finally:
        runs.end(process)


def _going(log: Path, root: Path, kills: int) -> bool:
    """Whether the worker trains again after so many kills, and has something to go on from."""
    checkpoints = list(root.glob("runs/finetune-*/checkpoint_manager_snapshot.json"))
    return bool(checkpoints) and log.read_text().count("goes on after step") >= kills


def _measured(recipe: Recipe) -> dict[str, float]:
    """Steps, what was best on validation queries, and NDCG@10 and PNR on test queries."""
    from disranker import teacher

    store = Store(recipe.root)
    counts, folder = store.manifest("teacher")["counts"], store.folder("teacher")
    tokens = Tokens.load(folder)
    scores = arms.scorer(teacher.scorer(folder, tokens, seed=0), tokens)
    sums = arms.tally(scores, arms.listed(recipe.root, "test")).sum(0)
    found = {name: float(sums[METRICS.index(name), 0] / sums[METRICS.index(name), 1]) for name in ("ndcg@10", "pnr")}
    return {"steps": counts["steps"], "pair_accuracy": counts["best"]["value"]} | found


def main(argv: list[str] | None = None) -> int:
    return claims.command("bench.killed_training", Plan, {"killed": killed}, SMALL, argv, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
