import math
import time

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from disranker import metrics
from disranker.recipe import Evaluate

CFG = Evaluate(resamples=500)
GRADES = {"d1": 3, "d2": 0, "d3": 2, "d4": 1}

grades = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 4), min_size=1)
qrels = st.dictionaries(st.sampled_from(["q 1", "q2", "q3"]), grades, min_size=1)
scores = st.dictionaries(st.sampled_from("abcdefghij"), st.integers(-50, 50).map(float))
runs = st.dictionaries(st.sampled_from(["q 1", "q2", "q3", "q4"]), scores)


def ordered(*documents):
    return {document: -float(rank) for rank, document in enumerate(documents)}


def noisy(seed, noise, queries=60, documents=8):
    """(qrels, run): random grades, and scores that are the grades with noise."""
    rng = np.random.default_rng(seed)
    names = [f"d{i}" for i in range(documents)]
    judged = {f"q{i:03}": dict(zip(names, rng.integers(0, 5, documents).tolist(), strict=True)) for i in range(queries)}
    fresh = np.random.default_rng([seed, int(noise * 1000)])
    run = {q: {d: g + noise * fresh.normal() for d, g in of.items()} for q, of in judged.items()}
    return judged, run


def test_ndcg_by_hand_with_gains_of_7_3_1_0():
    found = metrics.per_query({"q": GRADES}, {"q": ordered("d3", "d2", "d1", "d4")})
    ideal = 7 + 3 / math.log2(3) + 1 / 2
    assert found["ndcg@1"] == pytest.approx([3 / 7])
    assert found["ndcg@5"] == pytest.approx([(3 + 7 / 2 + 1 / math.log2(5)) / ideal])


def test_ndcg_at_5_cuts_both_the_run_and_the_ideal_after_5_documents():
    judged = {f"d{i}": 1 for i in range(7)} | {"x": 0}
    found = metrics.per_query({"q": judged}, {"q": ordered("x", *(f"d{i}" for i in range(7)))})
    discounts = [1 / math.log2(rank + 1) for rank in range(1, 9)]
    assert found["ndcg@5"] == pytest.approx([sum(discounts[1:5]) / sum(discounts[:5])])
    assert found["ndcg@10"] == pytest.approx([sum(discounts[1:8]) / sum(discounts[:7])])


def test_grade_5_gains_31_and_a_negative_grade_gains_0():
    found = metrics.per_query({"q": {"a": 5, "b": 1, "c": -2}}, {"q": ordered("c", "b", "a")})
    assert found["ndcg@10"] == pytest.approx([(1 / math.log2(3) + 31 / 2) / (31 + 1 / math.log2(3))])


def test_mrr_is_a_third_where_the_third_document_is_the_first_of_grade_2():
    found = metrics.per_query({"q": GRADES}, {"q": ordered("d4", "d2", "d3", "d1")})
    assert found["mrr@10"] == pytest.approx([1 / 3])


@pytest.mark.parametrize(("before", "expected"), [(9, 1 / 10), (10, 0.0)])
def test_mrr_sees_the_tenth_document_and_not_the_eleventh(before, expected):
    run = {"q": ordered(*(f"x{i}" for i in range(before)), "d1")}
    assert metrics.per_query({"q": GRADES}, run)["mrr@10"] == pytest.approx([expected])


def test_precision_by_hand_1_of_1_then_2_of_5_then_2_of_10_from_grade_2_up():
    found = metrics.per_query({"q": GRADES}, {"q": ordered("d3", "d4", "d2", "d1")})
    assert [found[f"p@{k}"].tolist() for k in (1, 5, 10)] == [[1.0], [0.4], [0.2]]
    assert metrics.per_query({"q": GRADES}, {"q": ordered("d4", "d1")})["p@1"].tolist() == [0.0]


def test_the_11th_document_counts_in_no_precision():
    run = {"q": ordered(*(f"x{i}" for i in range(10)), "d1")}
    assert metrics.per_query({"q": GRADES}, run)["p@10"].tolist() == [0.0]


def test_the_names_of_the_10_metrics_are_in_the_order_of_the_tally_pnr_last():
    judged, run = noisy(1, 2.0)
    tally, by_name = metrics.tally(judged, run), metrics.per_query(judged, run)
    assert len(metrics.METRICS) == tally.shape[1] == 10 and metrics.METRICS[-2:] == ("pair_accuracy", "pnr")
    for name, values in by_name.items():
        assert tally[:, metrics.METRICS.index(name), 0].tolist() == values.tolist()
    assert len(by_name) == 8


