"""The routes over HTTP, in this process; `test_serve.py` has them on Ray Serve."""

import asyncio
import hashlib
import time

import pytest
from endpoints import reranking
from fastapi.testclient import TestClient
from test_engine import some_pairs

from serve.access import Key, Keys
from serve.api import api
from serve.dialects import Asked, sigmoid
from serve.replica import PROBE

TEXTS = ["red trail shoe", "warm rain jacket", "blue kids size", "running light", "sale"]
LONG = "red shoe " * 60  # more than the 64 tokens of the contract


@pytest.fixture(scope="module")
def reranker(released):
    with reranking(released, max_documents=50, max_query_chars=200, max_body_bytes=100_000) as made:
        yield made


@pytest.fixture(scope="module")
def client(reranker):
    with TestClient(api(reranker)) as client:
        yield client


def post(client, path, expect=200, headers=None, **body):
    reply = client.post(path, json=body, headers=headers)
    assert reply.status_code == expect, reply.text
    return reply.json()


def rerank(client, expect=200, **body):
    return post(client, "/v1/rerank", expect, **body)


def best_first(logits):
    return sorted(range(len(logits)), key=lambda index: -logits[index])


def test_order_and_scores_are_those_of_the_engine(client, student):
    _, titles, summaries = some_pairs(30)
    documents = [{"title": title, "summary": summary} for title, summary in zip(titles, summaries, strict=True)]
    logits = student.scores(["red shoe"] * 30, titles, summaries)
    reply = rerank(client, query="red shoe", documents=documents)
    assert [result["index"] for result in reply["results"]] == best_first(logits) != list(range(30))
    expected = [sigmoid(logits[index]) for index in best_first(logits)]
    assert [result["relevance_score"] for result in reply["results"]] == pytest.approx(expected, abs=1e-5)
    assert (set(reply), reply["model"]) == ({"id", "model", "results", "usage", "meta"}, "disranker")


def test_a_string_and_a_text_score_as_a_summary_without_title(client, student):
    logits = student.scores(["shoe"] * 5, [""] * 5, TEXTS)
    for documents in (TEXTS, [{"text": text} for text in TEXTS]):
        results = rerank(client, query="shoe", documents=documents)["results"]
        found = [result["relevance_score"] for result in sorted(results, key=lambda result: result["index"])]
        assert found == pytest.approx([sigmoid(logit) for logit in logits], abs=1e-5)


def test_equal_scores_keep_the_order_of_the_documents(client):
    results = rerank(client, query="shoe", documents=["red shoe"] * 4)["results"]
    assert [result["index"] for result in results] == [0, 1, 2, 3]


def test_usage_counts_the_tokens_of_all_pairs(client):
    reply = rerank(client, query="red", documents=["shoe", "blue shoe"])  # [CLS] red [SEP] shoe [SEP], and one more
    assert reply["usage"] == {"prompt_tokens": 5 + 6, "total_tokens": 5 + 6}


def test_top_2_are_the_first_two_of_all_and_top_9_of_5_are_all(client):
    every = rerank(client, query="shoe", documents=TEXTS)["results"]
    assert rerank(client, query="shoe", documents=TEXTS, top_n=2)["results"] == every[:2]
    assert rerank(client, query="shoe", documents=TEXTS, top_n=9)["results"] == every
    assert rerank(client, query="shoe", documents=TEXTS, top_n=None)["results"] == every


def test_documents_come_back_as_they_were_sent_and_only_if_asked_for(client):
    documents = ["red shoe", {"text": "blue shoe", "id": 7}, {"title": "jacket", "summary": "warm"}]
    asked = rerank(client, query="shoe", documents=documents, return_documents=True)["results"]
    found = [result["document"] for result in sorted(asked, key=lambda result: result["index"])]
    assert found == [{"text": "red shoe"}, *documents[1:]]
    assert all("document" not in result for result in rerank(client, query="shoe", documents=documents)["results"])


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("query", {"documents": ["a"]}),
        ("query", {"query": "", "documents": ["a"]}),
        ("query", {"query": "  ", "documents": ["a"]}),
        ("query", {"query": 5, "documents": ["a"]}),
        ("query", {"query": "a" * 201, "documents": ["a"]}),
        ("documents", {"query": "a"}),
        ("documents", {"query": "a", "documents": []}),
        ("documents", {"query": "a", "documents": "text"}),
        ("documents", {"query": "a", "documents": [5]}),
        ("documents", {"query": "a", "documents": [{"body": "text"}]}),
        ("documents", {"query": "a", "documents": [{"text": "a", "summary": "b"}]}),
        ("top_n", {"query": "a", "documents": ["a"], "top_n": 0}),
        ("top_n", {"query": "a", "documents": ["a"], "top_n": "2"}),
        ("return_documents", {"query": "a", "documents": ["a"], "return_documents": "perhaps"}),
    ],
)
def test_a_bad_field_is_named_in_a_422_that_does_not_repeat_the_input(client, field, body):
    (fault,) = rerank(client, expect=422, **body)["detail"]
    assert fault["loc"][:2] == ["body", field]
    assert set(fault) == {"type", "loc", "msg"}


