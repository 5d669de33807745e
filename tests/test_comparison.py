"""Two reports side by side, as values and as the job."""

import json
import re
from dataclasses import replace
from urllib.parse import quote

import pytest
from rankings import CFG, judgments, run

from disranker import comparison, metrics, report, trec
from disranker.comparison import Side
from disranker.store import Store
from jobs import compare

SETTINGS = {"distill": {"lr": 7e-4, "beta": 1.0}, "evaluate": {"resamples": 300}}


def side(name, qrels, runs, settings=SETTINGS):
    return Side(name, report.evaluate(qrels, runs, CFG, 1), qrels, runs, settings)


@pytest.fixture(scope="module")
def qrels():
    return judgments()


@pytest.fixture(scope="module")
def a(qrels):
    return side("before", qrels, {"bm25": run(qrels, 6.0, 1), "student": run(qrels, 4.0, 3)})


@pytest.fixture(scope="module")
def b(qrels):
    runs = {"bm25": run(qrels, 6.0, 1), "student": run(qrels, 0.7, 3), "old/theirs": run(qrels, 1.0, 4)}
    return side("after", qrels, runs, SETTINGS | {"distill": {"lr": 1e-3, "beta": 1.0, "gamma": [1]}})


def found(a, b):
    return {(row["run"], row["metric"]): row for row in comparison.rows(a, b)}


def test_each_of_3_runs_has_10_rows_in_which_b_less_a_is_the_paired_difference(a, b, qrels):
    rows = found(a, b)
    assert len(rows) == 3 * len(metrics.METRICS)
    row = rows["student", "ndcg@10"]
    assert row["difference"] == pytest.approx(row["b"] - row["a"]) and row["low"] > 0
    tallies = [metrics.tally(qrels, one.runs["student"]) for one in (b, a)]
    alone = metrics.compare(*tallies, CFG, 0)["ndcg@10"]
    assert (row["low"], row["high"], row["p"]) == (alone.low, alone.high, alone.p)
    same = rows["bm25", "ndcg@10"]
    assert (same["difference"], same["low"], same["high"], same["p"]) == (0.0, 0.0, 0.0, 1.0)


def test_a_run_that_one_side_lacks_has_its_1_value_and_no_difference(a, b):
    row = found(a, b)["old/theirs", "ndcg@10"]
    assert row["a"] is None and row["b"] > 0.9
    assert (row["difference"], row["low"], row["high"], row["p"]) == (None, None, None, None)


def test_of_other_queries_the_difference_is_plain_and_a_note_says_how_many_are_the_same(a, qrels):
    fewer = dict(sorted(qrels.items())[:30])
    other = side("after", fewer, a.runs)
    row = found(a, other)["student", "ndcg@10"]
    assert row["low"] is None and row["difference"] == pytest.approx(row["b"] - row["a"]) != 0
    assert comparison.notes(a, other) == ["No intervals: of 40 and 30 queries, 30 are the same."]


def test_a_report_without_qrels_is_compared_without_intervals_and_named(a, b):
    old = replace(a, qrels={}, runs={})
    assert found(old, b)["student", "ndcg@10"]["low"] is None
    assert comparison.notes(old, b) == ["No intervals: before has no report/qrels.txt; evaluate again to get one."]
    assert found(replace(a, qrels={}), replace(b, qrels={}))["student", "ndcg@10"]["low"] is None


def test_a_metric_that_an_older_report_lacks_is_no_value(a, b):
    runs = {name: {k: v for k, v in of.items() if k != "p@5"} for name, of in a.report["runs"].items()}
    old = replace(a, report=a.report | {"runs": runs}, qrels={}, runs={})
    row = found(old, b)["student", "p@5"]
    assert row["a"] is None and row["difference"] is None and row["b"] is not None


def test_1_query_with_another_grade_is_said(a, b, qrels):
    query = min(qrels)
    regraded = qrels | {query: qrels[query] | {"d0": (qrels[query]["d0"] + 1) % 5}}
    assert comparison.notes(a, replace(b, qrels=regraded))[1].startswith("The judgments of 1 of them differ")
    assert len(comparison.notes(a, b)) == 1


def test_2_settings_differ_one_of_which_is_new(a, b):
    assert comparison.changed(a.settings, b.settings) == [("distill.gamma", None, [1]), ("distill.lr", 7e-4, 1e-3)]


