"""Tables out and in again: what is written is read as the same rows, here and by the tools of others."""

import json
import re
from pathlib import Path
from urllib.parse import unquote

import ir_measures
import polars as pl
import pyarrow as pa
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disranker import cleaning, exports, sources, tables, trec
from disranker.recipe import Refused
from disranker.store import Store
from jobs import export

TEXT = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \t\r\n\"',%#\ufeff\u2028\x00\\"), max_size=12
)
SOME = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = {"judgments": ["query", "doc_id", "grade", "split"], "documents": ["doc_id", "title", "summary"]}
JUDGMENT = st.fixed_dictionaries(
    {
        "query": TEXT.map(cleaning.normalise).filter(bool),
        "doc_id": TEXT.filter(bool),
        "grade": st.integers(0, 10),
        "split": st.sampled_from([None, "train", "validation", "test"]),
    }
)
DOCUMENT = st.fixed_dictionaries({"doc_id": TEXT.filter(bool), "title": TEXT.map(str.strip), "summary": st.just("s")})


def written(what, form, rows, place, parts=1):
    """The files that a table of these rows becomes, in the order they were written."""
    table = tables.conform(what, rows)
    size = -(-len(rows) // parts) or 1
    files = exports.files(what, form, (table.slice(at, size) for at in range(0, len(rows), size)))
    for name, write in files.items():
        Store(str(place)).put(write, *([name] if name else []))
    return [str(place / name) if name else str(place) for name in files]


def judgments(files, topics=()):
    """Good rows, without order; nothing may be refused."""
    good, refused = sources.judgments(files, topics)
    assert refused == []
    return sorted(good.select(NAMES["judgments"]).rows(), key=repr)


def once(rows, *keys):
    return list({tuple(row[key] for key in keys): row for row in rows}.values())


def tuples(what, rows):
    return sorted((tuple(row[name] for name in NAMES[what]) for row in rows), key=repr)


@SOME
@given(rows=st.lists(JUDGMENT, max_size=8).map(lambda rows: once(rows, "query", "doc_id")))
@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "beir"])
def test_judgments_of_any_text_come_back_with_their_split_from_4_formats(tmp_path, form, rows):
    files = written("judgments", form, rows, tmp_path / f"j.{form}", parts=2)
    assert judgments([file for file in files if not file.endswith("queries.jsonl")]) == tuples("judgments", rows)
    for file in files:
        Path(file).unlink()


@SOME
@given(rows=st.lists(JUDGMENT, min_size=1, max_size=8).map(lambda rows: once(rows, "query", "doc_id")))
def test_judgments_of_any_text_come_back_from_the_workbench_without_their_split(tmp_path, rows):
    [file] = written("judgments", "workbench", rows, tmp_path / "j.json")
    assert judgments([file]) == tuples("judgments", [row | {"split": None} for row in rows])


@SOME
@given(rows=st.lists(JUDGMENT, max_size=8))
def test_judgments_with_ids_without_white_space_come_back_from_trec_files(tmp_path, rows):
    rows = once((row | {"doc_id": "d" + "".join(row["doc_id"].split())} for row in rows), "query", "doc_id")
    topics, *qrels = written("judgments", "trec", rows, tmp_path)
    assert judgments(qrels, [topics]) == tuples("judgments", rows)
    theirs = {(q.query_id, q.doc_id, q.relevance) for file in qrels for q in ir_measures.read_trec_qrels(file)}
    ours = {(trec.field(row["query"]), row["doc_id"], row["grade"]) for row in rows}
    assert theirs == ours


@SOME
@given(rows=st.lists(DOCUMENT, max_size=8).map(lambda rows: once(rows, "doc_id")))
@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "beir"])
def test_documents_of_any_text_come_back_from_4_formats(tmp_path, form, rows):
    [file] = written("documents", form, rows, tmp_path / f"d.{form}", parts=3)
    blocks = [sources.DOCUMENT.empty_table(), *sources.documents(file, 2)]
    found, rejects, _ = sources.unique_documents(pa.concat_tables(blocks))
    assert rejects.num_rows == 0 and tuples("documents", found.to_pylist()) == tuples("documents", rows)
    Path(file).unlink()


