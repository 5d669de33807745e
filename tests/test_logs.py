import gzip
import json
from datetime import UTC, datetime

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disranker import logs
from disranker.recipe import Refused

SEARCH = {
    "query_id": "q1",
    "user_query": " Red  SHOE ",
    "client_id": "c1",
    "timestamp": "2026-10-01T12:00:00.500Z",
    "query_response_hit_ids": ["a", "b", "c"],
}
NOON = datetime(2026, 10, 1, 12, 0, 0, 500_000, tzinfo=UTC)


def event(doc_id="a", action="click", time=1_000, query_id="q1", **attributes):
    return {
        "action_name": action,
        "query_id": query_id,
        "timestamp": time,
        "event_attributes": {"object": {"object_id": doc_id}} | attributes,
    }


def read(entry, kind):
    line = entry if isinstance(entry, bytes) else json.dumps(entry).encode()
    return logs.record(line, "f", 1, kind)


def joined(queries, events):
    """(hits by query_id, reasons, counts) of records that all meet in one part."""
    lines = [(entry, "queries") for entry in queries] + [(entry, "events") for entry in events]
    rows = [logs.record(json.dumps(entry).encode(), kind, number, kind) for number, (entry, kind) in enumerate(lines)]
    searches, rejects, counts = logs.join(logs._table(rows, 1))
    return {row["query_id"]: row["hits"] for row in searches.to_pylist()}, rejects["reason"].to_pylist(), counts


def hit(doc_id, position, clicked=False, dwell_s=None, converted=False):
    return {"doc_id": doc_id, "position": position, "clicked": clicked, "dwell_s": dwell_s, "converted": converted}


# Lines


def test_a_search_is_read_with_its_query_normalised():
    found = read(SEARCH | {"query_attributes": {"start": 10}}, "queries")
    assert found == {
        "file": "f",
        "line": 1,
        "kind": "query",
        "query_id": "q1",
        "query": "red shoe",
        "client": "c1",
        "time": NOON,
        "start": 10,
        "hits": ["a", "b", "c"],
    }


def without(name):
    return {key: value for key, value in SEARCH.items() if key != name}


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (b"", "empty line"),
        (b" \r\n", "empty line"),
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'"\xff"', "not UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),
        ([1], "not a JSON object"),
        (b"null", "not a JSON object"),
        (without("user_query"), "no user_query"),
        (SEARCH | {"user_query": 5}, "no user_query"),
        (SEARCH | {"user_query": " \u3000\t"}, "user_query is blank"),
        (without("query_response_hit_ids"), "no query_response_hit_ids"),
        (SEARCH | {"query_response_hit_ids": []}, "no query_response_hit_ids"),
        (SEARCH | {"query_response_hit_ids": "abc"}, "no query_response_hit_ids"),
        *(
            (SEARCH | {"query_attributes": {"start": start}}, "query_attributes.start is no offset")
            for start in (-1, 1_000_000, "10", 1.0, True, None)
        ),
        (without("query_id"), "no query_id"),
        (SEARCH | {"query_id": ""}, "no query_id"),
        (without("client_id"), "no client_id"),
        *(
            (SEARCH | {"timestamp": time}, "timestamp is neither ISO 8601 nor milliseconds")
            for time in (None, "noon", "", float("nan"), 1e30, 10**400, "0001-01-01T00:00:00+14:00")
        ),
    ],
)
def test_a_broken_search_is_a_reject_with_its_reason(entry, reason):
    found = read(entry, "queries")
    assert (found["kind"], found["reason"], found["query_id"]) == ("reject", reason, "f:1")


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"query_id": "q"}, "no action_name"),
        (event() | {"query_id": None}, "no query_id"),
        (event() | {"event_attributes": None}, "no event_attributes.object.object_id"),
        (event() | {"event_attributes": {"object": "a"}}, "no event_attributes.object.object_id"),
        (event(doc_id=None), "no event_attributes.object.object_id"),
        (event(doc_id=""), "no event_attributes.object.object_id"),
        (event(time="later"), "timestamp is neither ISO 8601 nor milliseconds"),
    ],
)
def test_a_broken_event_is_a_reject_with_its_reason(entry, reason):
    assert read(entry, "events")["reason"] == reason