def test_the_table_has_5_metrics_of_each_run_and_the_settings(a, b):
    text = comparison.table(a, b)
    assert text.startswith("A: before\nB: after\nBoth on the same 40 queries")
    lines = [line.split() for line in text.splitlines()]
    assert sum(line[:1] == ["student"] for line in lines) == 5
    assert next(line for line in lines if line[:2] == ["old/theirs", "PNR"])[2] == report.NONE
    assert re.search(r"student +NDCG@10 +0\.\d{3} +0\.\d{3} +\+0\.\d{3} \[\+0\.\d{3}, \+0\.\d{3}\]", text)
    assert re.search(r"distill\.lr +0\.0007 +0\.001", text) and re.search(
        rf"distill\.gamma +{report.NONE} +\[1\]", text
    )
    assert max(map(len, text.splitlines())) <= 120
    assert "No setting differs." in comparison.table(a, a)


def test_the_page_colours_what_is_better_and_worse_and_escapes_names(a, b):
    text = comparison.html(replace(a, name="<script>"), b)
    assert "<script" not in text and not re.search(r"https?:|<link|url\(|@import", text)
    better = sum(row["low"] is not None and row["low"] > 0 for row in comparison.rows(a, b))
    assert text.count('class="delta up"') == better > 5 and 'class="delta down"' not in text
    assert 'class="delta down"' in comparison.html(b, a)
    folded = text[text.index("The other metrics") :]
    assert folded.count("<td>student</td>") == 5 and "Pair accuracy" in folded
    assert "distill.lr" in text and "<p>None.</p>" in comparison.html(a, a)


# The job


def write(root, one):
    """What a run leaves of its evaluation, as far as the job reads it."""
    store = Store(str(root))
    store.put_text(json.dumps(one.report), "report", "report.json")
    for name, scores in one.runs.items():
        store.put_text(
            "".join(f"{line}\n" for line in trec.run_lines(scores, name)), "report", f"{quote(name, safe='')}.run"
        )
    if one.qrels:
        store.put_text("".join(f"{line}\n" for line in trec.qrels_lines(one.qrels)), "report", "qrels.txt")
    store.commit("report", {"settings": {"evaluate": one.settings["evaluate"]}, "versions": {"torch": root.name}})
    store.commit("student", {"settings": {"distill": one.settings["distill"]}})
    return str(root)


def test_the_job_finds_in_2_roots_what_was_written_there(tmp_path, a, b, capsys):
    roots = [write(tmp_path / name, one) for name, one in (("a", a), ("b", b))]
    assert compare.main([*roots, "--out", str(tmp_path / "new" / "c.html")]) == 0
    text = capsys.readouterr().out
    expected = comparison.table(replace(a, name=roots[0]), replace(b, name=roots[1]))
    metric_lines = [line for line in expected.splitlines() if re.match("bm25|student|old/theirs", line)]
    assert len(metric_lines) == 15 and all(line in text.splitlines() for line in metric_lines)
    assert re.search(r"distill\.lr +0\.0007 +0\.001", text) and re.search(r"version\.torch +a +b", text)
    assert "recipe.seed" not in text and "+0." in (tmp_path / "new" / "c.html").read_text()


def test_another_seed_is_a_setting_that_differs(tmp_path, a, capsys):
    roots = [write(tmp_path / str(n), replace(a, report=a.report | {"seed": n})) for n in (1, 2)]
    assert compare.main(roots) == 0
    assert re.search(r"recipe\.seed +1 +2", capsys.readouterr().out)


def test_a_report_of_an_older_version_is_compared_without_intervals(tmp_path, a, b, capsys):
    roots = [write(tmp_path / "a", replace(a, qrels={})), write(tmp_path / "b", b)]
    assert compare.main(roots) == 0
    assert f"No intervals: {roots[0]} has no report/qrels.txt" in capsys.readouterr().out


def test_a_root_without_a_report_exits_with_2_and_1_line(tmp_path, a, capsys):
    root = write(tmp_path / "a", a)
    assert compare.main([root, str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith(f"refused: compare: no report in {tmp_path}/none; run jobs.evaluate") and said.count("\n") == 1
    )


def test_a_place_that_cannot_be_written_exits_with_1_and_a_compressed_one_with_2(tmp_path, a, capsys):
    root = write(tmp_path / "a", a)
    (tmp_path / "file").write_text("")
    assert compare.main([root, root, "--out", str(tmp_path / "file" / "c.html")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert compare.main([root, root, "--out", str(tmp_path / "c.html.gz")]) == 2
