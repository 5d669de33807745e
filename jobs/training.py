"""Ray Train around `disranker.fit`: one run has one name, so the same command goes on where a dead one stopped.

A run keeps under `runs/<stage>-<fingerprint>/` the model it starts from, Ray Train's checkpoints, the final model.
"""

import json
import logging
import math
import tempfile
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model

from disranker import fit, teacher
from disranker import recipe as recipes
from disranker.contract import Tokens
from disranker.fit import Task
from disranker.recipe import Recipe, Refused, Training
from disranker.stages import Step
from disranker.store import Store
from jobs.launch import SAY_EVERY_S, say

STATE = "state.pt"
RETRIES = 3  # of a worker or node that dies; the run goes on from its last checkpoint


def run(recipe: Recipe, store: Store, step: Step, start: Path) -> dict[str, Any]:
    """Trains the stage of `step` from the model in `start`, puts the result where the stage writes; gives counts."""
    stage, cfg = step.stage.name, getattr(recipe, step.stage.name)
    name = f"{stage}-{step.fingerprint}"
    _check(cfg, stage)
    store.put_folder(start, f"runs/{name}/start")
    settings = {"recipe": recipe.model_dump(), "root": store.uri, "stage": stage, "run": f"runs/{name}"}
    trainer = TorchTrainer(
        train,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=cfg.workers,
            use_gpu=cfg.gpus_per_worker > 0,
            resources_per_worker={"CPU": cfg.cpus_per_worker, "GPU": cfg.gpus_per_worker},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=store.at("runs"),
            storage_filesystem=store.fs,
            failure_config=FailureConfig(max_failures=RETRIES),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            logging_config=LoggingConfig(log_level="WARNING"),  # progress is said by the workers
        ),
    )
    trainer.fit()
    final = store.folder(f"runs/{name}/final")
    store.put_folder(final, step.stage.writes[0])
    return json.loads((Path(final) / "training.json").read_text())


def train(settings: dict[str, Any]) -> None:
    """One worker, from start or from its last checkpoint to the end."""
    recipe, store, stage = recipes.parse(settings["recipe"]), Store(settings["root"]), settings["stage"]
    cfg: Training = getattr(recipe, stage)
    job = import_module(f"jobs.{stage}")
    torch.set_num_threads(cfg.cpus_per_worker)
    logging.getLogger().setLevel(logging.WARNING)  # Ray names some of its loggers by file: no other way to quiet them
    start = store.folder(f"{settings['run']}/start")
    tokens = Tokens.load(start)
    task: Task = job.task(recipe, store, tokens)
    model = prepare_model(job.model(start, tokens, recipe.seed))
    planned = fit.steps(
        task, cfg, recipe.seed, ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    )
    state = _restored()
    history = _steps(model, task, planned, cfg, state, stage)
    if ray.train.get_context().get_world_rank() == 0:
        measured = task.validate(fit.plain(model))
        _save(model, tokens, start, measured | history, store, settings["run"])
    ray.train.report({"step": len(planned)})


def groups(store: Store) -> dict[str, list[dict[str, Any]]]:
    """The training and validation lists, in the order of parts, so that a seed decides what a run sees."""
    return {
        split: store.read("groups", where=pc.field("split") == split).to_pylist() for split in ("train", "validation")
    }


def texts(store: Store) -> Iterator[str]:
    """What a tokenizer is trained on: training queries and all documents."""
    yield from store.read("queries", ["query"], where=pc.field("split") == "train")["query"].to_pylist()
    for row in store.read("documents", ["title", "summary"]).to_pylist():
        yield from (row["title"], row["summary"])


def _steps(
    model: Any, task: Task, planned: list[list[int]], cfg: Training, state: dict[str, Any] | None, stage: str
) -> dict[str, Any]:
    losses: list[list[float]] = state["losses"] if state else []
    tokens, began, said = 0, time.monotonic(), 0.0
    first = ray.train.get_context().get_world_rank() == 0
    for progress, snapshot in fit.fit(model, task, planned, cfg, state):
        tokens += progress.tokens
        losses.append([progress.step, progress.loss])
        elapsed = time.monotonic() - began
        if first and (elapsed - said > SAY_EVERY_S or progress.step == progress.steps):
            said = elapsed
            _say(stage, progress, losses, tokens / elapsed, elapsed, len(planned) - (state["step"] if state else 0))
        if progress.step % cfg.checkpoint_every_steps == 0 and progress.step < progress.steps:
            _checkpoint(snapshot() | {"losses": losses}, first)
    return {
        "steps": len(planned),
        "tokens_per_second": round(tokens / max(1e-9, time.monotonic() - began)),
        "losses": _thinned(losses),
    }


def _say(
    stage: str, progress: fit.Progress, losses: list[list[float]], speed: float, elapsed: float, steps: int
) -> None:
    recent = [loss for _, loss in losses[-20:]]
    left = elapsed / max(1, progress.step - (progress.steps - steps)) * (progress.steps - progress.step)
    say(
        f"{stage}: step {progress.step}/{progress.steps}, loss {sum(recent) / len(recent):.4f}, "
        f"{speed:.0f} tokens/s, {left:.0f} s left"
    )


def _checkpoint(state: dict[str, Any], first: bool) -> None:
    """A barrier: every rank comes here, the first one brings the state."""
    if not first:
        ray.train.report({"step": state["step"]})
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder) / STATE)
        ray.train.report({"step": state["step"]}, checkpoint=Checkpoint.from_directory(folder))


def _restored() -> dict[str, Any] | None:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return torch.load(Path(folder) / STATE, weights_only=True, map_location="cpu")


def _save(model: Any, tokens: Tokens, start: str, measured: dict[str, Any], store: Store, run: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        teacher.save(fit.plain(model), tokens, start, folder)
        finite = {
            name: value for name, value in measured.items() if not isinstance(value, float) or math.isfinite(value)
        }
        (Path(folder) / "training.json").write_text(json.dumps(finite))
        store.put_folder(folder, f"{run}/final")


def _thinned(losses: list[list[float]], most: int = 200) -> list[list[float]]:
    every = max(1, len(losses) // most)
    return [[step, round(loss, 5)] for step, loss in losses[::every]]


def _check(cfg: Training, stage: str) -> None:
    """Raises `Refused` before Ray would wait for ever for what the cluster has not."""
    have = ray.cluster_resources()
    for name, each in (("CPU", cfg.cpus_per_worker), ("GPU", cfg.gpus_per_worker)):
        if cfg.workers * each > have.get(name, 0):
            raise Refused(
                f"{stage}: {cfg.workers} workers of {each} {name} need {cfg.workers * each}, "
                f"the cluster has {have.get(name, 0):g}; "
                f"lower {stage}.workers or {stage}.{name.lower()}s_per_worker"
            )
