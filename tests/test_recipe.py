import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from disranker import recipe
from disranker.recipe import Refused

RECIPES = Path(__file__).parents[1] / "recipes"


def refusal(content):
    with pytest.raises(Refused) as caught:
        recipe.parse({"root": "r"} | content)
    return str(caught.value)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("root: runs/1\nseed: 7\nteacher:\n  vocabulary: 640\n")
    return path


def test_a_recipe_of_one_line_has_every_default():
    found = recipe.parse({"root": "r"})
    assert (found.seed, found.made_up, found.distill.alpha, found.teacher.base) == (1, True, 1.0, "scratch")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"sed": 1}, ("'sed' in the recipe", "root, seed, world")),
        (
            {"distill": {"learning_rate": 1.0}},
            ("'learning_rate' in distill", "epochs, lr, warmup_share", "alpha, beta"),
        ),
        ({"student": {"take_layers": "first"}}, ("'take_layers' in student", "max_tokens, take")),
    ],
)
def test_an_unknown_key_is_refused_with_the_ones_there_are(content, named):
    assert all(part in refusal(content) for part in named)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"seed": "1"}, "seed: Input should be a valid integer, not '1'"),
        ({"seed": 1.0}, "seed: Input should be a valid integer, not 1.0"),
        ({"teacher": {"layers": 0}}, "teacher.layers: Input should be greater than 0, not 0"),
        ({"publish": {"beat_bm25": "yes"}}, "publish.beat_bm25: Input should be a valid boolean, not 'yes'"),
        (
            {"finetune": {"loss": "hinge"}},
            "finetune.loss: Input should be 'margin', 'ranknet', 'listwise' or 'pointwise'",
        ),
        ({"data": {"queries": "q.json"}}, "data.queries: Input should be a valid list, not 'q.json'"),
        ({"aggregate": {"head_share": 1.5}}, "aggregate.head_share: Input should be less than or equal to 1, not 1.5"),
        ({"distill": {"warmup_share": 1.0}}, "distill.warmup_share: Input should be less than 1, not 1.0"),
        ({"serve": {"port": 65536}}, "serve.port: Input should be less than or equal to 65535"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(content, message):
    assert message in refusal(content)


def test_two_faults_are_told_at_once():
    assert refusal({"seed": "x", "world": {"documents": 0}}).count("; ") == 1


def test_a_recipe_without_root_is_refused():
    with pytest.raises(Refused, match="root: Field required"):
        recipe.parse({})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": {"queries": ["q"], "events": ["e"]}}, "data: documents and a log belong together"),
        ({"data": {"flat": ["f"]}}, "data: documents and a log belong together"),
        ({"data": {"columns": {"encoding": "klingon"}}}, "no encoding 'klingon' is known"),
        ({"ingest": {"period_days": 1, "late_s": 86401}}, "late_s and page_gap_s must be within one period"),
        ({"data": {"judgments": ["j"]}}, "data: documents and a log belong together"),
        ({"data": {"topics": ["t"]}}, "data: topics are the queries of judgments: give judgments too"),
        ({"teacher": {"heads": 3, "width": 128}}, "teacher: heads 3 does not divide width 128"),
        ({"student": {"heads": 5, "width": 128}}, "student: heads 5 does not divide width 128"),
        ({"teacher": {"max_tokens": 43}}, "teacher: max_tokens must leave room"),
        ({"teacher": {"heads": 4, "width": 64}}, "teacher: width 64 over heads 4 is 16 a head"),
        ({"distill": {"alpha": 0, "beta": 0}}, "distill: alpha and beta are both 0"),
        ({"distill": {"targets": "grades"}}, "loss hybrid learns scores; targets grades go with ranknet or margin"),
        ({"distill": {"targets": "evidence", "loss": "kl"}}, "loss kl learns scores; targets evidence go with"),
        ({"distill": {"pairs": "gaps", "beta": 0}}, "pairs gaps is a choice for Margin-MSE, which needs loss hybrid"),
        ({"distill": {"pairs": "neighbours", "loss": "kl"}}, "pairs neighbours is a choice for Margin-MSE"),
        ({"distill": {"temperature": 2}}, "temperature 2 is for loss kl, not hybrid"),
        ({"distill": {"margin": 0.2}}, "margin 0.2 is for loss margin, not hybrid"),
        ({"distill": {"pair_share": 0.2}}, "pair_share 0.2 is for pairs gaps or sampled, not all"),
        ({"student": {"base": "a/bert", "heads": 4}}, "heads are those of base; with take: none"),
        ({"distill": {"pair_share": 0}}, "distill.pair_share: Input should be greater than 0, not 0"),
        ({"aggregate": {"validation_share": 0.5, "test_share": 0.5}}, "leave no query to train on"),
        ({"aggregate": {"head_share": 0.6, "torso_share": 0.5}}, "head_share and torso_share exceed 1"),
        (
            {"finetune": {"loss": "pointwise"}},
            "finetune: loss pointwise learns the targets' values, and labels grades_then_evidence are grades in some "
            "lists and clicks from 0 to 1 in others; set labels: grades or labels: evidence",
        ),
        ({"finetune": {"loss": "margin", "margin_by_gap": True}}, "finetune: margin_by_gap learns the targets' values"),
        ({"sample": {"judged": 1, "shown": 0, "bm25": 0, "random": 0}}, "fewer than the 2 documents"),
        ({"score": {"actors": 3, "max_actors": 2}}, "max_actors 2 is less than actors 3"),
        (
            {"score": {"tensor_parallel": 2}},
            "tensor_parallel shares an engine among GPUs: with it, gpus_per_actor is 1",
        ),
        (
            {"finetune": {"tokens_per_batch": 383}},
            "finetune: tokens_per_batch 383 cannot hold one list of 6 documents",
        ),
        ({"distill": {"tokens_per_batch": 383}}, "of 64 tokens; 384 or more can"),
        ({"pretrain": {"tokens_per_batch": 63}}, "pretrain: tokens_per_batch 63 cannot hold one text of 64 tokens"),
        ({"student": {"max_tokens": 400}}, "6 documents of 400 tokens; 2400 or more"),
        ({"teacher": {"max_tokens": 400}}, "6 documents of 400 tokens; 2400 or more"),
        (
            {"finetune": {"documents_per_list": 99, "tokens_per_batch": 1919}},
            "cannot hold one list of 30 documents",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(content, message):
    assert message in refusal(content)


@pytest.mark.parametrize(
    "content",
    [
        {"data": {"queries": ["q"], "events": ["e"], "documents": ["d"]}},
        {"data": {"queries": ["q"], "events": ["e"], "documents": ["d"], "judgments": ["j"]}},
        {"teacher": {"max_tokens": 44}},
        {"teacher": {"heads": 2, "width": 64}},
        {"teacher": {"heads": 4, "width": 64, "base": "a/decoder"}},
        {"distill": {"alpha": 0}},
        {"distill": {"alpha": 0, "beta": 0, "loss": "ranknet"}},
        {"distill": {"targets": "grades", "loss": "ranknet"}},
        {"distill": {"targets": "grades_then_evidence", "loss": "margin"}},
        {"distill": {"alpha": 0, "pairs": "sampled", "pair_share": 1.0, "lexical": 0.1}},
        {"distill": {"loss": "kl", "temperature": 0.1}},
        {"aggregate": {"validation_share": 0.4, "test_share": 0.5}},
        {"aggregate": {"head_share": 0.5, "torso_share": 0.5}},
        {"sample": {"judged": 1, "shown": 1, "bm25": 0, "random": 0}},
        {"finetune": {"loss": "pointwise", "labels": "evidence"}},
        {"finetune": {"loss": "margin", "margin_by_gap": True, "labels": "grades"}},
        {"finetune": {"tokens_per_batch": 384}, "distill": {"tokens_per_batch": 384}},
    ],
)
def test_settings_on_the_very_limit_are_taken(content):
    assert recipe.parse({"root": "r"} | content).made_up is ("data" not in content)


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("distill.lr=1e-3", "distill", "lr", 0.001),
        ("distill.lr=2", "distill", "lr", 2.0),
        ("teacher.vocabulary=320", "teacher", "vocabulary", 320),
        ("student.take=last", "student", "take", "last"),
        ("aggregate.em_rounds=5", "aggregate", "em_rounds", 5),
        (" teacher.base =s3://a/b=c", "teacher", "base", "s3://a/b=c"),
        ("publish.beat_bm25=false", "publish", "beat_bm25", False),
    ],
)
def test_an_override_sets_one_value_and_leaves_the_others(file, override, section, key, value):
    found = recipe.load(file, [override])
    assert getattr(getattr(found, section), key) == value
    assert (found.root, found.seed) == ("runs/1", 7)
    assert found.teacher.vocabulary == (320 if "vocabulary" in override else 640)


