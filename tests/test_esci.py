"""Real products and human grades, where they are at hand: a cut of `tests/esci.yaml`, from log to bundle."""

import json
from pathlib import Path

import polars as pl
import pytest
from conftest import ROOT, SHARED

from disranker import click_choice, recipe, student
from disranker.recipe import Student
from disranker.store import Store
from jobs import pipeline

CUT = {
    "root": "set below",
    "sample.ungraded": "{head: 0, torso: 0, tail: 0}",
    "sample.tail_floor": "0",
    "sample.judged": "3",
    "sample.shown": "2",
    "sample.bm25": "1",
    "sample.random": "1",
    "finetune.epochs": "1",
    "distill.epochs": "1",
    "finetune.cpus_per_worker": "1",
    "distill.cpus_per_worker": "1",
    "evaluate.resamples": "200",
    "publish.timed_lists": "5",
    "publish.timing_rounds": "1",
}


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data" / "esci").exists(), reason="the ESCI sample is not beside the repository")
def test_esci_goes_from_log_to_bundle_and_measures_the_50_queries_that_nobody_trained_on(
    ray_here, tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    base = tmp_path / "two layers"  # of six: a third of the time
    student.shortened(str(SHARED / "models" / "minilm-l6"), base, Student(layers=2), seed=0)
    own = {"root": str(tmp_path / "run"), "teacher.base": str(base), "student.base": str(base), "student.layers": "1"}
    changes = [f"{name}={value}" for name, value in (CUT | own).items()]
    pipeline.run(recipe.load("tests/esci.yaml", changes))
    store = Store(str(tmp_path / "run"))

    _holds_what_was_planted(store, json.loads((SHARED / "data" / "esci" / "truth.json").read_text()))
    groups = store.read("groups").to_pylist()
    test = {group["query"] for group in groups if group["split"] == "test"}
    assert len(test) == 50
    assert not test & {row["query"] for row in store.read("evidence").to_pylist()}
    report = json.loads(Path(store.at("report", "report.json")).read_text())
    assert report["queries"] == 50
    assert report["runs"]["bm25"]["ndcg@10"]["value"] == pytest.approx(0.685, abs=0.01)
    assert not store.finished("decoder")  # an encoder teacher is not pre-trained
    assert store.finished("bundle")


def _holds_what_was_planted(store: Store, truth: dict) -> None:
    counts = store.manifest("searches")["counts"]
    assert (counts["searches"], counts["rejects"], counts["duplicate_events"]) == (120_000, 4, 1323)
    used = counts["searches"] + counts["clicks"] + counts["conversions"]
    dropped = counts["duplicate_queries"] + counts["duplicate_events"] + counts["other_events"]
    assert used + dropped + counts["rejects"] == counts["lines"]

    found = store.manifest("evidence")["counts"]
    clients = store.read("searches", ["client"])["client"].to_pylist()
    bots = set(truth["bot_client_ids"])
    searched = sum(client in bots for client in clients)
    left_out = found["cleaning"]["bots"]["searches"]  # of bots, and of nobody else: there are 20, and 20 were found
    assert found["bots"] == len(bots) == 20
    assert 0.9 * searched < left_out < searched + 0.01 * (len(clients) - searched)

    examination = found["model"]["examination"]["pbm"]
    planted = truth["examination_by_rank"]
    assert [examination[str(rank)] for rank in range(1, 11)] == pytest.approx(planted, abs=0.05)
    evidence = pl.DataFrame(pl.from_arrow(store.read("evidence")))
    raw = evidence.with_columns(attractiveness=pl.col("clicks") / pl.col("impressions"))
    grades = pl.DataFrame(pl.from_arrow(store.read("judgments"))).filter(pl.col("split") == "train")
    agrees, plain = (click_choice.correlations(pairs, grades).mean() for pairs in (evidence, raw))
    assert agrees > plain + 0.03
