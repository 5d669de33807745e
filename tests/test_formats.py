"""The files of others: what is recognised, what is taken, what is refused and why."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from disranker import formats, sources, trec
from disranker.recipe import Refused


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def graded(*files, topics=()):
    """(query, document, grade, split) of all good rows, and (line, reason) of all rejects."""
    good, refused = sources.judgments(files, topics)
    pairs = good.select("query", "doc_id", "grade", "split").rows()
    return pairs, [(row["line"], row["reason"]) for row in refused]


def documents(file):
    """(line, doc_id, title, summary, reason) of all rows."""
    blocks = pa.concat_tables(sources.documents(file, 1)).to_pylist()
    return [tuple(row[name] for name in ("line", "doc_id", "title", "summary", "reason")) for row in blocks]


ROWS = [{"query": "red shoe", "doc_id": "a", "grade": 3}, {"query": "tent", "doc_id": "b", "grade": 0}]
PAIRS = [("red shoe", "a", 3, None), ("tent", "b", 0, None)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = "query,doc_id,grade\nred shoe,a,3\ntent,b,0\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("j.jsonl", LINES),
        ("j.ndjson", LINES),
        ("j.json", LINES),
        ("j", LINES),
        ("j.jsonl.gz", gzip.compress(LINES.encode())),
        ("j.jsonl.zst", pa.compress(LINES.encode(), "zstd", asbytes=True)),
        ("j.json", json.dumps(ROWS)),
        ("j.json", json.dumps(ROWS, indent=1)),
        ("j.jsonl", "\ufeff" + LINES),
        ("j.csv", CSV),
        ("j.csv", "\ufeff" + CSV.replace("\n", "\r\n")),
        ("j.csv.gz", gzip.compress(CSV.encode())),
        ("j.tsv", CSV.replace(",", "\t")),
        ("j.txt", CSV),
        ("j.txt", CSV.replace(",", "\t")),
        ("j.csv", "Query,docId,Rating\nred shoe,a,3.0\ntent,b,0\n"),
        ("j.csv", "rating,query,docid\n3.000,red shoe,a\n0.0,tent,b\n"),
    ],
)
def test_2_judgments_are_the_same_in_17_files(tmp_path, name, text):
    assert graded(put(tmp_path / name, text)) == (PAIRS, [])


@pytest.mark.parametrize("name", ["j.parquet", "j"])
def test_parquet_is_known_by_its_name_and_by_its_first_4_bytes(tmp_path, name):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / name)
    assert graded(str(tmp_path / name)) == (PAIRS, [])


def test_a_split_counts_in_any_row_of_json_lines_and_csv(tmp_path):
    lines = put(tmp_path / "j.jsonl", json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1] | {"split": "test"}))
    table = put(tmp_path / "j.csv", "split,query,doc_id,grade\n,red shoe,a,3\ntest,tent,b,0\n")
    assert graded(lines) == graded(table) == ([PAIRS[0], ("tent", "b", 0, "test")], [])


def test_a_csv_record_over_3_lines_keeps_its_quotes_and_breaks_and_the_line_it_begins_at(tmp_path):
    file = put(tmp_path / "d.csv", 'doc_id,title,summary\na,"5"" screen,\r\n\nwide",s\nb,,\n\nc,t,"x\ty"\n')
    assert documents(file) == [
        (2, "a", '5" screen,\r\n\nwide', "s", None),
        (5, "b", "", "", "neither title nor summary"),
        (7, "c", "t", "x\ty", None),
    ]


def test_3_bad_records_of_a_csv_file_are_3_rejects_and_the_rest_is_read(tmp_path):
    text = b'doc_id,title,summary\na,t\nb,"t"x,s\nc,\xff,s\n\xe9,t,s,u\nd,t,s\n'
    assert [(row[0], row[4]) for row in documents(put(tmp_path / "d.csv", text))] == [
        (2, "2 columns where the header has 3"),
        (3, "not CSV: ',' expected after '\"'"),
        (4, "not UTF-8"),
        (5, "4 columns where the header has 3"),
        (6, None),
    ]


def test_a_quote_that_is_never_closed_is_1_reject_that_says_which_lines_it_took(tmp_path):
    block = next(sources.documents(put(tmp_path / "d.csv", 'doc_id,title,summary\na,"t,s\nb,t,s\n'), 1)).to_pylist()
    assert [(row["line"], row["raw"]) for row in block] == [(2, "lines 2 to 3")]
    assert block[0]["reason"].startswith("not CSV: unexpected end")


@pytest.mark.parametrize("text", [b"\xff\xfed\x00o\x00c\x00_\x00", b'"doc_id"x,title,summary\n'])
def test_a_header_that_is_none_is_refused(tmp_path, text):
    with pytest.raises(Refused, match=r"data\.documents: .*d\.csv: the first line is no header in UTF-8"):
        documents(put(tmp_path / "d.csv", text))


def test_a_csv_file_without_columns_is_refused_and_an_empty_one_has_0_rows(tmp_path):
    with pytest.raises(Refused, match="no column query, doc_id, grade; it has q;d;g"):
        graded(put(tmp_path / "j.csv", "q;d;g\n"))
    assert graded(put(tmp_path / "e.csv", "")) == graded(put(tmp_path / "e.jsonl", "")) == ([], [])


def test_a_json_array_is_numbered_by_place_and_needs_objects(tmp_path):
    assert graded(put(tmp_path / "j.json", json.dumps([ROWS[0], 7, ROWS[1]]))) == (PAIRS, [(2, "not a JSON object")])
    with pytest.raises(Refused, match="no column query, doc_id, grade; it has none"):
        graded(put(tmp_path / "k.json", "[7]"))


@pytest.mark.parametrize("text", ["[1, 2", '{\n "query": "a",\n'])
def test_json_that_is_cut_off_is_refused(tmp_path, text):
    with pytest.raises(Refused, match=r"j\.json is not JSON, neither as a whole nor line by line"):
        graded(put(tmp_path / "j.json", text))


def test_1_object_over_several_lines_is_1_row(tmp_path):
    assert graded(put(tmp_path / "j.json", json.dumps(ROWS[0], indent=2))) == (PAIRS[:1], [])


def test_our_own_names_win_over_those_of_others(tmp_path):
    text = "query,doc_id,grade,docid,rating,query-id,corpus-id,score\ntent,a,3,b,4,7,c,5\n"
    assert graded(put(tmp_path / "j.csv", text)) == ([("tent", "a", 3, None)], [])


@pytest.mark.parametrize(("name", "columns"), [("j.jsonl.gz", "none"), ("j.gz", "query")])
def test_the_name_before_the_ending_of_compression_decides_where_the_first_line_does_not(tmp_path, name, columns):
    with pytest.raises(Refused, match=f"; it has {columns}$"):
        graded(put(tmp_path / name, gzip.compress(b"query\n")))


# BEIR and TREC


def test_a_corpus_of_beir_is_read_with_and_without_a_title(tmp_path):
    lines = [{"_id": "d1", "text": "warm", "metadata": {"x": 1}}, {"_id": 2, "title": "Shoe", "text": ""}]
    file = put(tmp_path / "corpus.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert documents(file) == [(1, "d1", "", "warm", None), (2, "2", "Shoe", "", None)]


@pytest.mark.parametrize(
    ("name", "split"),
    [("qrels/test.tsv", "test"), ("qrels/dev.tsv", "validation"), ("qrels/train.tsv", "train"), ("qrels.tsv", None)],
)
def test_qrels_of_beir_find_queries_jsonl_beside_or_1_above_and_their_split_in_the_name(tmp_path, name, split):
    put(tmp_path / "queries.jsonl", '{"_id": "1", "text": "Red  SHOE", "metadata": {}}\n{"_id": "2", "text": "tent"}\n')
    file = put(tmp_path / name, "query-id\tcorpus-id\tscore\n1\ta\t3\n2\tb\t-1\n3\tb\t1\n2\tc\t0.5\n")
    pairs, rejects = graded(file)
    assert pairs == [("red shoe", "a", 3, split), ("tent", "b", 0, split)]
    assert rejects == [(4, "no text for query id 3"), (5, "grade is no whole number from 0 to 10")]


def test_queries_2_folders_above_are_not_found_and_qrels_without_texts_are_refused(tmp_path):
    put(tmp_path / "queries.jsonl", '{"_id": "1", "text": "tent"}\n')
    file = put(tmp_path / "a" / "b" / "qrels.tsv", "query-id\tcorpus-id\tscore\n1\ta\t3\n")
    with pytest.raises(Refused, match=r"qrels\.tsv names queries by id; give data\.topics their texts"):
        graded(file)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_queries_beside_a_file_are_named_as_the_file_is(tmp_path, scheme):
    put(tmp_path / "queries.jsonl", "")
    assert trec.beside(f"{scheme}{tmp_path}/qrels/test.tsv") == f"{scheme}{tmp_path}/queries.jsonl"
    assert trec.beside(f"{scheme}{tmp_path}/a/b/test.tsv") is None


TREC = "101 0 D1 3\n101\t0\tD2\t-2\n\n102  Q0  D1  1\n103 0 D1 1\n101 0 D3\n101 0 D4 x\n101 0 D5 11\n"


@pytest.mark.parametrize("name", ["qrels.txt", "2019.qrels", "qrels.tsv", "qrels.gz"])
def test_qrels_of_trec_count_negative_as_0_and_reject_4_of_7_lines(tmp_path, name):
    topics = put(tmp_path / "topics.txt", "101\tRed shoe\r\n102\t tent \n")
    file = put(tmp_path / name, gzip.compress(TREC.encode()) if name.endswith(".gz") else TREC)
    pairs, rejects = graded(file, topics=[topics])
    assert pairs == [("red shoe", "D1", 3, None), ("red shoe", "D2", 0, None), ("tent", "D1", 1, None)]
    assert rejects == [
        (5, "no text for query id 103"),
        (6, "not the 4 columns of TREC qrels: query id, iteration, document id, relevance"),
        (7, "grade is no whole number from 0 to 10"),
        (8, "grade is no whole number from 0 to 10"),
    ]


def test_texts_beside_a_file_win_over_topics_of_other_files(tmp_path):
    put(tmp_path / "beir" / "queries.jsonl", '{"_id": "1", "text": "tent"}\n')
    beir = put(tmp_path / "beir" / "qrels.tsv", "query-id\tcorpus-id\tscore\n1\ta\t3\n")
    plain = put(tmp_path / "trec" / "qrels.txt", "1 0 a 2\n")
    topics = put(tmp_path / "topics.tsv", "1\tshoe\n")
    assert graded(beir, plain, topics=[topics])[0] == [("tent", "a", 3, None), ("shoe", "a", 2, None)]


def test_negative_grades_are_0_in_qrels_alone(tmp_path):
    assert graded(put(tmp_path / "j.csv", "query,docid,rating\nq,a,-1\n"))[1] == [
        (2, "grade is no whole number from 0 to 10")
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1\ta\n2 b\n", "line 2: write a query as id<TAB>text"),
        ("\ta\n", "line 1: write a query as id<TAB>text"),
        ('{"_id": "1"}\n', "line 1: write a query as id<TAB>text, or as JSON with _id and text"),
        ('{"_id": \n', "line 1: write a query as id<TAB>text, or as JSON with _id and text"),
        (b"1\ta\n2\t\xff\n", "line 2: not UTF-8"),
        ("1\ta\n\n1\tb\n", "line 3: query id 1 has another text already: 'a'"),
    ],
)
def test_broken_topics_are_refused_with_file_and_line(tmp_path, text, reason):
    with pytest.raises(Refused, match=r"topics\.tsv " + reason):
        trec.topics([put(tmp_path / "topics.tsv", text)])


def test_topics_may_say_the_same_twice_and_hold_tabs(tmp_path):
    files = [put(tmp_path / "1.tsv", "\ufeff1 \ta\tB\n"), put(tmp_path / "2.jsonl", '{"_id": 1, "text": "A  b"}\n')]
    assert trec.topics(files) == {"1": "a\tB"}


def test_a_run_of_3_lines_has_2_queries(tmp_path):
    file = put(tmp_path / "bm25.run", "1 Q0 a 1 2.5 bm25\n1 Q0 b 2 -1e-3 bm25\n\n2\tQ0\ta\t1\t7\tbm25\n")
    assert trec.run(file) == {"1": {"a": 2.5, "b": -0.001}, "2": {"a": 7.0}}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("1 Q0 a 1 2.5", "5 columns; a TREC run has query id, Q0, document id, rank, score, name"),
        ("1 Q0 b 1 high x", "score high is no finite number"),
        ("1 Q0 b 1 nan x", "score nan is no finite number"),
        ("1 Q0 a 2 2.0 x", "document a stands twice in the list of query 1"),
    ],
)
def test_a_broken_line_of_a_run_is_refused_with_its_number(tmp_path, line, reason):
    with pytest.raises(Refused, match=r"x\.run line 2: " + reason):
        trec.run(put(tmp_path / "x.run", f"1 Q0 a 1 3.0 x\n{line}\n"))


def test_a_run_that_is_no_gzip_file_is_refused(tmp_path):
    with pytest.raises(Refused, match=r"x\.run\.gz cannot be read to its end"):
        trec.run(put(tmp_path / "x.run.gz", "1 Q0 a 1 3.0 x\n"))


# The search relevance workbench

RATED = [{"docId": "a", "rating": "3.000"}, {"docId": "b", "rating": "0.5"}]
NOW = {"name": "x", "type": "IMPORT_JUDGMENT", "judgmentRatings": [{"query": "Red shoe", "ratings": RATED}]}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    "content",
    [
        NOW,
        {"took": 36, "hits": {"total": {"value": 1}, "hits": [{"_id": "1", "_source": NOW | {"status": "COMPLETED"}}]}},
        NOW | {"judgmentRatings": {"Red shoe": RATED}},
        {
            "type": "IMPORT_JUDGMENT",
            "judgmentScores": {"Red shoe": [{"docId": r["docId"], "score": r["rating"]} for r in RATED]},
        },
        NOW | {"judgmentRatings": [{"query": "Red shoe", "ratings": [{"docId": "a", "rating": 3}, RATED[1]]}]},
    ],
)
def test_a_judgment_list_of_the_workbench_is_read_in_5_shapes_and_a_fraction_is_a_reject(tmp_path, content, indent):
    file = put(tmp_path / "judgments.json", json.dumps(content, indent=indent))
    assert graded(file) == ([("red shoe", "a", 3, None)], [(2, "grade is no whole number from 0 to 10")])


def test_ratings_that_are_none_are_rejects(tmp_path):
    lists = [{"query": "q", "ratings": ["x", {"docId": "a"}, {"rating": "1"}, {"docId": "b", "rating": "1_0"}]}]
    file = put(tmp_path / "j.json", json.dumps({"judgmentRatings": [*lists, 7, {"ratings": RATED[:1]}]}))
    assert graded(file)[1] == [
        (1, "not a rating with docId and rating"),
        (2, "grade is no whole number from 0 to 10"),
        (3, "no doc_id"),
        (4, "grade is no whole number from 0 to 10"),
        (5, "no query"),
    ]


@pytest.mark.parametrize(
    "content",
    [
        {"hits": {"hits": [{"_source": {"judgmentRatings": [{"query": "red"}]}}]}},
        {"hits": {"hits": []}},
        {"hits": 3},
        {"judgmentRatings": "x"},
    ],
)
def test_an_answer_without_ratings_is_refused(tmp_path, content):
    with pytest.raises(Refused, match=r"j\.json holds no ratings; ask for the list by its id"):
        graded(put(tmp_path / "j.json", json.dumps(content)))


def test_a_judgment_list_is_no_file_of_documents(tmp_path):
    with pytest.raises(Refused, match="no column doc_id, title, summary; it has name, type, judgmentRatings"):
        documents(put(tmp_path / "j.json", json.dumps(NOW)))


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3.0), (" 2.000 ", 2.0), ("-1", -1.0), (".5", 0.5), ("1_0", "1_0"), ("nan", "nan"), ("٣", "٣"), (4, 4)],
)
def test_a_number_is_plain_digits(text, value):
    assert formats.number(text) == value
