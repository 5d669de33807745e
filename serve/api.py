"""The routes: rerank as Jina, Cohere, TEI and vLLM have it, what judges see and say, and what operators ask."""

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Protocol

import pydantic_core
from fastapi import APIRouter, FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve import dialects, faults, page
from serve.access import Forbidden, Key, Keys, Limiter, Right, Unauthorised
from serve.dialects import Asked, Pairs, Score, Scored, TeiRerank
from serve.faults import Fault
from serve.judgments import Comparison, Judgment
from serve.observe import Observed
from serve.records import MAX_EVENTS, Event
from serve.settings import Settings

REQUEST_ID = "x-request-id"
TRUNCATED = "x-truncated-pairs"
MAX_CLIENT_CHARS = 128
CLIENT_LEFT = 499  # as nginx counts who did not wait for the answer

Events = Annotated[list[Event], Field(min_length=1, max_length=MAX_EVENTS)] | Event


class Scorer(Protocol):
    """What the routes need of a replica."""

    settings: Settings
    keys: Keys
    limiter: Limiter
    observed: Observed

    async def rerank(self, asked: Asked) -> Scored:
        """Raises `Fault` if there is no answer in time, or too much waits."""

    async def compare(self, asked: Asked) -> Comparison:
        """Raises `Fault` as `rerank` does."""

    def keep(self, events: list[Event]) -> None:
        """Raises `Fault` where no events are kept."""

    def judged(self, row: dict[str, Any]) -> None:
        """Raises `Fault` where no judgments are kept."""

    async def ready(self) -> dict[str, Any]:
        """What serves. Raises `Fault` while nothing does."""


class _Body(Request):
    """A request whose body is bounded in bytes and time while it comes, and parsed without recursion."""

    settings: Settings

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            self._check(int(self.headers.get("content-length") or 0))
            limit_s = self.settings.timeout_s
            try:
                # Or whoever sends a byte now and then keeps one of the replica's places for as long as they like.
                async with asyncio.timeout(limit_s):
                    self._body = await self._read()
            except TimeoutError:
                raise Fault(408, f"the body did not come within {limit_s:g} s") from None
        return self._body

    async def _read(self) -> bytes:
        read = bytearray()
        async for chunk in self.stream():
            read += chunk
            self._check(len(read))
        return bytes(read)

    async def json(self) -> Any:
        try:
            found = pydantic_core.from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            # What FastAPI knows as a fault of the client; the text itself is none of the reply's business.
            raise json.JSONDecodeError(str(error), "", 0) from None
        # Before each of them is looked at, which would hold up all other requests.
        for field, value in found.items() if isinstance(found, dict) else ():
            if field in dialects.LISTS and isinstance(value, list) and len(value) > self.settings.max_documents:
                raise Fault(413, f"{field}: {len(value)} are too many; at most {self.settings.max_documents}")
        return found

    def _check(self, size: int) -> None:
        if size > self.settings.max_body_bytes:
            raise Fault(413, f"the body has more than {self.settings.max_body_bytes} bytes")


class _Timed:
    """Around all routes: how each request ended, and after how long."""

    def __init__(self, app: ASGIApp, observed: Observed):
        self._app, self._observed = app, observed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, status = time.monotonic(), CLIENT_LEFT

        async def sent(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, sent)
        finally:
            if scope["type"] == "http":
                path = getattr(scope.get("route"), "path", "other")
                self._observed.request(path, status, time.monotonic() - began)


def api(scorer: Scorer) -> FastAPI:
    """The application of a replica."""
    app = FastAPI(title="disranker", description=__doc__ or "", version="1")
    app.add_middleware(_Timed, observed=scorer.observed)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    app.include_router(_rerank(scorer))
    app.include_router(_events(scorer))
    app.include_router(_judgments(scorer))
    app.include_router(_about(scorer))
    return app


def _rerank(scorer: Scorer) -> APIRouter:
    router = _router(scorer, "rerank")

    async def scored(request: Request, response: Response, pairs: Pairs, model: str | None = None) -> Scored:
        found = await scorer.rerank(_asked(request, pairs, model, scorer.settings))
        response.headers[TRUNCATED] = str(sum(found.truncated))
        return found

    @router.post("/v1/rerank", response_model=None, summary="Jina, Cohere v1, vLLM")
    async def rerank_v1(body: dialects.Rerank, request: Request, response: Response) -> dict[str, Any]:
        return body.reply(await scored(request, response, body.pairs(), body.model), "1")

    @router.post("/v2/rerank", response_model=None, summary="Cohere v2")
    async def rerank_v2(body: dialects.Rerank, request: Request, response: Response) -> dict[str, Any]:
        return body.reply(await scored(request, response, body.pairs(), body.model), "2")

    @router.post("/rerank", response_model=None, summary="text-embeddings-inference")
    async def rerank_tei(body: TeiRerank, request: Request, response: Response) -> list[dict[str, Any]]:
        found = await scored(request, response, body.pairs())
        if body.truncate is False and (warning := dialects.truncation(found)):
            raise Fault(413, f"{warning}, but truncate is false")
        return body.reply(found)

    @router.post("/score", response_model=None, summary="vLLM")
    @router.post("/v1/score", response_model=None, summary="vLLM", include_in_schema=False)
    async def score(body: Score, request: Request, response: Response) -> dict[str, Any]:
        return body.reply(await scored(request, response, body.pairs(), body.model))

    # The right to rerank is enough: a canary gives out a candidate's order too, and to look is not to vote.
    @router.post("/v1/compare", response_model=None, summary="live and its candidate, to be judged")
    async def compare(body: dialects.Group, request: Request) -> dict[str, Any]:
        found = await scorer.compare(_asked(request, body.pairs(), body.model, scorer.settings))
        return found.reply()

    return router


