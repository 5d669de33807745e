"""Logs, documents and judgments -> searches, documents, judgments, and rejects with a reason.

Only log files that are new or changed are read. With --follow it goes on as files arrive.
"""

import json
import sys
import time
from collections import Counter
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from disranker import cleaning, flat, ledger, lines, logs, stages, tables, ubi
from disranker import recipe as recipes
from disranker import store as stores
from disranker.inputs import Columns, Ingest
from disranker.ledger import Cell, Identity, Ledger
from disranker.recipe import Recipe, Refused, digest
from disranker.stages import Step
from disranker.store import Store
from jobs import catalogue, launch, parts

LOGS = ("queries", "events", "flat")
FILES_PER_BATCH = 256  # what a crash while reading costs at most
EXAMPLES = 3
pause = time.sleep  # of following; a test has no time


def run(recipe: Recipe, store: Store, step: Step) -> dict[str, Any]:
    files = _files(recipe, store)
    counts = catalogue.write(files, recipe.ingest.parts, store, step)
    counts |= _log(recipe, {what: files[what] for what in LOGS}, store, step)
    reasons = _reasons(store, store.written("rejects"))
    return counts | {"rejects": sum(reasons.values()), "reasons": reasons}


def _files(recipe: Recipe, store: Store) -> dict[str, list[str]]:
    if not recipe.made_up:
        return {what: stores.expand(patterns, what) for what, patterns in recipe.data.files().items()}
    world = f"{store.uri}/world"
    names = {
        "documents": "documents.parquet",
        "judgments": "judgments.parquet",
        "queries": "ubi_queries-*",
        "events": "ubi_events-*",
    }
    found = {what: stores.expand([f"{world}/{name}"], what) for what, name in names.items()}
    return {what: found.get(what, []) for what in recipe.data.files()}


# The log


def _log(recipe: Recipe, files: dict[str, list[str]], store: Store, step: Step) -> dict[str, Any]:
    cfg, columns = recipe.ingest, recipe.data.columns
    at = Ledger(store, meaning(recipe, step), cfg)
    at.drop_others()
    kinds = {path: what for what, paths in files.items() for path in paths}
    unread = at.unread(stages.identities(sorted(kinds)))
    for first in range(0, len(unread), FILES_PER_BATCH):
        _read(at, unread[first : first + FILES_PER_BATCH], kinds, cfg, columns)
    joined = _join(at, store)
    counts = at.counts() | {"files_read": len(unread), "cells_joined": joined} | _joined_counts(store, at)
    _check(counts, cfg, store, files)
    return counts


def meaning(recipe: Recipe, step: Step) -> str:
    """A digest of what decides which files there are and what their records are: with another, all are read again."""
    # By whole paths: a log that was moved is another one, not the same lines once more.
    patterns = [f"{recipe.root}/world"] if recipe.made_up else [*chain(*(getattr(recipe.data, what) for what in LOGS))]
    named = [pattern if "://" in pattern else str(Path(pattern).absolute()) for pattern in patterns]
    return digest([stages.FORMAT, step.reads, named, recipe.data.columns.model_dump(), step.settings["ingest"]])


def _read(at: Ledger, files: list[Identity], kinds: dict[str, str], cfg: Ingest, columns: Columns) -> None:
    """One batch: a task a file."""
    name = at.begin(files)

    def one(number: int) -> dict[str, Any]:
        path = files[number][0]
        writer = ledger.Writer(at, name, number)
        masked = dict.fromkeys(cleaning.KINDS, 0)
        for block in _records(path, kinds[path], columns):
            rows, found = _masked(block) if cfg.mask_personal_data else (block, {})
            writer.add(rows)
            masked = {kind: count + found.get(kind, 0) for kind, count in masked.items()}
        said = writer.close()
        said["counts"] |= {f"masked_{kind}": count for kind, count in masked.items()}
        return said

    launch.say(f"ingest: reads {len(files)} files, {sum(size for _, size, _ in files) / 2**20:.0f} MiB")
    at.commit(name, files, parts.each(len(files), one, "ingest: files read"))


def _records(path: str, kind: str, columns: Columns) -> Any:
    if kind == "flat":
        return flat.tables(path, columns)
    return (ubi.table(numbers, block, path, kind) for numbers, block in lines.blocks(path))


def _masked(block: pa.Table) -> tuple[pa.Table, dict[str, int]]:
    rows = pl.DataFrame(pl.from_arrow(block))
    query, found = cleaning.masked(rows["query"])
    return logs.table(rows.with_columns(query=query).to_arrow()), found


def _join(at: Ledger, store: Store) -> int:
    """Joins the cells that something new reaches, drops what no longer counts, and returns how many were joined."""
    wanted = {_name(cell, made_of): cell for cell, made_of in at.cells().items()}
    there = {path.rsplit("/", 1)[1].removesuffix(".parquet") for path in store.written("searches")}
    stale = sorted(set(wanted) - there)

    def one(number: int) -> dict[str, int]:
        _join_cell(stale[number], wanted[stale[number]], at, store)
        return {}

    if stale:
        parts.each(len(stale), one, "ingest: parts joined")
    broken = {f"lines-{batch.name}-{digest(sorted(at.replaced(batch)))}": batch for batch in at.batches}
    for name, batch in broken.items():
        store.put_table(at.rejects(batch), "rejects", f"{name}.parquet")
    kept = wanted.keys() | broken.keys()
    store.remove("searches", lambda name: name.rsplit(".", 1)[0] not in kept)
    store.remove("rejects", lambda name: name.rsplit(".", 1)[0] not in kept and not catalogue.of(name))
    return len(stale)


