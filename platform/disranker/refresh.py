"""A night's look back: how far the day's log is from those before, and where the new student is worse than the old."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import sqrt
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from disranker import metrics, page, pictures, stages
from disranker.metrics import METRICS, Array, Qrels, Run
from disranker.recipe import Evaluate, Publish, Recipe, Refresh, Student, digest
from disranker.report import HEADLINE, number
from disranker.slices import Slices
from disranker.stages import Step

NOT_AGAIN = ("generate", "pretrain", "finetune")  # stages that no night repeats
IN_SERVICE, NEW = "in service", "new"  # the two students, in the matrix
OLD_QUERIES, NEW_QUERIES, LATER = "measured before", "new today", "measured since"
AGREEMENT = "pair_accuracy"  # with the teacher's order
CHANCE = 0.001  # how seldom chance alone may take a number over its bar
COUNTED = pl.Schema({"what": pl.String, "name": pl.String, "shown": pl.Int64, "clicked": pl.Int64})
Row = Mapping[str, Any]
Tallies = Mapping[str, Array]  # model -> tally, queries in sorted order

HALF = 0.5  # of a click, added at each position: one that had none would be infinitely far from one that had some


def nightly(recipe: Recipe, in_service: str) -> Recipe:
    """The recipe of a night: the student starts from the bundle in service, and the gate holds it against that one."""
    ours = recipe.student
    limits = {name: getattr(ours, name) for name in ("max_query_tokens", "max_title_tokens", "max_tokens")}
    # Width, heads and words are the base's.
    start = Student(base=in_service, take="first", layers=ours.layers, **limits)
    publish: Publish = recipe.publish.model_copy(update={"in_service": in_service})
    return recipe.model_copy(update={"student": start, "publish": publish})


def steps(recipe: Recipe, teacher: str) -> list[Step]:
    """The steps of a night: those of the pipeline, but of the teacher, which stands with this fingerprint."""
    made, found = {"teacher": teacher}, []
    for step in stages.steps(recipe):
        if step.stage.name in NOT_AGAIN:
            continue
        reads = {name: made[name] for name in step.stage.reads if name in made}
        same = reads == step.reads  # then it is the pipeline's own, and stands if that one does
        night = step if same else replace(step, reads=reads, fingerprint=digest([step.fingerprint, reads]))
        made |= dict.fromkeys(step.stage.writes, night.fingerprint)
        found.append(night)
    return found


# Drift


def seen(searches: pa.Table) -> pl.DataFrame:
    """How often each query was searched, and each document and position shown and clicked. Those of parts: `added`."""
    pages = pl.DataFrame(pl.from_arrow(searches.select(["query", "hits"])))
    hits = pages.select("hits").explode("hits").drop_nulls("hits").unnest("hits")
    clicked = pl.col("clicked").fill_null(False).cast(pl.Int64)
    return added(
        [
            named("query", pages["query"]),
            named("document", hits["doc_id"], hits.select(clicked).to_series()),
            named("position", hits["position"].cast(pl.String), hits.select(clicked).to_series()).drop_nulls("name"),
        ]
    )


def named(what: str, names: pl.Series, clicked: pl.Series | None = None) -> pl.DataFrame:
    """Rows of `COUNTED`, each seen once."""
    rows = pl.DataFrame({"name": names}, schema={"name": pl.String})
    return rows.select(
        what=pl.lit(what),
        name=pl.col("name"),
        shown=pl.lit(1, pl.Int64),
        clicked=pl.lit(0) if clicked is None else clicked,
    ).cast(COUNTED)


def added(parts: Sequence[pl.DataFrame]) -> pl.DataFrame:
    whole = pl.concat([pl.DataFrame(schema=COUNTED), *parts])
    return whole.group_by("what", "name").agg(pl.col("shown", "clicked").sum()).sort("what", "name")


def since(now: pl.DataFrame, before: pl.DataFrame) -> pl.DataFrame:
    """What came between two counts of one growing log. Who was forgotten in between took some away: none is below 0."""
    both = now.join(before, on=["what", "name"], how="left", suffix="_before")
    came = [(pl.col(name) - pl.col(f"{name}_before").fill_null(0)).clip(0).alias(name) for name in ("shown", "clicked")]
    return both.select("what", "name", *came).filter(pl.col("shown") + pl.col("clicked") > 0)


@dataclass(frozen=True)
class Measure:
    """A number that tells the day from those before, and its bar."""

    name: str  # the setting of `refresh` that is its bar
    value: float | None  # None where there is nothing to count
    low: float | None  # what of it is left when chance is taken off, at `CHANCE`
    bar: float
    sentence: str

    @property
    def drifted(self) -> bool:
        return self.low is not None and self.low > self.bar


def drift(today: pl.DataFrame, before: pl.DataFrame, cfg: Refresh) -> list[Measure]:
    """The day, as `since` gives it, beside the days before."""
    searches = int(_of(today, "query")["shown"].sum())
    return [
        _share("max_new_queries", "query", "searches were for queries", today, before, searches, cfg.max_new_queries),
        _share(
            "max_new_documents", "document", "results were documents", today, before, searches, cfg.max_new_documents
        ),
        _clicks(_of(today, "position"), _of(before, "position"), cfg.max_click_change),
        _positions(_of(today, "position"), _of(before, "position"), cfg.max_position_shift),
    ]


def _of(counted: pl.DataFrame, what: str) -> pl.DataFrame:
    return counted.filter(pl.col("what") == what)


def _share(
    name: str, what: str, called: str, today: pl.DataFrame, before: pl.DataFrame, pages: int, bar: float
) -> Measure:
    """Share of what was shown today that no day before has. Results of one page are not drawn apart: pages count."""
    from scipy import special  # takes a second to import

    rows = _of(today, what)
    total = int(rows["shown"].sum())
    if not total or not pages:
        return Measure(name, None, None, bar, f"The day has no {what}.")
    new = rows.join(_of(before, what), on="name", how="anti")
    share = int(new["shown"].sum()) / total
    hits = share * pages
    low = float(special.betaincinv(hits, pages - hits + 1, CHANCE)) if hits else 0.0  # Clopper and Pearson 1934
    return Measure(name, share, low, bar, f"{share:.1%} of the {total:,} {called} that the days before do not have.")


def _clicks(today: pl.DataFrame, before: pl.DataFrame, bar: float) -> Measure:
    """How far the click-through is from that before, either way, as a share of it."""
    from scipy import special

    (shown, clicked), (shown_before, clicked_before) = (
        (int(rows["shown"].sum()), int(rows["clicked"].sum())) for rows in (today, before)
    )
    if not clicked or not clicked_before:
        return Measure("max_click_change", None, None, bar, "Clicks are lacking, of the day or before.")
    rate, rate_before = clicked / shown, clicked_before / shown_before
    change = rate / rate_before - 1
    error = (1 + change) * sqrt(1 / clicked + 1 / clicked_before)  # of a ratio of two Poisson counts
    low = max(0.0, abs(change) + float(special.ndtri(CHANCE)) * error)
    return Measure(
        "max_click_change",
        abs(change),
        low,
        bar,
        f"{rate:.2%} of the results were clicked, {rate_before:.2%} in the days before ({number(change, '+.1%')}).",
    )


def _positions(today: pl.DataFrame, before: pl.DataFrame, bar: float) -> Measure:
    """Population stability index of the positions of clicks; under no change it is a chi-square over the counts."""
    from scipy import special

    both = today.join(before, on="name", how="full", coalesce=True, suffix="_before").fill_null(0)
    clicks, clicks_before = int(both["clicked"].sum()), int(both["clicked_before"].sum())
    if not clicks or not clicks_before:
        return Measure("max_position_shift", None, None, bar, "Clicks are lacking, of the day or before.")
    one, other = ((both[name].to_numpy() + HALF) for name in ("clicked", "clicked_before"))
    one, other = one / one.sum(), other / other.sum()
    shift = float(((one - other) * np.log(one / other)).sum())
    chance = (
        float(special.chdtri(both.height - 1, CHANCE)) * (1 / clicks + 1 / clicks_before) if both.height > 1 else 0.0
    )
    means = [float((share * both["name"].cast(pl.Int64).to_numpy()).sum()) for share in (one, other)]
    return Measure(
        "max_position_shift",
        shift,
        max(0.0, shift - chance),
        bar,
        f"Clicks fell on position {means[0]:.1f} on average, on {means[1]:.1f} in the days before (PSI {shift:.3f}).",
    )


# The matrix


def by_age(queries: Collection[str], measured: Collection[str], searched: Collection[str]) -> dict[str, list[str]]:
    """Queries that the night before measured too, that are new in the log, and that only got their lists since."""
    found: dict[str, list[str]] = {OLD_QUERIES: [], NEW_QUERIES: [], LATER: []}
    for query in queries:
        age = OLD_QUERIES if query in measured else LATER if query in searched else NEW_QUERIES
        found[age].append(query)
    return {age: of for age, of in found.items() if of}


def graded(qrels: Qrels, runs: Mapping[str, Run]) -> Tallies:
    """What `matrix` needs of runs, by human grades."""
    return {model: metrics.tally(qrels, run) for model, run in runs.items()}


def taught(orders: Qrels, runs: Mapping[str, Run]) -> Tallies:
    """The same by the teacher's order, of which pair accuracy alone makes sense: grades that high break a gain."""
    found = {}
    for model, run in runs.items():
        right, wrong = metrics.pairs(orders, run)
        found[model] = np.stack([right, right + wrong], -1)[:, None].repeat(len(METRICS), 1)
    return found


