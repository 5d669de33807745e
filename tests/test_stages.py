import os

import pytest

from disranker import recipe, stages
from disranker.recipe import Refused
from disranker.store import Store


def steps(**changed):
    return {step.stage.name: step for step in stages.steps(recipe.parse({"root": "r"} | changed))}


def different(**changed):
    """Stages whose fingerprint a change of the recipe changes."""
    before, after = steps(), steps(**changed)
    return [name for name in after if name not in before or before[name].fingerprint != after[name].fingerprint]


@pytest.fixture
def at(tmp_path):
    return Store(str(tmp_path))


def commit(step, at, **changed):
    """Manifests as a job writes them."""
    manifest = {"fingerprint": step.fingerprint, "reads": step.reads, "settings": step.settings, "inputs": step.inputs}
    for artefact in step.stage.writes:
        at.commit(artefact, manifest | changed)


@pytest.fixture
def real(tmp_path):
    """Settings of a run on files of one's own."""
    for name in ("q", "e", "d", "j"):
        (tmp_path / f"{name}.jsonl").write_text("{}")
    names = zip(("queries", "events", "documents", "judgments"), "qedj", strict=True)
    return {"data": {what: [str(tmp_path / f"{name}.jsonl")] for what, name in names}}


def test_10_stages_with_10_fingerprints_that_stay_the_same():
    found = steps()
    assert tuple(found) == stages.NAMES and len({step.fingerprint for step in found.values()}) == 10
    assert different() == [] and different(root="elsewhere") == []


@pytest.mark.parametrize(
    ("changed", "first"),
    [
        ({"world": {"documents": 100}}, "generate"),
        ({"ingest": {"parts": 2}}, "ingest"),
        ({"aggregate": {"em_rounds": 3}}, "aggregate"),
        ({"sample": {"random": 1}}, "sample"),
        ({"pretrain": {"epochs": 3}}, "pretrain"),
        ({"teacher": {"layers": 9}}, "pretrain"),
        ({"finetune": {"workers": 3}}, "finetune"),
        ({"score": {"dtype": "bfloat16"}}, "score"),
        ({"distill": {"beta": 0.5}}, "distill"),
        ({"student": {"layers": 9}}, "distill"),
        ({"evaluate": {"resamples": 100}}, "evaluate"),
        ({"publish": {"beat_bm25": False}}, "publish"),
        ({"seed": 2}, "generate"),
    ],
)
def test_a_changed_setting_changes_its_stage_and_all_that_follow(changed, first):
    assert different(**changed) == list(stages.NAMES[stages.NAMES.index(first) :])


@pytest.mark.parametrize(
    "changed",
    [
        {"pretrain": {"cpus_per_worker": 7}},
        {"finetune": {"gpus_per_worker": 1}},
        {"distill": {"checkpoint_every_steps": 7, "max_missing_share": 0.5}},
        {"score": {"actors": 3, "cpus_per_actor": 2, "gpus_per_actor": 1, "kv_cache_gib": 4}},
        {"serve": {"port": 80}},
    ],
)
def test_how_a_stage_is_done_changes_nothing(changed):
    assert different(**changed) == []


def test_each_stage_reads_what_an_earlier_one_wrote():
    written = {}
    for step in steps().values():
        assert step.reads == {name: written[name] for name in step.stage.reads}
        written |= dict.fromkeys(step.stage.writes, step.fingerprint)


def test_candidates_come_from_documents_judgments_evidence_and_queries():
    found = steps()
    assert set(found["sample"].reads) == {"documents", "judgments", "evidence", "queries"}
    assert set(found["evaluate"].reads) == {"documents", "evidence", "groups", "labels", "student"}
    assert set(found["publish"].reads) == {"groups", "student", "report"}


def test_another_format_of_the_tables_does_every_stage_again(monkeypatch):
    before = steps()
    monkeypatch.setattr(stages, "FORMAT", stages.FORMAT + 1)
    assert not {step.fingerprint for step in steps().values()} & {step.fingerprint for step in before.values()}


