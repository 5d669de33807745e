"""Which click model feeds the evidence: the one that agrees best with people, whatever predicts clicks best."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import polars as pl

from disranker import click_models
from disranker.click_models import Fitted
from disranker.clicks import PAIR
from disranker.metrics import Array

FALLBACK = "pbm"  # where too few queries are graded to tell
LEAST_QUERIES = 20  # below, one lucky query decides
LEAST_PAIRS = 5  # graded documents that a query needs before their order says something
RESAMPLES = 2000


def agreement(found: Mapping[str, pl.DataFrame], judgments: pl.DataFrame, seed: int) -> list[dict[str, Any]]:
    """A row per model: its mean Spearman correlation of attractiveness with grade within a query, and an interval.

    found: (query, doc_id, attractiveness) by model; judgments: (query, doc_id, grade) of the queries to choose on,
    which must not be test queries. A query counts with `LEAST_PAIRS` graded documents that were shown, of at least two
    grades; a model that tells none of them apart gets 0 there. The interval is a 95% percentile bootstrap over queries.
    """
    rows = []
    for model, pairs in found.items():
        values = correlations(pairs, judgments)
        low, high = _bootstrap(values, seed)
        mean = float(values.mean()) if len(values) else None
        rows.append({"model": model, "agreement": mean, "low": low, "high": high, "queries": len(values)})
    return rows


def correlations(pairs: pl.DataFrame, judgments: pl.DataFrame) -> Array:
    """Spearman's correlation of attractiveness with grade of each query that counts, in the order of the queries."""
    graded = pairs.join(judgments.filter(pl.col("grade").is_not_null()), on=PAIR).select(
        "query", "grade", "attractiveness"
    )
    rank = [pl.col(name).rank("average").over("query") for name in ("grade", "attractiveness")]
    by_query = (
        graded.with_columns(rank)
        .group_by("query")
        .agg(n=pl.len(), grades=pl.col("grade").n_unique(), rho=pl.corr("grade", "attractiveness"))
        .filter((pl.col("n") >= LEAST_PAIRS) & (pl.col("grades") > 1))
        .sort("query")
    )
    return np.asarray(np.nan_to_num(by_query["rho"].fill_null(0).to_numpy()))


def loss(held: pl.DataFrame, pairs: pl.DataFrame, fitted: Fitted) -> tuple[float, int]:
    """(log loss summed over the impressions of `held`, impressions), by a model that did not see them.

    `held` as `clicks.thin` makes it; `pairs` is `click_models.by_pair` of what was kept. Sums of parts add up.
    """
    rows = click_models.predicted(held, pairs, fitted)
    p, clicked, shown = (rows[name].to_numpy() for name in ("p", "clicks", "impressions"))
    return float(-(clicked * np.log(p) + (shown - clicked) * np.log1p(-p)).sum()), int(shown.sum())


def log_loss(parts: Iterable[tuple[float, int]]) -> float | None:
    """Mean log loss of an impression, in nats, over the parts of `loss`; None where none was held out."""
    losses, shown = zip(*parts, strict=True)
    return sum(losses) / sum(shown) if sum(shown) else None


def choose(rows: list[dict[str, Any]]) -> tuple[str, str]:
    """(model, why) from the rows of `agreement`: best agreement with people; the fallback where too few graded."""
    graded = [row for row in rows if row["agreement"] is not None and row["queries"] >= LEAST_QUERIES]
    if not graded:
        return FALLBACK, f"fewer than {LEAST_QUERIES} validation queries with grades to compare on, so the usual one"
    best = max(graded, key=lambda row: row["agreement"])
    return best["model"], (
        f"it agrees best with human grades on {best['queries']:,} validation queries: "
        f"Spearman correlation {best['agreement']:.3f}"
    )


def _bootstrap(values: Array, seed: int) -> tuple[float | None, float | None]:
    if len(values) < 2:
        return None, None
    from scipy.stats import bootstrap  # takes a second to import

    found = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed), batch=100
    ).confidence_interval
    return float(found.low), float(found.high)
