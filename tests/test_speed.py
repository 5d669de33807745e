import pytest
import torch
from test_engine import save_student

from disranker import conversion, engines, gate, speed
from disranker.engine import Engine
from disranker.recipe import Publish

QRELS = {"red shoe": {"a": 3, "b": 0}, "warm jacket": {"a": 0, "b": 2}}
EXACT = {"red shoe": {"a": 2.0, "b": 1.0}, "warm jacket": {"a": 1.0, "b": 3.0}}
TURNED = {"red shoe": {"a": 2.0, "b": 2.5}, "warm jacket": {"a": 1.0, "b": 3.0}}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = save_student(tmp_path_factory.mktemp("student"), num_hidden_layers=1)
    conversion.export(folder, folder, None)
    return str(folder)


def groups(count):
    docs = [{"doc_id": name, "title": f"{name} shoe", "summary": "light rain"} for name in ("red", "blue", "warm")]
    return [{"query": f"trail {i}", "docs": docs[: 1 + i % 3]} for i in range(count)]


def test_the_runs_of_engines_have_each_document_of_each_query(student):
    found = speed.runs(student, ("torch", "openvino"), groups(3))
    assert {query: list(scores) for query, scores in found["torch"].items()} == {
        "trail 0": ["red"],
        "trail 1": ["red", "blue"],
        "trail 2": ["red", "blue", "warm"],
    }
    exact = Engine(student).scores(["trail 2"] * 3, ["red shoe", "blue shoe", "warm shoe"], ["light rain"] * 3)
    for of in found.values():
        assert list(of["trail 2"].values()) == pytest.approx(exact, abs=1e-4)


def test_agreement_is_ndcg_the_largest_difference_and_kendalls_tau():
    found = speed.agreement(QRELS, {"torch": EXACT, "openvino-int8": TURNED})
    assert found["torch"] == {"ndcg@10": 1.0}
    # One of two queries is the wrong way round: tau is the mean of -1 and 1, and its NDCG 1 / log2(3).
    assert found["openvino-int8"] == {
        "ndcg@10": pytest.approx((1 + 0.63093) / 2, abs=1e-5),
        "max_difference": 1.5,
        "kendall_tau": 0.0,
    }


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_an_engine_with_one_score_that_is_no_number_has_none_and_passes_no_bar(broken):
    scores = {query: dict(of) for query, of in EXACT.items()}
    next(iter(scores.values()))["a"] = broken
    found = speed.agreement(QRELS, {"torch": EXACT, "onnx": scores, "openvino": EXACT, "openvino-int8": scores})
    assert found["onnx"] == {"ndcg@10": None, "max_difference": None, "kendall_tau": None} == found["openvino-int8"]
    failed = [bar.name for bar in gate.engines(found, Publish()) if not bar.passed]
    assert failed == [
        "max_difference, onnx",
        "max_rounding_loss, openvino-int8",
        "min_rounding_tau, openvino-int8",
    ]


def test_speeds_are_measured_with_1_and_with_2_threads_and_torch_gets_its_threads_back(student):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    prompts = [Engine(student).tokens.listed(group["query"], group["docs"]) for group in groups(4)]
    found = speed.measure(student, ("torch", "onnx", "openvino"), prompts, rounds=2, cores=2)
    assert list(found) == ["torch", "onnx", "openvino"]
    assert all(of["threads"] == [1, 2] and min(of["pairs_per_s"]) > 0 for of in found.values())
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def test_the_speed_is_all_pairs_over_the_median_of_the_rounds(student, monkeypatch):
    seconds = iter([99.0, 1.0, 2.0, 30.0])  # the first does not count
    monkeypatch.setattr(speed, "_seconds", lambda _engine, _lists: next(seconds))
    found = speed.measure(student, ("torch",), [[([1, 2], 1)] * 3, [([1, 2], 1)]], rounds=3, cores=1)
    assert found == {"torch": {"threads": [1], "pairs_per_s": [2.0]}}  # 4 pairs in 2 s


@pytest.mark.parametrize(
    ("speeds", "chosen"),
    [
        ({"torch": 10.0, "onnx": 99.0, "openvino": 20.0, "openvino-int8": 30.0}, "openvino-int8"),
        ({"torch": 10.0, "onnx": 99.0, "openvino": 20.0, "openvino-int8": 20.0}, "openvino"),
        ({"torch": 30.0, "onnx": 99.0, "openvino": 20.0, "openvino-int8": 25.0}, "torch"),
        ({"torch": 10.0, "onnx": 99.0, "openvino": 20.0}, "openvino"),
        ({"torch": 10.0, "openvino": 20.0, "openvino-bf16": 30.0, "openvino-int8": 30.0}, "openvino-bf16"),
    ],
)
def test_the_fastest_with_all_threads_is_chosen_a_rounded_one_only_if_faster_and_onnx_never(speeds, chosen):
    others = {
        "torch": 1.0,
        "onnx": 2.0,
        "openvino": 900.0,
        "openvino-bf16": 1.0,
        "openvino-int8": 3.0,
    }  # with one thread
    found = {name: {"pairs_per_s": [others[name], value]} for name, value in speeds.items()}
    assert speed.choose(found) == chosen


@pytest.mark.parametrize(
    ("bf16", "int8", "able", "rounded"),
    [
        (True, True, ["FP32", "BF16"], ("openvino-bf16", "openvino-int8")),
        (True, True, ["FP32"], ("openvino-int8",)),
        (False, True, ["FP32", "BF16"], ("openvino-int8",)),
        (True, False, ["FP32", "BF16"], ("openvino-bf16",)),
    ],
)
def test_rounded_engines_are_there_where_they_are_wanted_and_the_cpu_computes_in_them(
    bf16, int8, able, rounded, monkeypatch
):
    monkeypatch.setattr(engines.openvino().Core, "get_property", lambda *_: able)
    assert speed.present(bf16, int8) == ("torch", "onnx", "openvino", *rounded)


@pytest.mark.parametrize(
    ("most", "places"), [(10, range(10)), (5, range(0, 10, 2)), (4, [0, 2, 5, 7]), (9, [0, *range(1, 9)]), (1, [0])]
)
def test_lists_are_taken_evenly_over_all(most, places):
    assert speed.spread([{"n": n} for n in range(10)], most) == [{"n": n} for n in places]
