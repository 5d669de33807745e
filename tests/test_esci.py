"""Real products and human grades, where they are at hand: a cut of `tests/esci.yaml`, from log to bundle."""

import json
from pathlib import Path

import pytest
from conftest import ROOT, SHARED

from disranker import recipe
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
}


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data" / "esci").exists(), reason="the ESCI sample is not beside the repository")
def test_esci_goes_from_log_to_bundle_and_measures_the_50_queries_that_nobody_trained_on(
    ray_here, tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    changes = [f"{name}={value}" for name, value in (CUT | {"root": str(tmp_path / "run")}).items()]
    pipeline.run(recipe.load("tests/esci.yaml", changes))
    store = Store(str(tmp_path / "run"))

    counts = store.manifest("searches")["counts"]
    assert (counts["searches"], counts["rejects"], counts["duplicate_events"]) == (120_000, 4, 1323)
    assert store.manifest("evidence")["counts"]["bots"] == 20
    truth = json.loads((SHARED / "data" / "esci" / "truth.json").read_text())["examination_by_rank"]
    examination = store.manifest("evidence")["counts"]["model"]["examination"]
    assert [examination[str(rank)] for rank in range(1, 11)] == pytest.approx(truth, abs=0.05)

    groups = store.read("groups").to_pylist()
    test = {group["query"] for group in groups if group["split"] == "test"}
    assert len(test) == 50
    assert not test & {row["query"] for row in store.read("evidence").to_pylist()}
    report = json.loads(Path(store.at("report", "report.json")).read_text())
    assert report["queries"] == 50
    assert report["runs"]["bm25"]["ndcg@10"]["value"] == pytest.approx(0.685, abs=0.01)
    assert not store.finished("decoder")  # an encoder teacher is not pre-trained
    assert store.finished("bundle")
