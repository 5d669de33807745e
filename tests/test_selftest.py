import json
import shutil

import pytest
from test_engine import some_pairs

from disranker import bundle, selftest, speed
from disranker.engine import Engine
from disranker.recipe import Refused


def groups(lists=6, documents=10):
    queries, titles, summaries = some_pairs(lists * documents)
    rows = [
        {"doc_id": f"d{n}", "title": title, "summary": summary}
        for n, (title, summary) in enumerate(zip(titles, summaries, strict=True))
    ]
    return [
        {"query": queries[n] or f"red {n}", "docs": rows[n * documents : (n + 1) * documents]} for n in range(lists)
    ]


@pytest.fixture
def folder(released, tmp_path):
    """The files of a bundle with a self-test of its lists."""
    folder = tmp_path / "student"
    shutil.copytree(released, folder)
    test = selftest.made(groups(), speed.runs(str(folder), ["torch"], groups()))
    (folder / bundle.SELFTEST).write_text(test.model_dump_json())
    return folder


def test_a_bundle_carries_8_documents_of_4_lists_and_passes_its_own_test(folder, tmp_path):
    manifest = bundle.write(tmp_path / "bundle", folder, name="shoes", report={})
    assert bundle.SELFTEST in manifest["files"]
    test = json.loads((folder / bundle.SELFTEST).read_text())
    assert len(test["pairs"]) == len(test["scores"]["torch"]) == 32
    selftest.check(tmp_path / "bundle", Engine(tmp_path / "bundle"), "torch")


def test_a_score_that_is_2_percent_of_the_range_off_is_refused_in_float_and_passes_in_8_bits(folder):
    test = json.loads((folder / bundle.SELFTEST).read_text())
    scores = test["scores"]["torch"]
    scores[5] += 0.02 * (max(scores) - min(scores))
    test["scores"]["openvino-int8"] = scores
    (folder / bundle.SELFTEST).write_text(json.dumps(test))
    with pytest.raises(Refused, match=r"torch fails the self-test: a score is .* off"):
        selftest.check(folder, Engine(folder), "torch")
    selftest.check(folder, Engine(folder), "openvino-int8")
    scores[5] += 0.3 * (max(scores) - min(scores))
    (folder / bundle.SELFTEST).write_text(json.dumps(test))
    with pytest.raises(Refused, match="openvino-int8 fails"):
        selftest.check(folder, Engine(folder), "openvino-int8")


@pytest.mark.parametrize("recorded", [True, False])
def test_scores_that_are_no_numbers_are_refused_with_and_without_a_record(folder, released, recorded):
    engine = Engine(released)
    engine.logits = lambda prompts: [float("nan")] * len(prompts)
    with pytest.raises(Refused, match="no finite numbers"):
        selftest.check(folder if recorded else released, engine, "torch")


def test_a_bundle_of_before_without_a_self_test_is_served(released):
    selftest.check(released, Engine(released), "torch")
