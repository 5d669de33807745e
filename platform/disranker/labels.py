"""The label store: one teacher's scores by key, under `labels/<teacher>/`.

A key is a hash of the token ids and of all that decides the score of those ids, so the same text is never paid for
twice and a new teacher never mixes with an old one.

    teacher.json                  what the teacher is, and the format of these files
    new-<name>.parquet            a batch, as it was scored
    part-<start>-<name>.parquet   labels whose key begins with `start`, compacted
    trying-<name>-<chance>        a batch that an engine has begun, until it ends
    rejects-<name>.jsonl          pairs that no engine could score, and why
    stats.json                    count, mean, deviation and histogram of all labels

A file is named for what went into it: written twice, it is there once. A compacted file is there before its sources go,
and a key that stands in two files counts once. So batches, compactions and readers need no lock, on an object store as
on a disk.
"""

import contextlib
import hashlib
import json
import math
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
from pyarrow import fs

from disranker.contract import Contract, file_digest
from disranker.recipe import Refused, digest
from disranker.store import Store

FORMAT = 1  # of the files above; a store of a higher one is refused
PARTITIONS = "0123456789abcdef"  # the first character of a key
BINS = 20  # of the histogram
LEFT_S = 24 * 3600.0  # until what a run has begun is held to be left by a dead one
READS = 8  # of files that another process may be compacting
SCHEMA = pa.schema([("key", pa.string()), ("score", pa.float32())])
T = TypeVar("T")


def about(folder: str | Path, contract: Contract, dtype: str, engine: str) -> dict[str, Any]:
    """All that decides a score: weights, contract, dtype and the version of the engine."""
    weights = {path.name: file_digest(path) for path in sorted(Path(folder).glob("*.safetensors"))}
    weights["config.json"] = file_digest(Path(folder) / "config.json")
    return {"weights": weights, "contract": contract.digest, "dtype": dtype, "engine": engine}


def teacher(about: dict[str, Any]) -> str:
    """The name of a teacher."""
    return digest([about["weights"], about["contract"], about["dtype"], about["engine"]])


def key(ids: Sequence[int], teacher: str) -> str:
    """32 hexadecimal characters for one pair under one teacher."""
    return hashlib.blake2b(np.asarray(ids, np.uint32).tobytes(), digest_size=16, key=teacher.encode()).hexdigest()


