import asyncio
import json
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml
from test_engine import some_pairs

from bench import hostile
from disranker import bundle
from disranker.recipe import Refused
from serve.app import build, serve_here
from serve.dialects import sigmoid
from serve.settings import Served, Settings

LIMITS = {"max_documents": 50, "max_query_chars": 200}
SECRET = "zebrafish"  # in a query: no log may have it
TEXTS = ["red trail shoe", "warm rain jacket", "blue kids size", "running light", "sale"]


@pytest.fixture(scope="module")
def client(ray_here, released):
    import ray.serve

    url = serve_here(Served(bundle=str(released)), Settings(**LIMITS), port=0)
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client
    ray.serve.shutdown()


def replica_logs():
    import ray

    session = Path(ray.nodes()[0]["ObjectStoreSocketName"]).parents[1]
    return list((session / "logs" / "serve").glob("replica_*.log"))


def rerank(client, expect=200, **body):
    reply = client.post("/v1/rerank", json=body)
    assert reply.status_code == expect, reply.text
    return reply.json()


def test_healthz_says_ok_and_the_model(client):
    reply = client.get("/healthz")
    assert (reply.status_code, reply.json()) == (200, {"status": "ok", "model": "disranker"})


def test_40_requests_at_once_each_get_their_own_scores(client, student):
    queries, _, summaries = some_pairs(40, seed=1)
    queries = [query or "sale" for query in queries]

    def first(query):
        return rerank(client, query=query, documents=summaries, top_n=1)["results"][0]["relevance_score"]

    with ThreadPoolExecutor(40) as pool:
        found = list(pool.map(first, queries))
    expected = [sigmoid(max(student.scores([query] * 40, [""] * 40, summaries))) for query in queries]
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


def test_prometheus_sees_requests_by_status_and_no_text(client):
    import ray

    rerank(client, query=SECRET, documents=["a", "b"])
    rerank(client, expect=422, query="", documents=[SECRET])
    url, end = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics", time.monotonic() + 60
    wanted = ("disranker_requests_total", "disranker_pairs_total", "disranker_seconds_bucket", "disranker_waiting")
    while time.monotonic() < end:
        text = httpx.get(url, timeout=30).text
        if all(name in text for name in wanted) and 'status="422"' in text:
            break
        time.sleep(1)
    assert all(name in text for name in wanted), sorted(set(re.findall(r"^ray_disranker\w+", text, re.MULTILINE)))
    assert re.search(r'disranker_requests_total\{[^}]*path="/v1/rerank"[^}]*status="422"', text)
    assert SECRET not in text


def test_settings_come_as_text_from_the_command_line_and_a_misspelt_one_is_named():
    assert Settings.model_validate({"max_documents": "7"}).max_documents == 7
    with pytest.raises(Refused, match=r"max_docs: .*; there are model, .*max_documents"):
        build({"bundle": "b", "max_docs": 7})
    with pytest.raises(Refused, match=r"bundle: Field required"):
        build({"experiment": None})


def test_the_config_file_has_settings_that_build_takes_and_listens_on_this_machine_only():
    config = yaml.safe_load((Path(__file__).parents[1] / "serve" / "config.yaml").read_text())
    (application,) = config["applications"]
    build(application["args"])
    Served.model_validate(application["deployments"][0]["user_config"])
    assert application["import_path"] == "serve.app:build"
    assert [deployment["name"] for deployment in application["deployments"]] == ["Reranker"]
    assert config["http_options"]["host"] == "127.0.0.1"


def test_a_broken_bundle_is_refused_before_anything_starts(released, tmp_path):
    broken = shutil.copytree(released, tmp_path / "bundle")
    (broken / "config.json").write_text("{}")
    with pytest.raises(Refused, match=r"config\.json: sha256 expected"):
        serve_here(Served(bundle=str(broken)), Settings())


def test_another_host_without_keys_is_refused_before_anything_starts(released):
    with pytest.raises(Refused, match="there are no keys"):
        serve_here(Served(bundle=str(released)), Settings(), host="0.0.0.0")


