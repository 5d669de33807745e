import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from disranker import sources
from disranker.recipe import Refused


def written(path, rows):
    """Rows as parquet, JSON lines or gzip JSON lines, by the name."""
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return str(path)


def documents(*files):
    """(rows, rejects, counts) of all files as one part."""
    return sources.unique_documents(pa.concat_tables(block for file in files for block in sources.documents(file, 3)))


DOCUMENTS = [
    {"doc_id": "b", "title": " Shoe ", "summary": None},
    {"doc_id": "a", "title": None, "summary": "warm"},
    {"doc_id": "b", "title": "again", "summary": "x"},
    {"doc_id": None, "title": "t", "summary": "s"},
    {"doc_id": "c", "title": " ", "summary": None},
]


@pytest.mark.parametrize("name", ["d.parquet", "d.jsonl", "d.jsonl.gz"])
def test_5_rows_give_2_documents_1_duplicate_and_2_rejects(tmp_path, name):
    found, rejects, counts = documents(written(tmp_path / name, DOCUMENTS))
    assert found.to_pylist() == [
        {"doc_id": "a", "title": "", "summary": "warm"},
        {"doc_id": "b", "title": "Shoe", "summary": ""},
    ]
    told = [(row["line"], row["reason"]) for row in rejects.to_pylist()]
    assert told == [(4, "no doc_id"), (5, "neither title nor summary")] and counts == {"duplicate_documents": 1}
    assert json.loads(rejects["raw"][0].as_py()) == DOCUMENTS[3]


def test_the_first_of_2_files_wins_whatever_their_order_in_the_part(tmp_path):
    first = written(tmp_path / "1.jsonl", [{"doc_id": "a", "title": "old", "summary": ""}])
    second = written(tmp_path / "2.jsonl", [{"doc_id": "a", "title": "new", "summary": ""}])
    assert documents(second, first)[0]["title"].to_pylist() == ["old"]


def test_a_number_is_an_id_even_0(tmp_path):
    file = written(tmp_path / "d.jsonl", [{"doc_id": n, "title": "t", "summary": ""} for n in (0, 7)])
    assert documents(file)[0]["doc_id"].to_pylist() == ["0", "7"]


def test_equal_ids_of_2_files_meet_in_one_part(tmp_path):
    rows = [{"doc_id": f"d{n}", "title": "t", "summary": ""} for n in range(30)]
    tables = [next(sources.documents(written(tmp_path / name, rows), 4)) for name in ("1.jsonl", "2.parquet")]
    parts = [dict(zip(t["doc_id"].to_pylist(), t["part"].to_pylist(), strict=True)) for t in tables]
    assert parts[0] == parts[1] and set(parts[0].values()) == {0, 1, 2, 3}


@pytest.mark.parametrize("name", ["d.parquet", "d.jsonl"])
@pytest.mark.parametrize(("what", "missing"), [("documents", "title, summary"), ("judgments", "query, grade")])
def test_missing_columns_are_refused_beside_those_there_are(tmp_path, name, what, missing):
    file = written(tmp_path / name, [{"doc_id": "a", "text": "b"}])
    with pytest.raises(Refused, match=rf"data\.{what}: .*{name}: no column {missing}; it has doc_id, text"):
        list(sources.rows(file, what))


@pytest.mark.parametrize("name", ["d.parquet", "d.jsonl.gz"])
def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path, name):
    (tmp_path / name).write_text("neither of both")
    with pytest.raises(Refused, match="cannot be read as documents") as caught:
        documents(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_broken_lines_after_the_first_are_rejects(tmp_path):
    good = json.dumps({"doc_id": "a", "title": "half \ud83d", "summary": ""}).encode()
    (tmp_path / "d.jsonl").write_bytes(
        b"\n".join([good, b"{", b"\xff", b"[" * 100_000, b"[1]", b"", b'{"doc_id": "z"}'])
    )
    found, rejects, _ = documents(str(tmp_path / "d.jsonl"))
    assert found["title"].to_pylist() == ["half \ufffd"]
    assert [(row["line"], row["reason"]) for row in rejects.to_pylist()] == [
        (2, "not JSON"),
        (3, "not UTF-8"),
        (4, "not JSON"),
        (5, "not a JSON object"),
        (7, "neither title nor summary"),
    ]
    assert rejects["raw"].to_pylist()[:2] == ["{", "\ufffd"]


def test_25000_rows_come_in_2_blocks_and_are_numbered_from_1(tmp_path):
    rows = [{"doc_id": str(n), "title": "t", "summary": ""} for n in range(25_000)]
    for name in ("d.parquet", "d.jsonl"):
        blocks = list(sources.rows(written(tmp_path / name, rows), "documents"))
        assert [len(block) for block in blocks] == [20_000, 5_000]
        assert (blocks[0][0][0], blocks[1][0][0], blocks[1][-1][0]) == (1, 20_001, 25_000)


def test_a_parquet_file_with_more_columns_reads_its_own_alone(tmp_path):
    file = written(tmp_path / "j.parquet", [{"query": "a", "doc_id": "d", "grade": 1, "split": "test", "rater": "x"}])
    assert list(sources.rows(file, "judgments")) == [[(1, {"query": "a", "doc_id": "d", "grade": 1, "split": "test"})]]


def judgment(**changed):
    return {"query": " Red  SHOE", "doc_id": "d", "grade": 3} | changed


def test_a_judgment_has_its_query_normalised_and_a_split_if_given(tmp_path):
    file = written(tmp_path / "j.jsonl", [judgment(), judgment(doc_id=7, grade=2.0, split="test")])
    good, refused = sources.judgments([file])
    assert refused == [] and good.drop("file").rows() == [
        (1, "red shoe", "d", 3, None),
        (2, "red shoe", "7", 2, "test"),
    ]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"query": ""}, "no query"),
        ({"query": None}, "no query"),
        ({"query": " \u3000"}, "no query"),
        ({"doc_id": ""}, "no doc_id"),
        ({"doc_id": None}, "no doc_id"),
        *(
            ({"grade": grade}, "grade is no whole number from 0 to 10")
            for grade in ("3", None, True, 1.5, -1, 11, float("nan"))
        ),
        ({"grade": float("inf")}, "grade is no whole number from 0 to 10"),
        ({"split": "dev"}, "split is none of train, validation, test"),
    ],
)
def test_a_bad_judgment_is_a_reject_with_its_reason(tmp_path, changed, reason):
    good, refused = sources.judgments([written(tmp_path / "j.jsonl", [judgment(), judgment(**changed)])])
    assert len(good) == 1 and [(row["line"], row["reason"]) for row in refused] == [(2, reason)]


@pytest.mark.parametrize("grade", [0, 10])
def test_grades_0_and_10_are_taken(tmp_path, grade):
    good, refused = sources.judgments([written(tmp_path / "j.parquet", [judgment(grade=grade)])])
    assert good["grade"].to_list() == [grade] and refused == []


def test_what_is_accepted_carries_no_raw_text(tmp_path):
    block = next(sources.documents(written(tmp_path / "d.jsonl", DOCUMENTS), 1))
    assert [raw is None for raw in block["raw"].to_pylist()] == [True, True, True, False, False]


def test_no_files_give_no_judgments_of_the_same_columns():
    good, refused = sources.judgments([])
    assert good.columns == ["file", "line", "query", "doc_id", "grade", "split"] and len(good) == len(refused) == 0
