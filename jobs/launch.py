"""What every job does around its work: settings, Ray, manifests, exit status (0 done, 1 failed, 2 refused)."""

import argparse
import importlib
import logging
import os
import platform
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import ray

from disranker import recipe as recipes
from disranker import stages
from disranker.recipe import Recipe, Refused
from disranker.store import Store
from jobs.memory import Peak

SAY_EVERY_S = 10.0  # progress of long work
PACKAGES = ("disranker", "ray", "torch", "transformers", "pyarrow")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # nothing is fetched at run time
    "VLLM_NO_USAGE_STATS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # of many tasks that fail alike, the first says all
    "TOKENIZERS_PARALLELISM": "false",  # Ray's tasks are the parallelism
    "TQDM_DISABLE": "1",  # progress is said by the stages
    "TRANSFORMERS_VERBOSITY": "error",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it would show every line twice
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a checkpoint waits for the next look at the workers
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class Failed(RuntimeError):
    """Work that was done and did not come out as it must; jobs print the message alone and exit 1."""


def main(stage: str, argv: list[str] | None = None) -> int:
    """The command line of one stage."""
    about = importlib.import_module(f"jobs.{stage}").__doc__
    return one(stage, parser(f"python -m jobs.{stage}", about).parse_args(argv))


def one(stage: str, arguments: argparse.Namespace) -> int:
    """One stage, if it has to run."""

    def work() -> None:
        recipe = recipes.load(arguments.recipe, arguments.set)
        store = Store(recipe.root)
        step = stages.step(recipe, stage)
        if stages.why(step, store) is None:
            say(f"{stage}: stands")
        else:
            execute(step, recipe, store)

    return guarded(work)


def parser(name: str, about: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=name, description=about)
    parser.add_argument("--recipe", required=True, help="YAML file with the settings of the run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="lay a value over the recipe"
    )
    return parser


def guarded(work: Any) -> int:
    """Runs it; one line and status 2 where a person must mend the input, 1 and the traceback where something broke."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        work()
    except Refused as refusal:
        print(f"refused: {str(refusal).strip()}", file=sys.stderr, flush=True)
        return 2
    except Failed as failure:
        print(f"failed: {failure}", file=sys.stderr, flush=True)
        return 1
    return 0


def execute(step: stages.Step, recipe: Recipe, store: Store) -> None:
    """Runs one stage and makes what it wrote exist; leaves nothing of what was there before, or of a refused input.

    A model alone stays until its stage has trained another.
    """
    stages.check_reads(step, store)
    module = importlib.import_module(f"jobs.{step.stage.name}")
    connect()
    written = set(step.stage.writes) - stages.MODELS
    for artefact in written:
        store.unfinish(artefact) if artefact in stages.KEPT else store.clear(artefact)
    say(f"{step.stage.name}: {', '.join(step.reads) or 'nothing'} -> {', '.join(step.stage.writes)}")
    began = time.monotonic()
    try:
        with Peak() as peak:
            counts = module.run(recipe, store, step)
    except Refused:
        for artefact in written - stages.KEPT:
            store.clear(artefact)
        raise
    seconds = round(time.monotonic() - began, 1)
    manifest = _manifest(step) | {"seconds": seconds, "peak_memory_mib": peak.mib, "counts": counts}
    if resting := set(stages.resting(store)) - set(step.stage.writes):
        manifest |= {"rests_on_forgotten": sorted(resting)}  # made before somebody was forgotten, and not since
    for artefact in step.stage.writes:
        store.commit(artefact, manifest | {"artefact": artefact})
    store.drop_run(step.stage.name)
    say(f"{step.stage.name}: done in {seconds:.0f} s, at most {peak.mib} MiB" + _shown(counts))


def connect() -> None:
    """Joins the cluster of RAY_ADDRESS, which `ray job submit` sets; without it, starts Ray on this machine.

    Ray's own search would also try the address of the last Ray here, which a killed run leaves behind, for minutes.
    """
    if not ray.is_initialized():
        ray.init(
            address=os.environ.get("RAY_ADDRESS") or "local",
            runtime_env={"env_vars": {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()}},
            include_dashboard=True,  # on loopback; Ray Train asks it who is alive
            logging_level="warning",
        )
        if not os.environ.get("RAY_ADDRESS"):  # its workers start when first needed: now, not in the time of a stage
            ray.get([ray.remote(_awake).remote() for _ in range(int(ray.cluster_resources()["CPU"]))])
    from ray.data.context import ShuffleStrategy  # takes half a second to import, which most workers save

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # a line a stage says more than ten bars that redraw each other
    context.print_on_execution_start = False
    # The default shuffle starts actors, 7 s each time; a sort of the same rows takes 1 s.
    context.shuffle_strategy = ShuffleStrategy.SORT_SHUFFLE_PULL_BASED
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def _awake() -> None:
    """What a worker does first."""


def say(text: str) -> None:
    """One line of progress."""
    print(f"{datetime.now():%H:%M:%S}  {text}", flush=True)


def _shown(counts: dict[str, Any]) -> str:
    plain = [f"{name} {value}" for name, value in counts.items() if isinstance(value, int | str)]
    return "".join(f" | {text}" for text in plain)


def _manifest(step: stages.Step) -> dict[str, Any]:
    return {
        "stage": step.stage.name,
        "fingerprint": step.fingerprint,
        "settings": step.settings,
        "reads": step.reads,
        "inputs": step.inputs,
        "versions": {name: metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "finished": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
