"""What nobody should send: never a 500, never a hang. `python -m bench.fuzz` sends far more of it, over Ray Serve."""

import pytest
import schemathesis
from endpoints import reranking
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import status_code_conformance

from bench import hostile
from serve.api import api


@pytest.fixture(scope="module")
def application(released, tmp_path_factory):
    with reranking(released, max_documents=100, records=str(tmp_path_factory.mktemp("records"))) as reranker:
        yield api(reranker)


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


@pytest.mark.parametrize("path", hostile.PATHS)
@pytest.mark.parametrize("content", hostile.BODIES.values(), ids=hostile.BODIES)
def test_a_hostile_body_is_answered_or_refused(application, path, content):
    with TestClient(application, raise_server_exceptions=False) as client:
        reply = client.post(path, content=content, headers={"content-type": "application/json"})
        assert reply.status_code in (200, 202, 413, 422), (reply.status_code, reply.text[:200])
        assert len(reply.content) < 100_000
        assert client.post("/rerank", json={"query": "a", "texts": ["b"]}).status_code == 200
