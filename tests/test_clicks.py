import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from disranker import clicks, tables


def search(query, *hits, **others):
    """A result page; hits are (doc_id, position, clicked, dwell_s)."""
    names = ("doc_id", "position", "clicked", "dwell_s", "converted")
    shown = [dict(zip(names, (*found, False), strict=True)) for found in hits]
    return {"query_id": "q", "query": query, "client": "c", "time": None, "hits": shown} | others


def counts(*searches, satisfied_dwell_s=15.0):
    return clicks.frame(clicks.counts(tables.conform("searches", list(searches)), satisfied_dwell_s))


PAGES = (
    search("shoe", ("a", 1, True, 10.0), ("b", 2, False, None)),
    search("shoe", ("b", 1, True, None), ("a", 2, True, 20.0)),
    search("shoe", ("a", 1, False, None), ("b", 2, False, None)),
    search("coat", ("a", 1, False, None), ("b", 11, True, 5.0)),
)
SEEN = ["query", "doc_id", "position", "examined", "satisfied"]


def test_counts_of_4_pages_by_hand():
    assert counts(*PAGES).drop("examined", "satisfied").rows() == [
        ("coat", "a", 1, 1, 0, 0.0, 0),
        ("coat", "b", 11, 1, 1, 5.0, 1),
        ("shoe", "a", 1, 2, 1, 10.0, 1),
        ("shoe", "a", 2, 1, 1, 20.0, 1),
        ("shoe", "b", 1, 1, 1, 0.0, 0),
        ("shoe", "b", 2, 2, 0, 0.0, 0),
    ]


def test_examined_is_down_to_the_last_click_and_all_of_a_page_without_one():
    pages = [
        search("q", ("a", 1, False, None), ("b", 2, True, None), ("c", 3, False, None)),
        search("q", ("a", 1, True, None), ("b", 2, False, None), ("c", 3, False, None)),
        search("q", ("c", 3, False, None)),
    ]
    found = {row["doc_id"]: row["examined"] for row in counts(*pages).to_dicts()}
    assert found == {"a": 2, "b": 1, "c": 1}


def test_a_page_that_starts_at_11_is_a_list_of_its_own():
    pages = [
        search("q", ("a", 1, True, None), ("b", 2, False, None)),
        search("q", ("c", 11, False, None), ("d", 12, True, None), ("e", 13, False, None)),
    ]
    assert counts(*pages)["examined"].to_list() == [1, 0, 1, 1, 0]


def test_hits_out_of_order_are_examined_by_position():
    assert counts(search("q", ("c", 3, False, None), ("a", 1, False, None), ("b", 2, True, None)))[
        "examined"
    ].to_list() == [1, 1, 0]


def test_a_click_satisfies_by_dwell_and_as_the_last_one_where_dwell_is_not_known():
    page = search("q", ("a", 1, True, 15.0), ("b", 2, True, 14.9), ("c", 3, True, None), ("d", 4, True, None))
    assert counts(page)["satisfied"].to_list() == [1, 0, 0, 1]
    assert counts(page, satisfied_dwell_s=15.5)["satisfied"].to_list() == [0, 0, 0, 1]
    assert counts(search("q", ("a", 1, False, 99.0)))["satisfied"].to_list() == [0]


def test_without_positions_impressions_and_clicks_are_counted_all_the_same():
    found = counts(search("q", ("a", None, True, None), ("b", None, False, None)), search("q", ("a", None, True, 30.0)))
    assert found.rows() == [("q", "a", None, 2, 2, 30.0, 1, 2, 1), ("q", "b", None, 1, 0, 0.0, 0, 0, 0)]


def test_position_0_is_not_mistaken_for_an_unknown_one():
    found = counts(search("q", ("a", 0, True, None)), search("q", ("a", None, False, None)))
    assert sorted(found["position"].to_list(), key=str) == [0, None]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_counts_of_2_batches_merge_to_the_counts_of_one(cut):
    pages = [*PAGES, search("shoe", ("a", None, True, 2.0))] * 2
    halves = [clicks.counts(tables.conform("searches", half), 15.0) for half in (pages[:cut], pages[cut:])]
    merged = clicks.summed(pa.concat_tables(halves), clicks.PLACE)
    assert merged.schema == clicks.TABLE and clicks.frame(merged).equals(counts(*pages))
    ((_, part),) = clicks.by_part(merged[2:4], 1)
    assert clicks.frame(part).equals(counts(*pages)[2:4]) and clicks.coded(clicks.frame(part)).num_rows == 2
    assert part["query"].chunk(0).dictionary.to_pylist() == ["shoe"]


