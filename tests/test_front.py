"""What stands before Ray's proxy, around applications that answer as Ray does."""

import pytest
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.testclient import TestClient

from serve import front
from serve.front import Front


async def silent(scope, receive, send):
    """A proxy whose replica died with the request."""


def asked(app, **headers):
    return TestClient(Front(app)).post("/v1/rerank", headers=headers)


@pytest.mark.parametrize("app", [silent, PlainTextResponse("Path '/v1/rerank' not found. Ping http://.../", 404)])
def test_where_no_replica_answered_a_client_is_told_to_try_again(app):
    reply = asked(app, **{"x-request-id": "a-1"})
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert reply.json()["message"] == "no replica answered; try again"
    assert (reply.json()["error_type"], reply.json()["request_id"]) == ("Unavailable", "a-1")


async def streamed(scope, receive, send):
    await StreamingResponse(iter(["a", "b", "c"]))(scope, receive, send)


@pytest.mark.parametrize(
    "app",
    [
        JSONResponse({"message": "no model 'x' here"}, 404),
        PlainTextResponse("500", 500),
        PlainTextResponse("busy", 429, {"Retry-After": "3"}),
        streamed,
    ],
)
def test_every_other_answer_goes_through_as_it_is(app):
    mine, theirs = asked(app), TestClient(app).post("/")
    assert (mine.status_code, mine.text) == (theirs.status_code, theirs.text)
    assert mine.headers.items() == theirs.headers.items()


def ids(*given):
    headers = front.plain([*((front.REQUEST_ID, value) for value in given), (b"accept", b"*/*")])
    assert headers[0] == (b"accept", b"*/*")
    return [value for name, value in headers if name == front.REQUEST_ID]


def test_a_plain_id_stays():
    assert ids(b"r-7") == [b"r-7"]


@pytest.mark.parametrize("given", [(), (b"",), (b"\xff",), (b"a" * 65,), (b"a\tb",), (b"r-7", b"r-8")])
def test_each_other_request_gets_one_new_id_of_36_characters(given):
    (found,) = ids(*given)
    assert len(found) == 36 and found not in given


@pytest.mark.parametrize("name", [b"x-session-id", b"serve_multiplexed_model_id", b"x_request-timeout_seconds"])
def test_what_would_steer_ray_is_gone_with_dashes_as_with_underscores(name):
    for spelt in (name, name.replace(b"-", b"_"), name.replace(b"_", b"-")):
        assert spelt not in dict(front.plain([(spelt, b"1")]))


def test_the_variable_names_a_list_of_middlewares_and_what_is_no_request_is_left_alone():
    (name,) = front.VARIABLES.values()
    assert name == f"{front.middlewares.__module__}:{front.middlewares.__name__}"
    assert [type(each) for each in front.middlewares()] == [Middleware]
    with TestClient(Front(_lifespan)):  # begins and ends
        pass


async def _lifespan(scope, receive, send):
    assert scope["type"] == "lifespan"
    for state in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{state}.complete"})
