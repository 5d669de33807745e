"""The stages on a real Ray, with vLLM and Ray Train: what they leave, what they skip, what they refuse."""

import gzip
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from ray.train import WorkerGroupError
from transformers import AutoModelForSequenceClassification

from disranker import recipe, stages, tables
from disranker.contract import Contract, Tokens
from disranker.engine import Engine
from disranker.recipe import Refused
from disranker.store import Store
from jobs import distill, forget, ingest, launch, pipeline, score, training
from jobs.score import Teacher


def test_every_stage_leaves_its_artefacts_with_a_manifest(tiny, tiny_run):
    for step in stages.steps(recipe.parse(tiny)):
        for artefact in step.stage.writes:
            manifest = tiny_run.manifest(artefact)
            assert (manifest["stage"], manifest["fingerprint"]) == (step.stage.name, step.fingerprint)
            assert manifest["seconds"] >= 0
            assert manifest["versions"]["ray"]


@pytest.mark.parametrize("table", list(tables.SCHEMAS))
def test_a_table_has_the_columns_and_rows_that_its_manifest_says(tiny_run, table):
    manifest = tiny_run.manifest(table)
    read = pa.concat_tables(pq.read_table(part) for part in tiny_run.parts(table))
    assert read.num_rows == manifest["rows"] > 0
    assert read.schema.names == list(manifest["schema"])


def test_every_line_of_the_log_became_a_search_an_event_or_a_reject(tiny_run):
    counts = tiny_run.manifest("searches")["counts"]
    files = [info.path for info in tiny_run.files("world") if info.base_name.endswith(".ndjson.gz")]
    assert counts["lines"] == sum(len(gzip.open(file).read().splitlines()) for file in files)
    assert counts["searches"] == tiny_run.manifest("searches")["rows"] == 2000
    assert counts["rejects"] == tiny_run.manifest("rejects")["rows"] == sum(counts["reasons"].values())


def test_no_query_is_in_two_splits_and_test_lists_hold_judged_documents_alone(tiny_run):
    groups = tiny_run.read("groups").to_pylist()
    assert len({group["query"] for group in groups}) == len(groups)
    test = [group for group in groups if group["split"] == "test"]
    assert test
    assert all(doc["grade"] is not None for group in test for doc in group["docs"])
    learned = {row["query"] for row in tiny_run.read("clicked").to_pylist()}
    assert not learned & {group["query"] for group in test}


def test_every_pair_of_every_list_has_one_label(tiny, tiny_run):
    teacher = Teacher.of(recipe.parse(tiny), tiny_run)
    groups = tiny_run.read("groups").to_pylist()
    scores = [score for listed in teacher.scores(groups) for score in listed]
    counts = tiny_run.manifest("labels")["counts"]
    assert None not in scores and len(scores) == counts["pairs"] >= counts["scored"] == len(_keys(teacher, groups))
    assert counts["rejected"] == 0 and counts["tokens"] > 5 * counts["scored"] and counts["scoring_s"] > 0
    stats = teacher.labels.stats()
    assert stats["count"] == counts["scored"] == sum(stats["histogram"]["counts"])
    once = list(teacher.labels.scores(_keys(teacher, groups)).values())
    assert (stats["mean"], stats["deviation"]) == pytest.approx((np.mean(once), np.std(once)), abs=1e-6)
    assert stats == counts["scores"] and teacher.labels.fresh() == []


def test_vllm_gives_the_logits_of_plain_transformers_to_1e_4(tiny, tiny_run):
    import torch

    from disranker.batches import Rows
    from disranker.teacher import raw_scores, scorer

    folder = tiny_run.folder("teacher")
    tokens = Tokens.load(folder)
    model = scorer(folder, tokens, seed=0).eval()
    groups = tiny_run.read("groups").to_pylist()[:20]
    labelled = Teacher.of(recipe.parse(tiny), tiny_run).scores(groups)
    for group, expected in zip(groups, labelled, strict=True):
        rows = Rows.padded(tokens.listed(group["query"], group["docs"]), tokens.contract.pad)
        with torch.no_grad():
            assert raw_scores(model, rows).tolist() == pytest.approx(expected, abs=1e-4)


