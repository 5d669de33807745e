import numpy as np
import polars as pl
import pytest

from disranker import clicks, tables

EXAMINED = [1 / rank**0.7 for rank in range(1, 11)]


def search(query, *hits):
    """A result page; hits are (doc_id, position, clicked, dwell_s)."""
    names = ("doc_id", "position", "clicked", "dwell_s", "converted")
    shown = [dict(zip(names, (*found, False), strict=True)) for found in hits]
    return {"query_id": "q", "query": query, "client": "c", "time": None, "hits": shown}


def counted(*searches):
    return clicks.merge(clicks.counts(tables.conform("searches", list(searches))))


def pbm_log(pages=4000, queries=8, seed=0, shuffled=True):
    """Counts of a simulated log: 12 documents a query, 10 shown, clicked if examined and attractive."""
    rng = np.random.default_rng(seed)
    attractive = rng.uniform(0.05, 0.7, (queries, 12))
    rows = []
    for query in rng.integers(queries, size=pages):
        order = rng.permutation(12)[:10] if shuffled else np.argsort(-attractive[query])[:10]
        clicked = rng.random(10) < np.array(EXAMINED) * attractive[query, order]
        rows += [
            (f"q{query}", f"d{doc}", rank + 1, int(c)) for rank, (doc, c) in enumerate(zip(order, clicked, strict=True))
        ]
    frame = pl.DataFrame(rows, schema=["query", "doc_id", "position", "clicks"], orient="row")
    frame = frame.with_columns(impressions=pl.lit(1), dwell_sum_s=pl.lit(0.0), dwells=pl.lit(0))
    return clicks.merge(frame.select(pl.col(name).cast(kind) for name, kind in clicks.COUNTS.items())), attractive


PAGES = (
    search("shoe", ("a", 1, True, 10.0), ("b", 2, False, None)),
    search("shoe", ("b", 1, True, None), ("a", 2, True, 20.0)),
    search("shoe", ("a", 1, False, None), ("b", 2, False, None)),
    search("coat", ("a", 1, False, None), ("b", 11, True, 5.0)),
)


# Of 4 pages, a is clicked on 2, b on 1: examined starts at [1, 1 / sqrt 2], attractive at the mean, 3 / 8.
FOUR = [
    search("q", ("a", 1, first, None), ("b", 2, second, None))
    for first, second in ((True, True), (True, False), (False, False), (False, False))
]


def test_counts_of_4_pages_by_hand():
    assert counted(*PAGES).rows() == [
        ("coat", "a", 1, 1, 0, 0.0, 0),
        ("coat", "b", 11, 1, 1, 5.0, 1),
        ("shoe", "a", 1, 2, 1, 10.0, 1),
        ("shoe", "a", 2, 1, 1, 20.0, 1),
        ("shoe", "b", 1, 1, 1, 0.0, 0),
        ("shoe", "b", 2, 2, 0, 0.0, 0),
    ]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_counts_of_2_batches_merge_to_the_counts_of_one(cut):
    batches = [clicks.counts(tables.conform("searches", list(part))) for part in (PAGES[:cut], PAGES[cut:])]
    assert clicks.merge(pl.concat(batches)).equals(counted(*PAGES))


def test_the_examination_curve_of_a_shuffled_log_is_found_within_005():
    found = clicks.examination(pbm_log()[0], rounds=60, prior_impressions=4.0)
    assert list(found) == list(range(1, 11)) and found[1] == 1.0
    assert [found[rank] for rank in range(1, 11)] == pytest.approx(EXAMINED, abs=0.05)


def test_attractiveness_by_that_curve_is_found_within_01_and_better_than_by_plain_clicks():
    log, attractive = pbm_log()
    curve = clicks.examination(log, rounds=60, prior_impressions=4.0)
    errors = []
    for examined in (curve, dict.fromkeys(curve, 1.0)):
        done, looks = clicks.expected(log, examined)
        rows = clicks.evidence(log, examined, done / looks, 4.0).to_pylist()
        errors.append(
            [abs(row["attractiveness"] - attractive[int(row["query"][1:]), int(row["doc_id"][1:])]) for row in rows]
        )
    assert np.mean(errors[0]) < 0.05 and max(errors[0]) < 0.2 and np.mean(errors[1]) > 0.15