SCORES = [
    {"query": query, "doc_id": doc, "model": model, "score": score}
    for model in ("bm25", "student")
    for query in ("50% red shoe", "鞋\u3000子")
    for doc, score in (("a", 0.1), ("b%20", -3e-8), ("c", 0.1), ("d", 7.0))
]


def test_runs_of_2_models_come_back_to_the_last_bit_here_and_in_ir_measures(tmp_path):
    files = written("scores", "trec", SCORES, tmp_path, parts=3)
    assert [file.rsplit("/", 1)[1] for file in files] == ["bm25.run", "student.run"]
    for file in files:
        found = trec.run(file)
        assert {unquote(query) for query in found} == {"50% red shoe", "鞋\u3000子"}
        assert all(
            list(scores) == ["d", "c", "a", "b%20"] for scores in found.values()
        )  # best first, as trec_eval has it
        exact = pa.array([0.1, -3e-8], pa.float32()).to_pylist()
        assert all([scores["a"], scores["b%20"]] == exact for scores in found.values())
        theirs = [(doc.query_id, doc.doc_id, doc.score) for doc in ir_measures.read_trec_run(file)]
        assert theirs == [(query, doc, score) for query in found for doc, score in found[query].items()]


def test_a_run_counts_ranks_from_1_and_names_its_model(tmp_path):
    [file] = written("scores", "trec", SCORES[:2], tmp_path)
    assert Path(file).read_text().splitlines()[0] == "50%25%20red%20shoe Q0 a 1 0.10000000149011612 bm25"


@pytest.mark.parametrize(
    ("form", "names"),
    [
        ("trec", ["topics.tsv", "qrels.train.txt", "qrels.dev.txt", "qrels.test.txt", "qrels.txt"]),
        ("beir", ["queries.jsonl", "qrels/train.tsv", "qrels/dev.tsv", "qrels/test.tsv", "qrels.tsv"]),
    ],
)
def test_judgments_of_3_splits_and_of_none_are_4_files_after_the_texts(form, names):
    rows = [ROW | {"split": split} for split in (None, "test", "validation", "train")]
    assert list(exports.files("judgments", form, [tables.conform("judgments", rows)])) == names


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_16_scores_as_a_table_have_the_columns_of_the_table(tmp_path, form):
    [file] = written("scores", form, SCORES, tmp_path / "s", parts=3)
    reader = {"jsonl": pl.read_ndjson, "csv": pl.read_csv, "parquet": pl.read_parquet}[form]
    found = reader(file)
    assert found.columns == tables.SCHEMAS["scores"].names and len(found) == 16


def test_a_query_id_hides_white_space_percent_signs_and_the_mark_of_utf_8_alone():
    assert trec.field("\ufeffrot 50%\u3000鞋/子") == "%EF%BB%BFrot%2050%25%E3%80%80鞋/子"


ROW = {"query": "red shoe", "doc_id": "a", "grade": 3, "split": "test"}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"doc_id": "a b"}, "cannot hold the document id 'a b'"),
        ({"doc_id": "a\u00a0b"}, "cannot hold the document id"),
        ({"query": "red\tshoe"}, "cannot hold 'red\\\\tshoe'"),
        ({"query": "red\nshoe"}, "cannot hold 'red\\\\nshoe'"),
    ],
)
def test_what_trec_cannot_hold_is_refused_before_a_file_is_there(tmp_path, changed, reason):
    with pytest.raises(Refused, match=reason):
        written("judgments", "trec", [ROW, ROW | changed], tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("what", "form"), [("documents", "trec"), ("documents", "workbench"), ("scores", "beir")])
def test_a_form_without_a_place_for_a_table_is_refused_beside_those_that_have_one(what, form):
    with pytest.raises(Refused, match=rf"{what} cannot be written as {form}; as \w+.*parquet they can"):
        exports.files(what, form, [])


