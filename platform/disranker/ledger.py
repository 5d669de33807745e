"""What was read of a log: batches of files, each there whole or not at all, and the cells that they reach.

`root/records/<settings>/<batch>/` holds the records of a few log files, by part (of the client) and period (of the
time); `<batch>.json` beside it is written last and makes the batch exist. A cell, one part of one period, is a function
of the batches that reach it, and its file is named after them: nothing is joined again unless something new reaches it.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import product
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from disranker import logs, tables
from disranker.inputs import Ingest
from disranker.recipe import digest
from disranker.store import ARROW, Store

MOST_RECORDS = 400_000  # that are joined at a time: some 150,000 searches of ten documents
MOST_OPEN = 128  # files that one task writes at a time
FORGOTTEN = "forgotten.json"

Identity = list[Any]  # path, bytes, time of change


@dataclass(frozen=True)
class Cell:
    part: int
    period: int


@dataclass(frozen=True)
class Batch:
    name: str
    number: int  # in the order of reading: of two that hold one file, the later counts
    files: list[Identity]
    counts: dict[str, dict[str, int]]  # by file
    reaches: list[list[int]]  # cells, as part and period, for which its records may matter


class Ledger:
    """The batches of one root, read with one set of settings, after which they are named."""

    def __init__(self, store: Store, name: str, cfg: Ingest):
        self.store, self.name, self.cfg = store, name, cfg
        self.folder = f"records/{name}"

    def __reduce__(self) -> tuple[Any, ...]:  # without what was listed and read
        return Ledger, (self.store, self.name, self.cfg)

    @cached_property
    def batches(self) -> list[Batch]:
        """All that exist, in the order of reading."""
        names = [path.removeprefix(self.store.at("")) for path in self._paths if path.endswith(".json")]
        return sorted((Batch(**self.store.read_json(name)) for name in names), key=lambda batch: batch.number)

    @cached_property
    def _paths(self) -> list[str]:
        """All files, listed once: an object store is slow to list."""
        return sorted(info.path for info in self.store.files(self.folder))

    @cached_property
    def forgotten(self) -> dict[str, int]:
        return forgotten(self.store)

    def latest(self) -> dict[str, tuple[Identity, Batch]]:
        """For each path its identity when it was read last, and the batch that holds it."""
        return {identity[0]: (identity, batch) for batch in self.batches for identity in batch.files}

    def unread(self, identities: list[Identity]) -> list[Identity]:
        """Files that are new, or not what they were."""
        known = self.latest()
        return [found for found in identities if found[0] not in known or known[found[0]][0] != found]

    def begin(self, identities: list[Identity]) -> str:
        """The name of the next batch; what a killed run left of any goes."""
        there = {batch.name for batch in self.batches}
        for info in self.store.fs.get_file_info(fs.FileSelector(self.store.at(self.folder), allow_not_found=True)):
            if info.type == fs.FileType.Directory and info.base_name not in there:
                self.store.fs.delete_dir(info.path)
        return digest(identities)

    def commit(self, name: str, identities: list[Identity], said: list[dict[str, Any]]) -> None:
        """Makes a batch exist; `said` is what `Writer.close` said of each file."""
        reaches = sorted({tuple(cell) for one in said for cell in one["reaches"]})
        counts = {identity[0]: one["counts"] for identity, one in zip(identities, said, strict=True)}
        number = 1 + max((batch.number for batch in self.batches), default=0)
        batch = Batch(name, number, identities, counts, [list(cell) for cell in reaches])
        self.store.put_text(json.dumps(asdict(batch)), self.folder, f"{name}.json")
        for known in ("batches", "_paths"):
            self.__dict__.pop(known, None)

    def drop_others(self) -> None:
        """Removes what was read with other settings."""
        for info in self.store.fs.get_file_info(fs.FileSelector(self.store.at("records"), allow_not_found=True)):
            if info.path != self.store.at(self.folder):
                self.store.fs.delete_dir(info.path)

    def cells(self) -> dict[Cell, str]:
        """The name of what each cell holds, by all that it is made of."""
        reached: dict[Cell, list[Any]] = {}
        for batch in self.batches:
            replaced = sorted(self.replaced(batch))
            for part, period in batch.reaches:
                reached.setdefault(Cell(part, period), []).append([batch.name, replaced])
        gone: dict[int, list[str]] = {}
        for client, slot in self.forgotten.items():
            gone.setdefault(slot % self.cfg.parts, []).append(client)
        return {cell: digest([self.folder, of, sorted(gone.get(cell.part, []))]) for cell, of in reached.items()}

    def replaced(self, batch: Batch) -> set[str]:
        """Files of a batch that were read again later."""
        latest = self.latest()
        return {identity[0] for identity in batch.files if latest[identity[0]][1].name != batch.name}

    def slices(self, cell: Cell) -> Iterator[pa.Table]:
        """All records that matter to a cell: of its period, and of the time around it in which an event may be late.

        So many clients at a time, all of each, as make about `MOST_RECORDS`.
        """
        records = sum(rows.num_rows for rows in self._around(cell, ["file", "time"]))
        count = max(1, math.ceil(records / MOST_RECORDS))
        for number in range(count):
            yield pa.concat_tables(
                [logs.RECORD.empty_table(), *(self._slice(rows, number, count) for rows in self._around(cell))]
            )

    def _around(self, cell: Cell, columns: list[str] | None = None) -> Iterator[pa.Table]:
        length, margin = self.cfg.period_days * logs.DAY_MS, max(self.cfg.late_s, self.cfg.page_gap_s) * logs.MS
        first, last = cell.period * length - margin, (cell.period + 1) * length + margin
        fields = [logs.RECORD.get_field_index(name) for name in columns or logs.RECORD.names]
        reaching = [batch for batch in self.batches if [cell.part, cell.period] in batch.reaches]
        for batch, period in product(reaching, range(cell.period - 1, cell.period + 2)):
            for path in self._starting(batch.name, f"records-{cell.part:05d}-{period}-"):
                rows = self._current(batch, self.store.read_arrow(path, fields))
                yield rows if period == cell.period else _between(rows, first, last)

    def _slice(self, rows: pa.Table, number: int, count: int) -> pa.Table:
        if count == 1:
            return rows
        clients = rows["client"].unique()
        mine = tables.slots(clients.to_pylist()) // self.cfg.parts % count == number  # the remainder is their part
        return rows.filter(pc.is_in(rows["client"], clients.filter(pa.array(mine))))

    def rejects(self, batch: Batch) -> pa.Table:
        """Lines of a batch that could not be read."""
        read = map(self.store.read_arrow, self._starting(batch.name, "rejects-"))
        found = pa.concat_tables([tables.SCHEMAS["rejects"].empty_table(), *read])
        return self._current(batch, found)

    def counts(self) -> dict[str, int]:
        """What was counted while reading, over all files that still count."""
        found: Counter[str] = Counter()
        for path, (_, batch) in self.latest().items():
            found.update(batch.counts[path])
        return dict(found)

    def lines_of(self, clients: list[str]) -> int:
        """How many records there are of clients."""
        return sum(rows.num_rows - kept.num_rows for _, rows, kept in self._without(clients))

    def forget(self, clients: list[str]) -> int:
        """Removes the records of clients from every batch, and returns how many there were. The batches stay."""
        removed = 0
        for path, rows, kept in self._without(clients):
            if kept.num_rows < rows.num_rows:
                self.store.put_arrow(kept, path.removeprefix(self.store.at("")))
                removed += rows.num_rows - kept.num_rows
        return removed

    def _without(self, clients: list[str]) -> Iterator[tuple[str, pa.Table, pa.Table]]:
        """(file, what it holds, what is not of the clients) for each file that may hold something of theirs."""
        parts = set(tables.part_of(clients, self.cfg.parts).tolist())
        for path in self._paths:
            kind, *numbers = path.rsplit("/", 1)[1].split("-")
            if kind == "rejects":
                rows = self.store.read_arrow(path)
                yield path, rows, without_words(rows, clients)
            elif kind == "records" and int(numbers[0]) in parts:
                rows = self.store.read_arrow(path)
                yield path, rows, rows.filter(pc.invert(pc.is_in(rows["client"], pa.array(clients))))

    def _current(self, batch: Batch, rows: pa.Table) -> pa.Table:
        """Without what was read again from a changed file."""
        replaced = pa.array(sorted(self.replaced(batch)), pa.string())
        return rows.filter(pc.invert(pc.is_in(rows["file"], replaced))) if len(replaced) else rows

    def _starting(self, batch: str, name: str) -> list[str]:
        start = self.store.at(self.folder, batch, name)
        return [path for path in self._paths if path.startswith(start)]


def _between(rows: pa.Table, first_ms: int, last_ms: int) -> pa.Table:
    ms = rows["time"].cast(pa.int64())
    return rows.filter(pc.and_(pc.greater_equal(ms, first_ms), pc.less(ms, last_ms)))


class Writer:
    """Records of one log file -> files by part and period. Holds no more than a block in memory."""

    def __init__(self, ledger: Ledger, batch: str, number: int):
        self.store, self.cfg, self.forgotten = ledger.store, ledger.cfg, ledger.forgotten
        self.folder, self.number = f"{ledger.folder}/{batch}", number
        self.counts = {"lines": 0, "other_events": 0, "broken": 0, "of_forgotten_clients": 0}
        self.reaches: set[tuple[int, int]] = set()
        self.writers: dict[str, pa.RecordBatchFileWriter] = {}
        self.files = ExitStack()
        self.times_full = 0

    def add(self, block: pa.Table) -> None:
        rows = pl.DataFrame(pl.from_arrow(block))
        other, refused = (rows.filter(pl.col("kind") == kind) for kind in ("other", "reject"))
        kept = self._known(rows.filter(~pl.col("kind").is_in(["other", "reject"])))
        self.counts["lines"] += rows.height
        self.counts["other_events"] += other.height
        self.counts["broken"] += refused.height
        if refused.height:
            self._write("rejects", tables.conform("rejects", refused.to_arrow()))
        if kept.height:
            self._keep(kept)

    def close(self) -> dict[str, Any]:
        """Ends all files; what was counted, and the cells that are reached."""
        self.files.close()
        return {"counts": self.counts, "reaches": sorted(self.reaches)}

    def _known(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Without the clients that asked to be forgotten."""
        if not self.forgotten:
            return rows
        gone = [client for client in rows["client"].unique() if hashed(client) in self.forgotten]
        kept = rows.filter(~pl.col("client").is_in(gone))
        self.counts["of_forgotten_clients"] += rows.height - kept.height
        return kept

    def _keep(self, rows: pl.DataFrame) -> None:
        clients = rows["client"].unique()
        parts = tables.part_of(clients, self.cfg.parts)
        part = rows["client"].replace_strict(clients, parts, return_dtype=pl.Int32)
        margin = max(self.cfg.late_s, self.cfg.page_gap_s)
        for by in (-margin, 0, margin):
            near = rows.select(part=part, period=logs.period(self.cfg, by))
            self.reaches |= set(near.unique().iter_rows())
        placed = rows.with_columns(part=part, period=logs.period(self.cfg))
        cells = placed.partition_by("part", "period", as_dict=True, include_key=False)
        for (number, period), inside in cells.items():
            self._write(f"records-{number:05d}-{period}", logs.table(inside.to_arrow()))

    def _write(self, start: str, rows: pa.Table) -> None:
        if start not in self.writers:
            if len(self.writers) == MOST_OPEN:  # a log in which times jump about: begin again with other files
                self.files.close()
                self.writers.clear()
                self.times_full += 1
            path = self.store.at(self.folder, f"{start}-{self.number:05d}-{self.times_full}.arrow")
            self.store.fs.create_dir(path.rsplit("/", 1)[0], recursive=True)
            out = self.files.enter_context(self.store.fs.open_output_stream(path))
            self.writers[start] = self.files.enter_context(pa.ipc.new_file(out, rows.schema, options=ARROW))
        self.writers[start].write_table(rows)


