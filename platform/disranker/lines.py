"""Files of a log -> blocks of numbered lines.

A file holds one JSON object a line, one JSON array, OpenSearch bulk requests (action and source by turns) or a parquet
table; it is plain, gzip or zstd by its name. Whatever it is, one entry comes out as one line of JSON.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import ijson
import pyarrow as pa
import pyarrow.parquet as pq

from disranker import store
from disranker.recipe import Refused, in_a_line

COMPRESSED = (".gz", ".zst", ".bz2", ".lz4")  # what pyarrow knows by the name
CHUNK_BYTES = 16 << 20  # of a file that are in memory at a time
ROWS = 20_000  # of an array or a parquet file, the same
ACTIONS = frozenset({"index", "create"})  # of an OpenSearch bulk request

Block = tuple[list[int], list[bytes]]  # numbers from 1, lines without their end


def blocks(file: str) -> Iterator[Block]:
    """The entries of a file, in order. Raises `Refused` where it cannot be read to its end."""
    with to_the_end(file):
        yield from _parquet(file) if store.locate(file)[1].endswith(".parquet") else _text(file)


def written(file: str) -> Iterator[tuple[int, bytes]]:
    """The lines of a text file that are not blank, with their number. Raises as the file system does."""
    for numbers, block in physical(file):
        yield from ((number, line) for number, line in zip(numbers, block, strict=True) if line.strip())


def bare(file: str) -> str:
    """The path in small letters, without the endings of compression."""
    path = store.locate(file)[1].casefold()
    for ending in COMPRESSED:
        path = path.removesuffix(ending)
    return path


@contextmanager
def to_the_end(file: str) -> Iterator[None]:
    """Raises `Refused` where a file cannot be read to its end."""
    try:
        yield
    except (OSError, EOFError, pa.ArrowException, ijson.JSONError, UnicodeError) as error:
        raise Refused(f"{file} cannot be read to its end: {in_a_line(error)}") from error


def physical(file: str) -> Iterator[Block]:
    """The lines of a text file as they stand. Raises as the file system does."""
    filesystem, path = store.locate(file)
    number, rest = 1, b""
    with filesystem.open_input_stream(path, compression="detect") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            *whole, rest = (rest + chunk).split(b"\n")
            if whole:
                yield list(range(number, number + len(whole))), whole
                number += len(whole)
    if rest:
        yield [number], [rest]


def _text(file: str) -> Iterator[Block]:
    read = physical(file)
    first = next(read, None)
    if first is None:
        return
    start = first[1][0].removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
        yield from _array(file)
    elif _is_action(start):
        yield from map(_sources, chain([first], read))
    else:
        yield from chain([first], read)


def _sources(block: Block) -> Block:
    """The lines that hold no action."""
    kept = [(number, line) for number, line in zip(*block, strict=True) if not _is_action(line)]
    return [number for number, _ in kept], [line for _, line in kept]


def _is_action(line: bytes) -> bool:
    if not any(f'"{action}"'.encode() in line[:20] for action in ACTIONS):
        return False
    try:
        entry = json.loads(line)
    except ValueError:
        return False
    return (
        isinstance(entry, dict)
        and len(entry) == 1
        and all(name in ACTIONS and isinstance(place, dict) for name, place in entry.items())
    )


def _array(file: str) -> Iterator[Block]:
    filesystem, path = store.locate(file)
    numbers: list[int] = []
    lines: list[bytes] = []
    with filesystem.open_input_stream(path, compression="detect") as stream:
        for number, item in enumerate(ijson.items(stream, "item", use_float=True), start=1):
            numbers.append(number)
            lines.append(json.dumps(item).encode())
            if len(lines) == ROWS:
                yield numbers, lines
                numbers, lines = [], []
    yield numbers, lines


def _parquet(file: str) -> Iterator[Block]:
    filesystem, path = store.locate(file)
    number = 1
    with filesystem.open_input_file(path) as source:
        for batch in pq.ParquetFile(source).iter_batches(ROWS):
            yield (
                list(range(number, number + batch.num_rows)),
                [json.dumps(row, default=_plain).encode() for row in batch.to_pylist()],
            )
            number += batch.num_rows


def _plain(value: object) -> str:
    """What JSON does not know: a time in ISO 8601, bytes as text."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
