from dataclasses import replace

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_clicks import PAGES, counts, search

from disranker import click_models, clicks

EXAMINED = [1 / rank**0.7 for rank in range(1, 11)]
ROUNDS, PRIOR = 60, 4.0


def hits(order, clicked, dwell_s=None):
    dwells = [None] * len(order) if dwell_s is None else dwell_s
    return [
        (f"d{doc}", rank, bool(c), dwell if c else None)
        for rank, (doc, c, dwell) in enumerate(zip(order, clicked, dwells, strict=True), start=1)
    ]


def pbm_log(pages=4000, queries=8, seed=0):
    """Counts of a simulated log: 12 documents a query, 10 shown, clicked if examined and attractive."""
    rng = np.random.default_rng(seed)
    attractive = rng.uniform(0.05, 0.7, (queries, 12))
    searches = []
    for query in rng.integers(queries, size=pages):
        order = rng.permutation(12)[:10]
        clicked = rng.random(10) < np.array(EXAMINED) * attractive[query, order]
        searches.append(search(f"q{query}", *hits(order, clicked)))
    return counts(*searches), attractive


def dbn_log(pages=6000, queries=4, seed=0):
    """Counts of shoppers who read from the top, click what attracts and go on until a click satisfies, for 30 s."""
    rng = np.random.default_rng(seed)
    attractive, satisfying = rng.uniform(0.1, 0.6, (queries, 6)), rng.uniform(0.5, 0.95, (queries, 6))
    searches = []
    for query in rng.integers(queries, size=pages):
        order = rng.permutation(6)
        liked = rng.random(6) < attractive[query, order]
        done = liked & (rng.random(6) < satisfying[query, order])
        read = np.cumsum(done) - done == 0
        searches.append(search(f"q{query}", *hits(order, liked & read, np.where(done, 30.0, 5.0).tolist())))
    return counts(*searches), attractive, satisfying


def fit_pbm(*frames, rounds=ROUNDS, prior=PRIOR):
    parts = [click_models.Part(frame, prior) for frame in frames]
    totals = clicks.add([clicks.totals(frame) for frame in frames])
    attracted = [None] * len(parts)

    def expect(examined, center):
        found = [part.expect(examined, center, last) for part, last in zip(parts, attracted, strict=True)]
        attracted[:] = [now for _, now in found]
        return [said for said, _ in found]

    return click_models.pbm(totals, expect, rounds)


def by_pair(counted, fitted, prior):
    return click_models.by_pair(clicks.coded(counted), fitted, prior)


def truth(pairs, planted):
    return np.array([planted[int(query[1:]), int(doc[1:])] for query, doc in pairs.select(clicks.PAIR).iter_rows()])


# Of 4 pages, a is clicked on 2, b on 1: examined starts at [0.999, 1 / sqrt 2], attractive at the mean, 3 / 8.
FOUR = counts(
    *(
        search("q", ("a", 1, first, None), ("b", 2, second, None))
        for first, second in ((True, True), (True, False), (False, False), (False, False))
    )
)
LOG, ATTRACTIVE = pbm_log()


def test_pbm_finds_the_examination_curve_of_a_shuffled_log_within_005():
    found = fit_pbm(LOG).examination
    assert list(found) == list(range(1, 11)) and found[1] == 1.0
    assert [found[rank] for rank in range(1, 11)] == pytest.approx(EXAMINED, abs=0.05)


def test_attractiveness_by_that_curve_is_found_within_02_and_better_than_by_plain_clicks():
    errors = []
    for fitted in (fit_pbm(LOG), click_models.ctr(clicks.totals(LOG))):
        pairs = by_pair(LOG, fitted, PRIOR)
        errors.append(np.abs(pairs["attractiveness"].to_numpy() - truth(pairs, ATTRACTIVE)))
    assert np.mean(errors[0]) < 0.05 and max(errors[0]) < 0.2 and np.mean(errors[1]) > 0.15


def test_dbn_finds_attraction_times_satisfaction_within_01():
    log, attractive, satisfying = dbn_log()
    fitted = click_models.dbn(clicks.totals(log))
    pairs = by_pair(log, fitted, PRIOR)
    assert pairs["attractiveness"].to_numpy() == pytest.approx(truth(pairs, attractive * satisfying), abs=0.1)
    plain = by_pair(log, click_models.ctr(clicks.totals(log)), PRIOR)
    assert np.mean(truth(pairs, attractive) - plain["attractiveness"].to_numpy()) > 0.1


def test_dbn_finds_how_often_shoppers_read_on():
    log, attractive, satisfying = dbn_log()
    on = 1 - (attractive * satisfying).mean()
    found = click_models.dbn(clicks.totals(log)).examination
    assert [found[rank] for rank in range(1, 7)] == pytest.approx([on**k for k in range(6)], abs=0.08)