def test_each_training_says_how_it_went_and_keeps_its_best_weights(tiny_run):
    for artefact, metric in (
        ("decoder", "perplexity"),
        ("teacher", "pair_accuracy"),
        ("student", "teacher_pair_accuracy"),
    ):
        counts = tiny_run.manifest(artefact)["counts"]
        at = {one["step"]: one[metric] for one in counts["validations"]}
        assert len(at) == 5 and min(at) == 0 and max(at) == counts["steps"] == counts["curve"][-1]["step"]
        best = (min if metric == "perplexity" else max)(value for step, value in at.items() if step)
        assert counts["best"] == {"step": counts["best"]["step"], "metric": metric, "value": best}
        assert counts[metric] == best == at[counts["best"]["step"]]


def test_a_student_is_measured_beside_bm25_and_its_teacher_on_the_grades_of_validation_queries(tiny, tiny_run):
    others = tiny_run.manifest("student")["counts"]["baselines"]
    assert others.keys() == {"bm25", "teacher"} and all(0 < share < 1 for share in others.values())
    right = total = 0
    groups = tiny_run.read("groups", where=pc.field("split") == "validation").to_pylist()
    judge = Teacher.of(recipe.parse(tiny), tiny_run)
    for group, scores in zip(groups, judge.scores(groups), strict=True):
        grades = [0 if doc["grade"] is None and doc["source"] == "random" else doc["grade"] for doc in group["docs"]]
        graded = any(doc["grade"] is not None for doc in group["docs"])
        known = [row for row in zip(grades, scores, strict=True) if graded and None not in row]
        above = [a[1] > b[1] for a in known for b in known if a[0] > b[0]]
        right, total = right + sum(above), total + len(above)
    assert others["teacher"] == right / total