def test_half_a_surrogate_pair_is_a_422_and_not_a_500(client):
    headers = {"content-type": "application/json"}
    reply = client.post("/v1/rerank", content=rb'{"query": "\ud800", "documents": ["a"]}', headers=headers)
    assert reply.status_code == 422 and reply.json()["detail"][0]["loc"][0] == "body"
    assert client.post("/v1/rerank", content=b'{"query"', headers=headers).status_code == 422


def test_keys_of_other_services_are_ignored(client):
    plain = rerank(client, query="shoe", documents=TEXTS)["results"]
    others = {"rank_fields": ["text"], "max_tokens_per_doc": 4096, "truncation": True, "priority": 0}
    assert rerank(client, query="shoe", documents=TEXTS, **others)["results"] == plain


def test_another_model_is_a_404_that_names_ours(client):
    assert "'disranker'" in rerank(client, expect=404, query="a", documents=["a"], model="rerank-v3.5")["detail"]
    rerank(client, query="a", documents=["a"], model="disranker")


# Other dialects


def test_cohere_v2_is_v1_with_its_own_version(client):
    body = {"query": "shoe", "documents": TEXTS, "top_n": 3}
    one, two = (post(client, path, **body) for path in ("/v1/rerank", "/v2/rerank"))
    assert [reply["meta"]["api_version"]["version"] for reply in (one, two)] == ["1", "2"]
    assert one["results"] == two["results"] and len(two["results"]) == 3


def test_tei_gives_a_bare_list_of_scores_or_logits_with_texts_if_asked_for(client, student):
    logits = student.scores(["shoe"] * 5, [""] * 5, TEXTS)
    plain = post(client, "/rerank", query="shoe", texts=TEXTS)
    assert [set(result) for result in plain] == [{"index", "score"}] * 5
    assert [result["index"] for result in plain] == best_first(logits)
    raw = post(client, "/rerank", query="shoe", texts=TEXTS, raw_scores=True, return_text=True)
    assert [result["score"] for result in raw] == pytest.approx(
        [logits[place] for place in best_first(logits)], abs=1e-4
    )
    assert [result["score"] for result in plain] == pytest.approx(
        [sigmoid(result["score"]) for result in raw], abs=1e-6
    )
    assert [result["text"] for result in raw] == [TEXTS[result["index"]] for result in raw]


def test_tei_refuses_what_would_be_cut_off_if_it_may_not_be(client):
    assert len(post(client, "/rerank", query="shoe", texts=[LONG], truncate=True)) == 1
    fault = post(client, "/rerank", 413, query="shoe", texts=["sale", LONG], truncate=False)
    assert fault["error_type"] == "TooLarge" and fault["error"].startswith("1 of 2 pairs")
    assert len(post(client, "/rerank", query="shoe", texts=["sale"], truncate=False)) == 1


@pytest.mark.parametrize("names", ["queries documents", "queries items", "text_1 text_2", "data_1 data_2"])
def test_vllm_scores_one_query_with_all_or_each_with_its_own_in_their_order(client, student, names):
    queries = ["shoe", "jacket", "sale", "red", "kids"]
    for given, expanded in (("shoe", ["shoe"] * 5), (["shoe"], ["shoe"] * 5), (queries, queries)):
        reply = post(client, "/score", **dict(zip(names.split(), (given, TEXTS), strict=True)))
        logits = student.scores(expanded, [""] * 5, TEXTS)
        assert [one["score"] for one in reply["data"]] == pytest.approx([sigmoid(logit) for logit in logits], abs=1e-5)
        assert [one["index"] for one in reply["data"]] == [0, 1, 2, 3, 4]
    assert reply["object"] == "list" and reply["model"] == "disranker" and reply["usage"]["total_tokens"] > 25


def test_vllm_gives_logits_without_activation(client, student):
    (one,) = post(client, "/v1/score", queries="shoe", documents="red shoe", use_activation=False)["data"]
    assert one["score"] == pytest.approx(student.scores(["shoe"], [""], ["red shoe"])[0], abs=1e-4)


