import json
from datetime import UTC, datetime

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ubi import NOON, SEARCH, event

from disranker import logs, ubi
from disranker.inputs import Ingest

CFG = Ingest()
T = 1_790_856_001_000  # half a second after the page, in milliseconds


def records(queries, events):
    lines = [(entry, "queries") for entry in queries] + [(entry, "events") for entry in events]
    return [ubi.record(json.dumps(entry).encode(), kind, number, kind) for number, (entry, kind) in enumerate(lines)]


def joined(queries, events, cfg=CFG):
    """(hits by query_id, reasons, counts) of records that all meet in one cell."""
    searches, rejects, counts = logs.join(logs.table(records(queries, events)), cfg)
    return {row["query_id"]: row["hits"] for row in searches.to_pylist()}, rejects["reason"].to_pylist(), counts


def row(doc_id, position=None, clicked=True, seconds=0, query="shoe", client="c", **fields):
    """A row of a flat log."""
    time = datetime(2026, 10, 1, 12, 0, tzinfo=UTC).timestamp() + seconds
    place = {"kind": "row", "file": "f", "line": seconds, "query": query, "client": client, "doc_id": doc_id}
    return place | {"time": datetime.fromtimestamp(time, UTC), "position": position, "clicked": clicked} | fields


def hit(doc_id, position, clicked=False, dwell_s=None, converted=False):
    return {"doc_id": doc_id, "position": position, "clicked": clicked, "dwell_s": dwell_s, "converted": converted}


def test_3_hits_with_2_clicks_and_a_purchase():
    hits, reasons, counts = joined(
        [SEARCH],
        [
            event("b", time=T + 1, dwell_time=5),
            event("b", time=T + 2, dwell_time=7.5),
            event("c", "purchase", time=T + 3, dwell_time=9),
        ],
    )
    assert hits == {"q1": [hit("a", 1), hit("b", 2, True, 12.5), hit("c", 3, converted=True)]}
    assert reasons == []
    assert (counts["searches"], counts["clicks"], counts["duplicate_events"]) == (1, 2, 0)


