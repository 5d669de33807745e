"""What `aggregate` counts: a task for each part of the clients, an exchange by query through files, and the sums."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from disranker import cleaning, click_models, clicks, tables
from disranker.click_models import Fitted
from disranker.inputs import Cleaning
from disranker.recipe import Recipe
from disranker.stages import Step
from disranker.store import Store

MOST_ROWS = 3_000_000  # counts that a task holds before it writes them
SEEN = ["client", "query", "time", "hits.list.element.clicked"]  # what tells a bot
SHOWN = ["client", "query", "time", "hits", "shuffled"]
NAMED = ["hits.list.element.doc_id"]  # few names, many times: they are left as codes
ASKED = {"query": pl.String, "client": pl.UInt64, "searches": pl.Int64}
QUERIES = {"query": pl.String, "searches": pl.Int64, "clients": pl.Int64}


class Scratch:
    """Tables of this stage alone, by name, part and who wrote them.

    `counts` are by part of the clients; `asked`, `some` and `pairs` are by part of the queries, of many writers, and
    `queries` the sum of what was asked.
    """

    def __init__(self, store: Store, step: Step):
        self.store, self.folder = store, f"runs/aggregate-{step.fingerprint}"

    def put(self, rows: pa.Table, name: str, part: int, writer: str = "all") -> None:
        self.store.put_arrow(rows, self.folder, f"{name}-{part:05d}", f"{writer}.arrow")

    def each(self, name: str, part: int) -> Iterator[pa.Table]:
        """What each writer wrote, in the order of their names."""
        for path in sorted(info.path for info in self.store.files(f"{self.folder}/{name}-{part:05d}")):
            yield self.store.read_arrow(path)

    def frame(self, name: str, part: int, schema: Any) -> pl.DataFrame:
        """What all writers wrote; no rows where there was nothing to write."""
        found = pa.concat_tables([pl.DataFrame(schema=schema).to_arrow(), *self.each(name, part)])
        return pl.DataFrame(pl.from_arrow(found))


def count(part: int, store: Store, scratch: Scratch, recipe: Recipe, share: float, always: list[str]) -> dict[str, Any]:
    """Counts what some clients did; says what was left out, and what shuffled pages tell.

    The counts of a share of the queries, by chance, and of those that are always wanted are exchanged by query: the
    models are fitted on them.
    """
    files = [path for path in store.parts("searches") if path.rsplit("/", 1)[1].startswith(f"part-{part:05d}-")]
    bots = _bots(files, store, recipe.cleaning)
    out = Counter(searches=0, repeated_pages=0, lost_clicks=0)
    some, asked, shuffled = (
        [clicks.TABLE.empty_table()],
        [pl.DataFrame(schema=ASKED)],
        [pl.DataFrame(schema=clicks.SHUFFLED)],
    )
    looks = _looks(files, bots["client"].unique(), store, recipe.cleaning, out)
    for number, searches in enumerate(filter(len, looks)):
        counted = clicks.counts(searches, recipe.aggregate.satisfied_dwell_s)
        scratch.put(counted, "counts", part, f"{number:05d}")
        some.append(clicks.sampled(counted, share, always))
        asked.append(_asked(searches))
        shuffled.append(clicks.shuffled(searches))
    _by_query(scratch, "some", clicks.summed(pa.concat_tables(some), clicks.PLACE), recipe.ingest.parts, f"{part:05d}")
    queries = pl.concat(asked).group_by("query").agg(pl.col("searches").sum(), clients=pl.col("client").n_unique())
    _by_query(scratch, "asked", queries.cast(QUERIES).to_arrow(), recipe.ingest.parts, f"{part:05d}")
    rules = {rule: {"clients": bots.filter(pl.col("rule") == rule).height} for rule in cleaning.RULES}
    return {
        "bots": bots["client"].n_unique(),
        "shuffled": clicks.add(shuffled),
        "cleaning": rules | {"bots": {"searches": out.pop("searches")}, "merge_repeats": dict(out)},
    }


def _looks(files: list[str], bots: pl.Series, store: Store, cfg: Cleaning, out: Counter[str]) -> Iterator[pa.Table]:
    """Searches of people, each page once a session, in tables; what is left out is added to `out`."""
    for everyone in _tables(store, files, SHOWN):
        people = ~pl.Series(pl.from_arrow(everyone["client"])).is_in(bots.implode())
        out["searches"] += everyone.num_rows - int(people.sum())
        again = pl.repeat(False, everyone.num_rows, eager=True)
        if cfg.merge_repeats:
            page = cleaning.pages(everyone, cfg.session_gap_s)
            again = page.is_duplicated()
            several, counts = cleaning.merged(everyone.filter((people & again).to_arrow()), page.filter(people & again))
            out.update(counts)
            yield several
        yield everyone.filter((people & ~again).to_arrow())


def _bots(files: list[str], store: Store, cfg: Cleaning) -> pl.DataFrame:
    return cleaning.bots(pl.concat(map(cleaning.activity, _tables(store, files, SEEN))), cfg)


def _tables(store: Store, files: list[str], columns: list[str]) -> Iterator[pa.Table]:
    """Searches of whole clients in a period, group by group; the first table is empty, as a part may have no file."""
    yield tables.SCHEMAS["searches"].empty_table()
    for path in files:
        with store.fs.open_input_file(path) as file:
            parquet = pq.ParquetFile(file, read_dictionary=NAMED)
            for group in range(parquet.num_row_groups):
                yield parquet.read_row_group(group, columns)


def _asked(searches: pa.Table) -> pl.DataFrame:
    rows = pl.DataFrame(pl.from_arrow(searches.select(["query", "client"])))
    return rows.group_by("query", pl.col("client").hash()).agg(searches=pl.len().cast(pl.Int64))


def _by_query(scratch: Scratch, name: str, rows: pa.Table, count: int, writer: str) -> None:
    """Writes rows by the part that their query belongs to."""
    for part, inside in clicks.by_part(rows, count):
        scratch.put(inside, name, part, writer)


def queries(part: int, scratch: Scratch, min_clients: int) -> dict[str, Any]:
    """Adds up how often some queries were asked; leaves out queries of few clients."""
    asked = scratch.frame("asked", part, QUERIES).group_by("query").agg(pl.col("searches", "clients").sum())
    few = cleaning.few_clients(asked, min_clients).implode()
    kept = asked.filter(~pl.col("query").is_in(few)).sort("query")
    scratch.put(kept.to_arrow(), "queries", part)
    left_out = {"queries": asked.height - kept.height, "searches": asked["searches"].sum() - kept["searches"].sum()}
    return {"few_clients": left_out, "frequencies": dict(kept["searches"].value_counts().iter_rows())}


def some(part: int, scratch: Scratch) -> pl.DataFrame:
    """The counts of those queries of a part that models are fitted on."""
    found = clicks.summed(pa.concat_tables([clicks.TABLE.empty_table(), *scratch.each("some", part)]), clicks.PLACE)
    return clicks.frame(found).join(scratch.frame("queries", part, QUERIES), on="query", how="semi")


def pair(part: int, scratch: Scratch, fitted: Fitted, count: int) -> dict[str, Any]:
    """Counts by pair what some clients did, as a click model sees it, and hands it on by query."""
    found = (click_models.pairs(counted, fitted) for counted in scratch.each("counts", part))
    for number, several in enumerate(_together(found)):
        rows = clicks.summed(pa.concat_tables(several), clicks.PAIR) if len(several) > 1 else several[0]
        _by_query(scratch, "pairs", rows, count, f"{part:05d}-{number}")
    return {}


def _together(found: Iterable[pa.Table]) -> Iterator[list[pa.Table]]:
    """Tables, as many at a time as make many rows."""
    held: list[pa.Table] = []
    for rows in found:
        held.append(rows)
        if sum(table.num_rows for table in held) > MOST_ROWS:
            yield held
            held = []
    if held:
        yield held


def paired(part: int, scratch: Scratch, asked: pl.DataFrame, only_clicks: bool) -> pl.DataFrame:
    """The pairs of some queries. Of a log of clicks alone, each search of a query counts as showing its documents."""
    found = list(scratch.each("pairs", part))
    if not found:
        return pl.DataFrame(schema={**clicks.COUNTS, "looks": pl.Float64}).drop("position")
    rows = clicks.frame(clicks.summed(pa.concat_tables(found), clicks.PAIR))
    kept = rows.join(asked, on="query", maintain_order="left")  # without the queries of few clients
    return (click_models.shown_by_each_search(kept) if only_clicks else kept).select(rows.columns)
