"""`jobs.publish` needs no Ray: a store with what it reads is enough."""

import json
from types import SimpleNamespace

import pytest
from test_engine import WORDS, save_student

from disranker import bundle, metrics, recipe, report
from disranker.contract import Tokens
from disranker.engine import Engine
from disranker.recipe import Evaluate
from disranker.store import Store
from jobs import publish
from jobs.launch import Failed

LENIENT = {
    "max_rounding_loss": 1.0,
    "min_rounding_tau": 0.0,
    "timed_lists": 2,
    "timing_rounds": 1,
    "calibration_lists": 4,
}


def group(place, split):
    """A list of four documents; grades by place."""
    words = WORDS[place % 7 :] + WORDS
    docs = [
        {"doc_id": f"d{n}", "title": " ".join(words[n : n + 3]), "summary": " ".join(words[n + 3 : n + 9]), "grade": n}
        for n in range(4)
    ]
    return {"query": f"{words[1]} {place}", "split": split, "docs": docs}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """What evaluate leaves, of a random student that is its own teacher."""
    root = tmp_path_factory.mktemp("run")
    store, student = Store(str(root)), root / "student"
    student.mkdir()
    save_student(student, num_hidden_layers=1)
    rows = [group(place, ("test", "train", "train")[place % 3]) for place in range(12)]
    store.write("groups", 0, rows)
    tested = [row for row in rows if row["split"] == "test"]
    qrels = metrics.judged(tested)
    run = publish.speed.run(Engine(student), tested)
    worst = {query: {doc: -float(grade) for doc, grade in of.items()} for query, of in qrels.items()}
    found = report.evaluate(qrels, {"bm25": worst, "teacher": run, "student": run}, Evaluate(resamples=50), 1)
    store.put_text(json.dumps(found), "report", "report.json")
    store.put_text("<p>", "report", "report.html")
    _commit(store)
    return store


def _commit(store):
    """Manifests as the stages leave them."""
    plain = {"fingerprint": "f", "reads": {}, "inputs": [["/logs/q", 3, 1]], "finished": "now", "settings": {}}
    settings = recipe.parse({"root": "r"}).model_dump()
    counts = {"train": 8, "validation": 0, "test": 4, "pairs": 48, "steps": 3}
    for name in ("searches", "documents", "teacher", "labels", "student", "report", "groups"):
        reads = {} if name == "searches" else {"searches": "f"}
        manifest = plain | {"reads": reads, "settings": settings, "counts": counts, "versions": {"torch": "2"}}
        store.commit(name, manifest | {"rows": 3})


def run(store, **cfg):
    step = SimpleNamespace(reads=dict.fromkeys(("groups", "student", "report"), "f"), fingerprint="f", inputs=[])
    settings = {"min_share_of_teacher": 1.0, "beat_bm25": False} | LENIENT | cfg
    return publish.run(recipe.parse({"root": store.uri, "publish": settings}), store, step)


def gate(store):
    return store.read_json("report", "gate.json")


def test_a_student_that_passes_becomes_a_bundle_with_its_engines_and_its_lineage(store, capsys):
    counts = run(store)
    folder = store.folder(publish.BUNDLE)
    manifest = bundle.verify(folder)
    assert list(manifest["engines"]) == list(publish.speed.present(True, True)) == list(counts["engines"])
    assert manifest["engine"] == counts["engine"] == publish.speed.choose(manifest["engines"])
    assert manifest["gate"] == gate(store) and manifest["gate"]["passed"]
    assert set(manifest["lineage"]) == {"bundle", "groups", "student", "report", "searches"}
    assert manifest["files"].keys() >= set(bundle.ENGINE_FILES) | set(bundle.REPORT_FILES)
    assert all(max(of["threads"]) > 0 and of["ndcg@10"] > 0 for of in manifest["engines"].values())
    # The share of the teacher, two of parity, two of each engine of rounded numbers.
    assert capsys.readouterr().out.count("passed") == 3 + 2 * (len(manifest["engines"]) - 3)
    scores = Engine.from_bundle(folder, engine="torch").scores(["red"], ["shoe"], ["rain"])
    assert scores == Engine(store.folder("student")).scores(["red"], ["shoe"], ["rain"])
    store.clear("bundle")


def test_a_student_that_fails_leaves_gate_json_with_the_bar_and_no_bundle(store, capsys):
    with pytest.raises(Failed, match=r"publish.max_difference allows 1.00e-30.*publish.max_difference allows"):
        run(store, max_difference=1e-30)
    assert store.files("bundle") == []
    assert [bar["name"] for bar in gate(store)["bars"] if not bar["passed"]] == [
        "max_difference, onnx",
        "max_difference, openvino",
    ]
    assert capsys.readouterr().out.count("FAILED") == 2


def test_a_poor_student_is_not_released_and_is_told_by_how_much(store):
    found = store.read_json("report", "report.json")
    poor = found | {"runs": found["runs"] | {"student": found["runs"]["bm25"]}}
    beaten = [pair | {"difference": -0.1, "low": -0.2, "high": 0.0} for pair in found["pairs"]]
    store.put_text(json.dumps(poor | {"pairs": beaten}), "report", "report.json")
    try:
        with pytest.raises(Failed, match=r"publish\.min_share_of_teacher asks for 95\.00%.*not shown to beat BM25"):
            run(store, min_share_of_teacher=0.95, beat_bm25=True)
    finally:
        store.put_text(json.dumps(found), "report", "report.json")
    assert store.files("bundle") == []
    failed = {bar["name"]: bar for bar in gate(store)["bars"] if not bar["passed"]}
    assert failed.keys() == {"min_share_of_teacher", "beat_bm25"}
    assert failed["min_share_of_teacher"]["value"] == found["runs"]["bm25"]["ndcg@10"]["value"]


def test_without_rounded_numbers_there_are_3_engines(store):
    run(store, int8=False, bf16=False)
    manifest = bundle.verify(store.folder(publish.BUNDLE))
    assert list(manifest["engines"]) == ["torch", "onnx", "openvino"]
    assert not [name for name in manifest["files"] if "int8" in name]
    store.clear("bundle")


def test_the_bundle_in_service_scores_the_same_4_lists(store, tmp_path):
    bundle.write(tmp_path / "same", store.folder("student"), name="old", report={})
    run(store, in_service=str(tmp_path / "same"))
    (bar,) = [bar for bar in gate(store)["bars"] if bar["name"] == "max_loss"]
    assert (bar["value"], bar["bound"], bar["passed"]) == (0.0, -0.01, True) and "on 4 queries" in bar["why"]
    store.clear("bundle")


def test_8_bits_are_calibrated_with_4_lists_of_the_training_split_alone(store, monkeypatch):
    seen = {}
    monkeypatch.setattr(publish.conversion, "export", lambda _student, _target, prompts: seen.update(prompts=prompts))
    settings = recipe.parse({"root": store.uri, "ingest": {"parts": 3}, "publish": LENIENT})
    publish._assemble(str(store.path) + "/scratch", settings, store)
    tokens = Tokens.load(store.folder("student"))
    trained = [group(place, "train") for place in (1, 2, 4, 5)]
    assert seen["prompts"] == [prompt for of in trained for prompt in tokens.listed(of["query"], of["docs"])]