def test_the_curves_of_each_training_are_there_for_tensorboard(tiny_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for stage, artefact in (("pretrain", "decoder"), ("finetune", "teacher"), ("distill", "student")):
        counts = tiny_run.manifest(artefact)["counts"]
        (folder,) = Path(tiny_run.at("tracking")).glob(f"{stage}-*")
        events = EventAccumulator(str(folder)).Reload()
        assert [one.step for one in events.Scalars("loss")] == list(range(1, counts["steps"] + 1))
        measured = {one.step: one.value for one in events.Scalars(f"validation/{counts['best']['metric']}")}
        assert measured[counts["best"]["step"]] == pytest.approx(counts["best"]["value"], rel=1e-6)
        assert set(events.Tags()["scalars"]) >= {"loss", "lr", "gradient_norm", "tokens_per_second"}


@pytest.mark.slow
def test_2_workers_that_share_each_weight_train_adapters_and_leave_a_plain_teacher(ray_here, tiny, tiny_run, tmp_path):
    """All that a recipe can ask of a training at once, on CPUs."""
    root = Path(shutil.copytree(tiny_run.path, tmp_path / "run"))
    scale = {"workers": 2, "sharding": "fsdp", "lora_rank": 4, "recompute": True, "precision": "bfloat16"}
    finetune = tiny["finetune"] | scale | {"accumulate": 2, "patience": 1, "keep_checkpoints": 1}
    changed = recipe.parse(tiny | {"root": str(root), "finetune": finetune})
    pipeline.run(changed, last="finetune")
    store = Store(str(root))
    mine, theirs = (s.manifest("teacher")["counts"] for s in (store, tiny_run))
    assert 0 < mine["steps"] < theirs["steps"] / 3
    ours, base = (
        AutoModelForSequenceClassification.from_pretrained(s.folder(of), num_labels=1).state_dict()
        for s, of in ((store, "teacher"), (tiny_run, "decoder"))
    )
    assert ours.keys() == base.keys()
    changed_weights = {name for name in ours if not torch.equal(ours[name], base[name])}
    assert changed_weights == {name for name in ours if name.startswith("score") or "_proj" in name}


def test_a_training_whose_loss_is_no_number_stops_names_the_step_and_keeps_the_query_out_of_the_log(
    ray_here, tiny, tiny_run, tmp_path, capfd
):
    root = Path(shutil.copytree(tiny_run.path, tmp_path / "run"))
    finetune = tiny["finetune"] | {"lr": 1e30, "warmup_share": 0.0, "checkpoint_every_steps": 1}
    changed = recipe.parse(tiny | {"root": str(root), "finetune": finetune})
    with pytest.raises(
        launch.Failed, match=r"^finetune: loss 0\.6931 and gradient norm nan at step 2, .*lower finetune\.lr"
    ):
        pipeline.run(changed, last="finetune")
    (folder,) = root.glob("runs/finetune-*")
    (fault,) = folder.glob("fault-*.json")
    found = json.loads(fault.read_text())
    assert found["step"] > 1 and any(found["queries"])
    assert set(found["queries"]) <= {group["query"] for group in tiny_run.read("groups").to_pylist()}
    assert list(folder.glob("checkpoint_*")), "the last good checkpoint stays"
    said = "".join(capfd.readouterr())
    assert not any(f"'{query}'" in said or f'"{query}"' in said for query in found["queries"])


def test_a_training_out_of_memory_says_which_settings_to_lower(monkeypatch, tiny, ray_here, tmp_path):
    def fit(_):
        raise WorkerGroupError("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", {})

    monkeypatch.setattr(training.TorchTrainer, "fit", fit)
    store, given = Store(str(tmp_path)), recipe.parse(tiny | {"root": str(tmp_path)})
    start = tmp_path / "start"
    start.mkdir()
    with pytest.raises(
        launch.Failed, match=r"^finetune: out of memory\. .*recompute.*tokens_per_batch \(\d+;.*lora_rank"
    ):
        training.run(given, store, stages.step(given, "finetune"), start)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {"tokens_per_batch": 512},
            "To go on after the last checkpoint, set finetune.recompute: true. To start anew with less, lower "
            "tokens_per_batch (512; accumulate makes up for it), or set precision: bfloat16, or set lora_rank, or set "
            "sharding: fsdp with more workers",
        ),
        (
            {"tokens_per_batch": 512, "recompute": True, "precision": "bfloat16", "lora_rank": 4, "sharding": "fsdp"},
            "To start anew with less, lower tokens_per_batch (512; accumulate makes up for it), or take more workers",
        ),
    ],
)
def test_of_a_training_out_of_memory_only_what_is_not_set_yet_is_named(given, told):
    error = WorkerGroupError("CUDA out of memory", {})
    assert str(training._told(error, "finetune", recipe.Finetune(**given))) == f"finetune: out of memory. {told}"


def test_an_error_of_a_worker_that_nobody_can_mend_stays_as_it_is():
    assert training._told(WorkerGroupError("no such thing", {0: KeyError("x")}), "finetune", recipe.Finetune()) is None


def test_what_a_worker_refuses_comes_in_one_line(ray_here, monkeypatch, tiny, tiny_run, tmp_path):
    """Nothing to train on, which the stage would have seen before."""
    monkeypatch.setattr(training, "RETRIES", 0)
    given = recipe.parse(tiny | {"root": str(tmp_path)})
    store = Store(str(tmp_path))
    store.write("groups", 0, [])
    store.commit("groups", {})
    with pytest.raises(Refused, match=r"^nothing to train on: no row of the training split has what .* learns from$"):
        training.run(given, store, stages.step(given, "finetune"), Path(tiny_run.folder("decoder")))


def test_lists_without_two_targets_are_refused_before_a_worker_starts(tiny, tiny_run, tmp_path, capsys):
    root = _copy(tiny_run, tmp_path)
    content = tiny | {"root": root, "finetune": tiny["finetune"] | {"labels": "evidence", "min_impressions": 10**6}}
    # Random documents count as irrelevant, and all others as unknown.
    assert launch.main("finetune", ["--recipe", _recipe(tmp_path, content)]) == 2
    _refused_with(
        "finetune: no training list has two different targets with labels evidence; set other finetune.labels, or "
        "lower finetune.min_impressions (1000000)",
        capsys.readouterr().err,
    )
    assert not list(Path(root).glob("runs/*"))


