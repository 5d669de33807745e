import base64
import json
import re

import numpy as np
import pytest

from disranker import pictures, report
from disranker.metrics import METRICS
from disranker.recipe import Evaluate, Refused

CFG = Evaluate(resamples=300)
DOCUMENTS = [f"d{i}" for i in range(12)]


def judgments(queries=40):
    rng = np.random.default_rng(1)
    return {
        f"red shoes {i:02}": dict(zip(DOCUMENTS, rng.integers(0, 5, 12).tolist(), strict=True)) for i in range(queries)
    }


def run(qrels, noise, seed=0):
    rng = np.random.default_rng([seed, 7])
    return {q: {d: g + noise * rng.normal() for d, g in of.items()} for q, of in qrels.items()}


@pytest.fixture(scope="module")
def qrels():
    return judgments()


@pytest.fixture(scope="module")
def runs(qrels):
    return {"bm25": run(qrels, 6.0, 1), "teacher": run(qrels, 0.5, 2), "student": run(qrels, 0.7, 3)}


@pytest.fixture(scope="module")
def found(qrels, runs):
    bands = {query: ("head", "tail")[i % 2] for i, query in enumerate(sorted(qrels)) if i}
    return report.evaluate(qrels, runs, CFG, 1, bands)


def page(found, title="Report", **others):
    return report.html(found, title=title, **({"facts": {}, "examples": []} | others))


def test_the_report_has_40_queries_3_runs_and_15_differences_the_later_run_first(found):
    assert found["queries"] == 40
    assert list(found["runs"]) == ["bm25", "teacher", "student"]
    assert all(list(values) == list(METRICS) for values in found["runs"].values())
    assert set(found["runs"]["bm25"]["pnr"]) == {"value", "low", "high"}
    assert {"a", "b", "metric", "difference", "low", "high", "p"} <= set(found["pairs"][0])
    couples = [(pair["a"], pair["b"]) for pair in found["pairs"] if pair["metric"] == "mrr@10"]
    assert couples == [("teacher", "bm25"), ("student", "bm25"), ("student", "teacher")]
    assert len(found["pairs"]) == 15


def test_a_difference_is_the_value_of_a_less_the_value_of_b(found):
    for pair in found["pairs"]:
        a, b = (found["runs"][pair[side]][pair["metric"]]["value"] for side in ("a", "b"))
        assert pair["difference"] == pytest.approx(a - b)


def test_holm_over_3_pairs_triples_the_smallest_p(found):
    pairs = [pair for pair in found["pairs"] if pair["metric"] == "ndcg@10"]
    smallest = min(pairs, key=lambda pair: pair["p"])
    assert smallest["holm"] == pytest.approx(3 * smallest["p"])


def test_bands_hold_their_own_queries_and_the_unnamed_one_is_unseen(found, qrels, runs):
    assert {band: of["queries"] for band, of in found["bands"].items()} == {"head": 19, "tail": 20, "unseen": 1}
    tail = {query: qrels[query] for query in sorted(qrels)[1::2]}
    alone = report.evaluate(tail, runs, CFG, 1)["runs"]
    assert found["bands"]["tail"]["runs"] == alone


def test_json_holds_the_report_even_where_pnr_is_infinite(qrels):
    perfect = run(qrels, 0.0)
    content = report.evaluate(qrels, {"bm25": run(qrels, 5.0), "student": perfect}, CFG, 1)
    assert content["runs"]["student"]["pnr"]["value"] is None
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert report.NONE in report.table(content)
    assert "NDCG@10" in page(content)


def test_missing_queries_are_counted_and_said(qrels, runs):
    content = report.evaluate(qrels, {"bm25": runs["bm25"], "student": {}}, CFG, 1)
    assert content["missing"] == {"bm25": 0, "student": 40}
    assert content["runs"]["student"]["ndcg@10"]["value"] == 0
    assert "40 of the queries got no answer from student" in page(content)


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


def test_the_page_escapes_a_title_with_a_script_everywhere(found):
    bad = "<script>alert(1)</script>"
    document = {"title": bad, "grade": 1, "score_a": 1.0, "score_b": None}
    example = {"query": bad, "delta": 0.5, "a": "student", "b": "bm25", "documents": [document]}
    text = page(found, title=bad, facts={bad: bad}, examples=[example])
    assert "<script" not in text
    assert text.count("&lt;script&gt;") == 6  # title and heading, query, document, fact and its name


def test_the_page_fetches_nothing_and_is_the_same_twice(found):
    text = page(found)
    assert not re.search(r"https?:|<script|<link|url\(|@import", text)
    assert all(source.startswith("data:") for source in re.findall(r'src="([^"]*)', text))
    assert len(re.findall("<img", text)) == 3
    assert text == page(found)


def test_the_page_draws_no_bands_where_none_are_given(found):
    assert len(re.findall("<img", page(found | {"bands": {}}))) == 2


def test_the_page_says_how_much_of_the_teacher_the_student_keeps(found):
    values = [found["runs"][name]["ndcg@10"]["value"] for name in ("student", "teacher")]
    assert f"The student keeps {values[0] / values[1]:.1%} of the teacher&#39;s NDCG@10" in page(found)
    assert "The student is better than BM25" in page(found)


