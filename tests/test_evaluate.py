"""The job without a cluster and without models: what it reads, scores twice, and writes."""

import json
import re
from pathlib import Path

import pytest
import pytrec_eval

from disranker import recipe as recipes
from disranker import stages
from disranker.recipe import Refused
from disranker.store import Store
from jobs import evaluate, parts

QUERIES = {"red shoe": "head", "tent": "tail", "blue old 50% mug": "tail", "sock": "unseen"}
TRAINED = {"steps": 3, "pairs": 9, "train": 1, "validation": 1, "test": 4}


class Words:
    """A student that counts the words which query and title share, and keeps what it was asked."""

    asked: list[str] = []  # noqa: RUF012

    def __init__(self, folder):
        self.folder = folder

    def scores(self, queries, titles, summaries):
        self.asked += queries[:1]
        return [float(len({*query.split()} & {*title.split()})) for query, title in zip(queries, titles, strict=True)]


class Graded:
    """A teacher that knows the grades, and fails on one document."""

    @classmethod
    def of(cls, recipe, store):
        return cls()

    labelled = of

    def scores(self, groups):
        return [[None if doc["doc_id"] == "d3" else float(doc["grade"]) for doc in group["docs"]] for group in groups]


@pytest.fixture
def made(tmp_path, monkeypatch):
    """(recipe as plain values, store) of a run of 2 parts that stands up to its student."""
    store = Store(str(tmp_path / "run"))
    titles = ["red shoe", "tent", "blue old mug", "sock"]
    docs = [{"doc_id": f"d{i}", "title": title, "summary": "it is one"} for i, title in enumerate(titles)]
    store.write("documents", 0, docs)
    for part, queries in enumerate((list(QUERIES)[:2], list(QUERIES)[2:])):
        rows = [
            {"query": query, "split": "test", "band": QUERIES[query], "docs": graded(query, docs)} for query in queries
        ]
        store.write("groups", part, [*rows, rows[0] | {"query": f"train {part}", "split": "train"}])
    clicks = [("red shoe", 2), ("tent", 0), ("blue old 50% mug", 1), ("train 0", 5)]
    store.write("evidence", 0, [{"query": query, "doc_id": "d0", "clicks": n} for query, n in clicks])
    for name in ("documents", "groups", "evidence", "searches", "rejects", "teacher", "labels", "student"):
        store.commit(name, {"counts": TRAINED, "versions": {"python": "3"}})
    monkeypatch.setattr(evaluate, "Teacher", Graded)
    monkeypatch.setattr(evaluate, "Engine", Words)
    monkeypatch.setattr(Words, "asked", [])
    monkeypatch.setattr(parts, "each_by", lambda n, worker, *given: [worker(*given)(part) for part in range(n)])
    return {"root": store.root, "ingest": {"parts": 2}, "evaluate": {"resamples": 50}}, store


def graded(query, docs):
    return [doc | {"source": "judged", "grade": 3 if doc["title"].split()[-1] in query else 0} for doc in docs]


def run(content, store):
    """The counts of the job, and its report."""
    recipe = recipes.parse(content)
    counts = evaluate.run(recipe, store, stages.step(recipe, "evaluate"))
    return counts, json.loads(Path(store.at("report", "report.json")).read_text())


def with_settings(made, **settings):
    return made[0] | {"evaluate": made[0]["evaluate"] | settings}, made[1]


def test_4_test_queries_of_2_parts_are_scored_by_3_models_and_again_as_perturbed(made):
    counts, report = run(*made)
    assert counts == {"queries": 4, "scores": 44, "bm25": "1.000", "teacher": "0.750", "student": "1.000"}
    assert list(report["runs"]) == ["bm25", "teacher", "student"]
    rows = made[1].read_files("perturbed", made[1].written("perturbed")).to_pylist()
    kinds = {(row["query"], row["kind"]) for row in rows}
    assert len(kinds) == 4 + 2 + 2 and len(rows) == len(kinds) * 4 * 2
    assert {row["text"] for row in rows} == set(Words.asked) - set(QUERIES)
    measured = {(row["kind"], row["model"]): row["queries"] for row in report["perturbed"]}
    of_kind = {"typo": 4, "words swapped": 2, "word dropped": 2}
    assert measured == {(kind, model): n for kind, n in of_kind.items() for model in ("bm25", "student")}