def test_one_round_by_hand():
    e, a = np.array([0.999, 2**-0.5]), 3 / 8
    clicked, unclicked = np.array([2, 1]), np.array([2, 3])
    examined = np.minimum(0.999, (clicked + unclicked * e * (1 - a) / (1 - e * a)) / 4)
    fitted = fit_pbm(FOUR, rounds=1)
    assert [fitted.examination[1], fitted.examination[2]] == pytest.approx([1, examined[1] / examined[0]])
    assert fitted.mean == pytest.approx(3 / (4 + 4 * examined[1] / examined[0]))


def test_two_rounds_by_hand_use_the_prior_of_the_first():
    e, a = np.array([0.999, 2**-0.5]), np.array([3 / 8, 3 / 8])
    clicked, unclicked = np.array([2, 1]), np.array([2, 3])
    for _ in range(2):
        seen = (clicked + unclicked * e * (1 - a) / (1 - e * a)) / 4
        liked = clicked + unclicked * a * (1 - e) / (1 - e * a)
        e, a = np.minimum(seen, 0.999), (liked + 2 * liked.sum() / 8) / (4 + 2)
    assert fit_pbm(FOUR, rounds=2, prior=2.0).examination[2] == pytest.approx(e[1] / e[0])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=8, max_size=8))
def test_any_split_of_the_queries_gives_the_curve_of_the_whole(part_of):
    of = LOG["query"].str.slice(1).cast(pl.Int64).replace_strict(dict(enumerate(part_of)))
    frames = [LOG.filter(of == part) for part in range(4)]
    whole, split = fit_pbm(LOG, rounds=8), fit_pbm(*frames, rounds=8)
    assert split.examination == pytest.approx(whole.examination, rel=1e-9)
    assert split.mean == pytest.approx(whole.mean, rel=1e-9)


def test_without_clicks_every_position_counts_as_examined():
    log = counts(search("q", ("a", 1, False, None), ("b", 5, False, None)))
    totals = clicks.totals(log)
    for fitted in (fit_pbm(log), click_models.coec(totals), click_models.ctr(totals), click_models.dbn(totals)):
        assert fitted.examination == {1: 1.0, 5: 1.0} and fitted.mean == 0
        assert by_pair(log, fitted, PRIOR)["attractiveness"].to_list() == [0, 0]


def test_coec_by_hand():
    # 2 of 4 clicked at 1, 1 of 3 at 2, 1 of 1 at 11: relative to the first 1, 2/3, 2; 4 clicks on 4 + 2 + 2 looks.
    fitted = click_models.coec(clicks.totals(counts(*PAGES)))
    assert fitted.examination == pytest.approx({1: 1.0, 2: 2 / 3, 11: 2.0})
    assert fitted.mean == pytest.approx(0.5)
    pairs = by_pair(counts(*PAGES), fitted, 4.0)
    assert pairs["attractiveness"].to_list() == pytest.approx(
        [2 / 5, 3 / 6, (2 + 2) / (2 + 2 / 3 + 4), (1 + 2) / (1 + 4 / 3 + 4)]
    )
    # COEC itself, without the prior: clicks over clicks expected by the rate of the rank
    assert pairs["clicks"][2] / (2 + 2 / 3) / fitted.mean == pytest.approx(2 / (2 * 1 / 2 + 1 / 3))


def test_ctr_is_smoothed_clicks_over_impressions():
    fitted = click_models.ctr(clicks.totals(counts(*PAGES)))
    assert fitted.mean == 0.5
    pairs = by_pair(counts(*PAGES), fitted, 1.0)
    assert pairs["attractiveness"].to_list() == pytest.approx([0.5 / 2, 1.5 / 2, 2.5 / 4, 1.5 / 4])


def test_dbn_by_hand():
    # satisfied at 15 s: only a at 2, by 20 s. Examined: all but b below the first click.
    fitted = click_models.dbn(clicks.totals(counts(*PAGES)))
    assert fitted.examination == pytest.approx({1: 1.0, 2: 2 / 3, 11: 1.0})
    assert (fitted.mean, fitted.satisfaction) == (4 / 7, 1 / 4)
    pairs = by_pair(counts(*PAGES), fitted, 2.0)
    assert pairs["clickable"].to_list() == pytest.approx(
        [(8 / 7) / 3, (1 + 8 / 7) / 3, (2 + 8 / 7) / 5, (1 + 8 / 7) / 4]
    )
    satisfied = [0.5 / 2, 0.5 / 3, 1.5 / 4, 0.5 / 3]
    assert (pairs["attractiveness"] / pairs["clickable"]).to_list() == pytest.approx(satisfied)


def given_curve(examined, mean):
    return click_models.Fitted("pbm", examined, mean)


