"""Ray Train around `disranker.fit`: one run has one name, so the same command goes on where a dead one stopped.

A run keeps under `runs/<stage>-<fingerprint>/` the model it starts from, Ray Train's checkpoints, the final model.
"""

import json
import logging
import math
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import ray.train
import torch
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
)
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchTrainer, get_device, prepare_model
from torch import nn

from disranker import dropout, fit, lexical, lora, spread, teacher, tracking
from disranker import recipe as recipes
from disranker.contract import Tokens
from disranker.fit import Task
from disranker.recipe import Distill, Finetune, Recipe, Refused, Training
from disranker.stages import Step
from disranker.store import Store
from jobs import nodes, parts
from jobs.launch import SAY_EVERY_S, Failed, say

STATE = "state-{}.pt"  # of a rank
FAULT = "fault-"  # and the rank, in the folder of the run: why a step was not taken, and the queries
OUT_OF_MEMORY = ("out of memory", "OutOfMemory", "can't allocate memory")  # of CUDA, of Ray, of torch on a CPU
# A model is called several times for one batch, not equally often on each worker: nothing may be exchanged in a call.
DDP = {"gradient_as_bucket_view": True, "broadcast_buffers": False}
SPEED_OVER_STEPS = 50  # that tokens per second are a mean of: a run that slows down shows it
RETRIES = 3  # of a worker or node that dies; the run goes on from its last checkpoint


def run(recipe: Recipe, store: Store, step: Step, start: Path) -> dict[str, Any]:
    """Trains the stage of `step` from the model in `start`, puts the result where the stage writes; gives counts."""
    stage, cfg = step.stage.name, getattr(recipe, step.stage.name)
    name = f"{stage}-{step.fingerprint}"
    _check(cfg, stage)
    store.put_folder(start, f"runs/{name}/start")
    settings = {
        "recipe": recipe.model_dump(),
        "root": store.uri,
        "stage": stage,
        "run": f"runs/{name}",
        "workers": cfg.workers,
    }
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
            checkpoint_config=CheckpointConfig(num_to_keep=cfg.keep_checkpoints),
            logging_config=LoggingConfig(log_level="WARNING"),  # progress is said by the workers
        ),
    )
    store.remove(settings["run"], lambda file: file.startswith(FAULT))  # of an earlier command
    try:
        trainer.fit()
    except TrainingFailedError as error:
        if (told := _told(error, stage, cfg)) is None:
            raise
        raise told from error
    _check_faults(store, stage, cfg, settings["run"])
    final = store.folder(f"runs/{name}/final")
    store.clear(step.stage.writes[0])  # the model before stood until here
    store.put_folder(final, step.stage.writes[0])
    return json.loads((Path(final) / "training.json").read_text())


def train(settings: dict[str, Any]) -> None:
    """One worker, from start or from its last checkpoint to the end."""
    recipe, store, stage = recipes.parse(settings["recipe"]), Store(settings["root"]), settings["stage"]
    cfg: Training = getattr(recipe, stage)
    torch.set_num_threads(cfg.cpus_per_worker)
    dropout.quicken()
    logging.getLogger().setLevel(logging.WARNING)  # Ray names some of its loggers by file: no other way to quiet them
    start = store.folder(f"{settings['run']}/start")
    tokens = Tokens.load(start)
    task: Task = import_module(f"jobs.{stage}").task(recipe, store, tokens)
    started, _ = model(stage, start, tokens, recipe.seed, cfg)
    rank, ranks = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    planned = fit.steps(task, cfg, recipe.seed, rank, ranks)
    run = fit.Fit(_spread(started, cfg), task, planned, cfg, recipe.seed * 1000 + rank, broadcast_from_rank_zero)
    if (state := _restored(cfg, rank)) is not None:
        run.load(state)
        say(f"{stage}: rank {rank} goes on after step {run.done}")
    try:
        _steps(run, stage, rank, store, settings)
    except fit.Diverged as fault:
        # All ranks are here, and a retry would come to the same step: nothing is raised that Ray Train would repeat.
        finite = math.isfinite(fault.loss)
        found = {"fault": str(fault), "step": fault.step, "finite": finite, "queries": fault.queries}
        store.put_text(json.dumps(found), settings["run"], f"{FAULT}{rank}.json")
        return
    run.finish()
    weights = spread.whole(run.model, wanted=rank == 0)
    if rank == 0:
        merged, adapters = model(stage, start, tokens, recipe.seed, cfg)
        spread.put(merged, weights)
        if adapters:
            lora.merge(adapters)
        _save(merged, tokens, start, _history(run), store, settings["run"])
    ray.train.report({"step": run.done})