def test_the_page_says_when_a_run_is_worse_or_not_shown_to_be_better(qrels, runs):
    worse = report.evaluate(qrels, {"bm25": runs["teacher"], "student": runs["bm25"]}, CFG, 1)
    assert "The student is worse than BM25" in page(worse)
    same = report.evaluate(qrels, {"bm25": runs["bm25"], "student": runs["bm25"]}, CFG, 1)
    assert "The student is not shown to be better or worse than BM25" in page(same)


def test_a_single_run_still_makes_a_page(qrels, runs):
    assert "nothing to compare" in page(report.evaluate(qrels, {"bm25": runs["bm25"]}, CFG, 1))


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


def test_examples_never_call_a_tie_a_win(qrels, runs):
    assert report.examples(qrels, runs, "student", "student", {}) == []


def test_the_page_lists_each_runs_own_order_best_first(found):
    documents = [
        {"title": "Boot", "grade": 0, "score_a": 1.0, "score_b": 9.0},
        {"title": "Sandal", "grade": None, "score_a": 2.0, "score_b": 8.0},
    ]
    example = {"query": "shoes", "delta": -0.25, "a": "student", "b": "bm25", "documents": documents}
    text = page(found, examples=[example])
    assert re.findall("Boot|Sandal", text) == ["Sandal", "Boot", "Boot", "Sandal"]
    assert f"{report.MINUS}0.25 NDCG@10 for student" in text


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.01, 0.2, "is better than"),
        (-0.1, 0.2, "is not shown to be better or worse than"),
        (-0.2, -0.01, "is worse than"),
    ],
)
def test_the_verdict_follows_the_interval(found, low, high, verdict):
    pairs = [pair | {"low": low, "high": high} for pair in found["pairs"]]
    text = page(found | {"pairs": pairs})
    assert f"The student {verdict} BM25" in text
    assert f"of the teacher&#39;s NDCG@10 and {verdict} the teacher" in text


def test_the_picture_of_differences_moves_with_them(found):
    pairs = [pair | {"difference": 0.123} for pair in found["pairs"]]
    before, after = (re.findall(r'src="([^"]*)', page(content)) for content in (found, found | {"pairs": pairs}))
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False, True]


MODEL = {
    "click_model": "pbm",
    "why": "it agrees best with human grades on 100 validation queries: Spearman correlation 0.649",
    "examination": {
        "ctr": {str(p): 1.0 for p in range(1, 31)},
        "pbm": {str(p): p**-0.7 for p in (10, 1, 2, 3, 4, 5, 30)},
    },
    "interventional": [
        {"position": p, "examination": p**-0.7, "low": 0.8 * p**-0.7, "high": 1.2 * p**-0.7} for p in (1, 2, 5, 30)
    ],
    "models": [
        {"model": "ctr", "agreement": 0.566, "low": 0.526, "high": 0.599, "queries": 100, "log_loss": 0.2611},
        {"model": "pbm", "agreement": 0.649, "low": 0.616, "high": 0.678, "queries": 100, "log_loss": 0.2620},
    ],
}


def test_the_page_shows_both_numbers_of_each_click_model_and_marks_the_one_that_is_used(found):
    text = page(found | {"click_models": MODEL})
    rows = re.findall(r"<tr( class=\"chosen\")?><td>(.*?)</td></tr>", text)
    (ctr,), (pbm,) = ([cells for chosen, cells in rows if bool(chosen) == used and "0.26" in cells] for used in (0, 1))
    assert "plain click rate" in ctr and "0.566<small>[0.53, 0.60]" in ctr and "0.2611" in ctr and "used" not in ctr
    assert "position-based model" in pbm and "0.649<small>[0.62, 0.68]" in pbm and "0.2620" in pbm and "used" in pbm
    assert len(re.findall("<img", text)) == 4 and "Shuffled pages" in text


def test_the_page_says_which_click_model_is_used_why_and_how_far_shoppers_look(found):
    text = page(found | {"click_models": MODEL})
    assert "read by the position-based model (PBM): it agrees best with human grades on 100 validation queries" in text
    assert "result 5 is looked at 32% as often as the first" in text


def test_the_curve_is_drawn_in_order_down_to_position_20_and_moves_with_the_numbers(found):
    assert list(report._curve(MODEL["examination"]["pbm"])) == [1, 2, 3, 4, 5, 10]
    other = MODEL | {"examination": MODEL["examination"] | {"pbm": {"1": 1.0, "2": 0.1}}}
    moved = MODEL | {"interventional": [point | {"low": 0.0} for point in MODEL["interventional"]]}
    sources = [re.findall(r'src="([^"]*)', page(found | {"click_models": m}))[-1] for m in (MODEL, other, moved)]
    assert len(set(sources)) == 3


def test_the_page_says_nothing_of_click_models_without_any(found):
    assert "How clicks are read" not in page(found)
    assert page(found | {"click_models": None}) == page(found)


