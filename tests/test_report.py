import json
import re

import numpy as np
import pytest
from rankings import CFG, DOCUMENTS, run

from disranker import metrics, report
from disranker.metrics import METRICS
from disranker.recipe import Refused


def test_the_report_has_40_queries_3_runs_and_30_differences_the_later_run_first(found):
    assert found["queries"] == 40
    assert list(found["runs"]) == ["bm25", "teacher", "student"]
    assert all(list(values) == list(METRICS) for values in found["runs"].values())
    assert set(found["runs"]["bm25"]["pnr"]) == {"value", "low", "high"}
    assert {"a", "b", "metric", "difference", "low", "high", "p"} <= set(found["pairs"][0])
    couples = [(pair["a"], pair["b"]) for pair in found["pairs"] if pair["metric"] == "mrr@10"]
    assert couples == [("teacher", "bm25"), ("student", "bm25"), ("student", "teacher")]
    assert len(found["pairs"]) == 30


def test_a_difference_is_the_value_of_a_less_the_value_of_b(found):
    for pair in found["pairs"]:
        a, b = (found["runs"][pair[side]][pair["metric"]]["value"] for side in ("a", "b"))
        assert pair["difference"] == pytest.approx(a - b)


def test_holm_over_3_pairs_triples_the_smallest_p(found):
    pairs = [pair for pair in found["pairs"] if pair["metric"] == "ndcg@10"]
    smallest = min(pairs, key=lambda pair: pair["p"])
    assert smallest["holm"] == pytest.approx(3 * smallest["p"])


def test_slices_hold_their_own_queries_of_which_1_has_an_interval_too(found, qrels, runs):
    counted = {by: {name: of["queries"] for name, of in cut.items()} for by, cut in found["slices"].items()}
    assert counted == {
        "band": {"head": 19, "tail": 20, "never clicked": 1},
        "query_words": {"1 word": 1, "3 words": 39},
    }
    tail = {query: qrels[query] for query in sorted(qrels)[1::2]}
    alone = report.evaluate(tail, runs, CFG, 1)["runs"]
    assert found["slices"]["band"]["tail"]["runs"] == alone
    single = found["slices"]["query_words"]["1 word"]["runs"]["bm25"]["ndcg@10"]
    assert single["low"] == single["value"] == single["high"]


def test_a_slice_may_name_queries_that_nobody_judged(qrels, runs):
    content = report.evaluate(qrels, runs, CFG, 1, {"band": {"head": [*sorted(qrels)[:3], "other"]}})
    assert content["slices"]["band"]["head"]["queries"] == 3


def test_of_4_queries_the_student_wins_2_ties_1_and_loses_1():
    judged = {f"q{i}": {"a": 1, "b": 0} for i in range(4)}
    right, wrong = {"a": 2.0, "b": 1.0}, {"a": 1.0, "b": 2.0}
    runs = {
        "bm25": {"q0": wrong, "q2": wrong, "q3": right},
        "student": {"q0": right, "q1": right, "q2": wrong, "q3": wrong},
    }
    found = report.evaluate(judged, runs, CFG, 1)["outcomes"]
    assert found == [{"a": "student", "b": "bm25", "wins": 2, "ties": 1, "losses": 1}]


def test_a_difference_of_rounding_is_a_tie():
    one, other = (np.ones((2, len(METRICS), 2)) for _ in range(2))
    one[:, :, 0] += 1e-12
    assert report._outcome(one, other) == {"wins": 0, "ties": 2, "losses": 0}


def test_a_run_with_1_stranger_among_its_first_10_of_each_query_is_a_tenth_unjudged(qrels):
    strange = {query: {document: float(i) for i, document in enumerate([*DOCUMENTS, "x"])} for query in qrels}
    found = report.evaluate(qrels, {"bm25": run(qrels, 1.0), "theirs": strange}, CFG, 1)["unjudged"]
    assert found["theirs"]["value"] == found["theirs"]["low"] == pytest.approx(0.1)
    assert found["bm25"]["value"] == 0.0


def test_json_holds_the_report_even_where_pnr_is_infinite(qrels):
    perfect = run(qrels, 0.0)
    content = report.evaluate(qrels, {"bm25": run(qrels, 5.0), "student": perfect}, CFG, 1)
    assert content["runs"]["student"]["pnr"]["value"] is None
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert report.NONE in report.table(content)


def test_missing_queries_are_counted(qrels, runs):
    content = report.evaluate(qrels, {"bm25": runs["bm25"], "student": {}}, CFG, 1)
    assert content["missing"] == {"bm25": 0, "student": 40}
    assert content["runs"]["student"]["ndcg@10"]["value"] == 0


def test_no_judged_query_is_refused():
    with pytest.raises(Refused, match="no judged query"):
        report.evaluate({}, {"bm25": {}}, CFG, 1)


def test_a_student_like_its_teacher_agrees_more_than_bm25_does(found):
    tau = {(pair["a"], pair["b"]): pair["kendall_tau"] for pair in found["agreement"]}
    assert tau["student", "teacher"] > 0.5 > tau["student", "bm25"]
    assert all(0 <= pair["overlap@5"] <= 1 for pair in found["agreement"])


def test_the_table_has_a_line_for_each_run_and_fits_120_columns(found):
    head, *lines = report.table(found).splitlines()
    assert head.split() == ["run", "NDCG@1", "NDCG@5", "NDCG@10", "MRR@10", "PNR"]
    assert [line.split()[0] for line in lines] == ["bm25", "teacher", "student"]
    assert all(len(re.findall(r"\d+\.\d{3} \[\d+\.\d\d, \d+\.\d\d\]", line)) == 5 for line in lines)
    assert max(map(len, [head, *lines])) <= 120


def test_examples_are_the_2_largest_wins_then_the_2_largest_losses(qrels, runs):
    shown = report.examples(qrels, runs | {"b": run(qrels, 1.0, 9)}, "student", "b", {"d1": "Red shoe"}, k=2)
    deltas = [example["delta"] for example in shown]
    assert len(deltas) == 4
    assert deltas[0] >= deltas[1] > 0 > deltas[3] >= deltas[2]
    for example in shown:
        of = {document["title"]: document for document in example["documents"]}
        first = of.get("d1") or of.get("Red shoe")
        assert first is None or first["grade"] == qrels[example["query"]]["d1"]
        best = max(runs["student"][example["query"]].values())
        assert best == max(document["score_a"] for document in of.values())
        assert all(document["score_a"] != document["score_b"] for document in of.values())
    titles = {document["title"] for example in shown for document in example["documents"]}
    assert "Red shoe" in titles and "d1" not in titles
    assert all(5 <= len(example["documents"]) <= 10 for example in shown)
    for example in shown:
        for rank, score in (("rank_a", "score_a"), ("rank_b", "score_b")):
            by_score = sorted(example["documents"], key=lambda document: -document[score])
            assert [document[rank] for document in by_score[:5]] == [1, 2, 3, 4, 5]


def test_10_wins_and_10_losses_are_shown_unless_told_otherwise(qrels, runs):
    shown = report.examples(qrels, runs, "student", "teacher", {})
    deltas = metrics.per_query(qrels, runs["student"])["ndcg@10"] - metrics.per_query(qrels, runs["teacher"])["ndcg@10"]
    most = sorted(deltas.tolist())
    assert [example["delta"] for example in shown] == pytest.approx(most[:-11:-1] + most[:10])


def test_examples_never_call_a_tie_a_win(qrels, runs):
    assert report.examples(qrels, runs, "student", "student", {}) == []
