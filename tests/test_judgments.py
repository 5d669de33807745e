"""Two rankings side by side, and what people say of them."""

import asyncio
import hashlib
import json

import pytest
from endpoints import reranking
from fastapi.testclient import TestClient
from pydantic import ValidationError

from disranker.recipe import Refused
from serve import judgments
from serve.access import Key, Keys
from serve.api import api
from serve.dialects import sigmoid
from serve.judgments import Judgment, Ranking, counted, gain, left

TEXTS = ["red trail shoe", "warm rain jacket", "blue kids size", "running light", "sale"]
SAID = {"id": "j1", "request_id": "r1", "query": "red shoe", "old": "a" * 64, "new": "b" * 64, "right_is": "good"}
OLD_LEFT, NEW_LEFT = (next(f"r{n}" for n in range(99) if left(f"r{n}") == side) for side in ("old", "new"))


# Sides


def test_each_ranking_stands_left_as_often_and_always_on_one_side_for_one_request():
    drawn = [left(f"request-{number}") for number in range(2000)]
    assert 900 < drawn.count("old") < 1100
    assert drawn == [left(f"request-{number}") for number in range(2000)]


@pytest.mark.parametrize(("right_is", "turned"), [("good", "bad"), ("same", "same"), ("bad", "good")])
def test_what_is_said_of_the_right_one_is_turned_where_the_new_one_stood_left(right_is, turned):
    said = Judgment(**SAID | {"right_is": right_is})
    rows = [said.model_copy(update={"request_id": name}).row("anna", 0.0) for name in (OLD_LEFT, NEW_LEFT)]
    assert [(row["left"], row["verdict"]) for row in rows] == [("old", right_is), ("new", turned)]


def test_a_row_has_who_said_what_of_which_bundles_and_when():
    row = Judgment(**SAID | {"request_id": OLD_LEFT}).row("anna", 1_790_856_000.5)
    assert row == {
        "id": "j1",
        "timestamp": "2026-10-01T12:00:00.500+00:00",
        "request_id": OLD_LEFT,
        "judge": "anna",
        "query": "red shoe",
        "old": "a" * 64,
        "new": "b" * 64,
        "left": "old",
        "verdict": "good",
    }
    assert set(row) == set(judgments.SCHEMA)


@pytest.mark.parametrize(
    "wrong",
    [{"id": ""}, {"id": "a b"}, {"request_id": "x" * 65}, {"query": " "}, {"old": "../a"}, {"right_is": "Good"}],
)
def test_a_judgment_of_other_words_is_refused(wrong):
    with pytest.raises(ValidationError):
        Judgment(**SAID | wrong)


def test_moves_count_the_ranks_between_both_orders():
    old, new = Ranking("live", "a", [0, 1, 2, 3]), Ranking("candidate", "b", [3, 0, 1, 2], [0.0, -1.0, -2.0, 2.0])
    found = new.reply(old)["results"]
    assert [(result["index"], result["move"]) for result in found] == [(3, 3), (0, -1), (1, -1), (2, -1)]
    assert [result["relevance_score"] for result in found] == [sigmoid(2), 0.5, sigmoid(-1), sigmoid(-2)]
    assert [result["move"] for result in old.reply(new)["results"]] == [1, 1, 1, -3]
    assert {result["relevance_score"] for result in old.reply(new)["results"]} == {None}


# Counts


def written(folder, name, *rows):
    made = [Judgment(**SAID).row("anna", 100.0) | row for row in rows]
    (folder / f"gsb_judgments-{name}.ndjson").write_text("".join(json.dumps(row) + "\n" for row in made))


def test_good_same_and_bad_are_counted_for_each_pair_of_bundles(tmp_path):
    verdicts = ["good", "good", "good", "same", "bad"]
    written(tmp_path, 1, *({"id": f"j{n}", "verdict": verdict} for n, verdict in enumerate(verdicts)))
    written(tmp_path, 2, {"id": "k", "new": "c" * 64, "verdict": "bad"})
    one, other = counted(tmp_path).to_dicts()
    assert [one[key] for key in ("old", "new", "good", "same", "bad")] == ["a" * 64, "b" * 64, 3, 1, 1]
    assert one["delta"] == pytest.approx(0.4)
    assert (other["new"], other["bad"], other["delta"]) == ("c" * 64, 1, -1.0)