def test_a_roll_to_another_bundle_and_back_loses_no_request(client, released, tmp_path):
    """The same student under another name, so that scores do not tell which one answered."""
    import ray.serve

    other, stop = tmp_path / "bundle", threading.Event()
    bundle.write(other, released, name="other", report={})

    def ask():
        statuses = []
        while not stop.is_set():
            statuses.append(client.post("/v1/rerank", json={"query": "shoe", "documents": TEXTS}).status_code)
        return statuses

    with ThreadPoolExecutor(4) as pool:
        asking, seen = [pool.submit(ask) for _ in range(4)], []
        for folder in (other, released):
            args = LIMITS | {"bundle": str(folder)}
            ray.serve.run(build(args), name="disranker", route_prefix="/")
            seen.append(client.get("/readyz").json()["bundle"])
        stop.set()
        statuses = [status for future in asking for status in future.result()]
    assert seen == [bundle.digest(other), bundle.digest(released)]
    assert len(statuses) > 8 and set(statuses) == {200}


def test_a_reply_carries_the_id_of_its_request(client):
    reply = client.post("/v1/rerank", json={"query": "a", "documents": ["a"]}, headers={"x-request-id": "r-7"})
    assert reply.headers["x-request-id"] == reply.json()["id"] == "r-7"
    reply = client.post("/v1/rerank", json={"query": "a", "documents": ["a"]})
    assert reply.headers["x-request-id"] == reply.json()["id"] != ""


@pytest.mark.parametrize("name", hostile.NAMED)
def test_no_header_makes_a_fault_of_rays_proxy(client, name):
    ended = asyncio.run(hostile.send(client.base_url.host, client.base_url.port, hostile.NAMED[name], within_s=30))
    assert not ended.hung and tuple(ended.statuses) in hostile.NAMED[name].statuses


@pytest.mark.parametrize("given", [b"\xff", b"a" * 65, b"a b", b"<b>"])
def test_an_id_that_is_not_plain_gives_way_to_one_that_header_and_body_share(client, given):
    asked = {"query": "a", "documents": ["a"]}
    reply = client.post("/v1/rerank", json=asked, headers=[(b"x-request-id", given)])
    assert reply.headers.get_list("x-request-id") == [reply.json()["id"]] != [given.decode("latin-1")]


def test_a_client_does_not_set_the_time_that_rays_proxy_waits(client):
    asked = {"query": "a", "documents": TEXTS}
    assert client.post("/v1/rerank", json=asked, headers={"x-request-timeout-seconds": "0.0001"}).status_code == 200


def test_logs_as_the_config_file_asks_for_them_have_the_id_of_each_request_and_no_query(client, released):
    import ray

    config = yaml.safe_load((Path(__file__).parents[1] / "serve" / "config.yaml").read_text())
    logging, args = config["logging_config"], LIMITS | {"bundle": str(released)}
    ray.serve.run(build(args), name="disranker", route_prefix="/", logging_config=logging)
    plain = client.post("/v1/rerank", json={"query": SECRET, "documents": [SECRET]}, headers={"x-request-id": "log-1"})
    odd = client.post("/v1/rerank", json={"query": SECRET}, headers=[(b"x-request-id", b"\xff")])
    assert (plain.status_code, odd.status_code) == (200, 422)
    lines = [line for log in replica_logs() for line in log.read_text().splitlines() if line.startswith("{")]
    found = {line["request_id"]: line["message"] for line in map(json.loads, lines) if "request_id" in line}
    assert found["log-1"].startswith("POST /v1/rerank 200")
    assert found[odd.headers["x-request-id"]].startswith("POST /v1/rerank 422")
    assert not [line for line in lines if SECRET in line]


def test_a_second_address_is_an_error_while_serve_runs(client, released):
    with pytest.raises(RuntimeError, match="does not listen on"):
        serve_here(Served(bundle=str(released)), Settings(**LIMITS), port=0)
    assert client.get("/healthz").status_code == 200