def test_one_round_by_hand():
    log = counted(*FOUR)
    e, a = np.array([1, 2**-0.5]), 3 / 8
    clicked, unclicked = np.array([2, 1]), np.array([2, 3])
    examined = (clicked + unclicked * e * (1 - a) / (1 - e * a)) / 4
    found = clicks.examination(log, rounds=1, prior_impressions=4.0)
    assert [found[1], found[2]] == pytest.approx([1, examined[1] / min(examined[0], 0.999)])


def test_two_rounds_by_hand_use_the_prior_of_the_first():
    log = counted(*FOUR)
    e, a = np.array([1, 2**-0.5]), np.array([3 / 8, 3 / 8])
    clicked, unclicked = np.array([2, 1]), np.array([2, 3])
    for _ in range(2):
        seen = (clicked + unclicked * e * (1 - a) / (1 - e * a)) / 4
        liked = clicked + unclicked * a * (1 - e) / (1 - e * a)
        e, a = np.minimum(seen, 0.999), (liked + 2 * liked.sum() / 8) / (4 + 2)
    found = clicks.examination(log, rounds=2, prior_impressions=2.0)
    assert found[2] == pytest.approx(e[1] / e[0])


def test_without_clicks_every_position_counts_as_examined():
    log = counted(search("q", ("a", 1, False, None), ("b", 5, False, None)))
    assert clicks.examination(log, 30, 4.0) == {1: 1.0, 5: 1.0}


def test_evidence_by_hand():
    # shoe a: 2 looks at 1 and half a look at 2, 2 clicks: (2 + 4 * 0.5) / (2.5 + 4)
    rows = clicks.evidence(counted(*PAGES), {1: 1.0, 2: 0.5, 11: 0.25}, mean=0.5, prior_impressions=4.0).to_pylist()
    found = {(row["query"], row["doc_id"]): row for row in rows}
    assert list(found) == [("coat", "a"), ("coat", "b"), ("shoe", "a"), ("shoe", "b")]
    assert found["shoe", "a"]["attractiveness"] == pytest.approx(4 / 6.5)
    assert found["shoe", "b"]["attractiveness"] == pytest.approx((1 + 2) / (1 + 1 + 4))
    assert found["coat", "b"]["attractiveness"] == pytest.approx((1 + 2) / (0.25 + 4))
    assert (found["shoe", "a"]["impressions"], found["shoe", "a"]["clicks"], found["shoe", "a"]["dwell_s"]) == (
        3,
        2,
        15.0,
    )
    assert found["shoe", "b"]["dwell_s"] is None


def test_with_every_position_examined_attractiveness_is_smoothed_ctr():
    rows = clicks.evidence(counted(*PAGES), {1: 1.0, 2: 1.0, 11: 1.0}, mean=0.25, prior_impressions=1.0).to_pylist()
    assert rows[2]["attractiveness"] == pytest.approx((2 + 0.25) / (3 + 1))


def test_a_position_without_a_curve_counts_as_the_least_examined():
    done, looks = clicks.expected(counted(*PAGES), {1: 1.0, 2: 0.5})
    assert (done, looks) == (4.0, 4 + 3 * 0.5 + 1 * 0.5)
    row = clicks.evidence(counted(*PAGES), {1: 1.0, 2: 0.5}, 0.5, 4.0).to_pylist()[1]
    assert row["attractiveness"] == pytest.approx((1 + 2) / (0.5 + 4))


def test_attractiveness_is_at_most_1_where_clicks_exceed_looks():
    log = counted(*[search("q", ("a", 9, True, None))] * 50)
    assert clicks.evidence(log, {1: 1.0, 9: 0.1}, 0.9, 0.1)["attractiveness"].to_pylist() == [1.0]


def test_expected_of_2_parts_adds_up():
    whole, examined = counted(*PAGES), {1: 1.0, 2: 0.5, 11: 0.25}
    parts = [clicks.expected(whole[:3], examined), clicks.expected(whole[3:], examined)]
    assert tuple(map(sum, zip(*parts, strict=True))) == pytest.approx(clicks.expected(whole, examined))


def test_no_searches_have_no_counts():
    assert clicks.counts(tables.SCHEMAS["searches"].empty_table()).height == 0