def test_of_a_judgment_that_comes_twice_the_first_counts_and_ids_of_other_judges_are_others(tmp_path):
    later = {"timestamp": "2026-10-02T00:00:00.000+00:00", "verdict": "bad"}
    written(tmp_path, 1, later, {"judge": "bert", "verdict": "same"})
    written(tmp_path, 2, {"verdict": "good"}, {"verdict": "good"})
    (row,) = counted(tmp_path).to_dicts()
    assert [row[verdict] for verdict in ("good", "same", "bad")] == [1, 1, 0]


def test_gain_of_8_good_and_2_same_is_08_with_the_p_of_8_heads_of_8():
    found = gain(8, 2, 0)
    assert found["delta"] == pytest.approx(0.8) and found["p"] == pytest.approx(2 / 2**8)
    assert 0.4 <= found["low"] < 0.8 < found["high"] == 1.0


def test_gain_of_60_good_20_same_and_20_bad_has_the_interval_of_the_normal_law():
    found = gain(60, 20, 20)
    half = 1.96 * ((0.8 - 0.4**2) / 100) ** 0.5
    assert (found["low"], found["high"]) == pytest.approx((0.4 - half, 0.4 + half), abs=0.02)
    assert gain(0, 5, 0) == {"delta": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}


def test_the_counter_prints_a_line_for_each_pair(tmp_path, capsys):
    written(tmp_path, 1, {"verdict": "good"}, {"id": "j2", "verdict": "same"})
    judgments.main([str(tmp_path)])
    head, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["new", "against", "good", "same", "bad", "ΔGSB"]
    assert line.split() == ["b" * 12, "a" * 12, "1", "1", "0", "+0.500", "[+0.000,", "+1.000],", "p", "=", "1"]


def test_a_folder_without_judgments_or_with_other_lines_is_refused_in_words(tmp_path, capsys):
    with pytest.raises(Refused, match=r"no gsb_judgments-\*.ndjson"):
        counted(tmp_path)
    with pytest.raises(SystemExit):
        judgments.main([str(tmp_path)])
    assert "no gsb_judgments" in capsys.readouterr().err
    (tmp_path / "gsb_judgments-1.ndjson").write_text("{broken\n")
    with pytest.raises(Refused, match="not all lines are judgments"):
        counted(tmp_path)


# Routes


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


@pytest.fixture(scope="module")
def reranker(released, records):
    with reranking(released, max_documents=50, max_query_chars=200, records=str(records)) as made:
        yield made


@pytest.fixture(scope="module")
def client(reranker):
    with TestClient(api(reranker)) as client:
        yield client


@pytest.fixture
def tried(reranker, released, other):
    """While a candidate is tried."""
    experiment = {"name": "e1", "kind": "canary", "bundle": other, "share": 1.0}
    asyncio.run(reranker.reconfigure({"bundle": str(released), "experiment": experiment}))
    yield reranker._trial
    asyncio.run(reranker.reconfigure({"bundle": str(released)}))


def post(client, path, expect, token=None, **body):
    headers = {"authorization": f"Bearer {token}"} if token else {}
    reply = client.post(path, json=body, headers=headers)
    assert reply.status_code == expect, reply.text
    return reply.json()


def compared(client, expect=200, **more):
    return post(client, "/v1/compare", expect, **{"query": "shoe", "documents": TEXTS} | more)


def scores(engine):
    logits = engine.scores(["shoe"] * 5, [""] * 5, TEXTS)
    return pytest.approx({place: sigmoid(logit) for place, logit in enumerate(logits)}, abs=1e-5)


def by_place(ranking):
    return {result["index"]: result["relevance_score"] for result in ranking["results"]}


def test_a_candidate_is_compared_with_live_and_each_has_its_own_scores(client, tried, reranker, student, other):
    from disranker.engine import Engine

    reply = compared(client)
    assert [reply[side]["name"] for side in ("old", "new")] == ["live", "candidate"]
    assert [reply[side]["bundle"] for side in ("old", "new")] == [reranker._live().digest, tried.candidate.digest]
    assert by_place(reply["old"]) == scores(student)
    assert by_place(reply["new"]) == scores(Engine(other))
    assert reply["left"] == left(reply["id"])