@pytest.mark.parametrize(
    ("stage", "artefact"), [("pretrain", "decoder"), ("finetune", "teacher"), ("distill", "student")]
)
def test_a_training_that_is_refused_leaves_the_model_that_was_there(stage, artefact, tiny, tiny_run, tmp_path, capsys):
    root = _copy(tiny_run, tmp_path)
    before = _contents(Path(root, artefact))
    content = tiny | {"root": root, stage: tiny[stage] | {"workers": 999}}
    assert launch.main(stage, ["--recipe", _recipe(tmp_path, content)]) == 2
    _refused_with(f"{stage}: 999 workers of 1 CPU need 999", capsys.readouterr().err)
    assert _contents(Path(root, artefact)) == before and "manifest.json" in before


def test_a_trained_model_takes_the_place_of_the_one_before_with_nothing_of_it_left(
    ray_here, monkeypatch, tiny, tmp_path
):
    store, given = Store(str(tmp_path)), recipe.parse(tiny | {"root": str(tmp_path)})
    step = stages.step(given, "finetune")

    def fit(_):
        assert store.finished("teacher") == {"bytes": 3}
        store.put_text('{"steps": 7}', f"runs/finetune-{step.fingerprint}/final", "training.json")

    store.put_text("old", "teacher", "old.bin")
    store.commit("teacher", {})
    monkeypatch.setattr(training.TorchTrainer, "fit", fit)
    (tmp_path / "start").mkdir()
    assert training.run(given, store, step, tmp_path / "start") == {"steps": 7}
    assert list(_contents(tmp_path / "teacher")) == ["training.json"]


def test_tokens_a_second_are_those_of_the_last_steps():
    assert training._rate([(10.0, 4000), (11.0, 4100), (12.0, 4300)]) == 150


def test_the_report_has_three_runs_with_intervals_and_the_scores_it_came_from(tiny_run):
    report = json.loads(Path(tiny_run.at("report", "report.json")).read_text())
    assert list(report["runs"]) == ["bm25", "teacher", "student"]
    assert all(
        run["ndcg@10"]["low"] <= run["ndcg@10"]["value"] <= run["ndcg@10"]["high"] for run in report["runs"].values()
    )
    scores = tiny_run.read("scores")
    assert scores.num_rows == 3 * sum(
        len(g["docs"]) for g in tiny_run.read("groups").to_pylist() if g["split"] == "test"
    )
    assert report["training"].keys() == {"pretrain", "finetune", "distill"}
    assert "<html" in Path(tiny_run.at("report", "report.html")).read_text()


def test_the_bundle_gives_the_scores_of_the_evaluation(tiny_run):
    engine = Engine.from_bundle(tiny_run.at("bundle", "student"), engine="torch")
    group = next(g for g in tiny_run.read("groups").to_pylist() if g["split"] == "test")
    docs = group["docs"]
    found = engine.scores([group["query"]] * len(docs), [d["title"] for d in docs], [d["summary"] for d in docs])
    rows = tiny_run.read("scores").to_pylist()
    expected = {r["doc_id"]: r["score"] for r in rows if r["query"] == group["query"] and r["model"] == "student"}
    assert dict(zip([d["doc_id"] for d in docs], found, strict=True)) == pytest.approx(expected, abs=1e-5)


def test_a_second_run_does_nothing(tiny, tiny_run, capsys):
    before = {info.path: info.mtime_ns for info in tiny_run.files("")}
    pipeline.run(recipe.parse(tiny))
    assert capsys.readouterr().out.count("stands") == len(stages.steps(recipe.parse(tiny)))
    assert {info.path: info.mtime_ns for info in tiny_run.files("")} == before


def test_a_dry_run_names_the_changed_setting_and_all_that_follows_from_it(tiny, tiny_run, capsys):
    changed = recipe.parse(tiny | {"score": {"dtype": "bfloat16"}})
    pipeline.run(changed, dry=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines if "runs" in line] == ["score:", "distill:", "evaluate:", "publish:"]
    assert "score.dtype float32 -> bfloat16" in next(line for line in lines if "score:" in line)


def test_a_stage_alone_refuses_what_is_not_there_yet(tiny, tmp_path, capsys):
    path = _recipe(tmp_path, tiny | {"root": str(tmp_path / "run")})
    assert launch.main("sample", ["--recipe", path]) == 2
    assert "refused: sample: documents is not there" in capsys.readouterr().err


