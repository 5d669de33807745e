"""Lines of a flat log, one row a click or an impression, -> records, by the columns that the recipe names.

Text files are read with Python's `csv` (quotes doubled inside quotes) or split at blanks; parquet and JSON by `lines`.
"""

import csv
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from disranker import lines, logs
from disranker.cleaning import normalise
from disranker.inputs import Columns
from disranker.logs import Broken
from disranker.recipe import Refused

TRUE = frozenset({"1", "true", "t", "yes", "y", "click", "clicked"})
FALSE = frozenset({"", "0", "false", "f", "no", "n", "null", "none", "nan", "-"})
OBJECTS = (".jsonl", ".ndjson", ".json", ".parquet")
SECONDS_END = 1e11  # a larger number counts milliseconds
SEPARATORS = {"tab": "\t", "comma": ",", "semicolon": ";"}

Row = tuple[int, bytes, dict[str, str] | list[str] | Broken]  # number of the line, the line, its fields


def tables(file: str, cfg: Columns) -> Iterator[pa.Table]:
    """All rows of a file as `logs.RECORD`, in blocks.

    Raises `Refused` for a column that is missing, or a file that cannot be read to its end.
    """
    block: list[dict[str, Any]] = []
    for number, line, fields in rows(file, cfg):
        block.append({"file": file, "line": number} | record(line, fields, cfg))
        if len(block) == lines.ROWS:
            yield logs.table(block)
            block = []
    yield logs.table(block)


def rows(file: str, cfg: Columns) -> Iterator[Row]:
    """The rows of a file with the number of their line."""
    yield from _objects(file) if lines.bare(file).endswith(OBJECTS) else _texts(file, cfg)


def record(line: bytes, fields: dict[str, str] | list[str] | Broken, cfg: Columns) -> dict[str, Any]:
    """One row as a record; a broken one as a reject with its reason."""
    try:
        if isinstance(fields, Broken):
            raise fields
        return _row(fields if isinstance(fields, dict) else _by_number(fields), cfg)
    except Broken as fault:
        return logs.reject(line, str(fault))


def _row(fields: dict[str, str], cfg: Columns) -> dict[str, Any]:
    doc_id = _get(fields, cfg.document)
    query = normalise(_get(fields, cfg.query))
    if not query:
        raise Broken("no query")
    if not doc_id:
        return {"kind": "other"}  # a search without a click, in a log of clicks
    position = _number(fields, cfg.position, "position")
    if position is not None and (position != position // 1 or not cfg.first_position <= position < logs.LAST_POSITION):
        raise Broken(f"position is no whole number from {cfg.first_position}")
    dwell = _number(fields, cfg.dwell_s, "dwell_s")
    return {
        "kind": "row",
        "query_id": _get(fields, cfg.query_id) or None,
        "query": query,
        "client": _needed(fields, cfg.client, "client"),
        "time": _time(_needed(fields, cfg.time, "time"), cfg.time_format),
        "doc_id": doc_id,
        "position": None if position is None else int(position) + 1 - cfg.first_position,
        "clicked": not cfg.click or _flag(_get(fields, cfg.click), "click"),
        "converted": bool(cfg.conversion) and _flag(_get(fields, cfg.conversion), "conversion"),
        "dwell_s": dwell if dwell is not None and 0 <= dwell <= logs.LONGEST_DWELL_S else None,
    }


def _get(fields: dict[str, str], column: str) -> str:
    return (fields.get(column) or "").strip() if column else ""


def _needed(fields: dict[str, str], column: str, what: str) -> str:
    found = _get(fields, column)
    if not found:
        raise Broken(f"no {what}")
    return found


def _number(fields: dict[str, str], column: str, what: str) -> float | None:
    text = _get(fields, column)
    if text.casefold() in FALSE - {"0"}:
        return None
    try:
        return float(text)
    except ValueError:
        raise Broken(f"{what} is no number") from None


def _flag(text: str, what: str) -> bool:
    folded = text.casefold()
    if folded in TRUE or folded in FALSE:
        return folded in TRUE
    try:
        return float(folded) > 0
    except ValueError:
        raise Broken(f"{what} is neither true nor false") from None


def _time(text: str, form: str) -> datetime:
    """By the format of the recipe, or ISO 8601, or seconds or milliseconds since 1970; without a zone, UTC."""
    try:
        if form:
            found = datetime.strptime(text, form)
            return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
        number = float(text)
    except ValueError:
        if form:
            raise Broken(f"time is not like {form}") from None
        return logs.moment(text)
    return logs.moment(number if abs(number) > SECONDS_END else number * logs.MS)


def _by_number(fields: list[str]) -> dict[str, str]:
    """Fields of a file without a header, named from 1."""
    return {str(number): field for number, field in enumerate(fields, start=1)}


def _objects(file: str) -> Iterator[Row]:
    for numbers, block in lines.blocks(file):
        for number, line in zip(numbers, block, strict=True):
            yield number, line, _object(line)


def _object(line: bytes) -> dict[str, str] | Broken:
    try:
        found = logs.parsed(line) if line.strip() else None
    except Broken as fault:
        return fault
    if not isinstance(found, dict):
        return Broken("not a JSON object")
    return {name: _text(value) for name, value in found.items()}


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value)


