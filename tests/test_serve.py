import asyncio
import math
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml
from test_engine import save_student, some_pairs

from disranker import bundle
from disranker.engine import Engine
from disranker.recipe import Refused
from serve.app import Request, Reranker, Settings, _sigmoid, build, serve_here

SECRET = "zebrafish"  # in a query: no log may have it
TEXTS = ["red trail shoe", "warm rain jacket", "blue kids size", "running light", "sale"]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    bundle.write(folder / "bundle", save_student(folder / "student"), name="shoes", report={})
    return folder / "bundle"


@pytest.fixture(scope="module")
def engine(released):
    return Engine(released)


@pytest.fixture(scope="module")
def client(ray_here, released):
    import ray.serve

    url = serve_here(Settings(bundle=str(released), max_documents=50, max_query_chars=200), port=0)
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client
    ray.serve.shutdown()


def rerank(client, expect=200, **body):
    reply = client.post("/v1/rerank", json=body)
    assert reply.status_code == expect, reply.text
    return reply.json()


def sigmoid(logit):
    return 1 / (1 + math.exp(-logit))


def best_first(logits):
    return sorted(range(len(logits)), key=lambda index: -logits[index])


def test_order_and_scores_are_those_of_the_engine(client, engine):
    _, titles, summaries = some_pairs(30)
    documents = [{"title": title, "summary": summary} for title, summary in zip(titles, summaries, strict=True)]
    logits = engine.scores(["red shoe"] * 30, titles, summaries)
    reply = rerank(client, query="red shoe", documents=documents)
    assert [result["index"] for result in reply["results"]] == best_first(logits) != list(range(30))
    expected = [sigmoid(logits[index]) for index in best_first(logits)]
    assert [result["relevance_score"] for result in reply["results"]] == pytest.approx(expected, abs=1e-5)
    assert (set(reply), reply["model"]) == ({"id", "model", "results", "usage", "meta"}, "disranker")


def test_a_string_and_a_text_score_as_a_summary_without_title(client, engine):
    logits = engine.scores(["shoe"] * 5, [""] * 5, TEXTS)
    for documents in (TEXTS, [{"text": text} for text in TEXTS]):
        results = rerank(client, query="shoe", documents=documents)["results"]
        found = [result["relevance_score"] for result in sorted(results, key=lambda result: result["index"])]
        assert found == pytest.approx([sigmoid(logit) for logit in logits], abs=1e-5)


def test_equal_scores_keep_the_order_of_the_documents(client):
    results = rerank(client, query="shoe", documents=["red shoe"] * 4)["results"]
    assert [result["index"] for result in results] == [0, 1, 2, 3]


def test_usage_counts_the_tokens_of_all_pairs(client):
    reply = rerank(client, query="red", documents=["shoe", "blue shoe"])  # [CLS] red [SEP] shoe [SEP], and one more
    assert reply["usage"] == {"total_tokens": 5 + 6}


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
        ("documents", {"query": "a", "documents": ["a"] * 51}),
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
    assert reply.status_code == 422 and reply.json()["detail"][0]["loc"] == ["body", "query"]
    assert client.post("/v1/rerank", content=b'{"query"', headers=headers).status_code == 422


def test_keys_of_other_services_are_ignored(client):
    plain = rerank(client, query="shoe", documents=TEXTS)["results"]
    others = {"rank_fields": ["text"], "max_tokens_per_doc": 4096, "truncation": True, "priority": 0}
    assert rerank(client, query="shoe", documents=TEXTS, **others)["results"] == plain


def test_another_model_is_a_404_that_names_ours(client):
    assert "'disranker'" in rerank(client, expect=404, query="a", documents=["a"], model="rerank-v3.5")["detail"]
    rerank(client, query="a", documents=["a"], model="disranker")


def test_healthz_says_ok_and_the_model(client):
    reply = client.get("/healthz")
    assert (reply.status_code, reply.json()) == (200, {"status": "ok", "model": "disranker"})


def test_40_requests_at_once_each_get_their_own_scores(client, engine):
    queries, _, summaries = some_pairs(40, seed=1)
    queries = [query or "sale" for query in queries]

    def first(query):
        return rerank(client, query=query, documents=summaries, top_n=1)["results"][0]["relevance_score"]

    with ThreadPoolExecutor(40) as pool:
        found = list(pool.map(first, queries))
    expected = [sigmoid(max(engine.scores([query] * 40, [""] * 40, summaries))) for query in queries]
    assert found == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 3) for score in found}) > 5


def test_no_log_has_the_text_of_a_query(client):
    import ray

    rerank(client, query=SECRET, documents=[SECRET])
    rerank(client, expect=422, query=SECRET, documents=[{SECRET: SECRET}])
    session = Path(ray.nodes()[0]["ObjectStoreSocketName"]).parents[1]
    logs = {log.name: log.read_text() for log in (session / "logs").rglob("*.log")}
    assert any("POST /v1/rerank" in text for name, text in logs.items() if name.startswith("replica_"))
    assert not [name for name, text in logs.items() if SECRET in text]


def test_the_event_loop_turns_while_a_request_is_scored(released):
    reranker = Reranker(Settings(bundle=str(released)))
    reranker._score = lambda *_: time.sleep(0.3) or ([0.0], 4)

    async def turns():
        task, count = asyncio.create_task(reranker.rerank(Request(query="a", documents=["b"]))), 0
        while not task.done():
            await asyncio.sleep(0.01)
            count += 1
        return count

    assert asyncio.run(turns()) > 5


def test_settings_come_as_text_from_the_command_line_and_a_misspelt_one_is_named():
    assert Settings.model_validate({"bundle": "b", "max_documents": "7"}).max_documents == 7
    with pytest.raises(Refused, match=r"max_docs: .*; the settings are bundle, model, .*max_documents"):
        build({"bundle": "b", "max_docs": 7})
    with pytest.raises(Refused, match=r"bundle: Field required"):
        build({})


def test_the_config_file_has_settings_that_build_takes_and_listens_on_this_machine_only():
    config = yaml.safe_load((Path(__file__).parents[1] / "serve" / "config.yaml").read_text())
    (application,) = config["applications"]
    build(application["args"])
    assert application["import_path"] == "serve.app:build"
    assert [deployment["name"] for deployment in application["deployments"]] == ["Reranker"]
    assert config["http_options"]["host"] == "127.0.0.1"


def test_a_broken_bundle_is_refused_before_anything_starts(released, tmp_path):
    broken = shutil.copytree(released, tmp_path / "bundle")
    (broken / "config.json").write_text("{}")
    with pytest.raises(Refused, match=r"config\.json: sha256 expected"):
        serve_here(Settings(bundle=str(broken)))


def test_a_second_address_is_an_error_while_serve_runs(client, released):
    with pytest.raises(RuntimeError, match="does not listen on"):
        serve_here(Settings(bundle=str(released), max_documents=50, max_query_chars=200), port=0)
    assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize(("logit", "score"), [(0.0, 0.5), (2.0, 0.880797), (-1000.0, 0.0), (1000.0, 1.0)])
def test_scores_lie_between_0_and_1_for_any_logit(logit, score):
    assert _sigmoid(logit) == pytest.approx(score, abs=1e-6)