def test_a_log_without_positions_has_a_sentence_and_no_curve(found):
    bare = {"click_model": "ctr", "why": "the recipe asks for it", "examination": {"ctr": {"null": 1.0}}}
    text = page(found | {"click_models": bare | {"interventional": [], "models": []}})
    assert "read by the plain click rate (CTR): the recipe asks for it." in text
    assert len(re.findall("<img", text)) == 3 and "Agreement with grades" not in text


def learned(metric, values, steps=1234):
    """What the manifest of a trained model has; `values` of the metric by step, the largest one best."""
    best = max(values, key=values.get)
    return {
        "steps": steps,
        "curve": [{"step": step, "loss": 1 / step, "lr": 0.1} for step in range(1, 101)],
        "validations": [{"step": step, metric: value} for step, value in values.items()],
        "best": {"step": best, "metric": metric, "value": values[best]},
    }


TEACHER = learned("pair_accuracy", {0: 0.519, 900: 0.712, 1234: 0.704})
PERPLEXITY = [
    {"step": 0, "perplexity": 1043.2, "perplexity_head": 900.0, "perplexity_tail": 2000.0},
    {"step": 500, "perplexity": 26.94, "perplexity_head": 20.0, "perplexity_tail": 40.0},
]
DECODER = learned("perplexity", {0: 0.0}, 500) | {
    "validations": PERPLEXITY,
    "best": {"step": 500, "metric": "perplexity", "value": 26.94},
}


def drawn(training):
    """The pictures of how the models learned."""
    return [source for stage in report._learned(training) for _, source in stage["pictures"]]


def test_the_page_says_how_each_stage_went_in_their_order(found):
    training = {"distill": learned("teacher_pair_accuracy", {0: 0.8, 44: 0.6}, 44), "finetune": TEACHER}
    text = page(found | {"training": training | {"pretrain": DECODER}})
    assert len(re.findall("<img", text)) == 3 + 6
    assert re.findall(r"<h3>(\w+), .*</h3>\s*<p>(.*)</p>", text) == [
        ("Decoder", "500 steps, best at step 500: perplexity 26.9 (1,043.2 at step 0)."),
        ("Teacher", "1,234 steps, best at step 900: pair accuracy 0.71 (0.52 at step 0)."),
        ("Student", "44 steps, best at step 0: teacher pair accuracy 0.80."),
    ]


def test_the_page_says_nothing_of_learning_where_the_report_has_none(found):
    text = page(found)
    assert "How the models learned" not in text
    assert page(found | {"training": {}}) == page(found | {"training": {"finetune": {"steps": 3}}}) == text


def test_a_stage_without_validation_queries_has_its_loss_alone(found):
    bare = TEACHER | {"validations": [{"step": 0}, {"step": 1234}], "best": None}
    assert "1,234 steps, none of them measured on validation queries." in page(found | {"training": {"finetune": bare}})
    assert len(drawn({"finetune": bare})) == 1


def test_each_picture_of_learning_moves_with_its_own_numbers_alone():
    steep = TEACHER | {"curve": [{"step": step, "loss": 2 / step**2} for step in range(1, 101)]}
    other = TEACHER | {"validations": [*TEACHER["validations"][:2], {"step": 1234, "pair_accuracy": 0.6}]}
    chosen = TEACHER | {"best": TEACHER["best"] | {"step": 1234, "value": 0.704}}
    loss, accuracy = drawn({"finetune": TEACHER})
    assert drawn({"finetune": steep})[1] == accuracy != drawn({"finetune": other})[1]
    assert drawn({"finetune": other})[0] == loss != drawn({"finetune": steep})[0]
    assert drawn({"finetune": chosen})[1] != accuracy


def test_perplexity_has_a_line_for_all_queries_and_for_each_band_that_was_measured():
    assert report._lines(DECODER, "perplexity") == {
        "all": "perplexity",
        "head": "perplexity_head",
        "tail": "perplexity_tail",
    }
    assert report._measured(DECODER, "perplexity_tail") == {0: 2000.0, 500: 40.0}
    assert report._lines(TEACHER, "pair_accuracy") == {"pair accuracy": "pair_accuracy"}
    other = DECODER | {"validations": [PERPLEXITY[0], PERPLEXITY[1] | {"perplexity_tail": 60.0}]}
    assert drawn({"pretrain": other})[1] != drawn({"pretrain": DECODER})[1]


def test_the_running_mean_of_a_loss_takes_as_many_neighbours_as_there_are():
    assert pictures.means([0.0, 3.0, 6.0, 15.0], 1) == [1.5, 3.0, 8.0, 10.5]


@pytest.mark.parametrize(
    ("largest", "ticks"),
    [(260.0, ["50", "100", "150", "200", "250"]), (280.0, ["50", "100", "200"])],
)
def test_the_axis_goes_by_factors_where_values_differ_more_than_tenfold(largest, ticks):
    picture = pictures.validations({"all": {0: largest, 5: 27.0}}, (5, 27.0), "perplexity")
    words = re.findall("<!-- (.*?) -->", base64.b64decode(picture.split(",")[1]).decode())
    assert words[words.index("step") + 1 : words.index("perplexity")] == ticks