def test_dwell_of_unknown_clicks_is_unknown_and_0_seconds_are_0():
    hits, _, _ = joined(
        [SEARCH], [event("a"), event("b", dwell_time=0), event("c", time=T + 1), event("c", time=T + 2, dwell_time=4)]
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
    _, _, counts = joined([SEARCH], [event(), event(), event(time=T + 1000)])
    assert (counts["duplicate_events"], counts["clicks"]) == (1, 2)


def test_a_click_and_a_purchase_in_one_moment_are_2_events():
    hits, _, counts = joined([SEARCH], [event("a"), event("a", "purchase")])
    assert hits["q1"][0] == hit("a", 1, True, None, True) and counts["duplicate_events"] == 0


def test_a_click_on_what_was_not_shown_and_one_without_a_page_are_rejects():
    hits, reasons, counts = joined([SEARCH], [event("z"), event("a", query_id="q9")])
    assert reasons == ["the document was not on the result page", "no result page has this query_id"]
    assert not any(found["clicked"] for found in hits["q1"]) and counts["clicks"] == 0


def test_a_reject_of_the_join_says_what_it_was_without_the_words_of_the_query():
    _, rejects, _ = logs.join(logs.table(records([], [event(query_id="q9") | {"user_query": "my secret"}])), CFG)
    assert rejects.to_pylist() == [
        {
            "file": "events",
            "line": 0,
            "reason": "no result page has this query_id",
            "raw": "click of query_id q9, document a",
        }
    ]


@given(
    st.lists(st.sampled_from("pqr"), max_size=4),
    st.lists(
        st.tuples(
            st.sampled_from("abz"), st.sampled_from(["click", "purchase"]), st.integers(0, 2), st.sampled_from("pqx")
        ),
        max_size=10,
    ),
)
@settings(deadline=None)
def test_every_line_is_accounted_for(pages, events):
    hits, reasons, counts = joined(
        [SEARCH | {"query_id": key} for key in pages],
        [event(doc, action, T + time, key) for doc, action, time, key in events],
    )
    used = [e for e in set(events) if e[3] in pages and e[0] != "z"]
    assert len(hits) + counts["duplicate_queries"] == len(pages)
    assert len(used) + len(reasons) + counts["duplicate_events"] == len(events)


def test_the_count_of_clicks_is_of_those_that_were_used():
    assert joined([SEARCH], [event("a"), event("z")])[2]["clicks"] == 1


def test_searches_stand_in_the_order_of_query_ids():
    rows = records([SEARCH | {"query_id": key} for key in ("b", "a", "c")], [])
    searches, _, _ = logs.join(logs.table(rows), CFG)
    assert searches["query_id"].to_pylist() == ["a", "b", "c"] and searches["client"].to_pylist() == ["c1"] * 3
    assert searches["time"].to_pylist()[0] == NOON


def test_an_empty_part_has_no_searches_and_counts_0():
    searches, rejects, counts = logs.join(logs.RECORD.empty_table(), CFG)
    assert searches.num_rows == rejects.num_rows == 0 and set(counts.values()) == {0}


def test_reasons_are_counted_most_frequent_first():
    assert list(logs.refusals(["a", "b", "b", "b", "a", "c"]).items()) == [("b", 3), ("a", 2), ("c", 1)]
    assert logs.refusals([]) == {}


@pytest.mark.parametrize(("late_ms", "reasons"), [(86_399_500, []), (86_400_501, [logs.STRAY])])
def test_an_event_counts_for_a_page_shown_up_to_a_day_before_it(late_ms, reasons):
    assert joined([SEARCH], [event("a", time=T - 500 + late_ms)])[1] == reasons


def test_a_click_without_query_id_goes_to_the_last_page_of_the_client_for_the_query():
    pages = [SEARCH, SEARCH | {"query_id": "q2", "timestamp": "2026-10-01T12:01:00Z"}]
    nameless = event("a", time=T + 100_000, query_id=None) | {"user_query": "RED shoe"}
    hits, reasons, counts = joined(pages, [nameless])
    assert hits["q2"][0]["clicked"] and not hits["q1"][0]["clicked"] and reasons == []
    assert counts["found_by_client_and_query"] == 1


@pytest.mark.parametrize(
    "changed",
    [{"client_id": "c2"}, {"user_query": "blue shoe"}, {"timestamp": T + 1_800_001}, {"timestamp": T - 2000}],
    ids=["client", "query", "late", "early"],
)
def test_a_click_without_query_id_of_another_client_query_or_time_is_a_reject(changed):
    nameless = event("a", query_id=None) | {"user_query": "red shoe"} | changed
    hits, reasons, _ = joined([SEARCH], [nameless])
    assert reasons == [logs.LOST] and not hits["q1"][0]["clicked"]


def test_impressions_say_what_was_shown_where_the_query_record_does_not():
    bare = {name: value for name, value in SEARCH.items() if name != "query_response_hit_ids"}
    shown = [event(doc, "impression", position={"ordinal": n}) for doc, n in (("b", 2), ("a", 1), ("b", 2))]
    hits, reasons, counts = joined([bare], [*shown, event("b")])
    assert hits["q1"] == [hit("a", 1), hit("b", 2, True)] and reasons == []
    assert counts["duplicate_events"] == 1 and counts["clicks"] == 1


def test_impressions_that_count_from_0_stand_at_1_and_do_not_add_to_a_list_that_is_there():
    bare = {name: value for name, value in SEARCH.items() if name != "query_response_hit_ids"}
    shown = [event(doc, "impression", position={"ordinal": n}) for n, doc in enumerate("ab")]
    assert joined([bare], shown)[0]["q1"] == [hit("a", 1), hit("b", 2)]
    assert [found["doc_id"] for found in joined([SEARCH], [event("z", "impression")])[0]["q1"]] == ["a", "b", "c"]


def test_a_page_of_which_nothing_is_known_to_be_shown_is_a_reject():
    bare = {name: value for name, value in SEARCH.items() if name != "query_response_hit_ids"}
    hits, reasons, _ = joined([bare], [])
    assert hits == {} and reasons == [logs.EMPTY]


def flat(rows, cfg=CFG):
    searches, rejects, counts = logs.join(logs.table(rows), cfg)
    return searches.to_pylist(), rejects.num_rows, counts


def test_rows_of_one_client_and_query_without_a_gap_are_one_page():
    near = [row("a", 1), row("b", 2, False, 5), row("a", 1, seconds=2000)]
    searches, refused, counts = flat([*near, row("c", 1, query="hat"), row("d", client="e")])
    assert sorted((s["client"], s["query"], len(s["hits"])) for s in searches) == [
        ("c", "hat", 1),
        ("c", "shoe", 1),
        ("c", "shoe", 2),
        ("e", "shoe", 1),
    ]
    assert refused == 0 and counts["searches"] == 4 and counts["clicks"] == 4


def test_rows_with_a_query_id_are_the_page_of_that_id_and_say_clicks_dwell_and_conversions():
    rows = [row("b", 2, False, 1, query_id="p"), row("a", 1, True, 9000, query_id="p", dwell_s=4.0, converted=True)]
    [page], _, _ = flat(rows)
    assert page["hits"] == [hit("a", 1, True, 4.0, True), hit("b", 2)] and page["query_id"] == "p"


def test_rows_without_positions_have_none_and_stand_in_the_order_of_their_ids():
    [page], _, _ = flat([row("b"), row("a", clicked=False)])
    assert page["hits"] == [hit("a", None), hit("b", None, True)]


days = st.integers(0, 9 * 24).map(lambda hours: hours * 3_600_000)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from("pqr"), days), max_size=4, unique_by=lambda page: page[0]),
    st.lists(st.tuples(st.sampled_from(["p", "q", "r", "x", None]), st.sampled_from("az"), days), max_size=8),
    st.lists(st.tuples(st.sampled_from("ab"), days), max_size=4),
)
def test_periods_joined_one_by_one_give_what_all_gives_together(pages, events, shown):
    """With everything that lies up to a day around a period, each line comes out of one period."""
    cfg, base = Ingest(period_days=3), 1_790_726_400_000
    queries = [SEARCH | {"query_id": key, "timestamp": base + ms} for key, ms in pages]
    done = [event(doc, "click", base + ms, key) | {"user_query": "red shoe"} for key, doc, ms in events]
    rows = records(queries, done) + [row(doc, seconds=ms // 1000) for doc, ms in shown]
    table = logs.table(rows)
    whole, refused, counts = logs.join(table, cfg)
    periods = pl.DataFrame(pl.from_arrow(table)).select(logs.period(cfg)).to_series().unique().sort()
    found = [logs.join(table, cfg, period) for period in periods]
    key = "query_id"
    assert sorted((r for s, _, _ in found for r in s.to_pylist()), key=lambda r: r[key]) == whole.to_pylist()
    assert sorted((r["line"], r["file"]) for _, j, _ in found for r in j.to_pylist()) == sorted(
        (r["line"], r["file"]) for r in refused.to_pylist()
    )
    assert all(sum(c[name] for _, _, c in found) == counts[name] for name in counts)


def test_a_page_of_rows_ends_at_the_border_of_its_period():
    border = 20_728 * 86_400 - int(datetime(2026, 10, 1, 12, tzinfo=UTC).timestamp())  # in seconds from row()'s noon
    table = logs.table([row("a", 1, seconds=border - 60), row("b", 2, seconds=border + 60)])
    cfg = Ingest(period_days=1)
    whole, _, _ = logs.join(table, cfg)
    days = [logs.join(table, cfg, day)[0].to_pylist() for day in (20_727, 20_728)]
    assert [len(day) for day in days] == [1, 1] and whole.num_rows == 2
