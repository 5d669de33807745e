import base64
import re
from itertools import pairwise

import pytest
from rankings import CFG, cut, run

from disranker import page as pages
from disranker import pictures, report


def page(found, title="Report", **others):
    return pages.html(found, title=title, **({"facts": {}, "examples": []} | others))


def test_the_page_escapes_a_title_with_a_script_everywhere(found):
    bad = "<script>alert(1)</script>"
    document = {"title": bad, "grade": 1, "rank_a": 1, "rank_b": None, "score_a": 1.0, "score_b": None}
    example = {"query": bad, "delta": 0.5, "a": "student", "b": "bm25", "documents": [document]}
    text = page(found, title=bad, facts={bad: bad}, examples=[example])
    assert "<script" not in text
    assert text.count("&lt;script&gt;") == 6  # title and heading, query, document, fact and its name


def test_the_page_fetches_nothing_and_is_the_same_twice(found):
    text = page(found)
    assert not re.search(r"https?:|<script|<link|url\(|@import", text)
    assert all(source.startswith("data:") for source in re.findall(r'src="([^"]*)', text))
    assert len(re.findall("<img", text)) == 4
    assert text == page(found)


def test_the_page_draws_2_slicings_and_none_where_none_are_given(found):
    assert "NDCG@10 by how often a query is asked" in page(found)
    bare = page(found | {"slices": {}})
    assert len(re.findall("<img", bare)) == 2 and "Where it is good" not in bare


def sources(found):
    return [source for _, source in pages._slices(found)]


def test_the_picture_of_a_slice_names_it_with_its_queries_and_moves_with_it_alone(found):
    band, words = sources(found)
    tail = found["slices"]["band"]["tail"]
    moved = {"tail": tail | {"runs": tail["runs"] | {"student": found["runs"]["bm25"]}}}
    other = found | {"slices": found["slices"] | {"band": found["slices"]["band"] | moved}}
    moved_band, moved_words = sources(other)
    assert moved_words == words and moved_band != band
    assert {"never clicked", "(1)"} <= set(texts(band))


PERTURBED = [
    {"kind": kind, "model": model, "queries": 1234, "clean": 0.7, "perturbed": 0.7 + by}
    | {"difference": by, "low": by - 0.03, "high": by + 0.03, "p": 0.01}
    for kind, by in (("typo", -0.2), ("word dropped", -0.1))
    for model in ("bm25", "student")
]


def texts(picture):
    return re.findall("<!-- (.*?) -->", base64.b64decode(picture.split(",")[1]).decode())


def test_a_run_of_others_with_a_name_of_40_letters_is_drawn_in_lines_of_22_at_most(qrels, runs):
    name = "production index with synonyms 2026-10-1"
    content = report.evaluate(qrels, {"bm25": runs["bm25"], name: runs["teacher"]}, CFG, 1, cut(qrels))
    drawn = [text for _, picture in pages._pictures(content) + pages._slices(content) for text in texts(picture)]
    assert {"production index with", f"{report.MINUS} bm25"} <= set(drawn)
    assert max(map(len, drawn)) <= 22


@pytest.mark.parametrize(
    ("names", "columns"),
    [(["bm25", "teacher", "student"], 3), (["a", "b", "c", "d", "e"], 4), (["bm25", "x" * 22], 1), (["y" * 60], 1)],
)
def test_a_legend_has_fewer_columns_for_longer_names(names, columns):
    assert pictures.legend_columns(names) == columns


def test_the_page_says_what_a_typo_costs_over_how_many_queries_and_that_the_teacher_was_not_scored(found):
    text = page(found | {"perturbed": PERTURBED})
    row = "<td>typo</td><td>student</td><td>1,234</td><td>0.700</td><td>0.500</td>"
    assert f"{row}<td>{report.MINUS}0.200 [{report.MINUS}0.230, {report.MINUS}0.170]</td>" in text
    assert "Not scored: teacher. For the teacher" in text
    assert len(re.findall("<img", text)) == 5
    assert "mistyped" not in page(found) and page(found | {"perturbed": []}) == page(found)


def test_the_page_says_how_many_of_the_first_10_nobody_graded(found):
    assert "have no human grade" not in page(found)
    strange = found["unjudged"] | {"bm25": {"value": 0.126, "low": 0.1, "high": 0.2}}
    assert "12.6% of the first 10 results of bm25 have no human grade" in page(found | {"unjudged": strange})


def test_the_page_has_5_metrics_in_sight_and_the_other_5_under_a_fold(found):
    text = page(found)
    places = [text.index(words) for words in ("<h2>Quality of each run", "The other metrics", "What the numbers mean")]
    seen, folded = (re.findall(r"<th>(.*?)</th>", text[a:b]) for a, b in pairwise(places))
    assert seen == ["Run", "NDCG@1", "NDCG@5", "NDCG@10", "MRR@10", "PNR"]
    assert folded == ["Run", "NDCG@3", "P@1", "P@5", "P@10", "Pair accuracy"]


