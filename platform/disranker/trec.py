"""What TREC and BEIR keep beside a qrels file: texts of queries that it names by id, runs, read and written."""

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from urllib.parse import quote, unquote

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
    return tagged(file)[1]


def tagged(file: str) -> tuple[str | None, dict[str, dict[str, float]]]:
    """As `run`, after the name that all its lines give it in their last column; None where they differ.

    Between tabs a query may have spaces. Raises as `run` does.
    """
    found: dict[str, dict[str, float]] = {}
    names = set()
    for at, line in _lines(file):
        where = f"{file} line {at}"
        query, _, document, _, written, name = _cells(line, where)
        score = _score(written)
        if score is None:
            raise Refused(f"{where}: score {written} is no finite number")
        if document in found.setdefault(query, {}):
            raise Refused(f"{where}: document {document} stands twice in the list of query {query}")
        found[query][document] = score
        names.add(name)
    return names.pop() if len(names) == 1 else None, found


def outside(files: Iterable[str], qrels: metrics.Qrels, taken: Iterable[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Runs that others made, by name: the tag of a file, or the file's own name where it has no tag or a `taken` one.

    A query is known by its text, in any spelling that `normalise` makes one, or by the id that `field` makes of it;
    queries without judgments are left out. Raises `Refused` for a bad line, a file without any query of `qrels`, a
    query that stands under two names, and a name that is taken.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for file in files:
        tag, listed = tagged(file)
        known = {*taken, *found}
        name = tag if tag and tag not in known else _stem(file)
        if name in known:
            raise Refused(f"{file}: there is a run named {name} already; give the file another name or tag")
        found[name] = _judged(listed, qrels, file)
    return found


def qrels(file: str) -> dict[str, dict[str, int]]:
    """A qrels file: query id -> document -> grade. Raises `Refused` with file and line for a line that is none."""
    found: dict[str, dict[str, int]] = {}
    for at, line in _lines(file):
        cells = _text(line, f"{file} line {at}").split()
        if len(cells) != 4 or not cells[3].lstrip("-").isdecimal():
            raise Refused(f"{file} line {at}: a line of qrels has query id, 0, document id, grade")
        found.setdefault(cells[0], {})[cells[2]] = int(cells[3])
    return found


def qrels_lines(qrels: metrics.Qrels) -> Iterator[str]:
    """Judgments as a qrels file has them, with the ids that `run_lines` gives."""
    for query in sorted(qrels):
        yield from (f"{field(query)} 0 {field(document)} {grade}" for document, grade in sorted(qrels[query].items()))


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


def _judged(listed: metrics.Run, qrels: metrics.Qrels, file: str) -> dict[str, dict[str, float]]:
    """The queries of a run that are judged, under their texts."""
    by_id = {field(query): query for query in qrels}
    by_text = {normalise(query): query for query in qrels}
    found: dict[str, dict[str, float]] = {}
    for name, scores in listed.items():
        query = by_id.get(name) or by_text.get(normalise(name)) or by_text.get(normalise(unquote(name)))
        if query in found:
            raise Refused(f"{file}: query {query!r} stands there under two names, the second is {name!r}")
        if query is not None:
            found[query] = {_document(document, qrels[query]): score for document, score in scores.items()}
    if not found:
        raise Refused(
            f"{file}: none of its {len(listed)} queries has judgments; they are named like {next(iter(by_id))}"
        )
    return found


def _document(name: str, grades: Collection[str]) -> str:
    """Files of our own hide white space in ids, those of others cannot have any."""
    return plain if name not in grades and (plain := unquote(name)) in grades else name


def _stem(file: str) -> str:
    """The name of a file without folders and endings."""
    return store.locate(file)[1].rpartition("/")[2].partition(".")[0]


def _cells(line: bytes, where: str) -> list[str]:
    text = _text(line, where)
    width = len(RUN.split(", "))
    cells = [cell.strip() for cell in text.split("\t")] if text.count("\t") == width - 1 else text.split()
    if len(cells) != width or not all(cells):
        raise Refused(f"{where}: {len(cells)} columns; a TREC run has {RUN}")
    return cells


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
