from disranker import card
from disranker.contract import Contract
from disranker.lineage import Node

CONTRACT = Contract(
    form="encoder",
    tokenizer="t",
    pad=0,
    open=1,
    close=2,
    max_query_tokens=16,
    max_title_tokens=24,
    max_tokens=64,
    pooling=None,
)
MANIFESTS = {
    "searches": {"rows": 12_000},
    "documents": {"rows": 3000},
    "groups": {"counts": {"train": 900, "validation": 100, "test": 200}},
    "teacher": {
        "settings": {"teacher": {"base": "scratch"}, "finetune": {"loss": "ranknet"}},
        "counts": {"steps": 1500},
    },
    "labels": {"counts": {"pairs": 25_000}},
    "student": {
        "settings": {
            "student": {"base": "scratch", "layers": 2},
            "distill": {"loss": "hybrid", "targets": "teacher", "alpha": 1.0, "beta": 0.5, "pairs": "all", "lr": 1e-3},
        },
        "counts": {"steps": 2000},
        "versions": {"torch": "2.13.0"},
    },
}


def text(report=None, chain=None):
    return card.text("shoes", CONTRACT, report or {}, {}, "torch", {}, chain or {})


def test_the_facts_of_a_student_come_from_6_manifests():
    assert card.facts(MANIFESTS, made_up=False) == {
        "data": "click logs",
        "searches": "12,000",
        "documents": "3,000",
        "lists": "900 train, 100 validation, 200 test",
        "teacher": "scratch, 1,500 steps of ranknet",
        "labels": "25,000 pairs",
        "student": "scratch, 2 layers, 2,000 steps",
        "loss": "hybrid, alpha 1, beta 0.5, all pairs",
        "versions": "torch 2.13.0",
    }


def test_a_student_of_hard_labels_is_said_to_be_one():
    hard = {"loss": "margin", "targets": "grades"}
    student = MANIFESTS["student"] | {"settings": MANIFESTS["student"]["settings"] | {"distill": hard}}
    assert card.facts(MANIFESTS | {"student": student}, made_up=False)["loss"] == "margin on grades"


def test_a_made_up_world_is_said_to_be_one():
    assert "nothing here is a result on real users" in card.facts(MANIFESTS, made_up=True)["data"]


def test_a_card_without_anything_says_so_4_times():
    said = text()
    assert all(words in said for words in ("Not evaluated.", "Not measured."))
    assert said.count("Not stated.") == 2


def test_a_metric_without_a_value_is_an_empty_cell():
    report = {"queries": 3, "runs": {"student": {"pnr": {"value": None, "low": None, "high": None}}}}
    assert "| student |  |" in text(report)


def test_queries_that_a_run_left_out_are_limits():
    said = text({"missing": {"teacher": 1200, "student": 0}})
    assert "- teacher has no ranking for 1,200 test queries" in said and "- student" not in said


def test_people_forgotten_since_are_told():
    node = {"manifest": None, "finished": "now", "counts": {}, "reads": {}, "files": []}
    chain = {"bundle": Node(**node, fingerprint="1", rests_on_forgotten=["labels", "groups"])}
    assert "Made before somebody asked to be forgotten, from: groups, labels." in text(chain=chain)
    chain = {"bundle": Node(**node, fingerprint="1", rests_on_forgotten=[])}
    assert "forgotten" not in text(chain=chain)