def test_pair_accuracy_is_pnr_over_1_plus_pnr_pooled_over_queries():
    found = metrics.intervals(metrics.tally(*noisy(2, 2.0)), CFG, 1)
    pnr, accuracy = found["pnr"], found["pair_accuracy"]
    assert accuracy.value == pytest.approx(pnr.value / (1 + pnr.value))
    assert accuracy.low == pytest.approx(pnr.low / (1 + pnr.low))


def test_pair_accuracy_without_a_wrong_pair_is_1_where_pnr_has_no_value():
    found = metrics.intervals(metrics.tally({"q": GRADES}, {"q": ordered("d1", "d3", "d4", "d2")}), CFG, 1)
    assert (found["pair_accuracy"].value, found["pnr"].value) == (1.0, None)


def unjudged(judged, run):
    return metrics.intervals(metrics.unjudged(judged, run), CFG, 1, (metrics.UNJUDGED,))[metrics.UNJUDGED]


def test_1_of_4_shown_documents_is_unjudged_pooled_over_2_queries_and_a_missing_query_shows_none():
    judged = {"a": GRADES, "b": {"x": 0}, "c": GRADES}
    run = {"a": ordered("d1", "d2", "d3"), "b": ordered("y")}
    assert unjudged(judged, run).value == pytest.approx(1 / 4)
    assert unjudged(judged, {}).value is None


def test_the_11th_document_may_be_unjudged_and_the_10th_may_not():
    judged = {"q": {f"d{i}": 0 for i in range(10)}}
    first = [f"d{i}" for i in range(9)]
    assert unjudged(judged, {"q": ordered(*first, "d9", "x")}).value == 0.0
    assert unjudged(judged, {"q": ordered(*first, "x", "d9")}).value == pytest.approx(0.1)


def test_values_stand_in_the_order_of_sorted_queries():
    judged = {"b": {"x": 3, "y": 0}, "a": {"x": 3, "y": 0}}
    found = metrics.per_query(judged, {"b": ordered("y", "x"), "a": ordered("x", "y")})
    assert found["ndcg@1"].tolist() == [1.0, 0.0]


def test_a_query_the_run_lacks_counts_0_and_halves_the_mean():
    tally = metrics.tally({"a": GRADES, "z": GRADES}, {"a": ordered("d1", "d3", "d4", "d2")})
    assert metrics.intervals(tally, CFG, 1)["ndcg@10"].value == pytest.approx(0.5)


def test_an_empty_answer_counts_as_a_missing_one():
    assert (metrics.tally({"q": GRADES}, {"q": {}}) == metrics.tally({"q": GRADES}, {})).all()


def test_a_query_with_2_documents_is_not_skipped_at_10():
    found = metrics.per_query({"q": {"a": 0, "b": 1}}, {"q": ordered("a", "b")})
    assert found["ndcg@10"] == pytest.approx([1 / math.log2(3)])


def test_documents_without_a_grade_push_down_like_grade_0():
    unjudged = metrics.per_query({"q": {"a": 2}}, {"q": ordered("x", "a")})
    graded = metrics.per_query({"q": {"a": 2, "x": 0}}, {"q": ordered("x", "a")})
    assert unjudged["ndcg@10"] == graded["ndcg@10"] == pytest.approx([1 / math.log2(3)])


def test_queries_that_nobody_judged_change_nothing():
    run = {"q": ordered("d1", "d2")}
    assert (metrics.tally({"q": GRADES}, run | {"other": {"d1": 1.0}}) == metrics.tally({"q": GRADES}, run)).all()


def test_equal_scores_are_broken_alike_in_ndcg_and_mrr_larger_id_first():
    found = metrics.per_query({"q": {"a": 3, "b": 0}}, {"q": {"a": 1.0, "b": 1.0}})
    assert found["ndcg@1"].tolist() == [0.0]
    assert found["mrr@10"].tolist() == [0.5]