def test_a_student_under_a_hub_name_has_no_files_here_nor_has_scratch(tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert not any(step.inputs for step in steps(student={"base": "someone/some-bert"}).values())


def test_a_student_in_a_folder_counts_for_distill_alone(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert [name for name, step in steps(student={"base": str(tmp_path)}).items() if step.inputs] == ["distill"]


def test_an_input_file_of_the_same_size_but_another_time_is_another_file(real, tmp_path):
    before = steps(**real)["ingest"].fingerprint
    os.utime(tmp_path / "q.jsonl", (1, 1))
    assert steps(**real)["ingest"].fingerprint != before


def test_another_bundle_in_service_counts_for_publish_alone(tmp_path):
    served = {"in_service": str(tmp_path)}
    with pytest.raises(Refused, match=r"publish\.in_service: nothing at .*bundle\.json"):
        steps(publish=served)
    (tmp_path / "bundle.json").write_text("{}")
    before = steps(publish=served)
    assert [name for name, step in before.items() if step.inputs] == ["publish"]
    os.utime(tmp_path / "bundle.json", (1, 1))
    after = steps(publish=served)
    assert [name for name in after if after[name].fingerprint != before[name].fingerprint] == ["publish"]


def test_a_bundle_in_service_must_not_lie_where_publish_clears(tmp_path):
    own = tmp_path / "bundle" / "student"
    own.mkdir(parents=True)
    (own / "bundle.json").write_text("{}")
    with pytest.raises(Refused, match="publish writes, and clears first"):
        steps(root=str(tmp_path), publish={"in_service": str(own)})
    assert steps(root=str(tmp_path / "other"), publish={"in_service": str(own)})


def test_own_data_are_not_generated(real):
    found = steps(**real)
    assert "generate" not in found and len(found) == 9 and found["ingest"].reads == {}
    assert sorted(path[-7:] for path, _, _ in found["ingest"].inputs) == ["d.jsonl", "e.jsonl", "j.jsonl", "q.jsonl"]
    assert [size for _, size, _ in found["ingest"].inputs] == [2] * 4


def test_a_changed_input_file_changes_every_stage_and_one_more_file_too(real, tmp_path):
    before = steps(**real)
    (tmp_path / "q.jsonl").write_text("{}\n")
    after = steps(**real)
    assert all(before[name].fingerprint != after[name].fingerprint for name in before)
    real["data"]["queries"] = [str(tmp_path / "*.jsonl")]
    assert len(steps(**real)["ingest"].inputs) == 7


def test_input_that_is_not_there_is_refused_before_anything_runs(real):
    real["data"]["events"] = ["/none/e.jsonl"]
    with pytest.raises(Refused, match=r"data\.events: nothing at /none/e\.jsonl"):
        steps(**real)


def test_general_text_is_read_by_pretrain_alone_and_its_files_count(tmp_path):
    for name in ("a.txt", "b.txt", "c.json"):
        (tmp_path / name).write_text("rain\n")
    cfg = {"pretrain": {"general": [str(tmp_path / "*.txt")]}}
    found = steps(**cfg)
    assert [name for name, step in found.items() if step.inputs] == ["pretrain"]
    assert [path[-5:] for path, _, _ in found["pretrain"].inputs] == ["a.txt", "b.txt"]
    (tmp_path / "b.txt").write_text("rain again\n")
    assert steps(**cfg)["pretrain"].fingerprint != found["pretrain"].fingerprint


def test_general_text_that_is_not_there_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(Refused, match=r"^pretrain\.general: nothing at .*none\.txt; give a file"):
        steps(pretrain={"general": [str(tmp_path / "none.txt")]})


def test_an_encoder_as_teacher_is_not_pretrained_and_its_files_count(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForSequenceClassification"]}')
    found = steps(teacher={"base": str(tmp_path)})
    assert "pretrain" not in found and set(found["finetune"].reads) == {"groups"}
    assert found["finetune"].inputs[0][:2] == [str(tmp_path / "config.json"), 74]
    longer = steps(teacher={"base": str(tmp_path), "max_tokens": 65})
    assert longer["finetune"].fingerprint != found["finetune"].fingerprint
    (tmp_path / "model.safetensors").write_text("x")
    assert steps(teacher={"base": str(tmp_path)})["finetune"].fingerprint != found["finetune"].fingerprint


def test_a_decoder_in_a_folder_is_pretrained_and_a_student_in_a_folder_counts(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    found = steps(teacher={"base": str(tmp_path)}, student={"base": str(tmp_path)})
    assert [name for name, step in found.items() if step.inputs] == ["pretrain", "finetune", "distill"]


def test_a_teacher_that_is_nowhere_is_refused(tmp_path):
    with pytest.raises(Refused, match=r"teacher\.base .*none: no model there"):
        steps(teacher={"base": str(tmp_path / "none")})


# why


def test_a_stage_has_to_run_until_all_it_writes_is_there(at):
    step = steps()["aggregate"]
    assert stages.why(step, at) == "not done yet"
    commit(step, at)
    assert stages.why(step, at) is None
    at.unfinish("queries")
    assert stages.why(step, at) == "not done yet"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"distill": {"beta": 0.5}}, "distill.beta 1.0 -> 0.5"),
        (
            {"distill": {"beta": 0.5}, "student": {"take": "last"}},
            "student.take first -> last, distill.beta 1.0 -> 0.5",
        ),
        ({"score": {"dtype": "bfloat16"}}, "labels made anew"),
        ({"seed": 2}, "documents made anew, groups made anew, labels made anew"),
    ],
)
def test_why_names_what_changed(at, changed, reason):
    commit(steps()["distill"], at)
    assert stages.why(steps(**changed)["distill"], at) == reason


