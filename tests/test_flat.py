from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disranker import flat, logs
from disranker.inputs import Columns, Ingest
from disranker.recipe import Refused

NOON = datetime(2026, 10, 1, 12, tzinfo=UTC)
NAMES = "query\tdoc_id\tclient\ttime\trank\tclicked"
ALL = Columns(position="rank", click="clicked")


def read(tmp_path, content, cfg=ALL, name="log.tsv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [row for table in flat.tables(str(path), cfg) for row in table.to_pylist()]


def said(row):
    return [row[name] for name in ("kind", "query", "doc_id", "client", "position", "clicked", "time")]


def test_a_row_of_an_impression_log_becomes_a_record(tmp_path):
    [row] = read(tmp_path, f"{NAMES}\nRed  SHOE\td1\tc1\t2026-10-01T12:00:00Z\t3\t0\n")
    assert said(row) == ["row", "red shoe", "d1", "c1", 3, False, NOON] and row["line"] == 2


def test_without_a_click_column_every_row_is_a_click_and_one_without_document_is_none(tmp_path):
    content = "query,doc_id,client,time\nshoe,d1,c1,2026-10-01 12:00:00\nshoe,,c1,2026-10-01 12:00:00\n"
    clicked, searched = read(tmp_path, content, Columns(), "log.csv")
    assert said(clicked) == ["row", "shoe", "d1", "c1", None, True, NOON] and searched["kind"] == "other"


def test_doubled_quotes_and_commas_within_quotes_are_text(tmp_path):
    content = 'query,doc_id,client,time\n"12"" tv, black",d1,c1,1790856000\n'
    assert read(tmp_path, content, Columns(), "log.csv")[0]["query"] == '12" tv, black'


def test_a_quote_that_somebody_typed_between_tabs_stays(tmp_path):
    rows = read(tmp_path, f'{NAMES}\n"tv\td\tc\t1790856000\t1\t1\n12" tv\td\tc\t1790856000\t1\t1\n')
    assert [row["query"] for row in rows] == ['"tv', '12" tv']


def test_a_log_of_mixed_tabs_and_blanks_without_a_header_has_its_query_in_brackets(tmp_path):
    """As Sogou publishes its logs, in GB18030."""
    cfg = Columns(
        time="1", client="2", query="3", position="4", document="6", header=False, separator="blanks",
        encoding="gb18030", time_format="%H:%M:%S",
    )  # fmt: skip
    content = "12:00:00\t2982199073774412\t[360安全 卫士]\t8 3\tdownload.it.com.cn/softweb\n".encode("gb18030")
    [row] = read(tmp_path, content, cfg, "SogouQ.txt")
    assert [row[name] for name in ("query", "client", "position", "doc_id")] == [
        "360安全 卫士",
        "2982199073774412",
        8,
        "download.it.com.cn/softweb",
    ]


@pytest.mark.parametrize(("encoding", "text"), [("latin-1", "café"), ("gb18030", "皮鞋"), ("utf-8", "café")])
def test_3_encodings(tmp_path, encoding, text):
    cfg = Columns(encoding=encoding)
    content = f"query\tdoc_id\tclient\ttime\n{text}\td\tc\t1790856000\n".encode(encoding)
    assert read(tmp_path, content, cfg)[0]["query"] == text


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("shoe\td\tc\t1790856000\t1", "5 fields under 6 columns"),
        ("", "empty line"),
        ("\td\tc\t1790856000\t1\t1", "no query"),
        ("shoe\td\t\t1790856000\t1\t1", "no client"),
        ("shoe\td\tc\t\t1\t1", "no time"),
        ("shoe\td\tc\tnoon\t1\t1", "timestamp is neither ISO 8601 nor milliseconds"),
        ("shoe\td\tc\t1790856000\tx\t1", "position is no number"),
        ("shoe\td\tc\t1790856000\t0\t1", "position is no whole number from 1"),
        ("shoe\td\tc\t1790856000\t1.5\t1", "position is no whole number from 1"),
        ("shoe\td\tc\t1790856000\tinf\t1", "position is no whole number from 1"),
        ("shoe\td\tc\t1790856000\t1\tmaybe", "clicked is neither true nor false"),
        (b"sh\xff\td\tc\t1790856000\t1\t1", "not utf-8"),
    ],
)
def test_a_broken_row_is_a_reject_with_its_reason(tmp_path, line, reason):
    raw = line if isinstance(line, bytes) else line.encode()
    row = read(tmp_path, NAMES.encode() + b"\n" + raw + b"\n")[0]
    assert (row["kind"], row["reason"]) == ("reject", reason.replace("clicked is", "click is"))


