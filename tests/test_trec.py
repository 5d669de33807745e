"""Runs and qrels that leave, and runs of others that come in."""

import numpy as np
import pytest
import pytrec_eval

from disranker import report, trec
from disranker.recipe import Evaluate, Refused

QRELS = {"red shoe": {"a": 3, "b c": 0}, "50% off": {"a": 1}}


def put(path, text):
    path.write_text(text)
    return str(path)


def one(tmp_path, text, taken=()):
    """The only run in a file `theirs.v2.run`, with its name."""
    ((name, run),) = trec.outside([put(tmp_path / "theirs.v2.run", text)], QRELS, taken).items()
    return name, run


def test_a_run_of_others_is_read_by_the_ids_that_our_own_files_give_2_queries(tmp_path):
    ours = {"red shoe": {"a": 2.0, "b c": 1.5}, "50% off": {"a": 1.0}}
    text = "\n".join(trec.run_lines(ours, "theirs"))
    assert "red%20shoe" in text and "50%25%20off" in text
    assert one(tmp_path, text) == ("theirs", ours)


def test_between_tabs_a_query_may_be_its_text_in_another_spelling(tmp_path):
    assert one(tmp_path, "Red  SHOE\tQ0\ta\t1\t2.5\tbm25f\n") == ("bm25f", {"red shoe": {"a": 2.5}})


def test_an_id_comes_before_a_text_that_looks_like_it_and_either_is_found_alone(tmp_path):
    file = put(tmp_path / "x.run", "a%20b Q0 d 1 1 x\n")
    both = {"a b": {"d": 1}, "a%20b": {"d": 1}}
    assert [list(trec.outside([file], qrels, ())["x"]) for qrels in (both, {"a%20b": {"d": 1}})] == [["a b"], ["a%20b"]]
    file = put(tmp_path / "x.run", "a%2520b Q0 d 1 1 x\n")
    assert list(trec.outside([file], both, ())["x"]) == ["a%20b"]


def test_a_document_id_with_a_percent_sign_is_taken_as_it_stands_unless_only_its_plain_form_is_judged():
    assert trec._document("x%20y", {"x%20y", "x y"}) == "x%20y"
    assert trec._document("b%20c", {"b c"}) == "b c"
    assert trec._document("x%20y", {"a"}) == "x%20y"


def test_queries_without_judgments_are_left_out_and_1_remains(tmp_path):
    assert one(tmp_path, "red%20shoe Q0 a 1 2.5 x\nother Q0 a 1 2.5 x\n")[1] == {"red shoe": {"a": 2.5}}


@pytest.mark.parametrize(
    ("tags", "taken", "name"),
    [(("x", "x"), (), "x"), (("x", "y"), (), "theirs"), (("student", "student"), ("student",), "theirs")],
)
def test_a_run_is_named_by_its_tag_or_by_its_file_where_it_has_2_tags_or_one_that_is_taken(tmp_path, tags, taken, name):
    assert one(tmp_path, f"red%20shoe Q0 a 1 2 {tags[0]}\nred%20shoe Q0 b 2 1 {tags[1]}\n", taken)[0] == name


def test_2_files_with_one_tag_are_2_runs_and_a_third_of_the_same_file_name_is_refused(tmp_path):
    (tmp_path / "old").mkdir()
    line = "red%20shoe Q0 a 1 2 x\n"
    files = [put(tmp_path / name, line) for name in ("1.run", "2.run", "old/2.run")]
    assert list(trec.outside(files[:2], QRELS, ())) == ["x", "2"]
    with pytest.raises(Refused, match=r"old/2\.run: there is a run named 2 already"):
        trec.outside(files, QRELS, ())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("red%20shoe Q0 a 1 2 x\nred shoe Q0 a 1 2 x\n", "line 2: 7 columns; a TREC run has query id"),
        ("red shoe\tQ0\t\t1\t2\tx\n", "line 1: 6 columns"),
        ("red%20shoe Q0 a 1 many x\n", "line 1: score many is no finite number"),
        ("1 Q0 a 1 2 x\n2 Q0 a 1 2 x\n", "none of its 2 queries has judgments; they are named like red%20shoe"),
        ("red%20shoe Q0 a 1 2 x\nRed%20shoe Q0 a 1 2 x\n", "query 'red shoe' stands there under two names"),
        ("", "none of its 0 queries"),
    ],
)
def test_a_bad_run_of_others_is_refused_with_its_file_and_line(tmp_path, text, reason):
    with pytest.raises(Refused, match=r"theirs\.v2\.run:? " + reason):
        one(tmp_path, text)


def test_qrels_come_back_with_3_judgments_under_the_ids_of_the_runs(tmp_path):
    lines = list(trec.qrels_lines(QRELS))
    assert lines == ["50%25%20off 0 a 1", "red%20shoe 0 a 3", "red%20shoe 0 b%20c 0"]
    found = trec.qrels(put(tmp_path / "qrels.txt", "\n".join(lines)))
    assert found == {"50%25%20off": {"a": 1}, "red%20shoe": {"a": 3, "b%20c": 0}}


@pytest.mark.parametrize("line", ["q 0 a", "q 0 a high", "q 0 a 1 2"])
def test_a_line_that_is_no_judgment_is_refused_with_its_number(tmp_path, line):
    with pytest.raises(Refused, match=r"qrels\.txt line 2: a line of qrels has"):
        trec.qrels(put(tmp_path / "qrels.txt", f"q 0 b -1\n{line}\n"))


def test_pytrec_eval_finds_the_ndcg_of_the_report_in_its_files_over_30_queries():
    rng = np.random.default_rng(1)
    documents = [f"d {i}" for i in range(14)]
    qrels = {f"red 50% shoe {i}": dict(zip(documents, rng.integers(0, 5, 14).tolist(), strict=True)) for i in range(30)}
    # As the table of scores has them, in float32, and some alike: a tie must be broken in the same way.
    run = {q: {d: float(np.float32(round(g + 2 * rng.normal(), 1))) for d, g in of.items()} for q, of in qrels.items()}
    del run["red 50% shoe 7"]
    theirs = pytrec_eval.parse_run(trec.run_lines(run, "student"))
    judged = pytrec_eval.parse_qrel(trec.qrels_lines(qrels))
    gained = {q: {d: 2**g - 1 for d, g in of.items()} for q, of in judged.items()}
    values = pytrec_eval.RelevanceEvaluator(gained, {"ndcg_cut.10"}).evaluate(theirs)
    ours = report.evaluate(qrels, {"student": run}, Evaluate(resamples=10), 1)["runs"]["student"]["ndcg@10"]["value"]
    assert len(values) == 29
    assert ours == pytest.approx(sum(value["ndcg_cut_10"] for value in values.values()) / len(judged))