def test_why_names_a_seed_for_a_stage_that_reads_nothing_and_input_files(at, real, tmp_path):
    commit(steps()["generate"], at)
    assert stages.why(steps(seed=2)["generate"], at) == "seed or version changed"
    commit(steps(**real)["ingest"], at)
    (tmp_path / "q.jsonl").write_text("{}\n")
    assert stages.why(steps(**real)["ingest"], at) == "input files changed"


# select and check_reads


@pytest.mark.parametrize(
    ("first", "last", "names"),
    [
        (None, None, stages.NAMES),
        ("score", None, ("score", "distill", "evaluate", "publish")),
        (None, "ingest", ("generate", "ingest")),
        ("score", "distill", ("score", "distill")),
        ("score", "score", ("score",)),
    ],
)
def test_stages_from_one_to_another(first, last, names):
    assert tuple(step.stage.name for step in stages.select(list(steps().values()), first, last)) == names


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        ("scoring", None, "no stage 'scoring' in this recipe; it has generate, ingest"),
        (None, "serve", "no stage 'serve' in this recipe"),
        ("distill", "score", "stage distill comes after score"),
    ],
)
def test_a_wrong_choice_of_stages_is_refused(first, last, message):
    with pytest.raises(Refused, match=message):
        stages.select(list(steps().values()), first, last)


def test_a_stage_that_this_recipe_has_not_is_refused_by_name(real):
    with pytest.raises(Refused, match="no stage 'generate' in this recipe; it has ingest"):
        stages.select(list(steps(**real).values()), "generate", None)


def test_reads_must_be_there_and_made_with_these_settings(at):
    found = steps()
    with pytest.raises(
        Refused, match=r"score: teacher is not there in .*; run jobs\.finetune first, or jobs\.pipeline"
    ):
        stages.check_reads(found["score"], at)
    commit(found["finetune"], at)
    commit(found["sample"], at, fingerprint="old")
    with pytest.raises(
        Refused, match=r"score: groups was made with other settings or inputs in .*run jobs\.sample first"
    ):
        stages.check_reads(found["score"], at)
    commit(found["sample"], at)
    stages.check_reads(found["score"], at)
    stages.check_reads(found["generate"], at)


def test_queries_beside_the_judgments_and_topics_are_inputs_too(real, tmp_path):
    (tmp_path / "queries.jsonl").write_text("")
    (tmp_path / "t.tsv").write_text("1\ta\n")
    real["data"]["topics"] = [str(tmp_path / "t.tsv")]
    found = [path.rsplit("/", 1)[1] for path, _, _ in steps(**real)["ingest"].inputs]
    assert sorted(found) == ["d.jsonl", "e.jsonl", "j.jsonl", "q.jsonl", "queries.jsonl", "t.tsv"]