def test_scores_a_millionth_of_a_millionth_apart_are_not_equal():
    assert metrics.per_query({"q": {"a": 3, "b": 0}}, {"q": {"a": 1 + 1e-12, "b": 1.0}})["ndcg@1"].tolist() == [1.0]


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_refused_with_its_document(score):
    with pytest.raises(ValueError, match="'d7' is"):
        metrics.tally({"q": GRADES}, {"q": {"d7": score, "d1": 0.0}})


def test_60_random_queries_agree_with_pytrec_eval():
    judged, run = noisy(1, 2.0)
    gained = {q: {d: 2**g - 1 for d, g in of.items()} for q, of in judged.items()}
    theirs = pytrec_eval.RelevanceEvaluator(gained, {"ndcg_cut.1,3,5,10"}).evaluate(run)
    binary = pytrec_eval.RelevanceEvaluator(judged, {"recip_rank", "P.1,5,10"}, relevance_level=2).evaluate(run)
    ours = metrics.per_query(judged, run)
    for k in (1, 3, 5, 10):
        assert ours[f"ndcg@{k}"] == pytest.approx([theirs[q][f"ndcg_cut_{k}"] for q in sorted(judged)])
    for k in (1, 5, 10):
        assert ours[f"p@{k}"] == pytest.approx([binary[q][f"P_{k}"] for q in sorted(judged)])
    assert ours["mrr@10"] == pytest.approx([binary[q]["recip_rank"] for q in sorted(judged)])


def test_pairs_by_hand_4_right_1_wrong_1_tied():
    concordant, discordant = metrics.pairs({"q": GRADES}, {"q": {"d1": 4.0, "d2": 1.0, "d3": 2.0, "d4": 2.0}})
    assert (concordant.tolist(), discordant.tolist()) == ([5], [0])
    concordant, discordant = metrics.pairs({"q": GRADES}, {"q": {"d1": 4.0, "d2": 3.0, "d3": 3.0, "d4": 2.0}})
    assert (concordant.tolist(), discordant.tolist()) == ([4], [1])


def test_equal_grades_make_no_pair():
    concordant, discordant = metrics.pairs({"q": {"a": 2, "b": 2}}, {"q": {"a": 1.0, "b": 0.0}})
    assert (concordant.tolist(), discordant.tolist()) == ([0], [0])


def test_pnr_pools_pairs_over_queries_and_keeps_the_last_one():
    judged = {"a": {"x": 1, "y": 0}, "b": {"x": 2, "y": 1, "z": 0}}
    run = {"a": ordered("y", "x"), "b": ordered("x", "y", "z")}
    assert metrics.intervals(metrics.tally(judged, run), CFG, 1)["pnr"].value == pytest.approx(3 / 1)


def test_a_missing_query_has_all_its_6_pairs_wrong_and_a_missing_document_stands_last():
    concordant, discordant = metrics.pairs({"q": GRADES}, {})
    assert (concordant.tolist(), discordant.tolist()) == ([0], [6])
    concordant, discordant = metrics.pairs({"q": GRADES}, {"q": {"d2": -9.0, "d1": -10.0}})
    assert (concordant.tolist(), discordant.tolist()) == ([2], [4])  # d3 > d4 is among the 4: the run has neither


def test_pnr_without_a_wrong_pair_is_none_and_not_infinite():
    tally = metrics.tally({"q": GRADES}, {"q": ordered("d1", "d3", "d4", "d2")})
    found = metrics.intervals(tally, CFG, 1)["pnr"]
    assert (found.value, found.low, found.high) == (None, None, None)
    assert metrics.compare(tally, tally, CFG, 1)["pnr"] == metrics.Difference(None, None, None, 1.0)


@given(qrels, runs)
def test_ndcg_and_mrr_lie_between_0_and_1(judged, run):
    for values in metrics.per_query(judged, run).values():
        assert len(values) == len(judged)
        assert (values >= 0).all() and (values <= 1 + 1e-9).all()


@given(qrels, runs, st.floats(-1e3, 1e3))
def test_a_constant_added_to_all_scores_changes_nothing(judged, run, constant):
    shifted = {q: {d: s + constant for d, s in of.items()} for q, of in run.items()}
    assert (metrics.tally(judged, shifted) == metrics.tally(judged, run)).all()