def _events(scorer: Scorer) -> APIRouter:
    router = _router(scorer, "events")

    @router.post("/v1/events", response_model=None, status_code=202, summary="UBI 1.3 events, one or a list")
    async def events(body: Events) -> dict[str, int]:
        given = body if isinstance(body, list) else [body]
        scorer.keep(given)
        return {"accepted": len(given)}

    return router


def _judgments(scorer: Scorer) -> APIRouter:
    router = _router(scorer, "judge")

    @router.post("/v1/judgments", response_model=None, status_code=202, summary="Good, Same or Bad")
    async def judgments(body: Judgment, request: Request) -> dict[str, Any]:
        _check_length(body.query, "query", scorer.settings)
        row = body.row(request.state.caller, time.time())
        scorer.judged(row)
        return {key: row[key] for key in ("id", "left", "verdict")}

    return router


def _about(scorer: Scorer) -> APIRouter:
    router = APIRouter(tags=["operations"])

    @router.get("/", response_class=HTMLResponse, summary="a page to compare and judge")
    async def front() -> HTMLResponse:
        return HTMLResponse(page.html(), headers=page.headers())

    @router.get("/v1/models", response_model=None)
    async def models() -> dict[str, Any]:
        served = {"id": scorer.settings.model, "object": "model", "owned_by": "disranker"}
        return {"object": "list", "data": [served]}

    @router.get("/healthz", response_model=None, summary="the process answers")
    async def healthz() -> dict[str, str]:
        return {"status": "ok", "model": scorer.settings.model}

    @router.get("/readyz", response_model=None, summary="a pair goes through the model")
    async def readyz() -> dict[str, Any]:
        return await scorer.ready()

    return router


def _router(scorer: Scorer, right: Right) -> APIRouter:
    """Routes for those who have the right, that read a body of at most so many bytes."""
    bounded = type("Bounded", (_Body,), {"settings": scorer.settings})

    class Route(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handled(request: Request) -> Response:
                key = _allow(scorer, request, right)  # before a byte of the body is read
                request.state.caller = key.name if key else "anonymous"
                return await handle(bounded(request.scope, request.receive))

            return handled

    # The scheme is for the documentation alone.
    asked = [Security(HTTPBearer(auto_error=False, description="where the endpoint has keys"))]
    return APIRouter(route_class=Route, responses=_RESPONSES, dependencies=asked, tags=[right])


def _allow(scorer: Scorer, request: Request, right: Right) -> Key | None:
    try:
        key = scorer.keys.caller(request.headers.get("authorization"), right)
    except Unauthorised as error:
        raise Fault(401, str(error)) from None
    except Forbidden as error:
        raise Fault(403, str(error)) from None
    if wait_s := scorer.limiter.take(key):
        raise Fault(429, f"the key {key.name if key else ''} has had its requests of this minute", wait_s)
    return key


def _asked(request: Request, pairs: Pairs, model: str | None, settings: Settings) -> Asked:
    if model not in (None, settings.model):
        raise Fault(404, f"no model {model[:64]!r} here; it is {settings.model!r}, or left out")
    _check_length(max(pairs.queries, key=len), pairs.query_field, settings)
    limit_ms = request.headers.get("x-timeout-ms", "")
    timeout_s = min(settings.timeout_s, int(limit_ms[:9]) / 1000 if limit_ms.isdecimal() else 1e9)
    client = request.headers.get("x-client-id", "")[:MAX_CLIENT_CHARS].strip() or None
    return Asked(pairs, timeout_s, _id(request), client)


def _check_length(query: str, field: str, settings: Settings) -> None:
    if len(query) > settings.max_query_chars:
        message = f"{len(query)} characters are too many; at most {settings.max_query_chars}"
        raise RequestValidationError([{"type": "too_long", "loc": ("body", field), "msg": message}])


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    # FastAPI's own reply repeats the input, which may be megabytes and is none of a log's business.
    found = [{key: fault[key] for key in ("type", "loc", "msg")} for fault in error.errors()]
    message = "; ".join(f"{'.'.join(map(str, fault['loc'][1:]))}: {fault['msg']}" for fault in found[:3])
    return JSONResponse(faults.body(422, message, _id(request), found), 422)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    content = faults.body(error.status_code, str(error.detail), _id(request))
    return JSONResponse(content, error.status_code, error.headers)


def _id(request: Request) -> str:
    # Ray Serve's proxy makes one where the client sent none, and gives it back in the same header.
    return dialects.request_id(request.headers.get(REQUEST_ID))


_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": kind} for status, kind in faults.KINDS.items() if status not in (405, 422)
}