@pytest.mark.parametrize("queries", [[], ["a", "b"]])
def test_queries_that_do_not_go_with_their_documents_are_a_422(client, queries):
    fault = post(client, "/score", 422, queries=queries, documents=["a", "b", "c"])
    assert f"{len(queries)} queries and 3 documents" in fault["message"]


def test_models_lists_the_one_that_is_served(client):
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["disranker"]


def test_the_schema_names_every_route(client):
    paths = set(client.get("/openapi.json").json()["paths"])
    assert {"/v1/rerank", "/v2/rerank", "/rerank", "/score", "/v1/models", "/healthz", "/readyz"} <= paths
    assert {"/", "/v1/compare", "/v1/judgments"} <= paths
    assert client.get("/docs").status_code == 200


# What is told


def test_what_was_cut_off_is_told_in_the_reply_and_in_a_header(client):
    reply = client.post("/v1/rerank", json={"query": "shoe", "documents": ["sale", LONG, {"title": LONG}]})
    assert reply.json()["meta"]["warnings"] == ["2 of 3 pairs were longer than the model reads; the rest was cut off"]
    assert reply.headers["x-truncated-pairs"] == "2"
    reply = client.post("/v1/rerank", json={"query": "shoe", "documents": ["sale"]})
    assert "warnings" not in reply.json()["meta"] and reply.headers["x-truncated-pairs"] == "0"


def test_a_request_id_comes_back_where_it_is_plain_and_is_a_new_one_where_it_is_not(client):
    body = {"query": "shoe", "documents": ["sale"]}
    assert post(client, "/v1/rerank", headers={"x-request-id": "a-1"}, **body)["id"] == "a-1"
    assert post(client, "/v1/rerank", 422, headers={"x-request-id": "a-2"}, query="")["request_id"] == "a-2"
    for strange in ("a" * 65, "a b", "<a>"):
        assert post(client, "/v1/rerank", headers={"x-request-id": strange}, **body)["id"] != strange


def test_a_refusal_has_a_body_for_each_client(client):
    fault = rerank(client, 404, query="a", documents=["a"], model="x")
    assert fault["message"] == fault["detail"] == fault["error"]
    assert fault["error_type"] == "NotFound"
    assert post(client, "/v1/nothing", 404)["error_type"] == "NotFound"
    assert client.get("/v1/rerank").json()["error_type"] == "MethodNotAllowed"


# Events


CLICK = {
    "action_name": "click",
    "query_id": "q1",
    "client_id": "c1",
    "event_attributes": {"object": {"object_id": "d1"}},
}


@pytest.fixture
def kept(reranker, monkeypatch):
    """Events that the replica was given."""
    kept = []
    monkeypatch.setattr(reranker, "keep", kept.extend)
    return kept


def test_events_are_accepted_one_at_a_time_or_many(client, kept):
    assert client.post("/v1/events", json=CLICK).json() == {"accepted": 1}
    assert client.post("/v1/events", json=[CLICK] * 3).status_code == 202
    assert [event.query_id for event in kept] == ["q1"] * 4


@pytest.mark.parametrize("sent", [[], [CLICK] * 101, {"action_name": 5}, [CLICK, {}], "click", None])
def test_events_that_ingest_could_not_read_are_a_422_and_none_is_kept(client, kept, sent):
    assert client.post("/v1/events", json=sent).status_code == 422
    assert kept == []


# Keys


@pytest.fixture
def locked(reranker, client, monkeypatch):
    """The client where a token is asked for; and the tokens of a shop and of a logger, who may only post events."""
    tokens = {"shop": "a" * 43, "logger": "b" * 43, "slow": "c" * 43}
    more = {"logger": {"rights": ["events"]}, "slow": {"requests_per_minute": 10}}
    made = [
        Key(name=name, sha256=hashlib.sha256(token.encode()).hexdigest(), **more.get(name, {}))
        for name, token in tokens.items()
    ]
    monkeypatch.setattr(reranker, "keys", Keys(made))
    return tokens


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank", "/score", "/v1/score"])
def test_without_a_known_token_each_route_is_a_401_before_the_body_is_read(client, locked, path):
    for header in ({}, {"authorization": "Bearer " + "d" * 43}, {"authorization": "Basic x"}):
        reply = client.post(path, content=b"{", headers=header)
        assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
        assert reply.json()["error_type"] == "Unauthorized"
    reply = client.post(path, content=b"{}", headers={"authorization": "Bearer " + locked["shop"]})
    assert reply.status_code == 422


