import json
from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disranker import logs, ubi

SEARCH = {
    "query_id": "q1",
    "user_query": " Red  SHOE ",
    "client_id": "c1",
    "timestamp": "2026-10-01T12:00:00.500Z",
    "query_response_hit_ids": ["a", "b", "c"],
}
NOON = datetime(2026, 10, 1, 12, 0, 0, 500_000, tzinfo=UTC)


def event(doc_id="a", action="click", time=1_790_856_001_000, query_id="q1", **attributes):
    return {
        "action_name": action,
        "query_id": query_id,
        "client_id": "c1",
        "timestamp": time,
        "event_attributes": {"object": {"object_id": doc_id}} | attributes,
    }


def read(entry, kind):
    """What a line means, read alone, which is also what it means read with others."""
    line = entry if isinstance(entry, bytes) else json.dumps(entry).encode()
    alone = ubi.record(line, "f", 1, kind)
    assert ubi.table([1], [line], "f", kind).equals(logs.table([alone]))
    return alone


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
        "shuffled": False,
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
        *(
            (SEARCH | {"query_response_hit_ids": hits}, "query_response_hit_ids is no list of ids")
            for hits in ("abc", {"a": 1}, ["a", None], ["a", ""], [["a"]], [True])
        ),
        *(
            (SEARCH | {"query_attributes": {"start": start}}, "query_attributes.start is no offset")
            for start in (-1, 1_000_000, "10", 1.0, True)
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
    assert (found["kind"], found["reason"]) == ("reject", reason)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"query_id": "q"}, "no action_name"),
        (event() | {"query_id": None}, "neither query_id nor user_query"),
        (event() | {"query_id": "", "user_query": " "}, "neither query_id nor user_query"),
        (event() | {"client_id": None}, "no client_id"),
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


def test_what_was_shown_may_come_in_other_lines():
    assert read(without("query_response_hit_ids"), "queries")["hits"] is None
    assert read(SEARCH | {"query_response_hit_ids": []}, "queries")["hits"] is None
    found = read(event("a", "impression", position={"ordinal": "3"}), "events")
    assert (found["kind"], found["doc_id"], found["position"]) == ("shown", "a", 3)


@pytest.mark.parametrize(("ordinal", "position"), [(0, 0), (7, 7), ("12", 12), (-1, None), ("x", None), (None, None)])
def test_a_position_is_a_number_or_text_or_unknown(ordinal, position):
    assert read(event(position={"ordinal": ordinal}), "events")["position"] == position


@pytest.mark.parametrize(
    "attributes",
    [
        {"object": {"object_id": "a", "internal_id": "b"}},
        {"object": {"internal_id": "a"}},
        {"data": {"object_id": "a"}},
        {"object": {"object_id": None}, "data": {"internal_id": "a"}},
    ],
)
def test_4_places_in_which_the_id_of_a_document_is_found(attributes):
    assert read(event() | {"event_attributes": attributes}, "events")["doc_id"] == "a"


def test_an_event_without_query_id_keeps_the_query_by_which_its_page_is_found():
    found = read(event(query_id=None) | {"user_query": "Red  Shoe"}, "events")
    assert (found["query_id"], found["query"], found["client"]) == (None, "red shoe", "c1")


def test_a_page_in_an_order_of_chance_says_so():
    assert read(SEARCH | {"query_attributes": {"shuffled": True}}, "queries")["shuffled"]
    assert not read(SEARCH | {"query_attributes": {"shuffled": "yes"}}, "queries")["shuffled"]


def test_a_hit_of_an_export_is_its_source():
    assert read({"_index": "ubi", "_source": SEARCH}, "queries")["query_id"] == "q1"


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
def test_no_bytes_raise_and_lines_read_together_mean_what_each_means_alone(raw, kind):
    numbers = list(range(3, 3 + len(raw)))
    alone = [ubi.record(line, "f", number, kind) for number, line in zip(numbers, raw, strict=True)]
    together = ubi.table(numbers, raw, "f", kind).sort_by("line")
    assert together.equals(logs.table(alone))
    # and so it is among lines enough to be halved
    many = [*raw, *[json.dumps(SEARCH if kind == "queries" else event()).encode()] * 40, *raw]
    found = ubi.table(list(range(len(many))), many, "f", kind).sort_by("line")
    assert found.slice(0, len(raw)).drop(["line"]).equals(together.drop(["line"]))
    assert found.num_rows == len(many) and set(found["kind"].to_pylist()[len(raw) : -len(raw) or None]) <= {
        "query",
        "click",
    }


def test_half_a_character_becomes_a_replacement_and_a_whole_one_stays():
    assert read(rb'{"action_name": "click", "query_id": "\ud83d \ud83d\ude00"}', "events")["reason"].startswith(
        "no client"
    )
    assert logs.parsed(rb'["\uD83D \ud83d\ude00"]') == ["\ufffd \U0001f600"]
    assert logs.parsed(rb'["\uDE00"]') == ["\ufffd"]
    assert logs.parsed(b'\xef\xbb\xbf["bom"]') == ["bom"]


@pytest.mark.parametrize(
    "line",
    [
        b'{"x": ' + b"[" * 5000 + b"]" * 5000 + b"," + json.dumps(SEARCH).encode()[1:],
        json.dumps(SEARCH).encode() + json.dumps(SEARCH).encode(),
        b'{"x": "\xff", ' + json.dumps(SEARCH).encode()[1:],
        json.dumps(SEARCH | {"user_query": "shoe x"}).encode().replace(b"x", rb"\uD83D"),
        json.dumps(SEARCH | {"query_id": "q"}).encode()[:-1] + b', "query_id": "r"}',
        json.dumps(SEARCH).encode() + b"\r",
    ],
    ids=["deep", "two in one", "not UTF-8", "half a character", "a key twice", "carriage return"],
)
def test_6_lines_that_two_parsers_might_read_differently_have_one_meaning(line):
    read(line, "queries")
