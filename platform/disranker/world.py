"""A made-up shop: documents, queries, grades that words alone do not decide, and shoppers who click.

Everything follows from (settings, seed). Shards of the log are written independently of each other, as UBI 1.3.
"""

import gzip
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs as pafs

from disranker.inputs import World
from disranker.recipe import Refused
from disranker.vocabulary import CONCEPTS, FACETS, NEARNESS, USUAL, describe, name_and_words

PAGE = 10
EXAMINATION = np.array([1, 0.82, 0.66, 0.54, 0.43, 0.35, 0.29, 0.25, 0.22, 0.2])  # by rank on the page
ATTRACTIVENESS = np.array([0.04, 0.12, 0.28, 0.55])  # by grade
DWELL_S = np.array([8.0, 15, 35, 60])  # median by grade
CART = np.array([0, 0, 0.04, 0.12])  # of clicks, by grade

ASKED = (0.15, 0.4, 0.33, 0.12)  # share of queries that ask 0, 1, 2, 3 facets
ZIPF = 0.8
LEXICAL, RIGHT, POOL = 24, 5, 32  # of a query's pool: first by words, right without a shared word; the rest is random
EXTRA_RANK, RANK_NOISE = 14, 5.0  # where the engine places those without a shared word; how much its order varies
JUDGED = {"lexical": 12, "right": 2, "exact": 2, "partly": 1, "near": 1, "random": 5}  # documents of a judged query
SHUFFLED, SECOND_PAGE, BOTS, SENT_TWICE, BOT_CLICKS = 0.1, 0.1, 0.03, 0.01, 0.6
SEARCHES_PER_BOT, SEARCHES_PER_CLIENT, LINES_PER_FAULT = 150, 4, 2000
SPELLINGS = (0.7, 0.08, 0.1, 0.06, 0.06)  # as it is, upper case, title case, double spaces, spaces around
START_MS, SPAN_MS = 1_790_812_800_000, 30 * 24 * 3_600_000  # 2026-10-01, 30 days
BOT_DWELL_S, SESSION_MS = 1.0, 1_800_000
NAMELESS_SEARCH = '{"application": "shop", "user_query": "no ids", "timestamp": "2026-10-01T00:00:00.000Z"}\n'
NAMELESS_EVENT = '{"action_name": "click"}\n'
CHUNK = 8192  # searches in memory at once

_DOCUMENTS, _QUERIES, _POOLS, _JUDGED, _LOG = range(5)  # streams of random numbers
_SEARCH_ID, _RESPONSE_ID, _CLIENT_ID, _UNKNOWN_ID = range(4)  # streams of ids
_CLICKED, _TWICE, _LOST, _BOUGHT = range(4)  # kinds of events


@dataclass(frozen=True)
class Specs:
    """What n documents are, or n queries ask."""

    concept: np.ndarray  # (n,)
    facet: np.ndarray  # (n, facets): number of the value; -1 not asked
    name: np.ndarray  # (n,) which name the text uses, modulo their number
    word: np.ndarray  # (n, facets) which word of the value the text uses, the same

    def __getitem__(self, rows: Any) -> "Specs":
        return Specs(self.concept[rows], self.facet[rows], self.name[rows], self.word[rows])

    def texts(self) -> list[tuple[str, list[str]]]:
        """The name and the facets' words ("" where not asked) of each row."""
        columns = (self.concept.tolist(), self.name.tolist(), self.facet.tolist(), self.word.tolist())
        return [name_and_words(*row) for row in zip(*columns, strict=True)]


def grade(asked: Specs, offered: Specs) -> np.ndarray:
    """Grades 0 to 3, row by row, one row of either side broadcasts: (n,) int8.

    3 the product with all that was asked; 2 at least half of it, or a related product with all;
    1 the product or a related one otherwise, an accessory or what it is for; 0 anything else.
    """
    near = NEARNESS[asked.concept, offered.concept]
    wanted = asked.facet >= 0
    count, met = wanted.sum(1), (wanted & (asked.facet == offered.facet)).sum(1)
    partly = (near == 3) & (2 * met >= count) | (near == 2) & (met == count)
    return np.select([(near == 3) & (met == count), partly, near > 0], [3, 2, 1], 0).astype(np.int8)


def documents(cfg: World, seed: int) -> pa.Table:
    """Every document of the shop: doc_id, title, summary."""
    return _catalogue(cfg.documents, seed)[1]


def queries(cfg: World, seed: int) -> list[str]:
    """Every query that shoppers type, normalised and distinct, the most frequent first."""
    return _demand(cfg.documents, cfg.queries, seed)[1]