def _decoded(file: str, encoding: str) -> Iterator[tuple[int, bytes, str | None]]:
    """(number, line, its text or None where it is not of the encoding)."""
    with lines.to_the_end(file):
        for numbers, block in lines.physical(file):
            for number, line in zip(numbers, block, strict=True):
                try:
                    yield number, line, line.rstrip(b"\r").decode("utf-8-sig" if encoding == "utf-8" else encoding)
                except UnicodeDecodeError:
                    yield number, line, None


def _texts(file: str, cfg: Columns) -> Iterator[Row]:
    """The rows of a text file, cut into fields."""
    separator = SEPARATORS.get(cfg.separator) or ("," if lines.bare(file).endswith(".csv") else "\t")
    names: list[str] | None = None
    for number, line, decoded in _decoded(file, cfg.encoding):
        if decoded is None:
            yield number, line, Broken(f"not {cfg.encoding}")
            continue
        fields = _fields(decoded) if cfg.separator == "blanks" else _parse(decoded, separator)
        if cfg.header and names is None:
            if isinstance(fields, Broken):
                raise Refused(f"{file}: the first line is no header: {fields}")
            names = fields
            _require(cfg, names, file)
        else:
            yield number, line, fields if isinstance(fields, Broken) else _named(fields, names)


def _fields(line: str) -> list[str]:
    """Between any run of tabs and spaces, as some search engines publish; brackets hold a query together."""
    before, opened, rest = line.partition("[")
    inside, closed, after = rest.partition("]")
    return [*before.split(), inside, *after.split()] if opened and closed else line.split()


def _parse(line: str, separator: str) -> list[str] | Broken:
    """One line is one row: a line end within quotes would let one lost quote swallow the lines after it."""
    if '"' not in line:
        return line.split(separator)
    try:
        return next(csv.reader([line], delimiter=separator, strict=True), [])
    except csv.Error as error:
        # Between tabs a quote is often just one that somebody typed.
        return line.split(separator) if separator == "\t" else Broken(f"not CSV: {error}")


def _named(fields: list[str], names: list[str] | None) -> dict[str, str] | list[str] | Broken:
    if not any(fields):
        return Broken("empty line")
    if names is None:
        return fields
    if len(fields) != len(names):
        return Broken(f"{len(fields)} fields under {len(names)} columns")
    return dict(zip(names, fields, strict=True))


def _require(cfg: Columns, names: list[str], file: str) -> None:
    wanted = [column for column in cfg.named() if column not in names]
    if wanted:
        raise Refused(f"data.flat: {file} has no column {', '.join(wanted)}; it has {', '.join(names)}")
