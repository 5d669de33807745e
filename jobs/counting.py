"""What `aggregate` counts: a task for each part of the clients, an exchange by query through files, and the sums."""

from collections.abc import Iterator
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from disranker import cleaning, clicks, tables
from disranker.inputs import Cleaning
from disranker.recipe import Recipe
from disranker.stages import Step
from disranker.store import Store
from jobs import parts

CHUNK_ROWS = 3_000_000  # counts that a task holds before it writes them
SEEN = ["client", "query", "time", "hits.list.element.clicked"]  # what tells a bot


class Scratch:
    """Tables of this stage alone, by name, part of the queries and who wrote them.

    `counts` and `asked` have many writers; `merged` and `queries` are their sums.
    """

    def __init__(self, store: Store, step: Step):
        self.store, self.folder = store, f"runs/aggregate-{step.fingerprint}"

    def put(self, rows: pl.DataFrame, name: str, part: int, writer: str = "") -> None:
        self.store.put_table(rows.to_arrow(), self.folder, f"{name}-{part:05d}-{writer}.parquet")

    def get(self, name: str, part: int, schema: Any) -> pl.DataFrame:
        """What all writers wrote; no rows where there was nothing to write."""
        start = f"{name}-{part:05d}-"
        paths = sorted(info.path for info in self.store.files(self.folder) if info.base_name.startswith(start))
        return pl.concat([pl.DataFrame(schema=schema), *map(self._read, paths)])

    def _read(self, path: str) -> pl.DataFrame:
        with self.store.fs.open_input_file(path) as file:
            return pl.DataFrame(pl.from_arrow(pq.read_table(file)))


QUERIES = {"query": pl.String, "searches": pl.Int64, "clients": pl.Int64}


def count(part: int, store: Store, scratch: Scratch, recipe: Recipe) -> dict[str, Any]:
    """Counts what some clients did, by part of the query; says what was left out, and what shuffled pages tell."""
    files = [path for path in store.parts("searches") if path.rsplit("/", 1)[1].startswith(f"part-{part:05d}-")]
    bots = _bots(files, store, recipe.cleaning)
    refused = bots["client"].unique().implode()
    held, asked, shuffled = _Held(scratch, recipe.ingest.parts, part), [], []
    out = {"searches": 0, "repeated_pages": 0, "lost_clicks": 0}
    for shown in _tables(store, files):
        everyone = pl.DataFrame(pl.from_arrow(shown))
        people = everyone.filter(~pl.col("client").is_in(refused))
        out["searches"] += everyone.height - people.height
        if recipe.cleaning.merge_repeats:
            people, again = cleaning.unrepeated(people, recipe.cleaning.session_gap_s)
            out = parts.total([out, again])
        table = people.to_arrow()
        held.add(clicks.counts(table, recipe.aggregate.satisfied_dwell_s))
        shuffled.append(clicks.shuffled(table))
        asked.append(people.group_by("query", pl.col("client").hash()).agg(searches=pl.len().cast(pl.Int64)))
    held.write()
    queries = pl.concat(asked).group_by("query").agg(pl.col("searches").sum(), clients=pl.col("client").n_unique())
    _by_query(scratch, "asked", queries.cast(QUERIES), recipe.ingest.parts, f"{part:05d}")
    rules = {rule: {"clients": bots.filter(pl.col("rule") == rule).height} for rule in cleaning.RULES}
    return {
        "bots": bots["client"].n_unique(),
        "shuffled": clicks.add(shuffled).to_dicts() if shuffled else [],
        "cleaning": rules | {"bots": {"searches": out["searches"]}, "merge_repeats": _without(out, "searches")},
    }


def _without(counts: dict[str, int], name: str) -> dict[str, int]:
    return {key: value for key, value in counts.items() if key != name}


def _bots(files: list[str], store: Store, cfg: Cleaning) -> pl.DataFrame:
    return cleaning.bots(pl.concat(map(cleaning.activity, _tables(store, files, SEEN))), cfg)


def _tables(store: Store, files: list[str], columns: list[str] | None = None) -> Iterator[pa.Table]:
    """One table of searches after the other, the first without rows: a part may have no file."""
    yield tables.SCHEMAS["searches"].empty_table()
    for path in files:
        with store.fs.open_input_file(path) as file:
            yield pq.ParquetFile(file).read(columns)


class _Held:
    """Counts of one task, added up and written whenever they are many."""

    def __init__(self, scratch: Scratch, parts: int, writer: int):
        self.scratch, self.parts, self.writer = scratch, parts, writer
        self.frames: list[pl.DataFrame] = []
        self.written = 0

    def add(self, counted: pl.DataFrame) -> None:
        self.frames.append(counted)
        if sum(frame.height for frame in self.frames) > CHUNK_ROWS:
            self.write()

    def write(self) -> None:
        if not self.frames:
            return
        merged = clicks.merge(pl.concat(self.frames)) if len(self.frames) > 1 else self.frames[0]
        _by_query(self.scratch, "counts", merged, self.parts, f"{self.writer:05d}-{self.written}")
        self.frames, self.written = [], self.written + 1


def _by_query(scratch: Scratch, name: str, rows: pl.DataFrame, count: int, writer: str) -> None:
    """Writes rows by the part that their query belongs to."""
    queries = rows["query"].unique()
    part = rows["query"].replace_strict(queries, tables.part_of(queries, count), return_dtype=pl.Int32)
    cut = rows.with_columns(part=part).partition_by("part", as_dict=True, include_key=False)
    for (number,), inside in cut.items():
        scratch.put(inside, name, number, writer)


def merge(part: int, scratch: Scratch, min_clients: int) -> dict[str, Any]:
    """Adds up what all tasks counted of some queries; leaves out queries of few clients."""
    asked = scratch.get("asked", part, QUERIES).group_by("query").agg(pl.col("searches", "clients").sum())
    few = cleaning.few_clients(asked, min_clients).implode()
    kept = asked.filter(~pl.col("query").is_in(few)).sort("query")
    counted = clicks.merge(scratch.get("counts", part, clicks.COUNTS))
    counted = counted.filter(~pl.col("query").is_in(few))
    scratch.put(kept, "queries", part)
    scratch.put(counted, "merged", part)
    left_out = {"queries": asked.height - kept.height, "searches": asked["searches"].sum() - kept["searches"].sum()}
    frequencies = {str(searches): number for searches, number in kept["searches"].value_counts().iter_rows()}
    totals = clicks.totals(counted).to_dicts()
    return {"few_clients": left_out, "totals": totals, "frequencies": frequencies, "rows": counted.height}


def counted(scratch: Scratch, part: int, asked: pl.DataFrame, only_clicks: bool) -> pl.DataFrame:
    """Counts of some queries. Of a log of clicks alone, each search of a query counts as showing its documents."""
    found = scratch.get("merged", part, clicks.COUNTS)
    if not only_clicks:
        return found
    once = clicks.merge(found.with_columns(position=pl.lit(None, pl.Int32)))
    searches = pl.max_horizontal("searches", "clicks")
    joined = once.join(asked, on="query", maintain_order="left")
    return joined.with_columns(impressions=searches, examined=searches).select(list(clicks.COUNTS))
