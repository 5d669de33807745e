"""`kill -9` in the middle of a stage, then the same command again: the tables of an undisturbed run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from bench import exactly_once, runs
from disranker import recipe
from disranker.store import Store
from jobs import pipeline

ROOT = Path(__file__).parents[1]


def start(content: dict, folder: Path, stage: str, ray: str = "") -> subprocess.Popen:
    """One stage of the pipeline in a process group of its own; without an address it starts a Ray of its own."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    environment = os.environ | {"RAY_ADDRESS": ray, "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"}
    command = [sys.executable, "-m", "jobs.pipeline", "--recipe", str(path), "--from", stage, "--until", stage]
    log = (folder / "log").open("w")
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)


def kill_when(process: subprocess.Popen, there: Path, pattern: str, timeout_s: float = 180) -> None:
    """Ends it the moment a file appears."""
    end = time.monotonic() + timeout_s
    while not list(there.glob(pattern)):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < end, f"no {pattern} in {timeout_s} s"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def copy_without(store: Store, folder: Path, *artefacts: str) -> Path:
    root = Path(shutil.copytree(store.path, folder / "run"))
    for artefact in artefacts:
        shutil.rmtree(root / artefact)
    return root


@pytest.mark.slow
def test_ingest_killed_and_run_again_leaves_the_tables_of_an_undisturbed_run(tiny, tiny_run, tmp_path):
    """On a laptop: the killed run had a Ray of its own, and its address stays behind."""
    names = ("documents", "judgments", "searches", "rejects")
    root = copy_without(tiny_run, tmp_path, *names)
    content = tiny | {"root": str(root)}
    kill_when(start(content, tmp_path, "ingest"), root, "searches/part-*.parquet")
    store = Store(str(root))
    assert all(store.finished(name) is None for name in names)
    again = start(content, tmp_path, "ingest")
    assert again.wait(timeout=180) == 0, (tmp_path / "log").read_text()
    for name in names:
        assert rows(store, name) == rows(tiny_run, name), name
        assert not list((root / name).glob("*.unfinished"))


def rows(store: Store, table: str) -> list[str]:
    """All rows, in an order of their own; the world lies elsewhere, so a reject names another folder."""
    return sorted(json.dumps(row | {"file": ""}, default=str) for row in store.read(table).to_pylist())


@pytest.mark.slow
def test_score_killed_and_run_again_gives_the_same_scores_and_pays_for_none_twice(cluster, tiny, tiny_run, tmp_path):
    root = copy_without(tiny_run, tmp_path, "labels")
    content = tiny | {"root": str(root)}
    kill_when(start(content, tmp_path, "score", cluster.address), root, "labels/*/new-*.parquet")
    store = Store(str(root))
    assert store.finished("labels") is None
    pipeline.run(recipe.parse(content), first="score", last="score")
    counts, undisturbed = store.manifest("labels")["counts"], tiny_run.manifest("labels")["counts"]
    assert 0 < counts["scored"] < undisturbed["scored"]
    assert_same_labels(store, tiny_run)


@pytest.mark.slow
def test_score_outlives_its_engine_and_pays_for_at_most_one_batch_twice(cluster, tiny, tiny_run, tmp_path):
    root = copy_without(tiny_run, tmp_path, "labels")
    others = {actor.pid for actor in runs.workers([cluster.head], "Scorer")}  # of jobs that ended
    process = start(tiny | {"root": str(root)}, tmp_path, "score", cluster.address)
    with runs.Written(root / "labels") as written:
        runs.until(lambda: written.pairs, process, 180)
        (actor,) = (each for each in runs.workers([cluster.head], "Scorer") if each.pid not in others)
        actor.kill()
        assert process.wait(timeout=180) == 0, (tmp_path / "log").read_text()
    store = Store(str(root))
    assert_same_labels(store, tiny_run)
    wanted = tiny_run.manifest("labels")["counts"]["scored"]
    assert wanted <= written.pairs <= wanted + tiny["score"]["pairs_per_batch"]
    assert not list(root.glob("labels/*/trying-*"))


@pytest.mark.slow
def test_two_jobs_at_once_on_one_store_lose_and_double_no_label(cluster, tiny, tiny_run, tmp_path):
    root = copy_without(tiny_run, tmp_path, "labels")
    content = tiny | {"root": str(root), "score": tiny["score"] | {"cpus_per_actor": 0.5}}  # room for two engines
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    undisturbed = runs.rows(Path(tiny_run.at("labels")))
    scoring = exactly_once.Scoring(path, tmp_path / "log", undisturbed, tiny["score"]["pairs_per_batch"], 1, 0.0)
    assert exactly_once.holds(exactly_once.two(scoring, cluster, timeout_s=300))


def assert_same_labels(store: Store, undisturbed: Store) -> None:
    mine, wanted = (runs.rows(Path(each.at("labels"))) for each in (store, undisturbed))
    difference = runs.compare(mine, wanted)
    assert (difference.keys_wrong, difference.doubled, difference.missing) == (0, 0, 0)
    assert difference.most_difference <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["driver", "worker"])
def test_training_killed_goes_on_after_its_last_checkpoint_with_the_curve_of_an_undisturbed_run(
    cluster, tiny, tiny_run, tmp_path, victim
):
    """A killed driver needs the same command again; a killed worker costs the steps since a checkpoint and no more."""
    root = copy_without(tiny_run, tmp_path, "student")
    content = tiny | {"root": str(root)}
    process = start(content, tmp_path, "distill", cluster.address)
    checkpoint = "runs/distill-*/checkpoint_manager_snapshot.json"
    store = Store(str(root))
    if victim == "driver":
        kill_when(process, root, checkpoint)
        assert store.finished("student") is None
        process = start(content, tmp_path, "distill", cluster.address)
    else:
        runs.until(lambda: list(root.glob(checkpoint)), process, 180)
        (worker,) = runs.workers([cluster.head], "RayTrainWorker")
        worker.kill()
    assert process.wait(timeout=180) == 0, (tmp_path / "log").read_text()
    (step,) = re.findall(r"goes on after step (\d+)", (tmp_path / "log").read_text())
    assert int(step) >= 10 and int(step) % tiny["distill"]["checkpoint_every_steps"] == 0
    mine, theirs = (s.manifest("student")["counts"] for s in (store, tiny_run))
    assert [one["step"] for one in mine["curve"]] == [one["step"] for one in theirs["curve"]]
    assert [one["loss"] for one in mine["curve"]] == pytest.approx([o["loss"] for o in theirs["curve"]], abs=1e-3)
    assert [one["step"] for one in mine["validations"]] == [one["step"] for one in theirs["validations"]]
    assert not list((root / "runs").glob("distill-*"))
