"""How fast `ingest` and `aggregate` are on a made-up log, against DuckDB on the same files, and how large.

Ours is always the real command, with a Ray of its own, whose start is not counted; the peer has as many threads as
the machine has cores, and runs by turns with it.
"""

import contextlib
import functools
import os
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import psutil
import yaml

from bench import claims, runs
from bench.claims import Line
from jobs.watch import Watch

CORES = os.cpu_count() or 1
SEARCHES_PER_FILE = 125_000  # a file of a log is read by one task
MOST_MEMORY_MIB = 2048  # of any process
TIMES = (1, 2, 4)  # the log, where it grows
COUNTS = """
    create or replace table counts as
    select query, hit.doc_id, count(*) as impressions, count_if(hit.clicked) as clicks,
           sum(hit.dwell_s) as dwell_s, count(hit.dwell_s) as dwells
    from (select query, unnest(hits) as hit from read_parquet('{files}')) group by all
"""


class Largest(Watch):
    """The most memory that one process below a given one had for itself, in MiB."""

    every_s = 0.2

    def __init__(self, root: int) -> None:
        self.mib, self._root = 0, root

    def look(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self._root).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    memory = process.memory_info()
                    self.mib = max(self.mib, (memory.rss - memory.shared) // 2**20)


@dataclass(frozen=True)
class Plan:
    """Sizes of the full run; a setting that is a number is also an option of the command line."""

    folder: Path
    searches: int = 2_000_000  # result pages of ten documents
    queries: int = 50_000
    documents: int = 30_000
    runs: int = 3

    @functools.cache  # noqa: B019
    def log(self, times: int = 1) -> "Log":
        return Log(self.folder / f"{times}", self, times * self.searches)


@dataclass(frozen=True)
class Log:
    """A made-up log of so many searches, with what was measured on it."""

    folder: Path
    plan: Plan
    searches: int

    @functools.cached_property
    def recipe(self) -> Path:
        """With the log written, by the stage that makes it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "recipe.yaml"
        shards = max(CORES, self.searches // SEARCHES_PER_FILE)
        world = {"documents": self.plan.documents, "queries": self.plan.queries, "judged": 200}
        world |= {"searches": self.searches, "shards": shards}
        path.write_text(yaml.safe_dump({"root": str(self.folder / "run"), "world": world}))
        if not (self.folder / "run" / "world" / "manifest.json").exists():
            runs.done(path, self.folder / "log", stage="generate", artefact="world")
        return path

    def run(self, stage: str, artefact: str) -> dict[str, Any]:
        """The manifest of one run of a stage from nothing, with `largest_mib`."""
        for name in {"ingest": ("records", "searches", "documents"), "aggregate": ("evidence",)}[stage]:
            shutil.rmtree(self.folder / "run" / name, ignore_errors=True)
        with Largest(os.getpid()) as largest:
            manifest = runs.done(self.recipe, self.folder / "log", stage=stage, artefact=artefact)
        return manifest | {"largest_mib": largest.mib}

    def ingested(self) -> None:
        """Makes sure that there are searches."""
        if not (self.folder / "run" / "searches" / "manifest.json").exists():
            self.run("ingest", "searches")


def ingest(plan: Plan) -> Iterator[Line]:
    """Rows a second of the stage, with its join and all its checks, against a bare read of the same files."""
    log = plan.log()
    ours, peer, largest = [], [], 0
    for _ in range(plan.runs):
        manifest = log.run("ingest", "searches")
        lines, largest = manifest["counts"]["lines"], max(largest, manifest["largest_mib"])
        ours.append(lines / manifest["seconds"])
        peer.append(lines / _seconds(lambda: _read(log)))
    more = {"lines": lines, "searches": log.searches, "largest_mib": largest}
    yield claims.against("logs: ingest vs a bare read", ours, peer, "rows/s", 0.5, **more)


def _files(log: Log, kind: str) -> list[str]:
    assert log.recipe
    return sorted(map(str, (log.folder / "run" / "world").glob(f"ubi_{kind}-*.gz")))


def _read(log: Log) -> None:
    """All columns of all lines but the broken ones, at which Polars would stop."""
    with duckdb.connect(config={"threads": CORES}) as base:
        for kind in ("queries", "events"):
            options = "format='newline_delimited', ignore_errors=true"
            base.execute(f"create or replace table read as select * from read_json({_files(log, kind)}, {options})")


def aggregate(plan: Plan) -> Iterator[Line]:
    """The stage, with bots, four click models and evidence, against one query that counts impressions and clicks."""
    log = plan.log()
    log.ingested()
    ours, peer, largest = [], [], 0
    for _ in range(plan.runs):
        manifest = log.run("aggregate", "evidence")
        ours.append(manifest["seconds"])
        largest = max(largest, manifest["largest_mib"])
        peer.append(_seconds(lambda: _count(log)))
    more = {"impressions": 10 * log.searches, "largest_mib": largest}
    yield claims.against("logs: aggregate vs one DuckDB query", ours, peer, "s", 0.25, **more)


def _count(log: Log) -> None:
    with duckdb.connect(config={"threads": CORES}) as base:
        base.execute(COUNTS.format(files=f"{log.folder}/run/searches/*.parquet"))


def growth(plan: Plan) -> Iterator[Line]:
    """Twice and four times the log, as for as many nodes: the time and the largest process of both stages."""
    seconds: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    largest: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    for _ in range(plan.runs):
        for times in TIMES:
            for stage, artefact in (("ingest", "searches"), ("aggregate", "evidence")):
                manifest = plan.log(times).run(stage, artefact)
                seconds[stage, times].append(manifest["seconds"])
                largest[stage, times].append(manifest["largest_mib"])
    once = TIMES[0]
    for stage in ("ingest", "aggregate"):
        yield claims.within(f"logs: {stage}, largest process", largest[stage, once], MOST_MEMORY_MIB, "MiB")
        for times in TIMES[1:]:
            longer, searches = f"{times} times the log", plan.log(times).searches
            took, sizes = ((of[stage, times], of[stage, once]) for of in (seconds, largest))
            yield claims.against(f"logs: {stage} of {longer}", *took, "s", 1 / (1.1 * times), searches=searches)
            yield claims.against(f"logs: {stage}, largest process on {longer}", *sizes, "MiB", 1 / 1.1)


def _seconds(work: Callable[[], None]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


CLAIMS: dict[str, Callable[[Plan], Iterator[Line]]] = {"ingest": ingest, "aggregate": aggregate, "growth": growth}
SMALL = {"searches": 2_000, "queries": 100, "documents": 300, "runs": 1}


def main(argv: list[str] | None = None) -> int:
    return claims.command("bench.logs", Plan, CLAIMS, SMALL, argv, __doc__ or "", keeps=True)


if __name__ == "__main__":
    sys.exit(main())