def test_500_characters_of_a_refused_line_are_kept():
    assert read(b"x" * 600, "queries")["raw"] == "x" * 500
    assert read(b"{\xffa\n", "queries")["raw"] == "{\ufffda"


@pytest.mark.parametrize(
    ("action", "kind"),
    [
        ("click", "click"),
        ("Product_Click", "click"),
        ("purchase", "conversion"),
        ("ADD_TO_CART", "conversion"),
        ("view", "other"),
    ],
)
def test_an_action_is_a_click_a_conversion_or_something_else(action, kind):
    assert read(event(action=action), "events")["kind"] == kind


def test_other_events_need_neither_document_nor_time():
    assert read({"action_name": "scroll", "query_id": "q"}, "events")["kind"] == "other"


@pytest.mark.parametrize(
    ("dwell", "seconds"),
    [(3, 3.0), (0, 0.0), (2.5, 2.5), (-1, None), ("3", None), (None, None), (10**400, None), (float("inf"), None)],
)
def test_dwell_is_a_number_of_seconds_or_unknown(dwell, seconds):
    assert read(event(dwell_time=dwell), "events")["dwell_s"] == seconds


def test_a_document_of_id_0_is_a_document():
    assert read(event(doc_id=0), "events")["doc_id"] == "0"


@pytest.mark.parametrize(
    "time",
    [
        1_790_856_000_500,
        1_790_856_000_500.0,
        "2026-10-01T12:00:00.500Z",
        "2026-10-01T12:00:00.500",
        "2026-10-01 14:00:00.500+02:00",
        "20261001T070000.500-0500",
    ],
)
def test_6_ways_to_write_half_a_second_past_noon(time):
    assert read(SEARCH | {"timestamp": time}, "queries")["time"] == NOON


@pytest.mark.parametrize(
    ("typed", "one"),
    [
        ("  Red\tSHOE ", "red shoe"),
        ("\uff33\uff28\uff2f\uff25\u3000\uff14\uff12", "shoe 42"),  # full width
        ("ﾌﾞﾙｰ", "ブルー"),
        ("ﻼ", "لا"),
        ("Straße", "strasse"),
        ("℡", "tel"),
        ("cafe\u0301", "café"),
        ("ﬁne", "fine"),
        ("\u0130\u0316", "i\u0316\u0307"),  # folding alone leaves the accents in another order
    ],
)
def test_spellings_become_one(typed, one):
    assert logs.normalise(typed) == one


@settings(deadline=None)
@given(st.text())
def test_normalising_twice_is_normalising_once(text):
    once = logs.normalise(text)
    assert logs.normalise(once) == once and once == once.strip() and "  " not in once


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(alphabet=st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        name: json_values | st.just(good)
        for name, good in (SEARCH | event() | {"query_attributes": {"start": 3}}).items()
    },
)
lines = st.binary() | st.builds(lambda entry: json.dumps(entry).encode(), json_values | entries)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(lines.filter(lambda line: b"\n" not in line), max_size=5), st.sampled_from(["queries", "events"]))
def test_no_bytes_raise_and_each_line_ends_in_one_place(raw, kind):
    table = logs._table([logs.record(line, "f", number, kind) for number, line in enumerate(raw)], 4)
    searches, rejects, counts = logs.join(table)
    assert table.num_rows == len(raw) == counts["lines"]
    places = searches.num_rows + rejects.num_rows + counts["duplicate_queries"] + counts["duplicate_events"]
    assert places + counts["other_events"] == len(raw)


