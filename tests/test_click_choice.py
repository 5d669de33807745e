import numpy as np
import polars as pl
import pytest
from test_click_models import LOG, PRIOR, by_pair, fit_pbm

from disranker import click_choice, click_models, clicks


def pairs(**queries):
    """attractiveness of d0, d1, … by query"""
    rows = [(query, f"d{i}", float(x)) for query, values in queries.items() for i, x in enumerate(values)]
    return pl.DataFrame(rows, schema=["query", "doc_id", "attractiveness"], orient="row")


def grades(**queries):
    return pairs(**queries).select("query", "doc_id", grade=pl.col("attractiveness").cast(pl.Int8))


def test_agreement_is_the_mean_rank_correlation_within_queries():
    judged = grades(a=[0, 1, 2, 3, 3], b=[3, 3, 2, 1, 0], c=[2, 2, 2, 2, 2], d=[0, 3])
    found = {"pbm": pairs(a=[1, 2, 3, 4, 4], b=[9, 9, 2, 1, 0], c=[1, 2, 3, 4, 5], d=[1, 0])}
    found["ctr"] = pairs(a=[4, 3, 2, 1, 1], b=[9, 9, 2, 1, 0], c=[1, 2, 3, 4, 5], d=[1, 0])
    pbm, ctr = click_choice.agreement(found, judged, seed=0)
    assert (pbm["model"], pbm["agreement"], pbm["queries"]) == ("pbm", pytest.approx(1), 2)
    assert ctr["agreement"] == pytest.approx(0, abs=1e-12) and (ctr["low"], ctr["high"]) == (-1, 1)


def test_the_correlation_is_that_of_scipy_with_ties():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, 40), rng.integers(0, 4, 40)
    (found,) = click_choice.correlations(pairs(q=x), grades(q=y))
    assert found == pytest.approx(spearmanr(x, y).statistic)


def test_a_model_that_tells_nothing_apart_gets_0_and_ungraded_documents_do_not_count():
    judged = grades(q=[0, 1, 2, 3, 3])
    assert click_choice.correlations(pairs(q=[7, 7, 7, 7, 7, 7]), judged).tolist() == [0]
    assert click_choice.correlations(pairs(q=[1, 2, 3, 4, 4, 0, 99]), judged) == pytest.approx([1])


def test_one_query_has_no_interval_and_none_no_agreement():
    judged = grades(q=[0, 1, 2, 3, 3])
    (row,) = click_choice.agreement({"pbm": pairs(q=[1, 2, 3, 4, 4])}, judged, 0)
    assert (row["low"], row["high"], row["queries"]) == (None, None, 1)
    (row,) = click_choice.agreement({"pbm": pairs(p=[1, 2, 3, 4, 4])}, judged, 0)
    assert (row["agreement"], row["queries"]) == (None, 0)


def row(model, agreement, log_loss=0.3, queries=40):
    return {"model": model, "agreement": agreement, "queries": queries, "log_loss": log_loss}


def test_the_choice_is_the_best_agreement_even_where_another_predicts_clicks_better():
    chosen, why = click_choice.choose([row("ctr", 0.5, 0.1), row("coec", 0.61, 0.3), row("pbm", 0.6, 0.2)])
    assert chosen == "coec" and "0.610" in why and "40" in why


def test_without_graded_queries_the_choice_is_pbm_and_says_so():
    chosen, why = click_choice.choose([row("ctr", None), row("coec", None)])
    assert chosen == "pbm" and "fewer than 20 validation queries" in why


@pytest.mark.parametrize(("queries", "chosen"), [(19, "pbm"), (20, "ctr")])
def test_a_choice_takes_20_graded_queries(queries, chosen):
    assert click_choice.choose([row("ctr", 0.9, queries=queries), row("pbm", 0.1, queries=queries)])[0] == chosen


def test_log_loss_by_hand_and_of_2_parts():
    fitted = click_models.Fitted("pbm", {1: 1.0, 2: 0.5}, mean=0.4)
    held = LOG.filter(pl.col("position") <= 2)[:2].with_columns(
        position=pl.Series([1, 2], dtype=pl.Int32),
        impressions=pl.Series([4, 5], dtype=pl.Int64),
        clicks=pl.Series([1, 2], dtype=pl.Int64),
    )
    nothing = by_pair(LOG[:0], fitted, PRIOR)
    found = click_choice.loss(held, nothing, fitted)
    by_hand = -(np.log(0.4) + 3 * np.log(0.6)), -(2 * np.log(0.2) + 3 * np.log(0.8))
    assert found == (pytest.approx(sum(by_hand)), 9)
    parts = [click_choice.loss(held[i : i + 1], nothing, fitted) for i in range(2)]
    assert click_choice.log_loss(parts) == pytest.approx(sum(by_hand) / 9)
    assert click_choice.log_loss([(0.0, 0)]) is None


def test_on_a_position_based_log_pbm_predicts_held_out_clicks_better_than_ctr():
    kept, held = clicks.thin(LOG, 0.2, [0])
    losses = {}
    for fitted in (fit_pbm(kept), click_models.ctr(clicks.totals(kept))):
        found = click_choice.loss(held, by_pair(kept, fitted, PRIOR), fitted)
        losses[fitted.name] = click_choice.log_loss([found])
    assert losses["pbm"] < losses["ctr"] - 0.01
