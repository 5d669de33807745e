import shutil

import pytest
from builders import TINY_STUDENT, doc, save_decoder
from test_engine import save_student

from disranker import recipe
from disranker.contract import Tokens
from disranker.recipe import Refused
from disranker.store import Store
from jobs import distill
from jobs.score import Teacher

GRADED = [doc("a", title="red", grade=2), doc("b", title="blue", grade=0), doc("c", title="warm")]
CLICKED = [
    doc("a", title="red", attractiveness=0.5, impressions=9),
    doc("b", title="blue", attractiveness=0.1, impressions=9),
    doc("c", title="rain", source="random"),
]
GROUPS = [
    {"query": "red shoe", "split": "train", "band": "head", "docs": GRADED},
    {"query": "rain", "split": "train", "band": "tail", "docs": CLICKED},
    {"query": "shoe", "split": "validation", "band": "head", "docs": GRADED},
    {"query": "blue", "split": "test", "band": "head", "docs": GRADED},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run up to the lists, with a teacher that was not asked yet."""
    root = tmp_path_factory.mktemp("base")
    save_decoder(root / "teacher")
    store = Store(str(root))
    store.write("groups", 0, GROUPS)
    store.commit("groups", {})
    return root


@pytest.fixture
def store(base, tmp_path, monkeypatch):
    """A copy; parts of a table come one after the other instead of on Ray."""
    monkeypatch.setattr(distill.parts, "each", lambda parts, work, _: [work(part) for part in range(parts)])
    return Store(str(shutil.copytree(base, tmp_path / "run")))


def given(store, **settings):
    return recipe.parse({"root": store.uri, "ingest": {"parts": 1}, "distill": settings})


def label(store, count, score=float, **told):
    """Labels for so many of the first pairs of all, 9 of which are not for tests, and their manifest."""
    teacher = Teacher.of(given(store), store)
    keys = [key for group in GROUPS for key, _, _ in teacher.keyed(group)][:count]
    teacher.labels.write(keys, [score(place) for place in range(count)])
    store.commit("labels", {"counts": {"teacher": teacher.name, "scores": teacher.labels.measure()} | told})


def refusal(store, **settings):
    with pytest.raises(Refused) as caught:
        distill.check(given(store, **settings), store)
    return str(caught.value)


def test_labels_for_all_9_pairs_that_are_no_test_are_enough(store):
    label(store, 9)
    distill.check(given(store), store)


def test_1_label_of_9_that_is_missing_is_refused_unless_the_recipe_allows_a_ninth(store):
    label(store, 8)
    assert "1 of 9 pairs (11.1%) have no label" in refusal(store)
    distill.check(given(store, max_missing_share=0.12), store)


def test_a_teacher_that_gives_9_pairs_one_score_is_refused(store):
    label(store, 9, lambda _: 0.1)
    assert "the teacher gives every document the same score, 0.1" in refusal(store)


def test_labels_of_another_teacher_than_the_one_that_is_there_are_refused_by_both_names(store):
    label(store, 9, teacher="0123456789abcdef")
    said = refusal(store)
    assert "0123456789abcdef" in said and Teacher.of(given(store), store).name in said
    assert f"remove {store.at('labels', 'manifest.json')} and run jobs.score" in said


def test_the_stage_is_refused_before_a_student_is_written_or_a_worker_started(store, monkeypatch):
    label(store, 8)
    monkeypatch.setattr(distill, "start", lambda *_: pytest.fail("a student was written"))
    with pytest.raises(Refused, match="1 of 9 pairs"):
        distill.run(given(store), store, None)


def test_hard_labels_need_no_teacher_but_a_training_list_with_2_targets(store):
    for targets in ("grades", "evidence", "grades_then_evidence"):
        distill.check(given(store, targets=targets, loss="ranknet"), store)
    store.write("groups", 0, [group for group in GROUPS if group["split"] != "train" or group["docs"] is CLICKED])
    distill.check(given(store, targets="evidence", loss="margin"), store)
    assert "two documents to compare by targets grades" in refusal(store, targets="grades", loss="ranknet")


def task(store, tmp_path, **settings):
    tokens = Tokens.agree(save_student(tmp_path / "student"), "encoder", TINY_STUDENT)
    found = distill.task(given(store, **settings), store, tokens)
    return found, [sorted(found.batch([place]).targets[0].tolist()) for place in range(len(found.sizes))]


def test_the_student_learns_standardised_scores_0_to_5_of_2_lists_and_is_measured_on_the_graded_one(store, tmp_path):
    label(store, 9)
    found, targets = task(store, tmp_path)
    expected = [(score - 4) / (60 / 9) ** 0.5 for score in range(6)]
    assert targets == [pytest.approx(expected[:3]), pytest.approx(expected[3:])]
    assert found._validation.keys() == {"teacher_pair_accuracy", "pair_accuracy"}
    measured = {name: sorted(group.targets) for name, (group,) in found._validation.items()}
    assert measured["pair_accuracy"] == [0, 2] and len(measured["teacher_pair_accuracy"]) == 3


@pytest.mark.parametrize(
    ("targets", "learned"),
    [
        ("grades", [[0, 2]]),
        ("evidence", [[0, 0.1, 0.5]]),
        ("grades_then_evidence", [[0, 2], [0, 0.1, 0.5]]),
    ],
)
def test_the_very_same_student_learns_hard_labels_as_a_teacher_would(store, tmp_path, targets, learned):
    found, seen = task(store, tmp_path, targets=targets, loss="ranknet")
    assert [pytest.approx(one) for one in learned] == seen
    assert found._validation.keys() == {"pair_accuracy"} == {found.metric}


def test_too_few_impressions_for_fine_tuning_are_too_few_for_the_student(store):
    cfg = distill.hard(recipe.parse({"root": "r", "finetune": {"min_impressions": 10, "loss": "margin"}}))
    assert cfg.min_impressions == 10
    many = given(store, targets="evidence", loss="ranknet").model_copy(update={"finetune": cfg})
    with pytest.raises(Refused, match="targets evidence"):
        distill.check(many, store)