def test_counts_are_the_same_of_names_as_codes_and_of_a_table_in_pieces(tmp_path):
    searches = tables.conform("searches", list(PAGES))
    assert clicks.frame(clicks.counts(pa.concat_tables([searches[:1], searches[1:]]), 15.0)).equals(counts(*PAGES))
    pq.write_table(searches, tmp_path / "searches.parquet", row_group_size=2)
    file = pq.ParquetFile(tmp_path / "searches.parquet", read_dictionary=["hits.list.element.doc_id", "query"])
    read = pa.concat_tables(file.read_row_group(at) for at in range(2))
    assert read.schema != searches.schema
    assert clicks.frame(clicks.counts(read, 15.0)).equals(counts(*PAGES))


def test_counts_are_coded_and_named_again_and_sums_go_by_pair():
    log = counts(*PAGES)
    assert clicks.frame(clicks.coded(log)).equals(log)
    pairs = clicks.frame(clicks.summed(clicks.coded(log).drop_columns("position"), clicks.PAIR))
    assert pairs.select("query", "doc_id", "impressions", "clicks", "dwell_sum_s").rows() == [
        ("coat", "a", 1, 0, 0.0), ("coat", "b", 1, 1, 5.0), ("shoe", "a", 3, 2, 30.0), ("shoe", "b", 3, 1, 0.0),
    ]  # fmt: skip


def test_no_searches_and_no_hits_have_no_counts():
    empty = tables.SCHEMAS["searches"].empty_table()
    none = clicks.counts(empty, 15.0)
    assert none.schema == clicks.TABLE and clicks.frame(none).schema == pl.Schema(clicks.COUNTS)
    assert counts(search("q")).height == clicks.summed(none, clicks.PLACE).num_rows == 0
    assert clicks.totals(clicks.frame(none)).height == clicks.shuffled(empty).height == 0


def test_shuffled_counts_only_first_pages_that_are_marked():
    pages = [
        search("q", ("a", 1, True, None), ("b", 2, False, None), shuffled=True),
        search("p", ("b", 1, False, None), ("a", 2, False, None), shuffled=True),
        search("q", ("a", 1, True, None), shuffled=False),
        search("q", ("a", 1, True, None), shuffled=None),
        search("q", ("a", 11, True, None), ("b", 12, True, None), shuffled=True),
    ]
    found = clicks.shuffled(tables.conform("searches", pages))
    assert found.rows() == [(1, 2, 1), (2, 2, 0)]
    assert clicks.add([found, found]).rows() == [(1, 4, 2), (2, 4, 0)]


def test_totals_of_2_parts_add_up():
    whole = counts(*PAGES)
    assert clicks.add([clicks.totals(whole[:2]), clicks.totals(whole[2:])]).equals(clicks.totals(whole))
    assert clicks.totals(whole).rows() == [(1, 4, 2, 4, 0), (2, 3, 1, 2, 1), (11, 1, 1, 1, 0)]


def test_thinning_halves_each_kind_and_loses_nothing():
    columns = {"impressions": 90_000, "clicks": 4000, "examined": 40_000, "satisfied": 1000}
    row = counts(*PAGES)[:1].with_columns(pl.lit(n, pl.Int64).alias(name) for name, n in columns.items())
    kept, held = clicks.thin(row, 0.25, [1, 2])
    for name, n in columns.items():
        assert kept[name][0] + held[name][0] == n
        assert held[name][0] == pytest.approx(n / 4, abs=4 * np.sqrt(n * 3 / 16))
    assert held.equals(clicks.thin(row, 0.25, [1, 2])[1]) and not held.equals(clicks.thin(row, 0.25, [1, 3])[1])


def test_a_thinned_impression_is_whole():
    log = counts(*PAGES, *PAGES)
    for seed in range(20):
        for part in clicks.thin(log, 0.5, [seed]):
            assert part.filter(pl.col("impressions") == 0).height == 0
            assert part.filter(
                (pl.col("satisfied") > pl.col("clicks"))
                | (pl.col("clicks") > pl.col("examined"))
                | (pl.col("examined") > pl.col("impressions"))
            ).is_empty()