def test_pairs_on_which_the_engine_fails_are_rejected_and_too_many_of_them_fail_the_stage(
    tiny, tiny_run, tmp_path, capfd
):
    """A teacher that gives no number for pairs with one of the two highest tokens that come up."""
    root = _copy(tiny_run, tmp_path)
    shutil.rmtree(Path(root, "labels"))
    groups, tokens = tiny_run.read("groups").to_pylist(), Tokens.load(tiny_run.folder("teacher"))
    ids = [max(ids) for group in groups for ids, _ in tokens.listed(group["query"], group["docs"])]
    unknown = sorted(set(ids))[-2]
    _break_embedding(Path(root, "teacher"), unknown)
    content = tiny | {"root": root, "score": tiny["score"] | {"max_bad_share": 0.0}}
    assert launch.main("score", ["--recipe", _recipe(tmp_path, content)]) == 1
    assert "more than score.max_bad_share allows; the last: the score is nan" in capfd.readouterr().err
    store = Store(root)
    assert store.finished("labels") is None and list(Path(root).glob("labels/*/rejects-*.jsonl"))

    content = tiny | {"root": root, "score": tiny["score"] | {"max_bad_share": 1.0}}
    assert launch.main("score", ["--recipe", _recipe(tmp_path, content)]) == 0
    counts = store.manifest("labels")["counts"]
    rejected = {
        json.loads(line)["key"]
        for path in Path(root).glob("labels/*/rejects-*.jsonl")
        for line in path.read_text().splitlines()
    }
    teacher = Teacher.of(recipe.parse(content), store)
    keyed = [pair for group in groups for pair in teacher.keyed(group)]
    assert rejected == {key for key, ids, _ in keyed if max(ids) >= unknown}
    assert 0 < counts["rejected"] == len(rejected) < counts["scores"]["count"]
    assert counts["scores"]["count"] == len({key for key, _, _ in keyed} - rejected)
    listed = distill.labelled(groups, teacher)
    assert sum(len(group["docs"]) for group, _ in listed) == sum(max(ids) < unknown for _, ids, _ in keyed)


def test_a_teacher_of_another_contract_is_refused_with_both_digests(tiny, tiny_run, tmp_path, capsys):
    root = _copy(tiny_run, tmp_path)
    path = Path(root, "teacher", "contract.json")
    saved = Contract.model_validate_json(path.read_text())
    shorter = saved.model_copy(update={"max_tokens": saved.max_tokens - 1})
    path.write_text(shorter.model_dump_json())
    recipe_path = _recipe(tmp_path, tiny | {"root": root, "score": {"dtype": "bfloat16"}})
    assert launch.main("score", ["--recipe", recipe_path]) == 2
    said = capsys.readouterr().err
    assert shorter.digest in said and saved.digest in said
    assert f"max_tokens {saved.max_tokens - 1} -> {saved.max_tokens}" in said


def test_an_estimate_scores_a_sample_and_says_what_all_would_take(tiny, tiny_run, tmp_path, capsys):
    root = _copy(tiny_run, tmp_path)
    shutil.rmtree(Path(root, "labels"))
    assert score.main(["--recipe", _recipe(tmp_path, tiny | {"root": root}), "--estimate"]) == 0
    said = capsys.readouterr().out
    counts = tiny_run.manifest("labels")["counts"]
    assert f"{counts['scored']} pairs with {counts['tokens']} tokens have no label" in said
    assert "of them took one engine" in said and "their labels are kept" in said
    assert "room for 1 engine: 0.00 GPU hours" in said
    store = Store(root)
    teacher = Teacher.of(recipe.parse(tiny), store)
    kept = [s for listed in teacher.scores(store.read("groups").to_pylist()) for s in listed if s is not None]
    assert store.finished("labels") is None and 0 < len(kept) < counts["pairs"]