def judgments(cfg: World, seed: int) -> pa.Table:
    """Grades by people for `cfg.judged` of the queries, frequent and rare: query, doc_id, grade."""
    if cfg.judged > cfg.queries:
        raise Refused(f"world: judged {cfg.judged} exceeds queries {cfg.queries}")
    offered, table = _catalogue(cfg.documents, seed)
    asked, texts = _demand(cfg.documents, cfg.queries, seed)
    engine, rng = _engine(cfg.documents, seed), _random(seed, _JUDGED)
    rows, docs, grades = [], [], []
    for row in np.sort(rng.permutation(cfg.queries)[: cfg.judged]):
        grade_of = grade(asked[[row]], offered)
        docs.append(_to_judge(engine.scores(texts[row]), grade_of, rng))
        rows += [texts[row]] * len(docs[-1])
        grades.append(grade_of[docs[-1]])
    doc_ids = table["doc_id"].take(pa.array(np.concatenate(docs)))
    return pa.table({"query": rows, "doc_id": doc_ids, "grade": pa.array(np.concatenate(grades), pa.int8())})


def true_grades(cfg: World, seed: int, texts: list[str], doc_ids: list[str]) -> np.ndarray:
    """The grade of each (query, document): (n,) int8. Raises KeyError for a query that nobody types."""
    asked, known = _demand(cfg.documents, cfg.queries, seed)
    row = {text: number for number, text in enumerate(known)}
    offered = _catalogue(cfg.documents, seed)[0]
    return grade(asked[[row[text] for text in texts]], offered[[int(doc_id[1:]) for doc_id in doc_ids]])


def truth(cfg: World, seed: int) -> dict[str, Any]:
    """What the shoppers did and nobody told the log: examination, attractiveness, bots; fit for JSON."""
    return {
        "examination_by_rank": EXAMINATION.tolist(),
        "attractiveness_by_grade": {str(value): p for value, p in enumerate(ATTRACTIVENESS.tolist())},
        "bot_client_ids": _ids(seed, _CLIENT_ID, np.arange(_bots(cfg))),
    }


def write_shard(cfg: World, seed: int, index: int, fs: pafs.FileSystem, folder: str) -> None:
    """One of `cfg.shards` parts of the log, as `ubi_queries-<index>.ndjson.gz` and `ubi_events-<index>.ndjson.gz`."""
    if not 0 <= index < cfg.shards:
        raise ValueError(f"no shard {index}; there are 0 to {cfg.shards - 1}")
    paths = [f"{folder}/ubi_{kind}-{index:05d}.ndjson.gz" for kind in ("queries", "events")]
    # pyarrow would compress a second time because of the name
    with (
        fs.open_output_stream(paths[0], compression=None) as query_file,
        fs.open_output_stream(paths[1], compression=None) as event_file,
        gzip.GzipFile("", "wb", 1, query_file, mtime=0) as query_lines,
        gzip.GzipFile("", "wb", 1, event_file, mtime=0) as event_lines,
    ):
        for searched, happened in _log(cfg, seed, index):
            query_lines.write("".join(searched).encode())
            event_lines.write("".join(happened).encode())


def _random(seed: int, *stream: int) -> np.random.Generator:
    return np.random.default_rng([seed % 2**64, *stream])