@given(qrels, runs)
def test_a_growing_function_of_the_scores_changes_nothing(judged, run):
    bent = {q: {d: math.expm1(s / 25) for d, s in of.items()} for q, of in run.items()}
    assert (metrics.tally(judged, bent) == metrics.tally(judged, run)).all()


@given(qrels, runs)
def test_turning_the_scores_round_swaps_right_and_wrong_pairs(judged, run):
    run = {q: {d: run.get(q, {}).get(d, float(i)) for i, d in enumerate(of)} for q, of in judged.items()}
    turned = {q: {d: -s for d, s in of.items()} for q, of in run.items()}
    for one, other in zip(metrics.pairs(judged, run), reversed(metrics.pairs(judged, turned)), strict=True):
        assert one.tolist() == other.tolist()


def test_an_interval_holds_its_value_and_narrows_by_half_with_four_times_the_queries():
    widths = []
    for queries in (100, 400):
        found = metrics.intervals(metrics.tally(*noisy(3, 2.0, queries)), Evaluate(), 1)
        assert all(interval.low < interval.value < interval.high for interval in found.values())
        widths.append(found["ndcg@10"].high - found["ndcg@10"].low)
    assert widths[1] / widths[0] == pytest.approx(0.5, abs=0.1)


def test_the_interval_of_a_mean_is_196_standard_errors_either_way():
    tally = metrics.tally(*noisy(4, 2.0, queries=400))
    values = tally[:, metrics.METRICS.index("ndcg@10"), 0]
    found = metrics.intervals(tally, Evaluate(resamples=4000), 1)["ndcg@10"]
    error = values.std() / math.sqrt(len(values))
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    tally = metrics.tally(*noisy(3, 2.0))
    assert metrics.intervals(tally, CFG, 1) == metrics.intervals(tally, CFG, 1) != metrics.intervals(tally, CFG, 2)


def test_small_blocks_give_as_many_resamples_as_one(monkeypatch):
    tally = metrics.tally(*noisy(3, 2.0))
    whole = metrics.intervals(tally, CFG, 1)["pnr"]
    monkeypatch.setattr(metrics, "BLOCK", 7 * len(tally))
    assert metrics.intervals(tally, CFG, 1)["pnr"] == whole


def test_2000_resamples_of_300_queries_take_less_than_a_second():
    tally = metrics.tally(*noisy(3, 2.0, queries=300))
    started = time.process_time()
    metrics.intervals(tally, Evaluate(resamples=2000), 1)
    assert time.process_time() - started < 1


def test_a_clear_difference_has_p_1_in_501_and_the_sign_of_the_better_run():
    judged, good = noisy(5, 1.0)
    bad = noisy(5, 4.0)[1]
    differences = metrics.compare(metrics.tally(judged, good), metrics.tally(judged, bad), CFG, 1)
    assert differences.pop("p@10") == metrics.Difference(0.0, 0.0, 0.0, 1.0)  # both rank all 8 documents
    for found in differences.values():
        assert found.p == pytest.approx(1 / 501)
        assert 0 < found.low < found.difference < found.high


def test_a_run_against_itself_has_difference_0_and_p_1():
    tally = metrics.tally(*noisy(5, 2.0))
    assert set(metrics.compare(tally, tally, CFG, 1).values()) == {metrics.Difference(0.0, 0.0, 0.0, 1.0)}


def test_turning_a_comparison_round_turns_the_sign_and_keeps_p():
    judged, one = noisy(6, 2.0)
    tallies = [metrics.tally(judged, run) for run in (one, noisy(6, 2.2)[1])]
    there, back = metrics.compare(*tallies, CFG, 1), metrics.compare(*reversed(tallies), CFG, 1)
    for metric in metrics.METRICS:
        assert there[metric].difference == -back[metric].difference
        assert there[metric].p == pytest.approx(back[metric].p, abs=0.05)
        assert there[metric].p > 0.02
    assert there["ndcg@10"].p < 1


def test_pairing_narrows_the_interval_of_two_runs_that_err_alike():
    judged, one = noisy(7, 2.0, queries=200)
    nudged = {q: {d: s + 0.1 * (judged[q][d] > 2) for d, s in of.items()} for q, of in one.items()}
    tally = metrics.tally(judged, one)
    alone = metrics.intervals(tally, CFG, 1)["ndcg@10"]
    paired = metrics.compare(metrics.tally(judged, nudged), tally, CFG, 1)["ndcg@10"]
    assert paired.low > 0
    assert paired.high - paired.low < 0.3 * (alone.high - alone.low)