def test_a_request_to_the_workbench_has_its_4_keys_and_ratings_in_text(tmp_path):
    [file] = written("judgments", "workbench", [ROW, ROW | {"doc_id": "b", "grade": 0}], tmp_path / "j.json")
    assert json.loads(Path(file).read_text()) == {
        "name": "disranker",
        "type": "IMPORT_JUDGMENT",
        "judgmentRatings": [
            {"query": "red shoe", "ratings": [{"docId": "a", "rating": "3.0"}, {"docId": "b", "rating": "0.0"}]}
        ],
    }


# The job


@pytest.fixture
def recipe(tmp_path):
    """A recipe whose run has 2 parts of documents and 1 of judgments, and no scores."""
    store = Store(str(tmp_path / "run"))
    for part, name in enumerate("ab"):
        store.write("documents", part, [{"doc_id": name, "title": f"title {name}", "summary": ""}])
    store.write("judgments", 0, [ROW])
    for table in ("documents", "judgments"):
        store.commit(table, {})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"root": store.root}))
    return str(path)


def call(recipe, what, form, to):
    return export.main(["--recipe", recipe, "--what", what, "--format", form, "--to", str(to)])


def test_both_parts_of_the_documents_are_in_one_csv_file_with_one_header(recipe, tmp_path, capsys):
    assert call(recipe, "documents", "csv", tmp_path / "new" / "d.csv") == 0
    assert (tmp_path / "new" / "d.csv").read_text() == 'doc_id,title,summary\na,title a,""\nb,title b,""\n'
    assert capsys.readouterr().out.endswith(f"export: documents -> {tmp_path}/new/d.csv\n")


def test_a_folder_of_beir_holds_3_files_that_are_read_again(recipe, tmp_path):
    for what in ("documents", "judgments"):
        assert call(recipe, what, "beir", f"file://{tmp_path}/beir") == 0
    files = sorted(str(path.relative_to(tmp_path / "beir")) for path in (tmp_path / "beir").rglob("*.*"))
    assert files == ["corpus.jsonl", "qrels/test.tsv", "queries.jsonl"]
    assert judgments([str(tmp_path / "beir" / "qrels" / "test.tsv")]) == [("red shoe", "a", 3, "test")]


def test_a_second_export_replaces_the_first_and_leaves_nothing_unfinished(recipe, tmp_path):
    for _ in range(2):
        assert call(recipe, "judgments", "trec", tmp_path / "trec") == 0
    assert sorted(path.name for path in (tmp_path / "trec").iterdir()) == ["qrels.test.txt", "topics.tsv"]
    assert (tmp_path / "trec" / "qrels.test.txt").read_text() == "red%20shoe 0 a 3\n"
    assert (tmp_path / "trec" / "topics.tsv").read_text() == "red%20shoe\tred shoe\n"


@pytest.mark.parametrize(
    ("what", "form", "to", "line"),
    [
        ("scores", "trec", "x", "refused: export: scores is not there in .*/run; run jobs.evaluate first"),
        ("documents", "trec", "x", "refused: documents cannot be written as trec"),
        ("documents", "csv", "d.csv.gz", "refused: --to .*d.csv.gz: files are written plain"),
    ],
)
def test_what_cannot_be_exported_exits_with_2_and_1_line(recipe, tmp_path, capsys, what, form, to, line):
    assert call(recipe, what, form, tmp_path / to) == 2
    found = capsys.readouterr().err
    assert re.match(line, found) and found.count("\n") == 1 and not (tmp_path / to).exists()


def test_a_place_that_cannot_be_written_exits_with_1_and_1_line(recipe, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert call(recipe, "judgments", "beir", tmp_path / "file") == 1
    assert capsys.readouterr().err.startswith(f"failed: export: {tmp_path}/file cannot be written: ")


def test_a_line_of_a_run_has_6_fields_even_where_ids_hold_spaces_or_percent_signs():
    found = trec.run_lines({"red shoes": {"a b": 0.1, "c%": 2.0}, "鞋 子": {"d": 1.0}}, "my run")
    assert list(found) == [
        "red%20shoes Q0 c%25 1 2.0 my%20run", "red%20shoes Q0 a%20b 2 0.1 my%20run", "鞋%20子 Q0 d 1 1.0 my%20run",
    ]  # fmt: skip