def test_perturb_false_scores_each_of_4_queries_once(made):
    _, report = run(*with_settings(made, perturb=False))
    assert report["perturbed"] == [] and sorted(Words.asked) == sorted(QUERIES)


def test_a_query_with_0_clicks_and_one_never_searched_are_the_2_never_clicked(made):
    _, report = run(*made)
    sizes = {by: {name: of["queries"] for name, of in cut.items()} for by, cut in report["slices"].items()}
    assert sizes["band"] == {"head": 1, "tail": 1, "never clicked": 2}
    assert sizes["query_words"] == {"1 word": 2, "2 words": 1, "4 words or more": 1}
    assert sum(sizes["document_words"].values()) == 4


def test_a_run_of_others_stands_before_the_student_with_1_of_4_queries_and_its_own_file(made, tmp_path):
    (tmp_path / "old.run").write_text("red%20shoe Q0 d0 1 2.0 a/b\nred%20shoe Q0 x 2 1.0 a/b\n")
    counts, report = run(*with_settings(made, runs=[str(tmp_path / "*.run")]))
    assert list(report["runs"]) == ["bm25", "teacher", "a/b", "student"] and counts["a/b"] == "0.250"
    assert report["missing"]["a/b"] == 3 and report["unjudged"]["a/b"]["value"] == 0.5
    assert ("student", "a/b") in {(pair["a"], pair["b"]) for pair in report["pairs"]}
    names = {file.base_name for file in made[1].files("report")}
    assert names == {
        *("report.json", "report.html", "qrels.txt"),
        *("bm25.run", "teacher.run", "student.run", "a%2Fb.run"),
    }
    assert "better" in Path(made[1].at("report", "report.html")).read_text()


def test_labels_of_another_teacher_are_refused_before_anything_is_scored(made, monkeypatch):
    def another(recipe, store):
        raise Refused("the labels are of teacher x")

    monkeypatch.setattr(Graded, "labelled", another)
    with pytest.raises(Refused, match="the labels are of teacher x"):
        run(*made)
    assert not made[1].written("scores")


def test_a_bad_run_of_others_is_refused_before_anything_is_scored(made, tmp_path):
    (tmp_path / "old.run").write_text("red%20shoe Q0 d0 1 2.0\n")
    with pytest.raises(Refused, match=r"old\.run line 1: 5 columns"):
        run(*with_settings(made, runs=[str(tmp_path / "old.run")]))
    assert Words.asked == []
    with pytest.raises(Refused, match=r"evaluate\.runs: nothing at .*/none\.run"):
        run(*with_settings(made, runs=[str(tmp_path / "none.run")]))


def test_a_changed_run_of_others_makes_the_evaluation_run_again(made, tmp_path):
    content, _ = with_settings(made, runs=[str(tmp_path / "old.run")])
    prints = []
    for text in ("a", "ab"):
        (tmp_path / "old.run").write_text(text)
        prints.append(stages.step(recipes.parse(content), "evaluate").fingerprint)
    assert prints[0] != prints[1]


def test_anyone_finds_the_ndcg_of_4_queries_in_the_files_of_the_report(made):
    _, report = run(*made)
    folder = Path(made[1].at("report"))
    judged = pytrec_eval.parse_qrel((folder / "qrels.txt").read_text().splitlines())
    gained = {q: {d: 2**g - 1 for d, g in of.items()} for q, of in judged.items()}
    for name in ("bm25", "teacher", "student"):
        theirs = pytrec_eval.parse_run((folder / f"{name}.run").read_text().splitlines())
        values = pytrec_eval.RelevanceEvaluator(gained, {"ndcg_cut.10"}).evaluate(theirs)
        mean = sum(value["ndcg_cut_10"] for value in values.values()) / len(judged)
        assert report["runs"][name]["ndcg@10"]["value"] == pytest.approx(mean)


def test_no_test_query_is_refused_and_nothing_is_divided_by_0(made):
    made[1].write("groups", 0, [])
    made[1].write("groups", 1, [])
    with pytest.raises(Refused, match="no judged query"):
        run(*made)


def test_the_page_shows_the_largest_wins_over_bm25_and_over_the_teacher(made):
    run(*made)
    text = Path(made[1].at("report", "report.html")).read_text()
    assert re.findall(r'class="duel">(.*?)<', text) == ["student against teacher"]  # on BM25 it gains nothing