def _check_faults(store: Store, stage: str, cfg: Training, run: str) -> None:
    """Raises `Failed` where the workers stopped at a step. Queries stand in the store alone, never in a log."""
    names = [info.base_name for info in store.files(run) if info.base_name.startswith(FAULT)]
    if names:
        found = [store.read_json(run, name) for name in names]
        worst = max(found, key=lambda one: not one["finite"])  # a rank whose own loss is to blame
        raise Failed(
            f"{stage}: {worst['fault']}, which was not taken; its queries stand in {store.at(run)}/{FAULT}*.json; "
            f"lower {stage}.lr ({cfg.lr:g}) or clip_norm ({cfg.clip_norm:g}); checkpoints of the steps before it stay"
        )


def _told(error: TrainingFailedError, stage: str, cfg: Training) -> Exception | None:
    """What a person can mend of why the workers failed, in one line; None where there is no such thing."""
    for failure in getattr(error, "worker_failures", {}).values():
        if isinstance(failure, Refused):
            return failure
    return Failed(_less(stage, cfg)) if any(word in str(error) for word in OUT_OF_MEMORY) else None


def _less(stage: str, cfg: Training) -> str:
    """What would take less memory: of the settings those that are not set yet."""
    go_on = "" if cfg.recompute else f" To go on after the last checkpoint, set {stage}.recompute: true."
    ways = [
        f"lower tokens_per_batch ({cfg.tokens_per_batch}; accumulate makes up for it)",
        *["set precision: bfloat16"] * (cfg.precision == "float32"),
        *["set lora_rank"] * (not cfg.lora_rank),
        "take more workers" if cfg.sharding == "fsdp" else "set sharding: fsdp with more workers",
    ]
    return f"{stage}: out of memory.{go_on} To start anew with less, {', or '.join(ways)}"


def model(stage: str, start: str, tokens: Tokens, seed: int, cfg: Training) -> tuple[nn.Module, Any]:
    """The model that a stage starts from, and its adapters if the recipe asks for them."""
    started = import_module(f"jobs.{stage}").model(start, tokens, seed)
    if isinstance(cfg, Distill) and cfg.lexical:
        started = lexical.Telling(started, seed)
    return started, lora.adapt(started, cfg) if cfg.lora_rank else None


def _spread(model: nn.Module, cfg: Training) -> nn.Module:
    if cfg.recompute:
        spread.recompute(model)
    if cfg.sharding == "fsdp" and ray.train.get_context().get_world_size() > 1:
        return spread.shard(model, cfg, get_device())
    return prepare_model(model, parallel_strategy_kwargs=DDP)


def groups(store: Store) -> dict[str, list[dict[str, Any]]]:
    """The training and validation lists, in the order of parts, so that a seed decides what a run sees."""
    return {
        split: store.read("groups", where=pc.field("split") == split).to_pylist() for split in ("train", "validation")
    }


def comparable(recipe: Recipe, store: Store, labels: Finetune, stage: str) -> dict[str, int]:
    """How many `lists` of the training split have two different targets by these labels."""

    def count(part: int) -> dict[str, int]:
        found = store.read("groups", part=part, where=pc.field("split") == "train").to_pylist()
        return {"lists": sum(teacher.comparable(group["docs"], labels) for group in found)}

    return dict(parts.total(parts.each(recipe.ingest.parts, count, f"{stage}: targets of parts looked up")))


def texts(store: Store) -> Iterator[str]:
    """What a tokenizer is trained on: training queries and all documents."""
    yield from store.read("queries", ["query"], where=pc.field("split") == "train")["query"].to_pylist()
    for row in store.read("documents", ["title", "summary"]).to_pylist():
        yield from (row["title"], row["summary"])


def _steps(run: fit.Fit, stage: str, rank: int, store: Store, settings: dict[str, Any]) -> None:
    """Trains to the end, says and tracks how it goes, keeps checkpoints."""
    began, said, first = time.monotonic(), 0.0, run.done
    seen = deque([(0.0, 0)], SPEED_OVER_STEPS + 1)  # (seconds, tokens so far) after each of the last steps
    watch = _Watch(run, store, settings) if rank == 0 else None
    for progress in run.steps():
        elapsed = time.monotonic() - began
        seen.append((elapsed, seen[-1][1] + progress.tokens))
        speed = _rate(seen) * settings["workers"]
        if watch:
            watch.see(progress, speed)
        if rank == 0 and (elapsed - said > SAY_EVERY_S or progress.step == len(run.planned)):
            said = elapsed
            _say(stage, run, speed, elapsed / (run.done - first) * (len(run.planned) - run.done))
        if progress.step % run.cfg.checkpoint_every_steps == 0 and progress.step < len(run.planned):
            if watch:
                watch.flush()
            _checkpoint(run, rank)
    if watch:
        watch.close()