class Labels:
    """The labels of one teacher. Raises `Refused` where a newer version of this program wrote them."""

    def __init__(self, store: Store, teacher: str):
        self.store, self.teacher = store, teacher
        found = self._json("teacher.json")
        if found and found["format"] > FORMAT:
            raise Refused(
                f"the labels in {store.at('labels', teacher)} have format {found['format']}, this version reads "
                f"format {FORMAT} and older: update disranker, or score into another root"
            )

    def describe(self, about: dict[str, Any]) -> None:
        """Says beside the labels whose they are."""
        if not self._json("teacher.json"):
            self._put("teacher.json", about | {"format": FORMAT})

    # Batches

    def write(self, keys: Sequence[str], scores: Sequence[float]) -> None:
        """One batch. Raises `ValueError` if a score is not a finite number."""
        bad = [k for k, score in zip(keys, scores, strict=True) if not math.isfinite(score)]
        if bad:
            raise ValueError(f"{len(bad)} scores are not finite, the first for key {bad[0]}")
        rows = pa.table({"key": pa.array(keys, pa.string()), "score": pa.array(scores, pa.float32())})
        self._write(f"new-{_name(keys)}.parquet", rows)

    def written(self, keys: Iterable[str]) -> bool:
        """Whether just this batch was written and not compacted yet: a task that Ray repeats need not pay again."""
        return self._there(f"new-{_name(keys)}.parquet")

    def reject(self, pairs: list[dict[str, Any]]) -> None:
        """Keeps pairs that cannot be scored: rows of key, query, doc_id, reason."""
        lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        self.store.put_text(lines, "labels", self.teacher, f"rejects-{_name(pair['key'] for pair in pairs)}.jsonl")

    # Attempts: an engine that dies takes its process with it, so what it died on must be known outside.

    def begin(self, keys: Iterable[str]) -> list[str]:
        """Marks a batch as begun: the marks of all attempts at it that never ended, this one last.

        Remove them with `drop` at its end.
        """
        start = f"trying-{_name(keys)}-"
        earlier, mark = self._names(start, ""), start + uuid.uuid4().hex
        self.store.put_text("", "labels", self.teacher, mark)
        return [*earlier, mark]

    def sweep(self) -> None:
        """Removes what killed runs left half-done a day ago: what is younger may belong to a run that goes on."""
        selector = fs.FileSelector(self.store.at("labels", self.teacher), allow_not_found=True)
        limit = time.time() - LEFT_S
        left = [f for f in self.store.fs.get_file_info(selector) if f.mtime and f.mtime.timestamp() < limit]
        self.drop(f.base_name for f in left if f.base_name.startswith("trying-") or f.extension == "unfinished")

    # Reading

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys that have no label, each once, in order. Memory grows with the keys, not with the store."""
        wanted = list(dict.fromkeys(keys))
        known = self._stable(lambda: {k for rows in self._wanted(wanted, ["key"]) for k in rows["key"].to_pylist()})
        return [k for k in wanted if k not in known]

    def scores(self, keys: Iterable[str]) -> dict[str, float]:
        """The labels of those keys that have one."""
        wanted = list(dict.fromkeys(keys))
        return self._stable(lambda: _scores(self._wanted(wanted, ["key", "score"])))

    def stats(self) -> dict[str, Any]:
        """{"count", "mean", "deviation", "histogram": {"edges", "counts"}} of all labels, as `measure` left it.

        Raises `FileNotFoundError` where nothing was measured.
        """
        found = self._json("stats.json")
        if not found:
            raise FileNotFoundError(f"no statistics in {self.store.at('labels', self.teacher)}")
        return found

    # Upkeep

    def fresh(self) -> list[str]:
        """Batches that are not compacted yet."""
        return self._names("new-")

    def merge(self) -> None:
        """Puts all batches into the partitions, one partition after the other."""
        fresh = self.fresh()
        for start in PARTITIONS:
            self.compact(start, fresh)
        self.drop(fresh)

    def compact(self, start: str, fresh: Sequence[str]) -> None:
        """Puts the labels of one partition, those of the given batches too, into one file."""
        self._stable(lambda: self._compact(start, fresh))

    def drop(self, names: Iterable[str]) -> None:
        """Removes files whose labels stand in others, and marks of what is over."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # gone by another run
                self.store.fs.delete_file(self._at(name))

    def measure(self) -> dict[str, Any]:
        """Writes the statistics of all labels, and gives them; distillation standardises by them."""
        count, mean, deviation, low, high = _moments(lambda: map(self._partition, PARTITIONS))
        edges = np.linspace(low, high, BINS + 1)
        counts = sum((np.histogram(self._partition(start), edges)[0] for start in PARTITIONS), np.zeros(BINS, int))
        found: dict[str, Any] = {"count": count, "mean": mean, "deviation": deviation}
        found |= {"histogram": {"edges": edges.tolist(), "counts": counts.tolist()}}
        self._put("stats.json", found)
        return found

    # Files

    def _compact(self, start: str, fresh: Sequence[str]) -> None:
        batches = sorted(set(fresh) & set(self._names("new-")))  # the others were compacted by another run
        old = self._names(f"part-{start}-")
        rows = self._labels(start, old + batches)
        if not rows.num_rows or (len(old) == 1 and rows.num_rows == self._labels(start, old).num_rows):
            return  # nothing new
        self._write(f"part-{start}-{_name(old + batches)}.parquet", rows)
        self.drop(old)

    def _partition(self, start: str) -> np.ndarray:
        """The scores of a partition."""
        found: np.ndarray = self._stable(lambda: self._labels(start, self._files(start)))["score"].to_numpy()
        return found

    def _labels(self, start: str, names: list[str]) -> pa.Table:
        """The labels of a partition in these files, each key once, sorted by key."""
        where = (pc.field("key") >= start) & (pc.field("key") < chr(ord(start) + 1))
        rows = pa.concat_tables([SCHEMA.empty_table(), *self._scan(names, SCHEMA.names, where)])
        # Scored twice by two runs at once, a key has two scores that differ in their last bits: all take the same.
        return pl.DataFrame(pl.from_arrow(rows)).group_by("key").agg(pl.col("score").min()).sort("key").to_arrow()

    def _wanted(self, keys: list[str], columns: list[str]) -> Iterator[pa.Table]:
        """Labels of these keys, partition by partition, in batches."""
        by_start = pl.DataFrame({"key": keys}, schema={"key": pl.String})
        for start in sorted({k[0] for k in keys}):
            ours = by_start.filter(pl.col("key").str.starts_with(start))["key"].to_arrow().cast(pa.string())
            yield from self._scan(self._files(start), columns, pc.field("key").isin(ours))

    def _files(self, start: str) -> list[str]:
        """Files with labels of a partition; batches are listed first, as compaction takes labels from them."""
        return self._names("new-") + self._names(f"part-{start}-")

    def _scan(self, names: list[str], columns: list[str], where: pyarrow.dataset.Expression) -> Iterator[pa.Table]:
        for name in names:
            source = pyarrow.dataset.dataset(self._at(name), schema=SCHEMA, filesystem=self.store.fs, format="parquet")
            for batch in source.to_batches(columns=columns, filter=where, batch_readahead=1):
                if batch.num_rows:
                    yield pa.Table.from_batches([batch])

    def _stable(self, read: Callable[[], T]) -> T:
        """Reads again where a file went meanwhile: what it held stands in another by then."""
        for _ in range(READS - 1):
            try:
                return read()
            except FileNotFoundError:
                continue
        return read()

    def _names(self, start: str, end: str = ".parquet") -> list[str]:
        selector = fs.FileSelector(self.store.at("labels", self.teacher), allow_not_found=True)
        listed = (info.base_name for info in self.store.fs.get_file_info(selector))
        return sorted(n for n in listed if n.startswith(start) and n.endswith(end) and not n.endswith(".unfinished"))

    def _there(self, name: str) -> bool:
        return bool(self.store.fs.get_file_info(self._at(name)).type == fs.FileType.File)

    def _write(self, name: str, rows: pa.Table) -> None:
        self.store.put_table(rows.select(SCHEMA.names).cast(SCHEMA), "labels", self.teacher, name)

    def _json(self, name: str) -> dict[str, Any] | None:
        with contextlib.suppress(FileNotFoundError):
            return self.store.read_json("labels", self.teacher, name)
        return None

    def _put(self, name: str, content: dict[str, Any]) -> None:
        self.store.put_text(json.dumps(content, indent=1), "labels", self.teacher, name)

    def _at(self, name: str) -> str:
        return self.store.at("labels", self.teacher, name)