def orders(groups: Iterable[Mapping[str, Any]], scores: Iterable[Sequence[float | None]]) -> dict[str, dict[str, int]]:
    """The teacher's order of each list as grades; without documents that it has no score for."""
    found = {}
    for group, given in zip(groups, scores, strict=True):
        known = {doc["doc_id"]: score for doc, score in zip(group["docs"], given, strict=True) if score is not None}
        places = {score: place for place, score in enumerate(sorted(set(known.values())))}
        if len(places) > 1:
            found[group["query"]] = {doc_id: places[score] for doc_id, score in known.items()}
    return found


def matrix(
    queries: Collection[str],
    tallies: Tallies,
    cut: Mapping[str, Slices],
    cfg: Evaluate,
    seed: int,
    metric: str = HEADLINE,
) -> list[dict[str, Any]]:
    """A metric of each model on each slice, and of the new student less the one in service, on the same queries."""
    listed = np.array(sorted(queries), dtype=object)
    whole: dict[str, Slices] = {"all": {"all": sorted(queries)}}
    return [
        {"by": by, "slice": name, "metric": metric}
        | _row(np.isin(listed, np.array(wanted, dtype=object)), tallies, cfg, seed, metric)
        for by, slices in (whole | dict(cut)).items()
        for name, wanted in slices.items()
        if len(listed)
    ]


