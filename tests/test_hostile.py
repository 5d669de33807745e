"""Clients that lie, stop and leave, on real sockets: each is ended in time, and an honest one beside them is answered.

`bench.fuzz` has them over Ray Serve.
"""

import asyncio
import time

import httpx
import pytest
from endpoints import over_http, reranking

from bench import hostile

TIMEOUT_S, MARGIN_S = 1.5, 3.0


@pytest.fixture(scope="module")
def port(released):
    with reranking(released, timeout_s=TIMEOUT_S) as reranker, over_http(reranker) as (_, port):
        yield port


@pytest.fixture(scope="module")
def ended(port):
    """How all of them end, sent at once, and what an honest client gets meanwhile beside 200 idle connections."""

    async def whole():
        clients = hostile.CLIENTS
        async with (
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as honest,
            hostile.idle("127.0.0.1", port, 100),
            hostile.idle("127.0.0.1", port, 100, hostile.sized()[:20]),
        ):

            async def ask():
                json = {"query": "red shoe", "texts": ["red shoe"]}
                return (await honest.post("/rerank", json=json)).status_code

            sent = [hostile.send("127.0.0.1", port, each, TIMEOUT_S + MARGIN_S) for each in clients.values()]
            all_sent = asyncio.gather(*sent)
            statuses = await hostile.beside(all_sent, ask)
        return dict(zip(clients, all_sent.result(), strict=True)), statuses

    return asyncio.run(whole())


@pytest.mark.parametrize("name", hostile.CLIENTS)
def test_a_hostile_client_gets_what_it_may_and_its_connection_closes(ended, name):
    found = ended[0][name]
    assert not found.hung
    assert tuple(found.statuses) in hostile.CLIENTS[name].statuses


def test_an_honest_client_beside_all_of_them_and_200_idle_ones_has_no_failed_request(ended):
    assert len(ended[1]) > 5 and set(ended[1]) == {200}


def test_a_slow_body_is_a_typed_408_after_its_time_and_closes_the_connection(port):
    def slow():
        yield hostile.SLOW
        time.sleep(TIMEOUT_S + 0.5)

    began = time.monotonic()
    reply = httpx.post(f"http://127.0.0.1:{port}/v1/rerank", content=slow(), timeout=30)
    assert TIMEOUT_S <= time.monotonic() - began < TIMEOUT_S + MARGIN_S
    assert (reply.status_code, reply.json()["error_type"]) == (408, "TooSlow")
    assert reply.json()["message"] == f"the body did not come within {TIMEOUT_S:g} s"
    assert reply.headers["connection"] == "close"