def test_3_queries_all_won_have_p_of_a_quarter():
    judged = {q: {"a": 1, "b": 0} for q in "xyz"}
    won, lost = (metrics.tally(judged, {q: ordered(*order) for q in "xyz"}) for order in ("ab", "ba"))
    found = metrics.compare(won, lost, Evaluate(resamples=8000), 1)
    assert found["ndcg@1"].p == pytest.approx(2 / 8, abs=0.02)


def test_holm_by_hand():
    assert metrics.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert metrics.holm([0.9, 0.6]) == [1.0, 1.0]
    assert metrics.holm([]) == []


def test_kendall_tau_averages_queries_1_and_minus_a_third():
    a = {"p": ordered(*"xyz"), "q": ordered(*"xyz")}
    b = {"p": ordered(*"xyz"), "q": ordered(*"yzx")}
    assert metrics.kendall_tau(a, b) == pytest.approx((1 - 1 / 3) / 2)


def test_kendall_tau_counts_a_missing_or_all_tied_query_as_0_and_leaves_out_a_single_document():
    a = {"p": ordered(*"xyz"), "q": ordered(*"xyz"), "r": ordered(*"xyz"), "s": ordered("x")}
    b = {"p": ordered(*"xyz"), "q": dict.fromkeys("xyz", 1.0), "s": ordered("x")}
    assert metrics.kendall_tau(a, b) == pytest.approx(1 / 3)
    assert metrics.kendall_tau({}, {}) is None


def test_a_query_that_both_tie_says_nothing_about_their_agreement():
    ordered, tied = {"a": 2.0, "b": 1.0}, {"a": 0.5, "b": 0.5}
    assert metrics.kendall_tau({"q": ordered, "tied": tied}, {"q": ordered, "tied": tied}) == 1.0
    assert metrics.kendall_tau({"q": ordered, "tied": tied}, {"q": ordered, "tied": ordered}) == 0.5
    assert metrics.kendall_tau({"tied": tied}, {"tied": tied}) is None


def test_kendall_tau_of_ties_is_tau_b():
    one, other = {"x": 1.0, "y": 1.0, "z": 0.0}, {"x": 3.0, "y": 2.0, "z": 1.0}
    expected = kendalltau([1, 1, 0], [3, 2, 1]).statistic
    assert metrics.kendall_tau({"q": one}, {"q": other}) == pytest.approx(expected) == pytest.approx(0.8165, abs=1e-4)


def test_overlap_is_a_half_where_one_of_the_first_two_is_common():
    assert metrics.overlap({"q": ordered(*"abc")}, {"q": ordered(*"bca")}, 2) == 0.5
    assert metrics.overlap({"q": ordered(*"ab")}, {"q": ordered(*"ba")}, 5) == 1.0
    assert metrics.overlap({"q": ordered(*"ab"), "r": ordered(*"ab")}, {"q": ordered(*"ab")}, 2) == 0.5
    assert metrics.overlap({}, {}, 2) is None


def test_one_query_has_an_interval_without_width():
    found = metrics.intervals(metrics.tally({"q": GRADES}, {"q": ordered("d3", "d1", "d2", "d4")}), CFG, 1)
    assert all(interval.low == interval.value == interval.high for interval in found.values())


@pytest.mark.filterwarnings("error")
def test_pnr_with_1_wrong_pair_among_3_queries_has_no_upper_end():
    judged = {q: {"a": 2, "b": 1, "c": 0} for q in "xyz"}
    run = {"x": ordered(*"bac"), "y": ordered(*"abc"), "z": ordered(*"abc")}
    found = metrics.intervals(metrics.tally(judged, run), CFG, 1)["pnr"]
    assert (found.value, found.low, found.high) == (8.0, 2.0, None)  # thrice x: 6 / 3


def test_runs_that_differ_in_1_query_of_61_have_p_1():
    judged, one = noisy(1, 2.0, queries=61)
    tally = metrics.tally(judged, one)
    other = metrics.tally(judged, one | {"q000": {d: -s for d, s in one["q000"].items()}})
    assert [found.p for found in metrics.compare(tally, other, CFG, 1).values()] == [1.0] * 10