def test_without_a_candidate_live_is_compared_with_the_order_given(client, reranker, student):
    reply = compared(client)
    assert (reply["old"]["name"], reply["old"]["bundle"]) == ("given", "given")
    assert [result["index"] for result in reply["old"]["results"]] == [0, 1, 2, 3, 4]
    assert set(by_place(reply["old"]).values()) == {None}
    assert (reply["new"]["name"], reply["new"]["bundle"]) == ("live", reranker._live().digest)
    assert by_place(reply["new"]) == scores(student)
    found = [result["relevance_score"] for result in reply["new"]["results"]]
    assert found == sorted(found, reverse=True)


def test_a_comparison_is_no_search_and_says_nothing_of_the_experiment(client, tried, reranker, records):
    before = tried.watch.summary()
    compared(client)
    assert tried.watch.summary() == before
    assert not list(records.glob("*ubi_queries*"))


def test_a_candidate_that_fails_is_a_503_and_no_other_comparison(client, tried, monkeypatch):
    monkeypatch.setattr(tried.candidate.engine, "logits", lambda prompts: 1 / 0)
    assert compared(client, 503)["message"] == "the model failed"


@pytest.mark.parametrize(
    ("expect", "wrong"),
    [
        (422, {"query": ""}),
        (422, {"query": "a" * 201}),
        (422, {"documents": []}),
        (413, {"documents": ["a"] * 51}),
        (404, {"model": "rerank-v3.5"}),
    ],
)
def test_a_comparison_is_refused_for_what_a_rerank_is(client, expect, wrong):
    compared(client, expect, **wrong)


def test_what_was_cut_off_is_told(client):
    reply = compared(client, documents=["sale", "red shoe " * 60])
    assert reply["meta"]["warnings"] == ["1 of 2 pairs were longer than the model reads; the rest was cut off"]


@pytest.fixture
def kept(reranker, monkeypatch):
    """Rows that are to be written."""
    kept = []
    monkeypatch.setattr(reranker._judgments, "write", kept.append)
    return kept


def test_a_judgment_is_answered_with_what_was_left_and_what_it_says_of_the_new_one(client, kept):
    assert post(client, "/v1/judgments", 202, **SAID | {"request_id": NEW_LEFT}) == {
        "id": "j1",
        "left": "new",
        "verdict": "bad",
    }
    assert [(row["judge"], row["verdict"]) for row in kept] == [("anonymous", "bad")]


@pytest.mark.parametrize("wrong", [{"query": "a" * 201}, {"right_is": "better"}, {"id": None}])
def test_a_wrong_judgment_is_a_422_and_is_not_kept(client, kept, wrong):
    assert post(client, "/v1/judgments", 422, **SAID | wrong)["error_type"] == "Validation"
    assert kept == []


def test_a_judgment_that_finds_no_room_is_a_503_and_not_thought_saved(client, reranker, monkeypatch):
    monkeypatch.setattr(reranker._judgments._waiting, "maxsize", -1)
    monkeypatch.setattr(reranker._judgments._waiting, "full", lambda: True)
    monkeypatch.setattr(reranker._judgments, "dropped", 0)
    assert post(client, "/v1/judgments", 503, **SAID)["message"] == "the disk does not keep up"


def test_where_no_records_are_kept_a_judgment_is_a_404_that_says_why(client, reranker, monkeypatch):
    monkeypatch.setattr(reranker, "_judgments", None)
    assert "the setting records is empty" in post(client, "/v1/judgments", 404, **SAID)["message"]


def test_who_judges_needs_the_right_judge_and_who_compares_the_right_rerank(client, reranker, kept, monkeypatch):
    rights = {"shop": ["rerank"], "anna": ["judge"]}
    tokens = {name: name[0] * 43 for name in rights}
    made = [
        Key(name=name, sha256=hashlib.sha256(tokens[name].encode()).hexdigest(), rights=allowed)
        for name, allowed in rights.items()
    ]
    monkeypatch.setattr(reranker, "keys", Keys(made))
    for path in ("/v1/compare", "/v1/judgments"):
        post(client, path, 401)
    post(client, "/v1/judgments", 403, tokens["shop"], **SAID)
    post(client, "/v1/judgments", 202, tokens["anna"], **SAID)
    assert [row["judge"] for row in kept] == ["anna"]
    assert compared(client, token=tokens["shop"])["new"]["name"] == "live"
    compared(client, 403, token=tokens["anna"])
    assert client.get("/").status_code == 200
