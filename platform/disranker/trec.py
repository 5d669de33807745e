"""What TREC and BEIR keep beside a qrels file: the texts of queries that it names by id, and runs, read and written."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from urllib.parse import quote

from disranker import lines, logs, metrics, store
from disranker.cleaning import normalise
from disranker.recipe import Refused

BOM = "\ufeff"
RUN = "query id, Q0, document id, rank, score, name"


def topics(files: Iterable[str]) -> dict[str, str]:
    """Query id -> text, from `id<TAB>text` lines or BEIR's queries.jsonl.

    Raises `Refused` with file and line for one that is neither, or that gives an id another text.
    """
    found: dict[str, str] = {}
    for file in files:
        for at, line in _lines(file):
            name, text = _topic(line, f"{file} line {at}")
            if normalise(found.setdefault(name, text)) != normalise(text):
                raise Refused(f"{file} line {at}: query id {name} has another text already: {found[name]!r}")
    return found


def beside(file: str) -> str | None:
    """BEIR's queries.jsonl for a qrels file: in the same folder, or one above."""
    filesystem, path = store.locate(file)
    before, after = file.split(path, 1) if "://" in file and path in file else ("", "")
    folder = path.rpartition("/")[0]
    for place in (folder, folder.rpartition("/")[0]):
        queries = f"{place}/queries.jsonl"
        if filesystem.get_file_info(queries).is_file:
            return before + queries + after
    return None


def run(file: str) -> dict[str, dict[str, float]]:
    """A TREC run: query id -> document -> score. Ranks are left out: trec_eval goes by the scores too.

    Raises `Refused` with file and line for a line that is none.
    """
    found: dict[str, dict[str, float]] = {}
    for at, line in _lines(file):
        cells = _text(line, f"{file} line {at}").split()
        if len(cells) != len(RUN.split(", ")):
            raise Refused(f"{file} line {at}: {len(cells)} columns; a TREC run has {RUN}")
        query, document, score = cells[0], cells[2], _score(cells[4])
        if score is None:
            raise Refused(f"{file} line {at}: score {cells[4]} is no finite number")
        if document in found.setdefault(query, {}):
            raise Refused(f"{file} line {at}: document {document} stands twice in the list of query {query}")
        found[query][document] = score
    return found


def field(text: str) -> str:
    """The text without what would split it, the same in every file; `urllib.parse.unquote` undoes it."""
    return "".join(quote(sign) if sign.isspace() or sign in ("%", BOM) else sign for sign in text)


def run_lines(
    run: Mapping[str, Mapping[str, float]], name: str, written: Callable[[str], str] = field
) -> Iterator[str]:
    """A run as a file has it, best first; `written` says how the id of a document stands there."""
    for query in sorted(run):
        for rank, document in enumerate(metrics.ranking(run[query]), 1):
            yield f"{field(query)} Q0 {written(document)} {rank} {float(run[query][document])!r} {field(name)}"


def _lines(file: str) -> Iterator[tuple[int, bytes]]:
    with lines.to_the_end(file):
        yield from lines.written(file)


def _topic(line: bytes, where: str) -> tuple[str, str]:
    with contextlib.suppress(logs.Broken, KeyError, TypeError):
        entry = logs.parsed(line)
        return str(entry["_id"]), str(entry["text"])
    name, tab, text = _text(line, where).rstrip("\r\n").partition("\t")
    if not tab or not name.strip():
        raise Refused(f"{where}: write a query as id<TAB>text, or as JSON with _id and text")
    return name.strip(), text


def _text(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Refused(f"{where}: not UTF-8") from None


def _score(text: str) -> float | None:
    try:
        return float(text) if math.isfinite(float(text)) else None
    except ValueError:
        return None