@pytest.mark.parametrize(
    ("value", "clicked"), [("1", True), ("Yes", True), ("3", True), ("0", False), ("", False), ("FALSE", False)]
)
def test_6_ways_to_say_whether_it_was_clicked(tmp_path, value, clicked):
    assert read(tmp_path, f"{NAMES}\nshoe\td\tc\t1790856000\t1\t{value}\n")[0]["clicked"] is clicked


def test_positions_from_0_and_above_10_are_kept_from_1(tmp_path):
    cfg = ALL.model_copy(update={"first_position": 0})
    rows = read(tmp_path, f"{NAMES}\nshoe\td\tc\t1790856000\t0\t1\nshoe\te\tc\t1790856000\t25\t1\n", cfg)
    assert [row["position"] for row in rows] == [1, 26]


@pytest.mark.parametrize("time", ["1790856000", "1790856000000", "2026-10-01T14:00:00+02:00", "1790856000.0"])
def test_4_ways_to_write_noon(tmp_path, time):
    assert read(tmp_path, f"{NAMES}\nshoe\td\tc\t{time}\t1\t1\n")[0]["time"] == NOON


def test_a_missing_column_is_refused_with_those_that_are_there(tmp_path):
    with pytest.raises(Refused, match="has no column rank; it has query, doc_id, client, time, clicked"):
        read(tmp_path, NAMES.replace("rank\t", "") + "\n")


def test_rows_of_parquet_and_of_json_lines_are_the_same(tmp_path):
    rows = [{"query": "shoe", "doc_id": 7, "client": "c", "time": 1790856000, "rank": 2, "clicked": True}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    [of_parquet] = [row for table in flat.tables(str(tmp_path / "a.parquet"), ALL) for row in table.to_pylist()]
    [of_lines] = read(
        tmp_path,
        '{"query": "shoe", "doc_id": 7, "client": "c", "time": 1790856000, "rank": 2, "clicked": true}\n',
        name="a.jsonl",
    )
    assert said(of_parquet) == said(of_lines) == ["row", "shoe", "7", "c", 2, True, NOON]


@given(
    st.lists(st.binary(max_size=40).filter(lambda line: b"\n" not in line), max_size=6),
    st.sampled_from(["log.csv", "log.tsv", "log.jsonl"]),
    st.sampled_from(["", "blanks", "semicolon"]),
    st.booleans(),
)
@settings(deadline=None)
def test_no_bytes_raise_and_every_line_is_a_row_a_reject_or_a_search(tmp_path_factory, raw, name, separator, header):
    cfg = Columns(query="1", document="2", client="3", time="4", position="5", separator=separator, header=header)
    between = {"semicolon": b";", "blanks": b" "}.get(separator) or (b"," if name == "log.csv" else b"\t")
    first = [between.join([b"1", b"2", b"3", b"4", b"5"])] if header and name != "log.jsonl" else []
    content = b"".join(line + b"\n" for line in [*first, *raw])
    path = tmp_path_factory.mktemp("flat") / name
    path.write_bytes(content)
    if name == "log.jsonl" and content.lstrip().startswith(b"["):
        return  # an array, which is read whole or refused
    rows = [row for table in flat.tables(str(path), cfg) for row in table.to_pylist()]
    assert len(rows) == len(raw) and {row["kind"] for row in rows} <= {"row", "reject", "other"}
    logs.join(logs.table([row for row in rows if row["kind"] == "row"]), Ingest())