def _rate(seen: Sequence[tuple[float, int]]) -> float:
    """Tokens a second from the first to the last of (seconds, tokens so far)."""
    (start, before), (end, tokens) = seen[0], seen[-1]
    return (tokens - before) / (end - start)


def _say(stage: str, run: fit.Fit, speed: float, left: float) -> None:
    recent, latest = [one["loss"] for one in run.curve[-20:]], run.validations[-1]
    measured = "".join(f", {name} {value:.4g}" for name, value in latest.items() if name == run.task.metric)
    say(
        f"{stage}: step {run.done}/{len(run.planned)}, loss {sum(recent) / len(recent):.4f}{measured}, "
        f"{speed:.0f} tokens/s, {left:.0f} s left"
    )


class _Watch:
    """The tracker of a run; its files lie in the store, at once or, where that is far away, with every checkpoint."""

    def __init__(self, run: fit.Fit, store: Store, settings: dict[str, Any]):
        self.run, self.store, self.seen = run, store, len(run.validations)
        name = settings["run"].removeprefix("runs/")
        self.place = f"tracking/{name}"
        self.folder = store.at(self.place) if store.local else tempfile.mkdtemp(prefix="disranker-")
        recipe = settings["recipe"]
        shown = {section: recipe[section] for section in (settings["stage"], "teacher", "student")}
        self.tracker = tracking.Tracker(self.folder, name, shown, run.done)

    def see(self, progress: fit.Progress, speed: float) -> None:
        self.tracker.log(
            progress.step,
            {
                "loss": progress.loss,
                "lr": progress.lr,
                "gradient_norm": progress.gradient_norm,
                "tokens_per_second": speed,
            },
        )
        for one in self.run.validations[self.seen :]:
            values = {f"validation/{name}": value for name, value in one.items() if name != "step"}
            self.tracker.log(int(one["step"]), values)
        self.seen = len(self.run.validations)

    def flush(self) -> None:
        self.tracker.flush()
        if not self.store.local:
            self.store.put_folder(self.folder, self.place)

    def close(self) -> None:
        self.flush()
        self.tracker.close()


def _checkpoint(run: fit.Fit, rank: int) -> None:
    """A barrier: every rank comes here; those that hold something of their own bring it."""
    if rank and run.cfg.sharding == "ddp":
        ray.train.report({"step": run.done})
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save(run.state(), Path(folder) / STATE.format(rank))
        ray.train.report({"step": run.done}, checkpoint=Checkpoint.from_directory(folder))


def _restored(cfg: Training, rank: int) -> dict[str, Any] | None:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        file = Path(folder) / STATE.format(rank if cfg.sharding == "fsdp" else 0)
        return torch.load(file, weights_only=True, map_location="cpu")


def _history(run: fit.Fit) -> dict[str, Any]:
    """What the manifest says of a training: its curve, what was measured on the way, and of the weights it gives."""
    best = next((one for one in run.validations if run.best and one["step"] == run.best["step"]), {})
    return {name: value for name, value in best.items() if name != "step"} | {
        "steps": run.done,
        "best": run.best,
        "validations": run.validations,
        "curve": _thinned(run.curve),
    }


def _save(model: Any, tokens: Tokens, start: str, measured: dict[str, Any], store: Store, run: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        teacher.save(model, tokens, start, folder)
        (Path(folder) / "training.json").write_text(json.dumps(measured))
        store.put_folder(folder, f"{run}/final")


def _thinned(curve: list[dict[str, float]], most: int = 200) -> list[dict[str, float]]:
    every = math.ceil(len(curve) / most) or 1
    return [{name: round(value, 6) for name, value in one.items()} for one in curve[every - 1 :: every]]


def _check(cfg: Training, stage: str) -> None:
    """Raises `Refused` before Ray would wait for ever for what the cluster has not."""
    have = ray.cluster_resources()
    for name, each in (("CPU", cfg.cpus_per_worker), ("GPU", cfg.gpus_per_worker)):
        wanted = cfg.workers * each
        if wanted > have.get(name, 0) and wanted > (most := nodes.largest(name)):
            raise Refused(
                f"{stage}: {cfg.workers} workers of {each} {name} need {wanted}, the cluster has {most:g}; "
                f"lower {stage}.workers or {stage}.{name.lower()}s_per_worker"
            )
