"""What nobody should send: never a 500, never a hang. `python -m bench.fuzz` sends far more of it, over Ray Serve."""

import asyncio
import json

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import status_code_conformance

from serve.api import api
from serve.replica import Reranker
from serve.settings import Settings


@pytest.fixture(scope="module")
def application(released, tmp_path_factory):
    reranker = Reranker(Settings(max_documents=100, records=str(tmp_path_factory.mktemp("records"))))
    asyncio.run(reranker.reconfigure({"bundle": str(released)}))
    yield api(reranker)
    reranker.close()


RERANK = ["/v1/rerank", "/v2/rerank", "/rerank", "/score", "/v1/compare"]
ROUTES = [*RERANK, "/v1/events", "/v1/judgments", "/", "/v1/models", "/healthz", "/readyz"]


@pytest.mark.parametrize("path", ROUTES)
def test_what_our_own_schema_allows_or_forbids_gets_an_answer_that_it_names(application, path):
    schema = schemathesis.openapi.from_asgi("/openapi.json", application)
    (operation,) = (found.ok() for found in schema.get_all_operations() if found.ok().path == path)

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in GenerationMode)))
    def fuzz(case):
        case.call_and_validate(checks=[not_a_server_error, status_code_conformance])

    fuzz()


HOSTILE = {
    "deep": b'{"query": "a", "documents": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "10 MB in a string": json.dumps({"query": "a", "documents": ["x" * 10_000_000]}).encode(),
    "1 MB in a string": json.dumps({"query": "a", "documents": ["x y " * 250_000]}).encode(),
    "NUL": json.dumps({"query": "a\0b", "documents": ["\0", "a\0"]}).encode(),
    "lone surrogate": rb'{"query": "\ud800", "documents": ["\udfff"]}',
    "right to left": json.dumps({"query": "\u202eabc\u0627\u0644", "documents": ["\u200f", "\u202e" * 50]}).encode(),
    "combining": json.dumps({"query": "a" + "\u0301" * 3000, "documents": ["\u0301" * 10_000]}).encode(),
    "100k empty documents": json.dumps({"query": "a", "documents": [""] * 100_000}).encode(),
    "100 empty documents": json.dumps({"query": "a", "documents": [""] * 100}).encode(),
    "huge number": b'{"query": "a", "documents": ["a"], "top_n": ' + b"9" * 5000 + b"}",
    "same key 1000 times": b"{" + b",".join([b'"query": "a"'] * 1000) + b', "documents": ["a"]}',
    "1000 keys": json.dumps({"query": "a", "documents": [{"text": "a"} | {str(n): n for n in range(1000)}]}).encode(),
    "wrong types": b'{"query": {"a": []}, "documents": {"b": null}, "top_n": []}',
    "UTF-16": '{"query": "a", "documents": ["a"]}'.encode("utf-16"),
    "latin-1": '{"query": "\u00e9", "documents": ["a"]}'.encode("latin-1"),
    "nothing": b"",
}


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/score", "/v1/events", "/v1/compare", "/v1/judgments"])
@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_body_is_answered_or_refused(application, path, content):
    with TestClient(application, raise_server_exceptions=False) as client:
        reply = client.post(path, content=content, headers={"content-type": "application/json"})
        assert reply.status_code in (200, 202, 413, 422), (reply.status_code, reply.text[:200])
        assert len(reply.content) < 100_000
        assert client.post("/rerank", json={"query": "a", "texts": ["b"]}).status_code == 200
