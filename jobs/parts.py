"""Ray Data over the parts of a table: one task holds one part, and writes it under a name that its number decides."""

import json
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import pyarrow as pa
import ray

from disranker.recipe import Refused
from jobs import launch

Block = dict[str, Any]
Key = TypeVar("Key", bound=Hashable)


def flat(items: Iterable[Any], read: Callable[[Any], Iterator[pa.Table]]) -> "ray.data.Dataset":
    """All tables that `read` streams from each item; an item is one task."""

    def tables(batch: Block) -> Iterator[pa.Table]:
        for item in batch["item"]:
            yield from read(item)

    listed = [{"item": item} for item in items]
    return ray.data.from_items(listed, override_num_blocks=len(listed)).map_batches(tables, batch_size=1)


def gather(
    records: "ray.data.Dataset", parts: int, write: Callable[[int, pa.Table], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Brings the rows of each `part` together, hands them to `write`, and returns what it says of each."""

    def whole(rows: pa.Table) -> pa.Table:
        part = rows["part"][0].as_py()
        return pa.Table.from_pylist([{"said": json.dumps(write(part, rows))}])

    shuffled = records.groupby("part", num_partitions=parts).map_groups(whole, batch_format="pyarrow")
    return [json.loads(row["said"]) for row in shuffled.iter_rows()]


def each(parts: int, work: Callable[[int], dict[str, Any]], what: str = "") -> list[dict[str, Any]]:
    """What a function says of each part, in order; with `what`, how many are done is said now and then.

    Raises `Refused` where it does.
    """

    def guarded(part: int) -> tuple[str | None, dict[str, Any]]:
        try:
            return None, work(part)
        except Refused as refusal:  # raised through Ray it would come as an error of the task
            return str(refusal), {}

    # Bare tasks: nothing is to be streamed, and a pipeline of Ray Data takes half a second to set up.
    task = ray.remote(guarded)
    found = []
    told = time.monotonic()
    for done, said in enumerate(map(ray.get, [task.remote(part) for part in range(parts)]), start=1):
        found.append(said)
        if what and time.monotonic() - told > launch.SAY_EVERY_S:
            launch.say(f"{what}: {done} of {parts}")
            told = time.monotonic()
    for refusal, _ in found:
        if refusal:
            raise Refused(refusal)
    return [said for _, said in found]


def each_by(parts: int, worker: type, *arguments: Any) -> list[dict[str, Any]]:
    """What a worker says of each part; it is made once an actor, with the arguments, where making it is dear."""

    class Actor:
        def __init__(self) -> None:
            self.work = worker(*arguments)

        def __call__(self, batch: Block) -> Block:
            return {"said": [json.dumps(self.work(int(part))) for part in batch["id"]]}

    pool = ray.data.ActorPoolStrategy(min_size=1, max_size=parts)
    mapped = ray.data.range(parts, override_num_blocks=parts).map_batches(Actor, batch_size=1, compute=pool)
    return [json.loads(row["said"]) for row in mapped.iter_rows()]


def total(said: Iterable[Mapping[Key, int]]) -> dict[Key, int]:
    """Counts of all parts, added up."""
    counter: Counter[Key] = Counter()
    for counts in said:
        counter.update(counts)
    return dict(counter)