def test_the_page_counts_wins_ties_and_losses_of_each_pair_that_has_examples(found, qrels, runs):
    shown = [one for b in ("bm25", "teacher") for one in report.examples(qrels, runs, "student", b, {}, k=2)]
    text = page(found, examples=shown)
    counts = {pair["b"]: pair for pair in found["outcomes"] if pair["a"] == "student"}
    for b in ("bm25", "teacher"):
        said = f"{counts[b]['wins']} queries won, {counts[b]['ties']} tied, {counts[b]['losses']} lost"
        assert said in text and f"student against {b}" in text
    assert (text.count("The 2 largest wins"), text.count("The 2 largest losses")) == (2, 1)
    assert counts["bm25"]["losses"] < 2


def test_the_page_says_that_40_queries_got_no_answer(qrels, runs):
    content = report.evaluate(qrels, {"bm25": runs["bm25"], "student": {}}, CFG, 1)
    assert "40 of the queries got no answer from student" in page(content)


def test_the_page_holds_a_report_whose_pnr_is_infinite(qrels):
    content = report.evaluate(qrels, {"bm25": run(qrels, 5.0), "student": run(qrels, 0.0)}, CFG, 1)
    assert "NDCG@10" in page(content)


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


def test_the_page_lists_each_runs_own_order_best_first(found):
    documents = [
        {"title": "Boot", "grade": 0, "rank_a": 2, "rank_b": 1, "score_a": 1.0, "score_b": 9.0},
        {"title": "Sandal", "grade": None, "rank_a": 1, "rank_b": 2, "score_a": 2.0, "score_b": 8.0},
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
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False, True, True]


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
    rows = re.findall(r"<tr( class=\"chosen\")?><td>(.*?)</td></tr>", text[text.index("How clicks are read") :])
    (ctr,), (pbm,) = ([cells for chosen, cells in rows if bool(chosen) == used and "0.26" in cells] for used in (0, 1))
    assert "plain click rate" in ctr and "0.566<small>[0.53, 0.60]" in ctr and "0.2611" in ctr and "used" not in ctr
    assert "position-based model" in pbm and "0.649<small>[0.62, 0.68]" in pbm and "0.2620" in pbm and "used" in pbm
    assert len(re.findall("<img", text)) == 5 and "Shuffled pages" in text


def test_the_page_says_which_click_model_is_used_why_and_how_far_shoppers_look(found):
    text = page(found | {"click_models": MODEL})
    assert "read by the position-based model (PBM): it agrees best with human grades on 100 validation queries" in text
    assert "result 5 is looked at 32% as often as the first" in text


def test_the_curve_is_drawn_in_order_down_to_position_20_and_moves_with_the_numbers(found):
    assert list(pages._curve(MODEL["examination"]["pbm"])) == [1, 2, 3, 4, 5, 10]
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
    assert len(re.findall("<img", text)) == 4 and "Agreement with grades" not in text


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
    return [source for stage in pages._learned(training) for _, source in stage["pictures"]]


def test_the_page_says_how_each_stage_went_in_their_order(found):
    training = {"distill": learned("teacher_pair_accuracy", {0: 0.8, 44: 0.6}, 44), "finetune": TEACHER}
    text = page(found | {"training": training | {"pretrain": DECODER}})
    assert len(re.findall("<img", text)) == 4 + 6
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


def test_a_student_is_drawn_beside_the_levels_of_bm25_and_the_teacher_on_human_grades():
    student = learned("teacher_pair_accuracy", {0: 0.5, 44: 0.8}, 44)
    student["validations"] = [one | {"pair_accuracy": 0.6} for one in student["validations"]]
    beside = student | {"baselines": {"bm25": 0.58, "teacher": 0.71}}
    (stage,) = pages._learned({"distill": beside})
    assert [caption for caption, _ in stage["pictures"]][2:] == [
        "Pairs in the order of human grades, validation queries"
    ]
    assert len(drawn({"distill": student})) == 2
    moved = beside | {"baselines": {"bm25": 0.5, "teacher": 0.71}}
    assert drawn({"distill": moved})[2] != drawn({"distill": beside})[2]


def test_perplexity_has_a_line_for_all_queries_and_for_each_band_that_was_measured():
    assert pages._lines(DECODER, "perplexity") == {
        "all": "perplexity",
        "head": "perplexity_head",
        "tail": "perplexity_tail",
    }
    assert pages._measured(DECODER, "perplexity_tail") == {0: 2000.0, 500: 40.0}
    assert pages._lines(TEACHER, "pair_accuracy") == {"pair accuracy": "pair_accuracy"}
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
