"""The label store: one teacher's scores by key, under `labels/<teacher>/`.

A key is a hash of the token ids and of all that decides the score of those ids, so the same text is never paid for
twice and a new teacher never mixes with an old one. A batch becomes visible whole, under a name that its keys decide;
written twice, it is there once.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.dataset
from pyarrow import fs

from disranker import tables
from disranker.contract import Contract, file_digest
from disranker.recipe import digest
from disranker.store import Store

PARTITIONS = "0123456789abcdef"  # the first character of a key


def teacher(folder: str | Path, contract: Contract, dtype: str, engine: str) -> str:
    """A name for all that decides a score: weights, contract, dtype and the version of the engine."""
    weights = {path.name: file_digest(path) for path in sorted(Path(folder).glob("*.safetensors"))}
    weights["config.json"] = file_digest(Path(folder) / "config.json")
    return digest([weights, contract.digest, dtype, engine])


def key(ids: Sequence[int], teacher: str) -> str:
    """32 hexadecimal characters for one pair under one teacher."""
    return hashlib.blake2b(np.asarray(ids, np.uint32).tobytes(), digest_size=16, key=teacher.encode()).hexdigest()


class Labels:
    """The labels of one teacher."""

    def __init__(self, store: Store, teacher: str):
        self.store, self.teacher = store, teacher

    def write(self, keys: Sequence[str], scores: Sequence[float]) -> None:
        """One batch. Raises `ValueError` if a score is not a finite number."""
        bad = [k for k, score in zip(keys, scores, strict=True) if not math.isfinite(score)]
        if bad:
            raise ValueError(f"{len(bad)} scores are not finite, the first for key {bad[0]}")
        rows = pa.table({"key": pa.array(keys, pa.string()), "score": pa.array(scores, pa.float32())})
        name = hashlib.blake2b("".join(sorted(keys)).encode(), digest_size=8).hexdigest()
        self._write(f"new-{name}.parquet", rows)

    def known(self, keys: Iterable[str]) -> set[str]:
        """Those of the keys that have a label."""
        return set(self.scores(keys))

    def missing(self, keys: Sequence[str]) -> list[int]:
        """Places of keys that have no label yet, each key once, in order."""
        first: dict[str, int] = {}
        for place, name in enumerate(keys):
            first.setdefault(name, place)
        known = self.known(first)
        return [place for name, place in first.items() if name not in known]

    def scores(self, keys: Iterable[str]) -> dict[str, float]:
        """The labels of those keys that have one."""
        wanted = pa.array(sorted(set(keys)), pa.string())
        found: dict[str, float] = {}
        for files in self._files_by_partition(wanted):
            table = self._read(files, pyarrow.dataset.field("key").isin(wanted))
            found |= dict(zip(table["key"].to_pylist(), table["score"].to_pylist(), strict=True))
        return found

    def merge(self) -> None:
        """Puts new batches into the partitions. Killed in between, a key may stand in two files, with one score."""
        new = self._names("new-")
        if not new:
            return
        fresh = pl.DataFrame(pl.from_arrow(self._read(new)))
        for partition in PARTITIONS:
            added = fresh.filter(pl.col("key").str.starts_with(partition))
            old = [name for name in self._names("part-") if name == f"part-{partition}.parquet"]
            both = pl.concat([pl.DataFrame(pl.from_arrow(self._read(old))), added]) if old else added
            if added.height:
                self._write(f"part-{partition}.parquet", both.unique("key").sort("key").to_arrow())
        for name in new:
            self.store.fs.delete_file(self._at(name))

    def stats(self) -> dict[str, float]:
        """Count, mean and standard deviation of all labels: distillation standardises by them."""
        scores = np.concatenate([self._read([name])["score"].to_numpy() for name in self._names("part-")])
        return {
            "count": len(scores),
            "mean": float(scores.mean(dtype=float)),
            "deviation": float(scores.std(dtype=float)),
        }

    def _files_by_partition(self, keys: pa.Array) -> Iterable[list[str]]:
        starts = {k.as_py()[0] for k in keys}
        merged = [name for name in self._names("part-") if name[len("part-")] in starts]
        return [[name] for name in merged] + [[name] for name in self._names("new-")]

    def _names(self, start: str) -> list[str]:
        selector = fs.FileSelector(self.store.at("labels", self.teacher), allow_not_found=True)
        listed = (info.base_name for info in self.store.fs.get_file_info(selector))
        return sorted(name for name in listed if name.startswith(start) and name.endswith(".parquet"))

    def _read(self, names: list[str], where: pyarrow.dataset.Expression | None = None) -> pa.Table:
        files = [self._at(name) for name in names]
        source = pyarrow.dataset.dataset(
            files, schema=tables.SCHEMAS["labels"], filesystem=self.store.fs, format="parquet"
        )
        return source.to_table(filter=where)

    def _write(self, name: str, rows: pa.Table) -> None:
        self.store.put_table(tables.conform("labels", rows), "labels", self.teacher, name)

    def _at(self, name: str) -> str:
        return self.store.at("labels", self.teacher, name)