def test_a_key_without_the_right_is_a_403(client, locked):
    reply = client.post("/v1/rerank", json={}, headers={"authorization": "Bearer " + locked["logger"]})
    assert (reply.status_code, reply.json()["message"]) == (403, "the key logger has not the right rerank")


def test_more_requests_than_a_key_may_are_a_429_with_the_seconds_to_wait(client, locked):
    headers = {"authorization": "Bearer " + locked["slow"]}
    replies = [client.post("/v1/rerank", json={}, headers=headers) for _ in range(2)]
    assert [reply.status_code for reply in replies] == [422, 429]
    assert replies[1].headers["retry-after"] == "6"


def test_probes_need_no_token(client, locked):
    assert [client.get(path).status_code for path in ("/healthz", "/readyz", "/openapi.json")] == [200] * 3


# Limits


def test_too_many_documents_are_a_413_that_says_how_many_may_be(client):
    assert rerank(client, 413, query="a", documents=["a"] * 51)["message"] == "documents: 51 are too many; at most 50"
    assert "texts: 51" in post(client, "/rerank", 413, query="a", texts=["a"] * 51)["message"]
    rerank(client, query="a", documents=["a"] * 50)


@pytest.mark.parametrize("length", [{"content-length": "100001"}, {}])
def test_a_body_that_is_too_large_is_a_413_whether_it_says_so_or_not(client, length):
    pieces = (b"x" * 1001 for _ in range(100))
    content = b"x" * 100_001 if length else pieces
    reply = client.post("/v1/rerank", content=content, headers={"content-type": "application/json"})
    assert reply.status_code == 413 and "100000 bytes" in reply.json()["message"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[",
        b"null",
        b"[" * 5000,
        b'{"query": "a", "documents": ' + b"[" * 5000,
        b"\xff",
        b'{"query": NaN}',
        b"1e999",
    ],
)
def test_what_is_no_json_or_nested_too_deep_is_a_422(client, content):
    reply = client.post("/v1/rerank", content=content, headers={"content-type": "application/json"})
    assert reply.status_code == 422, reply.text


def test_a_deadline_that_passes_is_a_504_and_the_client_may_ask_for_a_shorter_one(reranker, client, monkeypatch):
    logits = reranker._live().engine.logits
    monkeypatch.setattr(reranker._live().engine, "logits", lambda prompts: time.sleep(0.1) or logits(prompts))
    body = {"query": "shoe", "documents": [f"red {n}" for n in range(50)]}
    monkeypatch.setattr(reranker._batcher, "_tokens_per_batch", 20)
    assert post(client, "/v1/rerank", 504, headers={"x-timeout-ms": "150"}, **body)["error_type"] == "Deadline"
    assert (
        len(post(client, "/v1/rerank", headers={"x-timeout-ms": "soon"}, query="shoe", documents=["sale"])["results"])
        == 1
    )


def test_a_full_queue_is_a_429_that_says_when_to_come_again(reranker, client, monkeypatch):
    monkeypatch.setattr(reranker._batcher, "_tokens", int(5.2 * reranker._batcher.tokens_per_s))
    reply = client.post("/v1/rerank", json={"query": "a", "documents": ["a"]})
    assert (reply.status_code, reply.headers["retry-after"], reply.json()["error_type"]) == (429, "6", "Overloaded")


def test_readyz_runs_a_pair_and_says_503_where_the_model_fails(reranker, client, monkeypatch):
    assert client.get("/readyz").json()["bundle"] == reranker._live().digest

    def broken(_):
        raise MemoryError

    monkeypatch.setattr(reranker._live().engine, "logits", broken)
    reply = client.get("/readyz")
    assert (reply.status_code, reply.json()["message"]) == (503, "the model does not answer: MemoryError")
    assert client.get("/healthz").status_code == 200


def test_the_event_loop_turns_while_a_request_is_scored(reranker, monkeypatch):
    monkeypatch.setattr(reranker._live().engine, "logits", lambda prompts: time.sleep(0.3) or [0.0])

    async def turns():
        task, count = asyncio.create_task(reranker.rerank(Asked(PROBE, 5.0, ""))), 0
        while not task.done():
            await asyncio.sleep(0.01)
            count += 1
        return count

    assert asyncio.run(turns()) > 5


@pytest.mark.parametrize(("logit", "score"), [(0.0, 0.5), (2.0, 0.880797), (-1000.0, 0.0), (1000.0, 1.0)])
def test_scores_lie_between_0_and_1_for_any_logit(logit, score):
    assert sigmoid(logit) == pytest.approx(score, abs=1e-6)