def _wording(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Which names (count,) and words (count, facets) are used."""
    numbers = rng.choice(len(USUAL), size=(count, len(FACETS) + 2), p=USUAL)
    return len(USUAL) * numbers[:, 0] + numbers[:, 1], numbers[:, 2:]  # an accessory's name is made of two


@lru_cache(maxsize=2)
def _catalogue(count: int, seed: int) -> tuple[Specs, pa.Table]:
    rng = _random(seed, _DOCUMENTS)
    facets = np.stack([rng.integers(len(values), size=count) for values in FACETS.values()], 1)
    specs = Specs(rng.integers(len(CONCEPTS), size=count), facets, *_wording(count, rng))
    titled = rng.permuted(np.tile([True, True, False, False, False], (count, 1)), axis=1).tolist()
    draws = rng.integers(2**31, size=(count, 10)).tolist()
    drawn = zip(specs.concept.tolist(), specs.texts(), titled, draws, strict=True)
    written = [describe(concept, name, words, shown, draw) for concept, (name, words), shown, draw in drawn]
    doc_ids = [f"P{number:06d}" for number in range(count)]
    return specs, pa.table({"doc_id": doc_ids, "title": [t for t, _ in written], "summary": [s for _, s in written]})


@lru_cache(maxsize=2)
def _demand(documents: int, count: int, seed: int) -> tuple[Specs, list[str]]:
    """Distinct queries, each taken from a document so that one answers it; short ones tend to be frequent."""
    offered, rng = _catalogue(documents, seed)[0], _random(seed, _QUERIES)
    drawn = _ask(offered[rng.integers(documents, size=4 * count + 100)], rng)
    found: dict[str, int] = {}
    for row, (name, words) in enumerate(drawn.texts()):
        found.setdefault(" ".join(word for word in [*words, name] if word), row)
    if len(found) < count:
        raise Refused(f"world: {documents} documents give {len(found)} distinct queries, not {count}")
    texts, asked = list(found)[:count], drawn[list(found.values())[:count]]
    order = np.argsort((asked.facet >= 0).sum(1) + rng.normal(0, 1.5, count), kind="stable")
    return asked[order], [texts[number] for number in order]


def _ask(specs: Specs, rng: np.random.Generator) -> Specs:
    """The same products in a shopper's words, with most of the facets left open."""
    n, facets = specs.facet.shape
    count = rng.choice(np.arange(len(ASKED)), size=n, p=ASKED)
    keep = rng.permuted(np.tile(np.arange(facets), (n, 1)), axis=1) < count[:, None]
    return Specs(specs.concept, np.where(keep, specs.facet, -1), *_wording(n, rng))


class _Engine:
    """Ranks by shared words, rare ones first in weight. Knows no synonym."""

    def __init__(self, table: pa.Table) -> None:
        texts = [f"{t} {s}" for t, s in zip(table["title"].to_pylist(), table["summary"].to_pylist(), strict=True)]
        bags = [set(text.replace(".", "").replace(",", "").split()) for text in texts]
        self.row = {word: number for number, word in enumerate(sorted(set().union(*bags)))}
        self.has = np.zeros((len(self.row), len(bags)), np.bool_)  # (words, documents)
        for document, bag in enumerate(bags):
            self.has[[self.row[word] for word in bag], document] = True
        self.weight = np.log(1 + len(bags) / self.has.sum(1)).astype(np.float32)

    def scores(self, query: str) -> np.ndarray:
        """(documents,), 0 where no word is shared."""
        rows = [self.row[word] for word in query.split() if word in self.row]
        return np.asarray(self.weight[rows] @ self.has[rows].astype(np.float32))


@lru_cache(maxsize=2)
def _engine(documents: int, seed: int) -> _Engine:
    if documents < 2 * POOL:
        raise Refused(f"world: {documents} documents are too few for two pages of results; {2 * POOL} or more will do")
    return _Engine(_catalogue(documents, seed)[1])


def _first(scores: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """The best `count` documents, best first, ties in any order."""
    noisy = scores + rng.random(len(scores), np.float32) * 1e-3
    best = np.argpartition(-noisy, count)[:count]
    return best[np.argsort(-noisy[best])]


def _draw(free: np.ndarray, also: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """At most `count` documents that are free and `also` true; free no more."""
    drawn = rng.permutation(np.flatnonzero(free & also))[:count]
    free[drawn] = False
    return drawn


def _to_judge(scores: np.ndarray, grades: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Documents of one query that people look at: shown ones, hidden right ones, near misses, random ones."""
    best, free = _first(scores, JUDGED["lexical"], rng), np.ones(len(scores), np.bool_)
    free[best] = False
    hidden = (grades >= 2) & (scores == 0)
    wanted = {"right": hidden, "exact": grades == 3, "partly": grades == 2, "near": grades == 1, "random": free}
    return np.concatenate([best, *(_draw(free, also, JUDGED[kind], rng) for kind, also in wanted.items())])


@lru_cache(maxsize=1)
def _pools(documents: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents that each query may show, best first, and their grades: two (queries, POOL)."""
    offered, (asked, texts) = _catalogue(documents, seed)[0], _demand(documents, count, seed)
    engine, rng = _engine(documents, seed), _random(seed, _POOLS)
    pools, grades = np.empty((count, POOL), np.int64), np.empty((count, POOL), np.int8)
    for row, text in enumerate(texts):
        scores, grade_of = engine.scores(text), grade(asked[[row]], offered)
        best, free = _first(scores, LEXICAL, rng), np.ones(documents, np.bool_)
        free[best] = False
        right = _draw(free, (grade_of >= 2) & (scores == 0), RIGHT, rng)
        pools[row] = np.concatenate([best, right, _draw(free, free, POOL - LEXICAL - len(right), rng)])
        grades[row] = grade_of[pools[row]]
    return pools, grades


@dataclass(frozen=True)
class _Pages:
    """n result pages as shown; documents, grades and clicks are (n, PAGE)."""

    number: np.ndarray  # (n,) of the search in the whole log
    query: np.ndarray  # (n,)
    start: np.ndarray  # (n,) 0, or PAGE on the second page
    shuffled: np.ndarray  # (n,) shown in an order of chance, and marked so
    bot: np.ndarray  # (n,)
    client: np.ndarray  # (n,) bots first
    time_ms: np.ndarray  # (n,)
    document: np.ndarray
    grade: np.ndarray
    clicked: np.ndarray


def _bots(cfg: World) -> int:
    return max(1, round(cfg.searches * BOTS / SEARCHES_PER_BOT))


def _browse(cfg: World, seed: int, number: np.ndarray, rng: np.random.Generator) -> _Pages:
    n, (pools, grades) = len(number), _pools(cfg.documents, cfg.queries, seed)
    share = np.cumsum(np.arange(1, cfg.queries + 1) ** -ZIPF)
    query = np.searchsorted(share, rng.random(n) * share[-1], side="right")
    second, shuffled, bot = (rng.random(n) < p for p in (SECOND_PAGE, SHUFFLED, BOTS))
    place = np.where(np.arange(POOL) < LEXICAL, np.arange(POOL), EXTRA_RANK).astype(np.float32)
    order = np.argsort(place + RANK_NOISE * rng.standard_normal((n, POOL), np.float32), axis=1)
    shown = np.where(second[:, None], order[:, PAGE : 2 * PAGE], order[:, :PAGE])
    shown[shuffled] = rng.permuted(shown[shuffled], axis=1)
    grade_of = grades[query[:, None], shown]
    likely = np.where(bot[:, None], BOT_CLICKS, EXAMINATION * ATTRACTIVENESS[grade_of])
    people = math.ceil(cfg.searches / SEARCHES_PER_CLIENT)
    return _Pages(
        number=number,
        query=query,
        start=np.where(second, PAGE, 0),
        shuffled=shuffled,
        bot=bot,
        client=np.where(bot, rng.integers(_bots(cfg), size=n), _bots(cfg) + rng.integers(people, size=n)),
        time_ms=START_MS + ((number + rng.random(n)) * (SPAN_MS / cfg.searches)).astype(np.int64),
        document=pools[query[:, None], shown],
        grade=grade_of,
        clicked=rng.random((n, PAGE)) < likely,
    )


def _log(cfg: World, seed: int, index: int) -> Iterator[tuple[list[str], list[str]]]:
    """Lines of searches and of events, chunk by chunk."""
    rng, texts = _random(seed, _LOG, index), queries(cfg, seed)
    spelt = [(t, t.upper(), t.title(), t.replace(" ", "  "), f" {t} ") for t in texts]
    doc_ids = documents(cfg, seed)["doc_id"].to_pylist()
    first, last = (cfg.searches * part // cfg.shards for part in (index, index + 1))
    for begin in range(first, last, CHUNK):
        pages = _browse(cfg, seed, np.arange(begin, min(begin + CHUNK, last)), rng)
        how = rng.choice(len(SPELLINGS), size=len(pages.query), p=SPELLINGS).tolist()
        typed = [spelt[query][way] for query, way in zip(pages.query.tolist(), how, strict=True)]
        searched = _search_lines(pages, typed, doc_ids, seed)
        happened = _event_lines(pages, typed, doc_ids, seed, rng)
        yield _soil(searched, NAMELESS_SEARCH, rng), _soil(happened, NAMELESS_EVENT, rng)


def _search_lines(pages: _Pages, typed: list[str], doc_ids: list[str], seed: int) -> list[str]:
    hits = ['", "'.join([doc_ids[document] for document in row]) for row in pages.document.tolist()]
    ids = (_ids(seed, stream, pages.number) for stream in (_SEARCH_ID, _RESPONSE_ID))
    clients, starts = _ids(seed, _CLIENT_ID, pages.client), pages.start.tolist()
    marks = [', "shuffled": true' if shuffled else "" for shuffled in pages.shuffled.tolist()]
    columns = zip(*ids, clients, typed, hits, starts, marks, _iso(pages.time_ms), strict=True)
    # words of this shop need no escape, and json.dumps would take most of the time
    return [
        f'{{"application": "shop", "query_id": "{query_id}", "client_id": "{client}", "user_query": "{text}", '
        f'"query_response_id": "{response}", "query_response_hit_ids": ["{row}"], '
        f'"query_attributes": {{"start": {start}{mark}}}, "timestamp": "{time}Z"}}\n'
        for query_id, response, client, text, row, start, mark, time in columns
    ]


def _events(pages: _Pages, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Row of the page, rank, kind, time_ms and dwell_s of each event, by time."""
    row, rank = np.nonzero(pages.clicked)
    grade_of, bot = pages.grade[row, rank], pages.bot[row]
    dwell_s = np.where(bot, BOT_DWELL_S, DWELL_S[grade_of]) * rng.lognormal(0, 0.5, len(row))
    time_ms = pages.time_ms[row] + 2000 + 3000 * rank + (4000 * rng.random(len(row))).astype(np.int64)
    bought = np.flatnonzero(rng.random(len(row)) < CART[grade_of] * ~bot)
    twice = np.flatnonzero(rng.random(len(row)) < SENT_TWICE)
    lost = rng.permutation(len(row))[: _faults(len(row))]
    kinds = [np.arange(len(row)), twice, lost, bought]
    source, kind = np.concatenate(kinds), np.repeat(np.arange(len(kinds)), [len(each) for each in kinds])
    when = time_ms[source] + np.where(kind == _BOUGHT, 1000 * dwell_s[source], 0).astype(np.int64)
    order = np.argsort(when, kind="stable")
    source = source[order]
    return row[source], rank[source], kind[order], when[order], dwell_s[source]


def _event_lines(pages: _Pages, typed: list[str], doc_ids: list[str], seed: int, rng: np.random.Generator) -> list[str]:
    """Clicks, some sent twice, some of a search that nobody logged, some followed by a purchase."""
    row, rank, kind, time_ms, dwell_s = _events(pages, rng)
    logged, unknown = (_ids(seed, stream, pages.number[row]) for stream in (_SEARCH_ID, _UNKNOWN_ID))
    columns = zip(
        ["add_to_cart" if each == _BOUGHT else "click" for each in kind.tolist()],
        [unknown[e] if each == _LOST else logged[e] for e, each in enumerate(kind.tolist())],
        _ids(seed, _CLIENT_ID, pages.client[row]),
        (pages.time_ms[row] // SESSION_MS).tolist(),
        [typed[each] for each in row.tolist()],
        _iso(time_ms),
        [doc_ids[each] for each in pages.document[row, rank].tolist()],
        (pages.start[row] + rank + 1).tolist(),
        dwell_s.round(1).tolist(),
        strict=True,
    )
    return [
        f'{{"application": "shop", "action_name": "{action}", "query_id": "{query_id}", '
        f'"session_id": "{client[:8]}-{session}", "client_id": "{client}", "user_query": "{text}", '
        f'"timestamp": "{time}Z", "message_type": "CLICK_THROUGH", "event_attributes": {{'
        f'"object": {{"object_id": "{doc_id}", "object_id_field": "doc_id"}}, '
        f'"position": {{"ordinal": {ordinal}}}, "dwell_time": {dwell}}}}}\n'
        for action, query_id, client, session, text, time, doc_id, ordinal, dwell in columns
    ]


def _faults(lines: int) -> int:
    """How many of each kind of fault go with so many lines; at least one, so that small logs have them too."""
    return math.ceil(lines / LINES_PER_FAULT)


def _soil(lines: list[str], nameless: str, rng: np.random.Generator) -> list[str]:
    """The lines and, between them, broken, empty and nameless ones."""
    soiled = list(lines)
    for place in rng.integers(len(lines), size=_faults(len(lines))).tolist():
        soiled[place] = f"{lines[place][: len(lines[place]) // 2]}\n\n{nameless}{lines[place]}"
    return soiled


def _iso(time_ms: np.ndarray) -> list[str]:
    return list(np.datetime_as_string(time_ms.astype("datetime64[ms]")).tolist())


def _ids(seed: int, stream: int, number: np.ndarray) -> list[str]:
    """A UUID-like name for each number; different numbers of a stream never share one."""
    key = _random(seed, 100 + stream).integers(2**63, size=2, dtype=np.uint64)
    halves = _mix(number.astype(np.uint64)[:, None] + key)  # (n, 2)
    text = halves.astype(">u8").tobytes().hex()
    names = (text[at : at + 32] for at in range(0, len(text), 32))
    return [f"{name[:8]}-{name[8:12]}-{name[12:16]}-{name[16:20]}-{name[20:]}" for name in names]


def _mix(value: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele et al. 2014), a one-to-one map of 64-bit numbers that looks random."""
    value = value * np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(value ^ (value >> np.uint64(31)))
