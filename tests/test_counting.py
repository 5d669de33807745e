from collections import Counter
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_clicks import PAGES, search

from disranker import click_models, clicks, tables
from disranker.recipe import Cleaning
from disranker.store import Store
from jobs import counting
from jobs.counting import Scratch

FIFTY = [search(f"q{n}", ("a", 1, n % 2 == 0, None), ("b", 2, False, None)) for n in range(50)]


def counted(*searches):
    return clicks.counts(tables.conform("searches", list(searches)), 15.0)


@pytest.fixture
def scratch(tmp_path):
    return Scratch(Store(str(tmp_path)), SimpleNamespace(fingerprint="f"))


def test_a_file_of_2_row_groups_is_read_group_by_group(tmp_path):
    store, searches = Store(str(tmp_path)), tables.conform("searches", list(PAGES))
    for name, rows in (("some", searches), ("none", searches[:0])):
        pq.write_table(rows, tmp_path / name, row_group_size=2)
    found = list(counting._tables(store, [str(tmp_path / name) for name in ("some", "none")], counting.SHOWN))
    assert [one.num_rows for one in found] == [0, 2, 2, 0]
    together = clicks.summed(pa.concat_tables(clicks.counts(one, 15.0) for one in found), clicks.PLACE)
    assert clicks.frame(together).equals(clicks.frame(counted(*PAGES)))


def test_the_queries_to_fit_on_are_a_share_by_chance_and_those_always_wanted_whatever_part_they_come_from():
    def some(rows, share, always=()):
        return set(clicks.frame(clicks.sampled(rows, share, list(always)))["query"])

    whole, halves = counted(*FIFTY), [counted(*FIFTY[::2]), counted(*FIFTY[1::2])]
    assert some(whole, 1.0) == {f"q{n}" for n in range(50)} and some(whole, 0.0, ["q7", "none"]) == {"q7"}
    chosen = some(whole, 0.3)
    assert 7 < len(chosen) < 25 and chosen == some(halves[0], 0.3) | some(halves[1], 0.3)


@pytest.mark.parametrize("merge", [True, False])
def test_looks_are_those_of_people_and_a_page_loaded_again_is_one_look_if_the_recipe_says_so(tmp_path, merge):
    again = search("shoe", ("a", 1, True, None), client="twice", time=datetime(2026, 3, 1, 12, tzinfo=UTC))
    rows = [again, again | {"query_id": "later", "time": again["time"] + timedelta(minutes=1)}]
    rows += [row | {"client": "robot"} for row in rows]
    pq.write_table(tables.conform("searches", rows), tmp_path / "file")
    out = Counter()
    cfg, bots = Cleaning(merge_repeats=merge), pl.Series(["robot"])
    found = list(counting._looks([str(tmp_path / "file")], bots, Store(str(tmp_path)), cfg, out))
    assert [looks["client"].to_pylist() for looks in found if len(looks)] == [["twice"] if merge else ["twice"] * 2]
    assert out["searches"] == 2 and out["repeated_pages"] == int(merge)


def test_searches_of_one_client_add_up():
    asked = counting._asked(tables.conform("searches", [search("a"), search("a"), search("b")]))
    assert sorted(asked.select("query", "searches").rows()) == [("a", 2), ("b", 1)]


def test_rows_go_to_the_part_of_their_query_and_none_is_lost(scratch):
    rows = counted(*FIFTY)
    for part in range(3):
        assert scratch.frame("pairs", part, clicks.COUNTS).is_empty()
    counting._by_query(scratch, "pairs", rows, 3, "w")
    found = [pa.concat_tables(scratch.each("pairs", part)) for part in range(3)]
    for part, there in enumerate(found):
        assert set(tables.part_of(clicks.frame(there)["query"], 3)) == {part}
        assert len(there["query"].chunk(0).dictionary) < 50
    together = pl.concat(map(clicks.frame, found)).sort(clicks.PLACE)
    assert together.equals(clicks.frame(rows).sort(clicks.PLACE))


@pytest.mark.parametrize("most", [1, 1000])
def test_pairs_of_several_tables_are_summed_whether_they_are_many_rows_or_few(scratch, monkeypatch, most):
    monkeypatch.setattr(counting, "MOST_ROWS", most)
    fitted = click_models.Fitted("pbm", {1: 1.0, 2: 0.5, 11: 0.25}, 0.5)
    for number in range(2):
        scratch.put(counted(*PAGES), "counts", 0, f"{number}")
    counting.pair(0, scratch, fitted, 1)
    assert len(list(scratch.each("pairs", 0))) == (2 if most == 1 else 1)
    asked = pl.DataFrame([("shoe", 6, 3)], schema=counting.QUERIES, orient="row")
    found = counting.paired(0, scratch, asked, only_clicks=False)
    # "coat" is not among the queries that are kept
    assert found.select("query", "doc_id", "impressions", "clicks", "looks").rows() == [
        ("shoe", "a", 6, 4, 5.0), ("shoe", "b", 6, 2, 4.0),
    ]  # fmt: skip


def test_in_a_log_of_clicks_alone_each_search_shows_the_documents_of_its_query(scratch):
    scratch.put(counted(search("q", ("a", None, True, None)), search("q", ("b", None, True, None))), "counts", 0)
    fitted = click_models.Fitted("ctr", {None: 1.0}, 0.5)
    counting.pair(0, scratch, fitted, 1)
    for searches, shown in ((5, 5), (0, 1)):  # of some clicks the search was lost
        asked = pl.DataFrame([("q", searches, 3)], schema=counting.QUERIES, orient="row")
        found = counting.paired(0, scratch, asked, only_clicks=True)
        assert found.select("doc_id", "impressions", "clicks", "examined", "looks").rows() == [
            ("a", shown, 1, shown, float(shown)), ("b", shown, 1, shown, float(shown)),
        ]  # fmt: skip