def _row(inside: Any, tallies: Tallies, cfg: Evaluate, seed: int, metric: str) -> dict[str, Any]:
    models = {name: metrics.intervals(tally[inside], cfg, seed)[metric] for name, tally in tallies.items()}
    found = metrics.compare(tallies[NEW][inside], tallies[IN_SERVICE][inside], cfg, seed)[metric]
    return {
        "queries": int(inside.sum()),
        "models": {name: asdict(interval) for name, interval in models.items()},
        **asdict(found),
        "tone": _tone(found, cfg),
    }


def _tone(found: metrics.Difference, cfg: Evaluate) -> str:
    """up or down where both interval and test say so: of a handful of queries the interval alone is too short."""
    if found.low is None or found.high is None or found.p > 1 - cfg.confidence:
        return ""
    return "up" if found.low > 0 else "down" if found.high < 0 else ""


# The page


def content(
    day: str,
    since_day: str,
    counts: Mapping[str, Any],
    measures: Sequence[Measure],
    by_grades: Sequence[Row],
    by_teacher: Sequence[Row],
) -> dict[str, Any]:
    """What goes into refresh.json."""
    worse = [row for row in (*by_grades, *by_teacher) if row["tone"] == "down"]
    return {
        "day": day,
        "since": since_day,
        "counts": dict(counts),
        "drifted": [measure.name for measure in measures if measure.drifted],
        "drift": [asdict(measure) | {"drifted": measure.drifted} for measure in measures],
        "forgotten": [f"{row['by']}: {row['slice']}, {row['metric']}" for row in worse],
        "matrix": list(by_grades),
        "agreement": list(by_teacher),
    }


def html(found: Mapping[str, Any], cfg: Evaluate) -> str:
    """The same as a page that fetches nothing."""
    rows = [row | {"value": row["difference"]} for row in found["matrix"]]
    names = [f"{row['slice']}\n({row['queries']:,})" for row in rows]
    return page.render(
        "refresh.html.j2",
        found=found,
        confidence=cfg.confidence,
        sliced=page.SLICED | {"all": "all", "age": "since when it is known"},
        few=page.FEW,
        sentences=sentences(found),
        picture=pictures.differences(names, rows, "new less in service, NDCG@10"),
    )


def sentences(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(tone, sentence), what a person must see first."""
    said = [("bad", f"Drift: {one['sentence']}") for one in found["drift"] if one["drifted"]]
    said = said or [("good", "The day's log is like those before: no number is over its bar.")]
    said += [_found(row) for row in (*found["matrix"], *found["agreement"]) if row["tone"]]
    if not any(row["slice"] == NEW_QUERIES for row in found["matrix"]):
        said.append(("open", "No query that is new today has grades: only the teacher tells how either does on them."))
    return said


def _found(row: Row) -> tuple[str, str]:
    tone, verdict = ("bad", "worse: it forgets") if row["tone"] == "down" else ("good", "better")
    called = page.named(row["metric"]) + (" by the teacher" if row["metric"] == AGREEMENT else "")
    new, old = (number(row["models"][model]["value"]) for model in (NEW, IN_SERVICE))
    where = f"{row['queries']:,} queries, {row['slice']}"
    return tone, f"On {where}, the new student is {verdict}: {called} {new} against {old}."