def test_half_of_each_training_list_is_asked_for_and_all_of_a_test_list(tiny, tiny_run, tmp_path):
    root = _copy(tiny_run, tmp_path)
    halved = recipe.parse(tiny | {"root": root, "sample": tiny["sample"] | {"asked_share": 0.5}})
    pipeline.run(halved, first="sample", last="sample")
    store = Store(root)
    for group in store.read("groups").to_pylist():
        asked, docs = sum(doc["asked"] for doc in group["docs"]), len(group["docs"])
        assert asked == (docs if group["split"] == "test" else max(2, math.ceil(docs / 2)))
    counts = store.manifest("groups")["counts"]
    assert counts["asked"] < 0.7 * counts["pairs"]


def test_labels_are_paid_for_once(tiny, tiny_run, tmp_path):
    """Deleting the manifest makes the stage run again, and find every label."""
    root = _copy(tiny_run, tmp_path)
    Path(root, "labels", "manifest.json").unlink()
    pipeline.run(recipe.parse(tiny | {"root": root}), first="score", last="score")
    counts = Store(root).manifest("labels")["counts"]
    assert counts["scored"] == 0
    assert counts["scores"] == tiny_run.manifest("labels")["counts"]["scores"]


LOG = {
    "query_id": "q1",
    "client_id": "c1",
    "user_query": "sofa",
    "query_response_hit_ids": ["d1", "d2"],
    "timestamp": "2026-01-01T00:00:00Z",
}
EVENT = {
    "action_name": "click",
    "query_id": "q1",
    "client_id": "c1",
    "timestamp": "2026-01-01T00:00:05Z",
    "event_attributes": {"object": {"object_id": "d1"}},
}
DOCUMENTS = [{"doc_id": "d1", "title": "a sofa", "summary": ""}, {"doc_id": "d2", "title": "a table", "summary": ""}]
JUDGMENTS = [{"query": "sofa", "doc_id": "d1", "grade": 3}]


def _recipe(folder: Path, content: dict) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def _copy(store: Store, folder: Path) -> str:
    return shutil.copytree(store.path, folder / "run").as_posix()


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _input(folder: Path, queries=(LOG,), events=(EVENT,), documents=DOCUMENTS, judgments=JUDGMENTS) -> dict:
    def lines(name: str, rows) -> str:
        path = folder / f"{name}.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    given = {"queries": queries, "events": events, "documents": documents, "judgments": judgments}
    return {
        "root": str(folder / "run"),
        "ingest": {"parts": 2, "max_bad_share": 1.0},
        "data": {name: [lines(name, rows)] for name, rows in given.items()},
    }


