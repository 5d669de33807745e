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


async def echo(scope, receive, send):
    await JSONResponse([[name.decode(), value.decode()] for name, value in scope["headers"]])(scope, receive, send)


@pytest.mark.parametrize(("given", "kept"), [("mine-1", True), ("\xff", False), ("a b", False), ("x" * 65, False)])
def test_a_request_has_one_plain_id_the_clients_where_it_is_fit(given, kept):
    (found,) = [
        value for name, value in asked(echo, **{"x-request-id": given.encode("latin-1")}).json() if "id" in name
    ]
    assert (found == given) is kept and found.isascii() and 0 < len(found) <= 64


def test_a_client_does_not_steer_ray():
    given = {"x-request-timeout-seconds": "0.001", "X_Session_Id": "a", "x-client-id": "b"}
    names = {name for name, _ in asked(echo, **given).json()}
    assert "x-client-id" in names and not {"x-request-timeout-seconds", "x_session_id"} & names


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