def test_evidence_by_hand():
    # shoe a: 2 looks at 1 and half a look at 2, 2 clicks: (2 + 4 * 0.5) / (2.5 + 4)
    fitted = given_curve({1: 1.0, 2: 0.5, 11: 0.25}, 0.5)
    rows = click_models.evidence(by_pair(counts(*PAGES), fitted, 4.0)).to_pylist()
    found = {(row["query"], row["doc_id"]): row for row in rows}
    assert list(found) == [("coat", "a"), ("coat", "b"), ("shoe", "a"), ("shoe", "b")]
    a, b = found["shoe", "a"], found["shoe", "b"]
    assert a["attractiveness"] == pytest.approx(4 / 6.5)
    assert b["attractiveness"] == pytest.approx((1 + 2) / (1 + 1 + 4))
    assert found["coat", "b"]["attractiveness"] == pytest.approx((1 + 2) / (0.25 + 4))
    assert (a["impressions"], a["clicks"], a["satisfied"], a["dwell_s"]) == (3, 2, 1, 15.0)
    assert b["dwell_s"] is None and b["satisfied"] == 0


def test_a_position_without_a_curve_counts_as_the_least_examined():
    row = click_models.evidence(by_pair(counts(*PAGES), given_curve({1: 1.0, 2: 0.5}, 0.5), 4.0)).to_pylist()[1]
    assert row["attractiveness"] == pytest.approx((1 + 2) / (0.5 + 4))


def test_attractiveness_is_at_most_1_where_clicks_exceed_looks():
    log = counts(*[search("q", ("a", 9, True, None))] * 50)
    assert click_models.evidence(by_pair(log, given_curve({1: 1.0, 9: 0.1}, 0.9), 0.1))[
        "attractiveness"
    ].to_pylist() == [1.0]


def test_pairs_of_2_halves_of_a_log_add_up_to_those_of_the_whole():
    fitted = given_curve({1: 1.0, 2: 0.5, 11: 0.25}, 0.5)
    log = clicks.coded(counts(*PAGES))
    halves = pa.concat_tables([click_models.pairs(log[:3], fitted), click_models.pairs(log[3:], fitted)])
    assert clicks.summed(halves, clicks.PAIR).equals(click_models.pairs(log, fitted))
    assert click_models.pairs(log, fitted)["looks"].to_pylist() == [1.0, 0.25, 2.5, 2.0]
    assert click_models.pairs(log, replace(fitted, name="dbn"))["looks"].to_pylist() == [1.0, 1.0, 3.0, 2.0]


def test_predicted_is_examination_times_the_chance_of_a_click_and_the_mean_for_an_unknown_pair():
    fitted = given_curve({1: 1.0, 2: 0.5, 11: 0.25}, 0.4)
    pairs = by_pair(counts(*PAGES), fitted, 4.0).filter(pl.col("query") == "shoe")
    found = click_models.predicted(counts(*PAGES), pairs, fitted)["p"].to_list()
    a, b = pairs["clickable"].to_list()
    assert found == pytest.approx([0.4, 0.1, a, a / 2, b, b / 2])


def test_a_log_without_positions_allows_ctr_alone_and_says_why():
    log = counts(search("q", ("a", None, True, None)), search("q", ("a", 1, True, None), ("b", 2, False, None)))
    found = click_models.impossible(clicks.totals(log))
    assert set(found) == {"coec", "pbm", "dbn"}
    assert "1 of 3 impressions have no position" in found["pbm"]
    assert click_models.impossible(clicks.totals(counts(*PAGES))) == {}
    fitted = click_models.ctr(clicks.totals(log))
    assert fitted.examination == {None: 1.0, 1: 1.0, 2: 1.0}
    assert by_pair(log, fitted, 3.0)["attractiveness"].to_list() == pytest.approx([4 / 5, 2 / 4])


def by_position(*rows):
    return pl.DataFrame(rows, schema=["position", "impressions", "clicks"], orient="row")


def test_the_interventional_estimate_by_hand():
    found = click_models.interventional(by_position((1, 400, 100), (2, 400, 50), (3, 400, 0)))
    assert found["examination"].to_list() == [1, 0.5, 0]
    error = 1.96 * np.sqrt(1 / 50 - 1 / 400 + 1 / 100 - 1 / 400)
    assert found.row(1)[2:] == pytest.approx((0.5 * np.exp(-error), 0.5 * np.exp(error)))
    assert found.row(0)[2:] == (1, 1)
    assert found["low"][2] == 0 and 0.001 < found["high"][2] < 0.1


def test_the_interval_covers_the_truth_19_times_in_20():
    rng = np.random.default_rng(3)
    covered = []
    for _ in range(400):
        rows = [(rank, 1000, rng.binomial(1000, 0.3 * EXAMINED[rank - 1])) for rank in (1, 4)]
        _, _, low, high = click_models.interventional(by_position(*rows)).row(1)
        covered.append(low <= EXAMINED[3] <= high)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.03)


def test_there_is_no_interventional_estimate_without_clicks_at_the_top():
    assert click_models.interventional(by_position((1, 9, 0), (2, 9, 1))).height == 0
    assert click_models.interventional(by_position()).height == 0