def _join_cell(name: str, cell: Cell, at: Ledger, store: Store) -> None:
    join = partial(logs.join, cfg=at.cfg, only=cell.period)
    counts: Counter[str] = Counter()
    refused = []

    def write(out: IO[bytes]) -> None:
        with pq.ParquetWriter(out, tables.SCHEMAS["searches"]) as file:
            # By `map`, which lets go of one slice before it asks for the next.
            for searches, rejects, counted in map(join, at.slices(cell)):
                file.write_table(searches, row_group_size=max(1, searches.num_rows))  # whole clients, for `aggregate`
                counts.update(counted)
                refused.append(rejects)
        # Before the searches are there, whose presence says that all is.
        store.put_text(json.dumps(counts), "searches", f"{name}.json")
        store.put_table(pa.concat_tables(refused), "rejects", f"{name}.parquet")

    store.put(write, "searches", f"{name}.parquet")


def _name(cell: Cell, made_of: str) -> str:
    return f"part-{cell.part:05d}-{cell.period}-{made_of}"


def _joined_counts(store: Store, at: Ledger) -> dict[str, int]:
    names = [f"{_name(cell, made_of)}.json" for cell, made_of in at.cells().items()]
    return parts.total(store.read_json("searches", name) for name in names)


def _check(counts: dict[str, Any], cfg: Ingest, store: Store, files: dict[str, list[str]]) -> None:
    """Raises `Refused` for a log that gives nothing, or too much that is broken."""
    of_log = [path for path in store.written("rejects") if not catalogue.of(path.rsplit("/", 1)[1])]
    read, reasons = counts.get("lines", 0), _reasons(store, of_log)
    refused = sum(reasons.values())
    if counts.get("searches") and refused <= cfg.max_bad_share * read:
        return
    named = ((what, paths) for what, paths in files.items() if paths)
    where = ", ".join(f"data.{what}: {paths[0]}{_and_more(paths)}" for what, paths in named)
    if not read:
        raise Refused(f"{where}: the log is empty")
    common = list(reasons.items())[:EXAMPLES]
    said = "; ".join(f"{reason} ({count}), as {_example(store, of_log, reason)}" for reason, count in common)
    if not counts.get("searches"):
        raise Refused(f"{where}: not one valid search in {read} lines; mostly: {said}")
    raise Refused(
        f"{refused} of {read} lines were refused, {refused / read:.1%}, and ingest.max_bad_share allows "
        f"{cfg.max_bad_share:.1%}; they lie in {store.at('rejects')}; mostly: {said}"
    )


def _and_more(paths: list[str]) -> str:
    return f" and {len(paths) - 1} more" if len(paths) > 1 else ""


def _reasons(store: Store, files: list[str]) -> dict[str, int]:
    """How often each reason occurs, most frequent first; a file at a time, as there may be many."""
    found: Counter[str] = Counter()
    for file in files:
        found.update(logs.refusals(store.read_files("rejects", [file], ["reason"])["reason"].to_pylist()))
    return dict(found.most_common())


def _example(store: Store, files: list[str], reason: str) -> str:
    here = pc.field("reason") == reason
    found = (store.read_files("rejects", [file], ["file", "line"], here) for file in files)
    first = next(rows for rows in found if rows.num_rows).slice(0, 1).to_pylist()[0]
    return f"{first['file']}:{first['line']}"


# Following


def follow(recipe_path: str, overrides: list[str], every_s: float, idle_s: float | None) -> None:
    """Ingests again and again: what arrived since is committed whole or not at all. Ends when idle so long."""
    quiet_since = time.monotonic()
    while idle_s is None or time.monotonic() - quiet_since < idle_s:
        recipe = recipes.load(recipe_path, overrides)
        store = Store(recipe.root)
        step = stages.step(recipe, "ingest")
        if stages.why(step, store):
            launch.execute(step, recipe, store)
            quiet_since = time.monotonic()
        pause(every_s)


def main(argv: list[str] | None = None) -> int:
    parser = launch.parser("python -m jobs.ingest", __doc__)
    parser.add_argument("--follow", action="store_true", help="go on: read files as they arrive, until interrupted")
    parser.add_argument("--every-s", type=float, default=30.0, help="how often to look, with --follow")
    parser.add_argument("--idle-s", type=float, help="with --follow, end after so long without a new file")
    arguments = parser.parse_args(argv)
    if not arguments.follow:
        return launch.one("ingest", arguments)

    def work() -> None:
        try:
            follow(arguments.recipe, arguments.set, arguments.every_s, arguments.idle_s)
        except KeyboardInterrupt:
            launch.say("ingest: stopped following; everything read so far is committed")

    return launch.guarded(work)


if __name__ == "__main__":
    sys.exit(main())