def test_half_a_character_becomes_a_replacement_and_a_whole_one_stays():
    assert read(rb'{"action_name": "click", "query_id": "\ud83d \ud83d\ude00"}', "events")["reason"].startswith(
        "no event"
    )
    assert logs.parsed(rb'["\uD83D \ud83d\ude00"]') == ["\ufffd \U0001f600"]
    assert logs.parsed(rb'["\uDE00"]') == ["\ufffd"]
    assert logs.parsed(b'\xef\xbb\xbf["bom"]') == ["bom"]


# Files


@pytest.mark.parametrize("name", ["q.ndjson", "q.ndjson.gz"])
def test_3_lines_of_a_file_are_numbered_and_parted_by_query_id(tmp_path, name):
    content = b"".join(json.dumps(SEARCH | {"query_id": key}).encode() + b"\n" for key in ("x", "y", "x"))
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    found = pa.concat_tables(logs.records(str(tmp_path / name), "queries", 1000))
    assert found.schema.equals(logs.RECORD) and found["line"].to_pylist() == [1, 2, 3]
    parts = found["part"].to_pylist()
    assert parts[0] == parts[2] != parts[1]


def test_20001_lines_come_in_2_blocks(tmp_path):
    (tmp_path / "e").write_bytes(b"\n" * 20_001)
    blocks = list(logs.records(str(tmp_path / "e"), "events", 8))
    assert [block.num_rows for block in blocks] == [20_000, 1]
    assert set(blocks[0]["part"].to_pylist()) == set(range(8))  # rejects are spread too


@pytest.mark.parametrize("cut", [0.5, 0.999])
def test_a_truncated_gzip_is_refused_in_one_line(tmp_path, cut):
    whole = gzip.compress(b"".join(json.dumps({"n": n}).encode() + b"\n" for n in range(5000)))
    (tmp_path / "q.gz").write_bytes(whole[: int(len(whole) * cut)])
    with pytest.raises(Refused, match=r"q\.gz cannot be read to its end") as caught:
        list(logs.records(str(tmp_path / "q.gz"), "queries", 2))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(Refused, match="cannot be read"):
        list(logs.records(str(tmp_path / "none"), "queries", 2))


# The join


def test_3_hits_with_2_clicks_and_a_purchase():
    hits, reasons, counts = joined(
        [SEARCH],
        [
            event("b", time=1, dwell_time=5),
            event("b", time=2, dwell_time=7.5),
            event("c", "purchase", time=3, dwell_time=9),
        ],
    )
    assert hits == {"q1": [hit("a", 1), hit("b", 2, True, 12.5), hit("c", 3, converted=True)]}
    assert reasons == []
    assert counts == {"lines": 4, "duplicate_queries": 0, "duplicate_events": 0, "other_events": 0, "clicks": 2}


def test_dwell_of_unknown_clicks_is_unknown_and_0_seconds_are_0():
    hits, _, _ = joined(
        [SEARCH], [event("a"), event("b", dwell_time=0), event("c", time=1), event("c", time=2, dwell_time=4)]
    )
    assert [found["dwell_s"] for found in hits["q1"]] == [None, 0, 4]


def test_seconds_spent_before_a_purchase_are_not_those_after_the_click():
    hits, _, _ = joined([SEARCH], [event("a", dwell_time=5), event("a", "purchase", dwell_time=9)])
    assert hits["q1"][0] == hit("a", 1, True, 5, True)


def test_the_second_page_starts_at_position_11():
    pages = [SEARCH, SEARCH | {"query_id": "q2", "query_attributes": {"start": 10}}]
    hits, _, _ = joined(pages, [event("c", query_id="q2")])
    assert hits["q2"] == [hit("a", 11), hit("b", 12), hit("c", 13, True)] and hits["q1"][2] == hit("c", 3)


def test_attributes_without_a_start_mean_the_first_page_and_numbers_are_ids():
    hits, _, _ = joined([SEARCH | {"query_attributes": {}, "query_response_hit_ids": [7, "b"]}], [event(7)])
    assert hits["q1"] == [hit("7", 1, True), hit("b", 2)]


