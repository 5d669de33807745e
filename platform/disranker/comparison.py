"""Two reports side by side: every run and metric, how sure the difference is, and the settings that differ."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from disranker import metrics, page
from disranker.metrics import METRICS, Array, Qrels, Run
from disranker.recipe import Evaluate
from disranker.report import NONE, SHOWN, Report, aligned, difference, number

Settings = Mapping[str, Mapping[str, Any]]  # section -> setting -> value


@dataclass(frozen=True)
class Side:
    """One of the two. `qrels` and `runs` are those beside the report, empty where an older version wrote none."""

    name: str
    report: Report
    qrels: Qrels
    runs: Mapping[str, Run]
    settings: Settings


def rows(a: Side, b: Side) -> list[dict[str, Any]]:
    """Each run of either side and each metric: `a`, `b` and b less a, None where a side lacks it.

    The difference has a paired interval and p where both have the same queries: resamples and confidence as `b` has
    them. Elsewhere a difference would be of queries too, and has no interval.
    """
    found = []
    for run in dict.fromkeys([*a.report["runs"], *b.report["runs"]]):
        differences = _paired(a, b, run)
        for metric in METRICS:
            one, other = (_value(side.report, run, metric) for side in (a, b))
            plain = None if one is None or other is None else other - one
            row = {"run": run, "metric": metric, "a": one, "b": other, "difference": plain}
            found.append(row | differences.get(metric, {"low": None, "high": None, "p": None}))
    return found


def same_queries(a: Side, b: Side) -> bool:
    """Whether both were measured on the same queries, and their judgments are there to pair them."""
    return bool(a.qrels) and a.qrels.keys() == b.qrels.keys()


def notes(a: Side, b: Side) -> list[str]:
    """What to know before any difference is believed, a sentence each."""
    if not a.qrels or not b.qrels:
        lacking = " and ".join(side.name for side in (a, b) if not side.qrels)
        return [f"No intervals: {lacking} has no report/qrels.txt; evaluate again to get one."]
    if not same_queries(a, b):
        shared = len(a.qrels.keys() & b.qrels.keys())
        return [f"No intervals: of {len(a.qrels):,} and {len(b.qrels):,} queries, {shared:,} are the same."]
    said = [f"Both on the same {len(a.qrels):,} queries; brackets hold paired intervals."]
    if regraded := sum(a.qrels[query] != b.qrels[query] for query in a.qrels):
        said.append(f"The judgments of {regraded:,} of them differ, so a difference may be of grades.")
    return said


def changed(a: Settings, b: Settings) -> list[tuple[str, Any, Any]]:
    """(section.setting, value of a, value of b) of the settings that differ; None where a side does not have one."""
    names = sorted({(section, key) for side in (a, b) for section, values in side.items() for key in values})
    values = [[side.get(section, {}).get(key) for side in (a, b)] for section, key in names]
    return [(".".join(name), one, other) for name, (one, other) in zip(names, values, strict=True) if one != other]


def table(a: Side, b: Side) -> str:
    """The comparison as plain text: metrics, notes, settings."""
    listed = [["run", "metric", "A", "B", "B less A"]]
    listed += [
        [row["run"], page.named(row["metric"]), number(row["a"]), number(row["b"]), shown(row)]
        for row in rows(a, b)
        if row["metric"] in SHOWN
    ]
    settings = [["setting", "A", "B"], *map(list, _settings(a, b))]
    said = [f"A: {a.name}", f"B: {b.name}", *notes(a, b), "", *aligned(listed), ""]
    return "\n".join(said + (aligned(settings) if len(settings) > 1 else ["No setting differs."]))


def html(a: Side, b: Side) -> str:
    """The comparison as one page that fetches nothing."""
    return page.render(
        "comparison.html.j2",
        a=a,
        b=b,
        rows=[row | {"shown": shown(row), "tone": _tone(row)} for row in rows(a, b)],
        first=SHOWN,
        notes=notes(a, b),
        settings=_settings(a, b),
    )


def shown(row: Mapping[str, Any]) -> str:
    """A difference, with its interval where it has one."""
    return number(row["difference"], "+.3f") if row["low"] is None and row["high"] is None else difference(row)


def _paired(a: Side, b: Side, run: str) -> dict[str, dict[str, Any]]:
    if not same_queries(a, b) or run not in a.runs or run not in b.runs:
        return {}
    cfg = Evaluate(resamples=b.report["resamples"], confidence=b.report["confidence"])
    tallies: list[Array] = [metrics.tally(side.qrels, side.runs[run]) for side in (b, a)]
    found = metrics.compare(tallies[0], tallies[1], cfg, seed=0)
    return {metric: asdict(of) for metric, of in found.items()}


def _value(report: Report, run: str, metric: str) -> float | None:
    """None also for a metric that an older report does not have."""
    found = report["runs"].get(run, {}).get(metric)
    return None if found is None else found["value"]


def _settings(a: Side, b: Side) -> list[tuple[str, ...]]:
    """As texts, one that a side does not have as a dash."""
    listed = changed(a.settings, b.settings)
    return [(name, *(NONE if value is None else str(value) for value in (one, other))) for name, one, other in listed]


def _tone(row: Mapping[str, Any]) -> str:
    if row["low"] is not None and row["low"] > 0:
        return "up"
    return "down" if row["high"] is not None and row["high"] < 0 else ""