BAD = {
    "an unknown key": (
        lambda given: given | {"finetune": {"learning_rate": 1}},
        "no setting 'learning_rate' in finetune; it has",
    ),
    "a missing path": (
        lambda given: given | {"data": given["data"] | {"queries": ["nowhere.ndjson"]}},
        "data.queries: nothing at nowhere.ndjson",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_recipe_is_refused_in_one_line_with_nothing_written(fault, tmp_path, capsys):
    change, message = BAD[fault]
    assert pipeline.main(["--recipe", _recipe(tmp_path, change(_input(tmp_path)))]) == 2
    _refused_with(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


INPUTS = {
    "an empty log": ({"queries": (), "events": ()}, "the log is empty"),
    "events without queries": ({"queries": ()}, "not one valid search in 1 lines; mostly: no result page has this"),
    "a log without a valid line": ({"queries": ("{broken", "[]")}, "not one valid search in 3 lines; mostly: "),
    "documents without a column": (
        {"documents": [{"doc_id": "d1", "title": "a"}]},
        "no column summary; it has doc_id, title",
    ),
    "judgments of unknown documents": (
        {"judgments": [{"query": "sofa", "doc_id": "x", "grade": 1}]},
        "none of the 1 grades",
    ),
}


@pytest.mark.parametrize("fault", INPUTS)
def test_input_that_cannot_be_used_is_refused_in_one_line_and_no_table_is_finished(fault, ray_here, tmp_path, capsys):
    change, message = INPUTS[fault]
    assert pipeline.main(["--recipe", _recipe(tmp_path, _input(tmp_path, **change)), "--until", "ingest"]) == 2
    _refused_with(message, capsys.readouterr().err)
    assert not list(tmp_path.rglob("manifest.json"))


def _refused_with(message: str, error: str) -> None:
    lines = [line for line in error.splitlines() if line.startswith("refused: ")]  # Ray may have said something too
    assert len(lines) == 1
    assert message in lines[0]


def test_queries_without_documents_are_refused_with_nothing_written(ray_here, tmp_path, capsys):
    """The log speaks of documents that the catalogue has not."""
    strange = _input(tmp_path, queries=[LOG | {"query_response_hit_ids": ["x", "y"]}], events=[])
    strange |= {"aggregate": {"test_share": 0.0}, "sample": {"bm25": 0, "random": 0}}
    assert pipeline.main(["--recipe", _recipe(tmp_path, strange), "--until", "sample"]) == 2
    assert "no training query has two documents" in capsys.readouterr().err
    assert not (tmp_path / "run" / "groups").exists()


def test_what_is_bad_in_part_is_counted_and_kept(ray_here, tmp_path):
    given = _input(
        tmp_path,
        queries=(LOG, "{broken", LOG | {"query_id": "q2", "user_query": " "}),
        events=(EVENT, EVENT, EVENT | {"query_id": "gone"}),
        documents=[*DOCUMENTS, {"doc_id": None, "title": "x", "summary": "y"}],
        judgments=[
            *JUDGMENTS,
            {"query": "sofa", "doc_id": "x", "grade": 1},
            {"query": "sofa", "doc_id": "d2", "grade": 99},
        ],
    )
    assert pipeline.main(["--recipe", _recipe(tmp_path, given), "--until", "ingest"]) == 0
    store = Store(given["root"])
    assert store.manifest("searches")["counts"]["duplicate_events"] == 1
    rejects = store.read("rejects").to_pylist()
    assert sorted(row["reason"] for row in rejects) == [
        "grade is no whole number from 0 to 10",
        "no doc_id",
        "no result page has this query_id",
        "no such document",
        "not JSON",
        "user_query is blank",
    ]
    assert all(row["file"] and row["line"] for row in rejects)
    (search,) = store.read("searches").to_pylist()
    assert [hit["clicked"] for hit in search["hits"]] == [True, False]


FLAT = "query\tdoc_id\tclient\ttime\trank\tclicked\n" + "".join(
    f"sofa\td{1 + n % 2}\tc{n // 2}\t{1_790_856_000 + n // 2}\t{1 + n % 2}\t{int(n % 4 == 0)}\n" for n in range(40)
)


def _flat(folder: Path, *names: str, **more) -> dict:
    given = _input(folder)
    (folder / "log.tsv").write_text(FLAT)
    columns = {name: {"position": "rank", "click": "clicked"}[name] for name in names}
    data = {name: given["data"][name] for name in ("documents", "judgments")}
    return given | {"data": data | {"flat": [str(folder / "log.tsv")], "columns": columns}} | more


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("click",), "40 of 40 impressions have no position"),
        (("position",), "the log shows clicked documents alone"),
    ],
)
def test_a_log_that_gives_no_examination_names_the_impossible_models_and_takes_ctr_when_told(
    columns, message, ray_here, tmp_path, capsys
):
    given = _flat(tmp_path, *columns)
    assert pipeline.main(["--recipe", _recipe(tmp_path, given), "--until", "aggregate"]) == 2
    error = capsys.readouterr().err
    assert message in error and "pbm: " in error and "coec: " in error and "ctr is possible" in error
    told = given | {"aggregate": {"click_model": "ctr", "prior_impressions": 1e-9}}
    assert pipeline.main(["--recipe", _recipe(tmp_path, told), "--until", "aggregate"]) == 0
    rows = {row["doc_id"]: row for row in Store(given["root"]).read("evidence").to_pylist()}
    # 20 pages of d1 and d2; d1 was clicked on ten. Of clicks alone, every row is one, and every page a search.
    clicked = {"d1": 10, "d2": 0} if columns == ("click",) else {"d1": 20, "d2": 20}
    assert {doc: (row["impressions"], row["clicks"]) for doc, row in rows.items()} == {
        doc: (20, clicks) for doc, clicks in clicked.items()
    }
    assert rows["d1"]["attractiveness"] == pytest.approx(clicked["d1"] / 20)


