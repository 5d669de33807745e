import json
import math

import pytest

from disranker import gate, report
from disranker.gate import Bar
from disranker.recipe import Evaluate, Publish

CFG = Evaluate(resamples=500)


def made(student, teacher=0.8, low=0.1):
    """The least of a report that the gate reads."""
    values = {"bm25": 0.6, "teacher": teacher, "student": student}
    pair = {"a": "student", "b": "bm25", "metric": "ndcg@10", "difference": student - 0.6, "low": low, "high": 0.3}
    return {"confidence": 0.95, "runs": {n: {"ndcg@10": {"value": v}} for n, v in values.items()}, "pairs": [pair]}


def quality(content, cfg=None):
    return gate.reasons(gate.quality(content, cfg or Publish()))


def measured(**changed):
    """Engines that all pass at the very bounds."""
    return {
        "torch": {"ndcg@10": 0.8},
        "onnx": {"ndcg@10": 0.8, "max_difference": 1e-3, "kendall_tau": 1.0},
        "openvino": {"ndcg@10": 0.8, "max_difference": 1e-3, "kendall_tau": 1.0},
        "openvino-bf16": {"ndcg@10": 0.796, "max_difference": 0.3, "kendall_tau": 0.98},
        "openvino-int8": {"ndcg@10": 0.796, "max_difference": 0.3, "kendall_tau": 0.98} | changed,
    }


def engines(content, cfg=None):
    return gate.reasons(gate.engines(content, cfg or Publish()))


def lists(losses):
    """Qrels and two runs of two documents: the new one has some queries the wrong way round, the old one none."""
    qrels = {f"q{i}": {"good": 3, "bad": 0} for i in range(len(losses))}
    old = {query: {"good": 1.0, "bad": 0.0} for query in qrels}
    new = {query: {"good": 1.0, "bad": 2.0 if lost else 0.0} for query, lost in zip(qrels, losses, strict=True)}
    return qrels, new, old


def in_service(losses, cfg=None):
    return gate.in_service(*lists(losses), cfg or Publish(), CFG, 1)


def test_a_student_at_exactly_95_percent_passes():
    assert quality(made(0.95 * 0.8)) == []


def test_a_student_at_94_percent_is_told_both_numbers_and_that_0_008_are_missing():
    (reason,) = quality(made(0.752))
    assert "0.7520 is 94.00% of the teacher's 0.8000" in reason
    assert "asks for 95.00%, which is 0.0080 more" in reason


def test_a_student_whose_interval_over_bm25_starts_at_0_is_held_back():
    (reason,) = quality(made(0.8, low=0.0))
    assert "+0.2000" in reason and "[+0.0000, +0.3000]" in reason
    assert quality(made(0.8, low=0.0), Publish(beat_bm25=False)) == []


def test_a_student_that_fails_twice_is_given_two_reasons():
    assert len(quality(made(0.5, low=-0.2))) == 2


@pytest.mark.parametrize("name", ["teacher", "student", "bm25"])
def test_an_absent_run_is_named(name):
    content = made(0.8)
    del content["runs"][name]
    assert f"no run of {name}" in quality(content)[0]


def test_bm25_is_not_needed_where_it_need_not_be_beaten():
    content = made(0.8)
    del content["runs"]["bm25"]
    assert quality(content, Publish(beat_bm25=False)) == []


def test_a_student_is_not_released_by_a_share_of_a_teacher_of_0():
    (reason,) = quality(made(0.1, teacher=0.0))
    assert "The teacher's NDCG@10 is 0" in reason


def test_a_whole_report_is_read_both_ways():
    qrels, bad, good = lists([True] * 20)
    runs = {"bm25": bad, "teacher": good, "student": good}
    assert quality(report.evaluate(qrels, runs, CFG, 1)) == []
    assert len(quality(report.evaluate(qrels, runs | {"student": bad}, CFG, 1))) == 2


def test_a_student_that_ranks_like_the_one_in_service_passes_even_with_a_margin_of_1_in_a_million():
    bar = in_service([False] * 10, Publish(max_loss=1e-6))
    assert bar.passed and bar.value == 0.0 and bar.bound == -1e-6