def hashed(client: str) -> str:
    """What is kept of a client that asked to be forgotten, so that a log that still holds it is recognised."""
    return hashlib.blake2b(client.encode(), digest_size=16).hexdigest()


def forgotten(store: Store) -> dict[str, int]:
    """Clients to forget, hashed, with the number that decides their part."""
    return dict(_memory(store)["clients"])


def forgot_at(store: Store) -> str | None:
    """When somebody was forgotten last, in ISO 8601."""
    at: str | None = _memory(store)["at"]
    return at


def remember_to_forget(store: Store, clients: list[str]) -> None:
    """Adds clients to those that no log brings back."""
    slots = dict(zip(map(hashed, clients), tables.slots(clients).tolist(), strict=True))
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    store.put_text(json.dumps({"at": now, "clients": forgotten(store) | slots}), FORGOTTEN)


def _memory(store: Store) -> dict[str, Any]:
    with suppress(FileNotFoundError):
        return store.read_json(FORGOTTEN)
    return {"at": None, "clients": {}}


def without_words(rejects: pa.Table, words: list[str]) -> pa.Table:
    """Refused lines in which none of the words occurs."""
    for word in words:
        rejects = rejects.filter(pc.invert(pc.fill_null(pc.match_substring(rejects["raw"], word), False)))
    return rejects
