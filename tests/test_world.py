"""The made-up shop: the same from the same seed, hard for words alone, clicked as told."""

import gzip
import json
import re
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import fs as pafs

from disranker import vocabulary, world
from disranker.inputs import World
from disranker.recipe import Refused

SMALL = World(documents=1500, queries=300, judged=150, searches=12_000, shards=3)
SEED = 7

Records = list[dict[str, Any]]


def written(cfg: World, seed: int, index: int, folder: Path) -> tuple[bytes, bytes]:
    world.write_shard(cfg, seed, index, pafs.LocalFileSystem(), str(folder))
    names = (f"ubi_{kind}-{index:05d}.ndjson.gz" for kind in ("queries", "events"))
    queries, events = ((folder / name).read_bytes() for name in names)
    return queries, events


def parsed(content: bytes) -> tuple[Records, list[str]]:
    """Records with a query id, and the lines that are not."""
    records, rest = [], []
    for line in gzip.decompress(content).decode().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            record = {}
        if "query_id" in record:
            records.append(record)
        else:
            rest.append(line)
    return records, rest


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The whole small log."""
    folder = tmp_path_factory.mktemp("log")
    found: dict[str, Any] = {"searches": [], "events": [], "odd searches": [], "odd events": [], "per shard": []}
    for index in range(SMALL.shards):
        queries, events = (parsed(content) for content in written(SMALL, SEED, index, folder))
        found["per shard"].append((len(queries[0]), queries[1], events[1]))
        for kind, (records, rest) in (("searches", queries), ("events", events)):
            found[kind] += records
            found[f"odd {kind}"] += rest
    return found


def by_people(log: dict[str, Any]) -> Records:
    bots = set(world.truth(SMALL, SEED)["bot_client_ids"])
    return [search for search in log["searches"] if search["client_id"] not in bots]


def shown(searches: Records) -> np.ndarray:
    """Grades of what each page showed: (searches, 10)."""
    texts = [" ".join(search["user_query"].lower().split()) for search in searches for _ in range(10)]
    hits = [hit for search in searches for hit in search["query_response_hit_ids"]]
    return world.true_grades(SMALL, SEED, texts, hits).reshape(-1, 10)


def clicked(searches: Records, events: Records) -> np.ndarray:
    """Whether a person clicked, from the events: (searches, 10)."""
    row = {search["query_id"]: number for number, search in enumerate(searches)}
    clicks = np.zeros((len(searches), 10), bool)
    for event in events:
        number = row.get(event["query_id"])
        if number is not None and event["action_name"] == "click":
            start = searches[number]["query_attributes"]["start"]
            clicks[number, event["event_attributes"]["position"]["ordinal"] - 1 - start] = True
    return clicks


def ndcg(grades: np.ndarray, scores: np.ndarray) -> float:
    discount = 1 / np.log2(np.arange(2, 12))
    gains = [2.0 ** grades[np.argsort(-by, kind="stable")[:10]] - 1 for by in (scores, grades)]
    reached, possible = (float((gain * discount[: len(gain)]).sum()) for gain in gains)
    return reached / possible if possible else 1.0


def spec(concept: str, **facets: str) -> world.Specs:
    """One row, from any of the words for each meaning."""
    number = next(n for n, names in enumerate(vocabulary.CONCEPTS) if concept in names)
    values = [
        next((v for v, words in enumerate(rows) if facets.get(kind) in words), -1)
        for kind, rows in vocabulary.FACETS.items()
    ]
    nothing = np.zeros((1, len(values)), int)
    return world.Specs(np.array([number]), np.array([values]), np.array([0]), nothing)


@pytest.mark.parametrize(
    ("grade", "asked", "offered"),
    [
        (3, spec("couch", colour="grey"), spec("settee", colour="slate", size="tall")),
        (3, spec("couch"), spec("sofa")),
        (2, spec("couch", colour="grey", size="tall"), spec("sofa", colour="grey", size="wide")),
        (2, spec("couch", colour="grey"), spec("recliner", colour="charcoal")),
        (1, spec("couch", colour="grey", size="tall"), spec("recliner", colour="grey", size="wide")),
        (1, spec("couch", colour="grey"), spec("sofa", colour="blue")),
        (1, spec("couch", colour="grey", size="tall", room="office"), spec("sofa", colour="grey", size="wide")),
        (1, spec("couch", colour="grey"), spec("couch slipcover", colour="grey")),
        (1, spec("couch slipcover"), spec("couch")),
        (0, spec("couch", colour="grey"), spec("clock", colour="grey")),
        (0, spec("couch slipcover"), spec("table cover")),
    ],
)
def test_a_grade_counts_meanings_and_not_words(grade: int, asked: world.Specs, offered: world.Specs) -> None:
    assert world.grade(asked, offered).tolist() == [grade]


def test_fewer_than_600_words_and_each_facet_word_means_one_thing() -> None:
    meanings = Counter(w for rows in vocabulary.FACETS.values() for words in rows for w in words)
    names = [name for names in vocabulary.CONCEPTS for name in names]
    of_names = {w for name in names for w in name.split()}
    assert set(meanings.values()) == {1} and not of_names & set(meanings)
    assert len(names) == len(set(names))
    table = world.documents(SMALL, SEED)
    used = {
        w.strip(".,") for column in ("title", "summary") for text in table[column].to_pylist() for w in text.split()
    }
    assert 250 < len(used) < 600 and set(" ".join(world.queries(SMALL, SEED)).split()) <= of_names | set(meanings)


def test_a_document_tells_all_five_facets_and_its_name() -> None:
    specs, table = world._catalogue(SMALL.documents, SEED)
    for (name, words), row in zip(specs.texts(), table.to_pylist(), strict=True):
        title = row["title"].split()
        assert row["title"].startswith(words[0]) and row["title"].endswith(f" {name}")
        assert len(title) - len(name.split()) == 3
        stated = re.split(r"[.,] ?", row["summary"])
        for word, how in zip(words, vocabulary.STATED, strict=True):
            assert word in title or how.format(word) in stated
    loved = sum("you will love" in text for text in table["summary"].to_pylist()) / len(table)
    assert 0.25 < loved < 0.35


def test_300_distinct_queries_are_each_answered_by_a_document() -> None:
    texts = world.queries(SMALL, SEED)
    offered = world._catalogue(SMALL.documents, SEED)[0]
    asked = world._demand(SMALL.documents, SMALL.queries, SEED)[0]
    assert len(set(texts)) == SMALL.queries
    words = [len(text.split()) for text in texts]
    assert np.mean(words[:100]) + 0.5 < np.mean(words[-100:])
    assert all(world.grade(asked[[row]], offered).max() == 3 for row in range(SMALL.queries))


def test_judgments_hold_150_queries_with_about_22_documents_of_every_grade() -> None:
    table = world.judgments(SMALL, SEED)
    per_query = Counter(table["query"].to_pylist())
    shares = np.bincount(np.array(table["grade"]), minlength=4) / len(table)
    assert len(per_query) == SMALL.judged and min(per_query.values()) >= 18 and max(per_query.values()) <= 25
    assert len(set(zip(table["query"].to_pylist(), table["doc_id"].to_pylist(), strict=True))) == len(table)
    assert shares.min() > 0.1 and len(shares) == 4
    assert table.schema.field("grade").type == pa.int8()
    told = world.true_grades(SMALL, SEED, table["query"].to_pylist(), table["doc_id"].to_pylist())
    assert told.tolist() == table["grade"].to_pylist()
    best = dict.fromkeys(per_query, 0)
    for row in table.to_pylist():
        best[row["query"]] = max(best[row["query"]], row["grade"])
    assert set(best.values()) == {3}


def test_words_alone_reach_an_ndcg_between_random_order_and_070() -> None:
    documents, rng = world.documents(SMALL, SEED).to_pylist(), np.random.default_rng(0)
    texts = [f"{row['title']} {row['summary']}" for row in documents]
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)
    lists: dict[str, list[tuple[int, int]]] = {}
    for row in world.judgments(SMALL, SEED).to_pylist():
        lists.setdefault(row["query"], []).append((int(row["doc_id"][1:]), row["grade"]))
    by_words, by_chance = [], []
    for query, listed in lists.items():
        docs, grades = rng.permutation(np.array(listed)).T
        words = bm25s.tokenize([query], show_progress=False, return_ids=False)
        assert isinstance(words, list)
        by_words.append(ndcg(grades, index.get_scores(words[0])[docs]))
        by_chance.append(ndcg(grades, rng.random(len(docs))))
    assert np.mean(by_chance) + 0.08 < np.mean(by_words) < 0.7


def test_some_judged_documents_are_right_without_a_shared_word() -> None:
    text = {row["doc_id"]: f"{row['title']} {row['summary']}" for row in world.documents(SMALL, SEED).to_pylist()}
    right = [row for row in world.judgments(SMALL, SEED).to_pylist() if row["grade"] >= 2]
    hidden = [
        row
        for row in right
        if not set(row["query"].split()) & {word.strip(".,") for word in text[row["doc_id"]].split()}
    ]
    assert len(hidden) / len(right) > 0.25


def test_same_seed_same_bytes_and_another_seed_other_bytes(tmp_path: Path) -> None:
    first = written(SMALL, SEED, 1, tmp_path)
    for cached in (world._catalogue, world._demand, world._engine, world._pools):
        cached.cache_clear()
    assert written(SMALL, SEED, 1, tmp_path) == first
    other = written(SMALL, SEED + 1, 1, tmp_path)
    assert other[0] != first[0] and other[1] != first[1]
    assert world.documents(SMALL, SEED) != world.documents(SMALL, SEED + 1)
    assert world.judgments(SMALL, SEED) == world.judgments(SMALL, SEED)
    assert world.judgments(SMALL, SEED) != world.judgments(SMALL, SEED + 1)


def test_a_shard_is_the_same_whichever_was_written_before(tmp_path: Path) -> None:
    alone = written(SMALL, SEED, 2, tmp_path)
    written(SMALL, SEED, 0, tmp_path)
    assert written(SMALL, SEED, 2, tmp_path) == alone
    assert written(SMALL, SEED, 0, tmp_path) != alone


def test_12000_searches_over_3_shards_share_no_id(log: dict[str, Any]) -> None:
    assert [count for count, *_ in log["per shard"]] == [4000, 4000, 4000]
    ids = [search[key] for search in log["searches"] for key in ("query_id", "query_response_id")]
    assert len(ids) == len(set(ids)) == 24_000
    assert {len(id_) for id_ in ids} == {36}


def test_shards_that_do_not_divide_the_searches_still_add_up(tmp_path: Path) -> None:
    cfg = SMALL.model_copy(update={"searches": 101, "shards": 7})
    counts = [len(parsed(written(cfg, SEED, index, tmp_path)[0])[0]) for index in range(7)]
    assert sum(counts) == 101 and max(counts) - min(counts) == 1


def test_clicks_of_people_follow_examination_times_attractiveness(log: dict[str, Any]) -> None:
    people, truth = by_people(log), world.truth(SMALL, SEED)
    grades, clicks = shown(people), clicked(people, log["events"])
    attractive = np.array([truth["attractiveness_by_grade"][str(value)] for value in range(4)])
    for rank, examined in enumerate(truth["examination_by_rank"]):
        expected = examined * attractive[grades[:, rank]]
        noise = np.sqrt((expected * (1 - expected)).sum())
        assert abs(clicks[:, rank].sum() - expected.sum()) < 4 * noise
    for value in range(4):
        expected = (np.array(truth["examination_by_rank"]) * attractive[value] * (grades == value)).sum()
        assert abs((clicks & (grades == value)).sum() - expected) < 4 * np.sqrt(expected)


def test_the_engine_puts_better_grades_first_and_shows_all_of_them(log: dict[str, Any]) -> None:
    first = [search for search in by_people(log) if search["query_attributes"]["start"] == 0]
    second = [search for search in by_people(log) if search["query_attributes"]["start"] == 10]
    grades = shown(first)
    assert grades[:, 0].mean() > grades[:, 9].mean() + 0.1 and grades.mean() > shown(second).mean() + 0.1
    assert (np.bincount(grades.ravel(), minlength=4) / grades.size).min() > 0.05
    assert all(len(set(search["query_response_hit_ids"])) == 10 for search in log["searches"])
    assert 0.08 < len(second) / (len(first) + len(second)) < 0.12


def test_right_documents_without_a_shared_word_are_shown_sometimes(log: dict[str, Any]) -> None:
    text = {row["doc_id"]: f"{row['title']} {row['summary']}" for row in world.documents(SMALL, SEED).to_pylist()}
    words = {key: {word.strip(".,") for word in value.split()} for key, value in text.items()}
    people = by_people(log)
    wordless = np.array([
        [not words[hit] & set(search["user_query"].lower().split()) for hit in search["query_response_hit_ids"]]
        for search in people
    ])  # fmt: skip
    assert 0.01 < (wordless & (shown(people) >= 2)).mean() < 0.15


def test_one_page_in_ten_is_shuffled_and_marked_so_and_the_usual_order_is_broken_there(log: dict[str, Any]) -> None:
    pools = world._pools(SMALL.documents, SMALL.queries, SEED)[0]
    row = {text: number for number, text in enumerate(world.queries(SMALL, SEED))}
    drops: dict[bool, list[float]] = {True: [], False: []}
    for search in log["searches"][:3000]:
        pool = pools[row[" ".join(search["user_query"].lower().split())]].tolist()
        places = [pool.index(int(hit[1:])) for hit in search["query_response_hit_ids"]]
        order = np.corrcoef(np.minimum(places, world.EXTRA_RANK), np.arange(10))[0, 1]
        drops[search["query_attributes"].get("shuffled", False)].append(order)
    assert 0.08 < len(drops[True]) / 3000 < 0.12
    assert 0.35 < np.mean(np.array(drops[True]) < 0) < 0.65  # half of the shuffled ones
    assert np.mean(np.array(drops[False]) < 0) < 0.16  # some by noise


def test_the_4_bots_are_the_busiest_clients_and_click_most(log: dict[str, Any]) -> None:
    cfg = SMALL.model_copy(update={"searches": 40_000})
    assert len(world.truth(cfg, SEED)["bot_client_ids"]) == 8
    bots = world.truth(SMALL, SEED)["bot_client_ids"]
    searches = Counter(search["client_id"] for search in log["searches"])
    clicks = Counter(event["client_id"] for event in log["events"])
    busiest = searches.most_common()
    assert len(bots) == 2 and {client for client, _ in busiest[:2]} == set(bots)
    assert busiest[1][1] > 100 and busiest[2][1] < 20
    assert all(clicks[bot] > 4 * searches[bot] for bot in bots)
    assert not any(event["client_id"] in bots for event in log["events"] if event["action_name"] == "add_to_cart")
    assert 0.02 < sum(searches[bot] for bot in bots) / SMALL.searches < 0.04


def test_one_click_in_a_hundred_was_sent_twice(log: dict[str, Any]) -> None:
    lines = Counter(json.dumps(event) for event in log["events"] if event["action_name"] == "click")
    twice = sum(count - 1 for count in lines.values())
    assert 0.006 < twice / len(lines) < 0.015


def test_good_grades_hold_shoppers_longer_and_are_bought(log: dict[str, Any]) -> None:
    dwell, bought = ({value: [] for value in range(4)} for _ in range(2))  # type: ignore[var-annotated]
    people = by_people(log)
    grade_of = {
        (search["query_id"], hit): value
        for search, row in zip(people, shown(people).tolist(), strict=True)
        for hit, value in zip(search["query_response_hit_ids"], row, strict=True)
    }
    for event in log["events"]:
        value = grade_of.get((event["query_id"], event["event_attributes"]["object"]["object_id"]))
        if value is not None:
            seconds = event["event_attributes"]["dwell_time"]
            (dwell if event["action_name"] == "click" else bought)[value].append(seconds)
    medians = [float(np.median(dwell[value])) for value in range(4)]
    assert medians == pytest.approx([8, 15, 35, 60], rel=0.2)
    assert not bought[0] and not bought[1] and 0 < len(bought[2]) < len(bought[3]) < 0.2 * len(dwell[3])


def test_frequencies_fall_like_zipf_and_queries_are_spelt_in_many_ways(log: dict[str, Any]) -> None:
    typed = [search["user_query"] for search in log["searches"]]
    count = Counter(" ".join(text.lower().split()) for text in typed)
    assert set(count) == set(world.queries(SMALL, SEED))
    head, tenth = (count[world.queries(SMALL, SEED)[rank]] for rank in (0, 9))
    assert head / tenth == pytest.approx(10**0.8, rel=0.25)
    normal = sum(text == " ".join(text.lower().split()) for text in typed) / len(typed)
    assert 0.6 < normal < 0.8
    odd = (sum(map(str.isupper, typed)), sum(map(str.istitle, typed)), sum(t != t.strip() for t in typed))
    assert min(odd) > 300 and sum("  " in text for text in typed) > 300


def test_each_shard_has_broken_empty_and_nameless_lines_and_lost_events(log: dict[str, Any]) -> None:
    for _, *odd in log["per shard"]:
        for lines in odd:
            assert "" in lines and any(line.startswith("{") and not line.endswith("}") for line in lines)
            assert any(line.endswith("}") for line in lines) and len(lines) < 20
    known = {search["query_id"] for search in log["searches"]}
    lost = [event for event in log["events"] if event["query_id"] not in known]
    assert 3 <= len(lost) < 0.01 * len(log["events"])
    assert all(event["event_attributes"]["object"]["object_id"].startswith("P") for event in lost)


def test_records_have_the_keys_of_ubi_and_times_in_october(log: dict[str, Any]) -> None:
    search, event = log["searches"][0], log["events"][0]
    assert " ".join(search) == (
        "application query_id client_id user_query query_response_id query_response_hit_ids query_attributes timestamp"
    )
    assert " ".join(event) == (
        "application action_name query_id session_id client_id user_query timestamp message_type event_attributes"
    )
    assert list(event["event_attributes"]) == ["object", "position", "dwell_time"]
    times = [search["timestamp"] for search in log["searches"]]
    assert times == sorted(times)
    assert times[0].startswith("2026-10-01T0") and times[-1].startswith("2026-10-30T2") and len(times[0]) == 24
    assert search["query_id"] not in search["client_id"] and event["session_id"].startswith(
        event["client_id"][:8] + "-"
    )


def test_events_come_after_their_search_and_point_at_what_it_showed(log: dict[str, Any]) -> None:
    searches = {search["query_id"]: search for search in log["searches"]}
    for event in log["events"]:
        search = searches.get(event["query_id"])
        if search:
            attributes, start = event["event_attributes"], search["query_attributes"]["start"]
            place = attributes["position"]["ordinal"] - 1 - start
            assert 0 <= place < 10 and search["query_response_hit_ids"][place] == attributes["object"]["object_id"]
            assert event["timestamp"] > search["timestamp"] and event["client_id"] == search["client_id"]
            assert event["user_query"] == search["user_query"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"judged": 301}, "judged 301 exceeds queries 300"),
        ({"documents": 20}, "20 documents"),
        ({"documents": 1, "queries": 3000}, "1 documents give .* distinct queries, not 3000"),
    ],
)
def test_a_world_that_cannot_be_is_refused_by_name(change: dict[str, int], message: str) -> None:
    with pytest.raises(Refused, match=message):
        world.judgments(SMALL.model_copy(update=change), SEED)


def test_shard_3_of_3_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no shard 3; there are 0 to 2"):
        world.write_shard(SMALL, SEED, 3, pafs.LocalFileSystem(), str(tmp_path))


def test_events_stand_by_time_and_a_purchase_follows_its_click_by_the_dwell_time(log: dict[str, Any]) -> None:
    times = [event["timestamp"] for event in log["events"]]
    assert times == sorted(times)
    clicks: dict[tuple[str, str], datetime] = {}
    for event in log["events"]:
        key = event["query_id"], event["event_attributes"]["object"]["object_id"]
        time = datetime.fromisoformat(event["timestamp"])
        if event["action_name"] == "click":
            clicks.setdefault(key, time)
        else:
            assert abs((time - clicks[key]).total_seconds() - event["event_attributes"]["dwell_time"]) < 0.1