def test_a_student_that_turns_around_10_of_100_queries_is_worse_than_the_one_in_service():
    # NDCG@10 of the wrong way round is 1 / log2(3) = 0.6309, so 10 of 100 lose 0.0369 in the mean. A resample holds 16
    # of them at its 97.5% quantile.
    bar = in_service([True] * 10 + [False] * 90)
    assert not bar.passed and bar.value == pytest.approx(-0.16 * (1 - 1 / math.log2(3)))
    assert "on 100 queries is -0.0369" in bar.why and "must lie above -0.0100 (publish.max_loss)" in bar.why


def test_what_may_be_lost_is_measured_at_the_low_end_of_the_interval():
    assert not in_service([True] * 10 + [False] * 90, Publish(max_loss=0.05)).passed
    assert in_service([True] * 10 + [False] * 90, Publish(max_loss=0.1)).passed


def test_a_better_student_passes_and_the_sign_is_new_less_old():
    qrels, old, new = lists([True] * 10 + [False] * 90)
    bar = gate.in_service(qrels, new, old, Publish(), CFG, 1)
    assert bar.passed and bar.value > 0


def test_engines_pass_at_the_very_bounds():
    assert engines(measured()) == []


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_a_float_engine_that_differs_by_2_thousandths_fails(name):
    content = measured()
    content[name]["max_difference"] = 2e-3
    (reason,) = engines(content)
    assert f"A score of {name} differs from torch's by 2.00e-03" in reason and "allows 1.00e-03" in reason


def test_a_difference_that_is_no_number_fails():
    content = measured()
    content["onnx"]["max_difference"] = float("nan")
    assert len(engines(content)) == 1


def test_8_bits_that_lose_6_thousandths_of_ndcg_fail_and_are_told_by_how_much():
    (reason,) = engines(measured(**{"ndcg@10": 0.7952}))
    assert "0.7952, 0.0008 below" in reason and "publish.int8=false" in reason


@pytest.mark.parametrize(("tau", "said"), [(0.979, "0.9790"), (None, "no number")])
def test_8_bits_that_rank_otherwise_fail(tau, said):
    (reason,) = engines(measured(kendall_tau=tau))
    assert f"Kendall's tau is {said}" in reason


def test_a_large_difference_of_8_bits_alone_is_no_fault():
    assert engines(measured(max_difference=9.0)) == []


@pytest.mark.parametrize(("name", "setting"), [("openvino-bf16", "bf16"), ("openvino-int8", "int8")])
def test_each_engine_of_rounded_numbers_is_held_to_both_bars_and_told_how_to_be_left_out(name, setting):
    content = measured()
    content[name] = {"ndcg@10": 0.7, "max_difference": 0.3, "kendall_tau": 0.5}
    assert [bar.name for bar in gate.engines(content, Publish()) if not bar.passed] == [
        f"max_rounding_loss, {name}",
        f"min_rounding_tau, {name}",
    ]
    assert all(f"As {name} " in why and f"publish.{setting}=false releases it" in why for why in engines(content))


def test_without_rounded_numbers_there_are_2_bars():
    content = measured()
    del content["openvino-int8"], content["openvino-bf16"]
    assert [bar.name for bar in gate.engines(content, Publish())] == [
        "max_difference, onnx",
        "max_difference, openvino",
    ]


def test_the_line_of_a_bar_tells_value_bound_and_gap():
    assert Bar("min_rounding_tau", 0.97, ">=", 0.98, "").line == "min_rounding_tau: 0.97 >= 0.98 (-0.01), FAILED"
    assert Bar("beat_bm25", 0.125, ">", 0.0, "").line == "beat_bm25: 0.125 > 0 (+0.125), passed"
    assert Bar("beat_bm25", None, ">", 0.0, "").line == "beat_bm25: not measured, FAILED"


def test_gate_json_has_all_bars_and_is_passed_only_if_each_is():
    bars = gate.engines(measured(kendall_tau=0.5), Publish())
    content = json.loads(json.dumps(gate.content(bars)))
    assert content["passed"] is False and [bar["passed"] for bar in content["bars"]] == [True] * 5 + [False]
    assert gate.content(bars[:3])["passed"] is True
