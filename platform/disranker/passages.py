"""Files of general text -> passages, and some of them as ids, taken by chance."""

import heapq
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from disranker import lines, logs, store, tables
from disranker.contract import Tokens

COLUMN = "text"
TOGETHER = 1000  # passages that are tokenised together


def texts(file: str) -> Iterator[str]:
    """The passages of a file: `text` of parquet or JSON by its name, else a line each; what holds no text is left out.

    Raises `Refused` where the first row has no `text`, or the file cannot be read to its end.
    """
    name = lines.bare(file)
    with lines.to_the_end(file):
        if name.endswith(".parquet"):
            found = _parquet(file)
        else:
            found = _json(file) if name.endswith((".json", ".jsonl", ".ndjson")) else _plain(file)
        yield from (text.strip() for text in found if isinstance(text, str) and text.strip())


def taken(passages: Iterable[str], tokens: Tokens, most: int, seed: int) -> list[list[int]]:
    """Passages drawn by the seed, in pieces of ids, until these are `most`: at most a piece more, or all there are.

    The passages stream by, and only those that may be taken are tokenised and held.
    """
    if most < 1:
        return []
    draws, passages = np.random.default_rng(seed), iter(passages)
    least: list[tuple[float, int, list[list[int]]]] = []  # a heap, the highest draw first: (-draw, ids, pieces)
    held, limit = 0, 1.0  # ids in the heap; the draw from which on a passage is not needed
    while several := list(islice(passages, TOGETHER)):
        drawn = zip(draws.random(len(several)).tolist(), several, strict=True)
        near = [(draw, text) for draw, text in drawn if draw < limit]
        for (draw, _), pieces in zip(near, tokens.passages([text for _, text in near]), strict=True):
            size = sum(map(len, pieces))
            heapq.heappush(least, (-draw, size, pieces))
            held += size
            while held - least[0][1] >= most:
                held -= heapq.heappop(least)[1]
        if held >= most:
            limit = -least[0][0]
    drawn_first = [piece for _, _, pieces in sorted(least, reverse=True) for piece in pieces]
    ends = np.cumsum([len(piece) for piece in drawn_first])
    return drawn_first[: int(np.searchsorted(ends, most)) + 1]


def _plain(file: str) -> Iterator[str]:
    for _, line in lines.written(file):
        yield line.decode("utf-8-sig", "replace")


def _json(file: str) -> Iterator[Any]:
    rows = (_object(line) for _, block in lines.blocks(file) for line in block if line.strip())
    for place, row in enumerate(rows):
        if not place:
            tables.require([COLUMN], row, f"pretrain.general: {file}")
        yield row.get(COLUMN)


def _object(line: bytes) -> dict[str, Any]:
    try:
        found = logs.parsed(line)
    except logs.Broken:
        return {}
    return found if isinstance(found, dict) else {}


def _parquet(file: str) -> Iterator[Any]:
    filesystem, path = store.locate(file)
    with filesystem.open_input_file(path) as source:
        parquet = pq.ParquetFile(source)
        tables.require([COLUMN], parquet.schema_arrow.names, f"pretrain.general: {file}")
        for batch in parquet.iter_batches(lines.ROWS, columns=[COLUMN]):
            yield from batch[COLUMN].to_pylist()