def test_a_document_twice_on_a_page_stands_at_its_first_position():
    hits, _, _ = joined([SEARCH | {"query_response_hit_ids": ["a", "b", "a", "c"]}], [event("a")])
    assert hits["q1"] == [hit("a", 1, True), hit("b", 2), hit("c", 4)]


def test_a_query_record_sent_twice_is_one_search_the_earlier_by_time():
    later = SEARCH | {"timestamp": "2026-10-01T12:00:01Z", "query_response_hit_ids": ["z"]}
    hits, reasons, counts = joined([later, SEARCH, SEARCH], [])
    assert list(map(len, hits.values())) == [3] and reasons == [] and counts["duplicate_queries"] == 2


def test_the_same_click_twice_counts_once_and_a_second_later_twice():
    _, _, counts = joined([SEARCH], [event(time=1000), event(time=1000), event(time=2000)])
    assert (counts["duplicate_events"], counts["clicks"]) == (1, 2)


def test_a_click_and_a_purchase_in_one_moment_are_2_events():
    hits, _, counts = joined([SEARCH], [event("a"), event("a", "purchase")])
    assert hits["q1"][0] == hit("a", 1, True, None, True) and counts["duplicate_events"] == 0


def test_a_click_on_what_was_not_shown_and_one_without_a_page_are_rejects():
    hits, reasons, counts = joined([SEARCH], [event("z"), event("a", query_id="q9")])
    assert reasons == ["the document was not on the result page", "no result page has this query_id"]
    assert not any(found["clicked"] for found in hits["q1"]) and counts["lines"] == 3


def test_a_reject_of_the_join_names_its_query_id():
    rows = [logs.record(json.dumps(event(query_id="q9")).encode(), "e", 4, "events")]
    assert logs.join(logs._table(rows, 1))[1].to_pylist() == [
        {"file": "e", "line": 4, "reason": "no result page has this query_id", "raw": "query_id q9"}
    ]


@given(
    st.lists(st.sampled_from("pqr"), max_size=4),
    st.lists(
        st.tuples(
            st.sampled_from("abz"),
            st.sampled_from(["click", "purchase", "view"]),
            st.integers(0, 2),
            st.sampled_from("pqx"),
        ),
        max_size=10,
    ),
)
@settings(deadline=None)
def test_every_line_is_accounted_for(pages, events):
    hits, reasons, counts = joined(
        [SEARCH | {"query_id": key} for key in pages],
        [event(doc, action, time, key) for doc, action, time, key in events],
    )
    real = {e for e in events if e[1] != "view"}
    used = [e for e in real if e[3] in pages and e[0] != "z"]
    assert counts["lines"] == len(pages) + len(events)
    assert len(hits) + counts["duplicate_queries"] == len(pages)
    assert len(used) + len(reasons) + counts["duplicate_events"] + counts["other_events"] == len(events)


def test_the_count_of_clicks_is_of_those_that_were_used():
    assert joined([SEARCH], [event("a"), event("z")])[2]["clicks"] == 1


def test_searches_stand_in_the_order_of_query_ids():
    rows = [read(SEARCH | {"query_id": key}, "queries") for key in ("b", "a", "c")]
    searches, _, _ = logs.join(logs._table(rows, 1))
    assert searches["query_id"].to_pylist() == ["a", "b", "c"] and searches["client"].to_pylist() == ["c1"] * 3
    assert searches["time"].to_pylist()[0] == NOON


def test_an_empty_part_has_no_searches_and_0_lines():
    searches, rejects, counts = logs.join(logs.RECORD.empty_table())
    assert searches.num_rows == rejects.num_rows == 0 and set(counts.values()) == {0}


def test_reasons_are_counted_most_frequent_first():
    assert list(logs.refusals(["a", "b", "b", "b", "a", "c"]).items()) == [("b", 3), ("a", 2), ("c", 1)]
    assert logs.refusals([]) == {}