def test_queries_of_few_clients_and_bots_are_left_out_and_counted_by_rule(ray_here, tmp_path):
    given = _flat(tmp_path, "position", "click")
    with (tmp_path / "log.tsv").open("a") as log:
        log.write("my own secret\td1\tc1\t1790857000\t1\t1\n")
        log.write("sofa\td1\tc1\t1790877000\t1\t1\n")  # a second search of a client
        for n in range(30):  # clicks all it sees, on pages of five
            log.writelines(f"sofa\tx{k}\tbot\t{1_790_900_000 + 4000 * n}\t{k}\t1\n" for k in range(1, 6))
    given |= {"cleaning": {"min_clients": 2}}
    assert pipeline.main(["--recipe", _recipe(tmp_path, given), "--until", "aggregate"]) == 0
    store = Store(given["root"])
    counts = store.manifest("evidence")["counts"]
    assert counts["cleaning"]["click_through"] == {"clients": 1} and counts["cleaning"]["rate"] == {"clients": 0}
    assert counts["cleaning"]["bots"] == {"searches": 30} and counts["searches_left_out"] == 31
    assert counts["cleaning"]["few_clients"] == {"queries": 1, "searches": 1}
    assert {row["doc_id"] for row in store.read("evidence").to_pylist()} == {"d1", "d2"}
    assert store.manifest("searches")["rows"] == 21 + 1 + 30
    assert [(row["query"], row["searches"]) for row in store.read("queries").to_pylist()] == [("sofa", 21)]


def test_following_a_log_commits_each_file_as_it_arrives_and_ends_when_idle(ray_here, tmp_path, monkeypatch):
    given = _input(tmp_path)
    given["data"] |= {"queries": [f"{tmp_path}/q*.jsonl"], "events": [f"{tmp_path}/e*.jsonl"]}
    seen = []

    def arrive(_: float) -> None:
        """Between two looks, the next file comes."""
        seen.append(store.manifest("searches")["rows"])
        if len(seen) < 3:
            more = LOG | {"query_id": f"more{len(seen)}"}
            (tmp_path / f"q{len(seen)}.jsonl").write_text(json.dumps(more) + "\n")

    store = Store(given["root"])
    monkeypatch.setattr(ingest, "pause", arrive)
    arguments = ["--recipe", _recipe(tmp_path, given), "--follow", "--every-s", "0", "--idle-s", "1"]
    assert ingest.main(arguments) == 0
    assert seen[:3] == [1, 2, 3] and set(seen[3:]) <= {3}


def test_a_forgotten_client_is_gone_and_what_was_learned_of_it_is_named(tiny, tiny_run, tmp_path, capfd):
    root = _copy(tiny_run, tmp_path)
    content, store = tiny | {"root": root}, Store(root)
    path = _recipe(tmp_path, content)
    client = store.read("searches", ["client"])["client"][0].as_py()
    before = store.read("searches").num_rows
    assert forget.main(["--recipe", path, "--client", "nobody"]) == 2
    assert "no line of 1 clients" in capfd.readouterr().err and store.read("searches").num_rows == before
    assert forget.main(["--recipe", path, "--client", client]) == 0
    said = capfd.readouterr().out
    left = store.read("searches")
    assert client not in left["client"].to_pylist() and 0 < before - left.num_rows < 100
    assert not any(client.encode() in Path(file.path).read_bytes() for file in store.files("records"))
    rests = store.manifest("evidence")["rests_on_forgotten"]
    assert rests == sorted(
        ["bundle", "clicked", "decoder", "groups", "labels", "perturbed", "report", "scores", "student", "teacher"]
    )
    assert all(f"forget: {name} was made while" in said for name in rests)
    assert pipeline.main(["--recipe", path, "--until", "sample"]) == 0
    assert "groups" not in store.manifest("groups")["rests_on_forgotten"]


def _break_embedding(folder: Path, start: int) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.get_input_embeddings().weight.data[start:] = torch.nan
    model.save_pretrained(folder)


def _keys(teacher: Teacher, groups: list[dict]) -> set[str]:
    return {key for group in groups for key, _, _ in teacher.keyed(group)}