@pytest.mark.parametrize(("text", "value"), [("1e-3", 0.001), ("2.5E-4", 0.00025), ("1", 1.0), ("1.0e-3", 0.001)])
def test_a_number_in_the_file_is_read_as_people_write_it(tmp_path, text, value):
    (tmp_path / "r.yaml").write_text(f"root: r\nfinetune: {{lr: {text}}}\n")
    assert recipe.load(tmp_path / "r.yaml").finetune.lr == value


def test_an_override_fills_a_section_that_stands_empty(tmp_path):
    (tmp_path / "r.yaml").write_text("root: r\naggregate:\n")
    assert recipe.load(tmp_path / "r.yaml", ["aggregate.em_rounds=5"]).aggregate.em_rounds == 5


def test_a_list_is_given_in_brackets_and_a_later_override_wins(file):
    data = ["data.queries=[a, b]", "data.events=[c]", "data.documents=[d]"]
    found = recipe.load(file, [*data, "seed=1", "seed=2"])
    assert (found.data.queries, found.seed) == (["a", "b"], 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.lr", "--set distill.lr: write it as section.key=value"),
        ("root.x=1", "--set root.x=1: root is one value, not a section"),
        ("data.queries=[a,", "--set data.queries=[a,: the value is not YAML"),
        ("distill.lr=fast", "distill.lr: Input should be a valid number, not 'fast'"),
        ("distill.lr=", "distill.lr: Input should be a valid number, not None"),
        ("=5", "no setting '' in the recipe"),
        ("teacher.wdith=5", "no setting 'wdith' in teacher"),
    ],
)
def test_a_bad_override_is_refused_in_one_line(file, override, message):
    with pytest.raises(Refused, match=re.escape(message)) as caught:
        recipe.load(file, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1\nb: }", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"- 1\n- 2", "holds list, not settings by name"),
        (b"", "root: Field required"),
        (b"1: 2\nroot: r", "1: Keys should be strings"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(Refused, match=re.escape(message)) as caught:
        recipe.load(tmp_path / "r.yaml")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused_by_its_path(tmp_path):
    with pytest.raises(Refused, match=r"recipe .*none\.yaml: No such file"):
        recipe.load(tmp_path / "none.yaml")


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        recipe.parse({"root": "r"}).seed = 2


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_that_comes_with_the_code_is_taken_as_it_is_written(path):
    assert recipe.load(path).model_dump(exclude_unset=True) == yaml.load(path.read_text(), recipe._Loader)


@pytest.mark.parametrize(
    ("name", "base", "gpus", "tokens_a_step"),
    [
        ("decoder-0.6b.yaml", "Qwen/Qwen3-0.6B", 1, (32_768, 16_384)),
        ("decoder-7b.yaml", "Qwen/Qwen2.5-7B-Instruct", 8, (65_536, 131_072)),
    ],
)
def test_a_recipe_for_gpus_takes_as_many_as_the_page_on_memory_counts_with(name, base, gpus, tokens_a_step):
    found = recipe.load(RECIPES / name)
    stages = (found.pretrain, found.finetune)
    assert found.teacher.base == base
    assert [stage.workers * stage.gpus_per_worker for stage in stages] == [gpus, gpus]
    assert (found.score.actors, found.score.gpus_per_actor, found.score.dtype) == (gpus, 1, "bfloat16")
    assert tuple(stage.workers * stage.accumulate * stage.tokens_per_batch for stage in stages) == tokens_a_step
    assert all(stage.precision == "bfloat16" and stage.recompute for stage in stages)
    assert (found.teacher.max_tokens, found.student.max_tokens, found.student.layers) == (256, 256, 6)


@pytest.mark.parametrize(("sharding", "workers"), [("ddp", 1), ("ddp", 2), ("fsdp", 8)])
def test_adapters_go_with_either_way_of_spreading_a_7b_model(sharding, workers):
    changes = {"sharding": sharding, "workers": workers, "lora_rank": 16, "lr": 1e-4}
    overrides = [f"{stage}.{key}={value}" for stage in ("pretrain", "finetune") for key, value in changes.items()]
    found = recipe.load(RECIPES / "decoder-7b.yaml", overrides)
    assert (found.pretrain.lora_rank, found.finetune.lora_rank) == (16, 16)
    assert (found.finetune.sharding, found.finetune.workers, found.finetune.lr) == (sharding, workers, 1e-4)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@settings(deadline=None)
@given(values)
def test_a_digest_is_16_characters_and_does_not_depend_on_the_order_of_keys(value):
    turned = dict(reversed(value.items())) if isinstance(value, dict) else value
    assert re.fullmatch("[0-9a-f]{16}", recipe.digest(value)) and recipe.digest(turned) == recipe.digest(value)
    assert recipe.digest([value]) != recipe.digest(value)


def test_a_digest_is_the_same_in_another_process():
    value = {"b": [1, 2.5, None], "a": "é"}
    code = f"import json; from disranker import recipe; print(recipe.digest(json.loads({json.dumps(value)!r})))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == recipe.digest(value)


@settings(deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_override_is_taken_or_refused_and_raises_nothing_else(override):
    content = {"root": "r"}
    try:
        recipe._set(content, override)
        recipe.parse(content)
    except Refused as refused:
        assert str(refused)