def isolate(pairs: Sequence[T], score: Callable[[Sequence[T]], list[float]]) -> list[tuple[float | None, str]]:
    """(score, "") of each pair, or (None, reason): a batch on which `score` raises is halved to find the culprit.

    One pair of n that fails costs about 2 log2 n more calls. A score that is not a finite number is a failure too.
    """
    try:
        found = score(pairs)
    except Exception as error:
        if len(pairs) == 1:
            return [(None, f"{type(error).__name__}: {error}")]
        middle = len(pairs) // 2
        return isolate(pairs[:middle], score) + isolate(pairs[middle:], score)
    if len(pairs) == 1:
        return [(found[0], "") if math.isfinite(found[0]) else (None, f"the score is {found[0]}")]
    # What is not a number spreads over the memory that a batch shares: only a pair alone can be blamed for it.
    return [
        (value, "") if math.isfinite(value) else isolate([pair], score)[0]
        for pair, value in zip(pairs, found, strict=True)
    ]


def _name(parts: Iterable[str]) -> str:
    return hashlib.blake2b("".join(sorted(parts)).encode(), digest_size=8).hexdigest()


def _scores(batches: Iterable[pa.Table]) -> dict[str, float]:
    found: dict[str, float] = {}
    for rows in batches:
        for name, score in zip(rows["key"].to_pylist(), rows["score"].to_pylist(), strict=True):
            found[name] = min(score, found.get(name, score))  # as compaction decides
    return found


def _moments(parts: Callable[[], Iterable[np.ndarray]]) -> tuple[int, float, float, float, float]:
    """(count, mean, deviation, least, most) of numbers in several arrays. Raises `ValueError` if there are none."""
    sums = [(len(part), part.sum(dtype=float), part.min(), part.max()) for part in parts() if len(part)]
    if not sums:
        raise ValueError("there is no label to measure")
    counts, totals, lows, highs = zip(*sums, strict=True)
    count, mean = sum(counts), float(sum(totals)) / sum(counts)
    squares = sum(float(((part - mean) ** 2).sum(dtype=float)) for part in parts())
    return count, mean, math.sqrt(squares / count), float(min(lows)), float(max(highs))
