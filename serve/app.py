"""The endpoint: POST /v1/rerank, in the form that Jina's and Cohere's clients share, and GET /healthz."""

import asyncio
import math
import socket
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Self

import pydantic
import ray.serve
from annotated_types import Gt
from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from disranker import bundle
from disranker.engine import Engine
from disranker.recipe import Refused

Count = Annotated[int, Gt(0)]


class Settings(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")  # not strict: `serve run` passes numbers as text

    bundle: str  # a folder that every replica can read
    model: str = "disranker"  # the name that requests may give and replies carry
    threads: Count | None = None  # of torch; None: what Ray Serve sets, the replica's num_cpus
    tokens_per_batch: Count = 4096
    max_documents: Count = 1000  # in one request
    max_query_chars: Count = 4096


class Document(pydantic.BaseModel):
    """A string or {"text"}, or {"title", "summary"}; other keys only come back with `return_documents`.

    A text takes the place of the summary, since a title has a small limit of its own.
    """

    model_config = pydantic.ConfigDict(extra="allow")

    text: str | None = None
    title: str | None = None
    summary: str | None = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _named(cls, document: Any) -> Any:
        return {"text": document} if isinstance(document, str) else document

    @pydantic.model_validator(mode="after")
    def _one_meaning(self) -> Self:
        if self.text is None and self.title is None and self.summary is None:
            raise ValueError("a document is a string, or an object with text, or with title and summary")
        if self.text is not None and self.summary is not None:
            raise ValueError("text takes the place of summary: give one of them")
        return self


class Request(pydantic.BaseModel):
    """Keys that only other services know are ignored."""

    query: Annotated[str, pydantic.StringConstraints(strip_whitespace=True, min_length=1)]
    documents: Annotated[list[Document], pydantic.Field(min_length=1, fail_fast=True)]
    top_n: Annotated[int | None, pydantic.Field(ge=1, strict=True)] = None  # None: all
    return_documents: bool | None = None
    model: str | None = None


class Reranker:
    """One replica: an engine, and the one thread that runs it, since a forward pass would block the event loop."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self._engine = Engine.from_bundle(settings.bundle, settings.threads, settings.tokens_per_batch, "torch")
        self._thread = ThreadPoolExecutor(max_workers=1)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Asked for by `ray.serve.ingress()` once a replica is made."""
        return api(self)

    async def rerank(self, request: Request) -> dict[str, Any]:
        """The reply to a checked request; equal scores keep the order of the documents."""
        logits, tokens = await self._logits(request.query, request.documents)
        ranked = sorted(range(len(logits)), key=lambda index: -logits[index])[: request.top_n]
        results: list[dict[str, Any]] = [{"index": i, "relevance_score": _sigmoid(logits[i])} for i in ranked]
        if request.return_documents:
            for result in results:
                result["document"] = request.documents[result["index"]].model_dump(exclude_unset=True)
        return {
            "id": str(uuid.uuid4()),
            "model": self.settings.model,
            "results": results,
            "usage": {"total_tokens": tokens},
            "meta": {"api_version": {"version": "1"}},
        }

    async def healthz(self) -> dict[str, str]:
        """Says ok once a pair went all the way through the model, behind the requests that wait."""
        await self._logits("query", [Document(title="title", summary="summary")])
        return {"status": "ok", "model": self.settings.model}

    async def _logits(self, query: str, documents: Sequence[Document]) -> tuple[list[float], int]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._score, query, documents)

    def _score(self, query: str, documents: Sequence[Document]) -> tuple[list[float], int]:
        """A raw logit for each document, and the number of tokens of all pairs."""
        titles = [document.title or "" for document in documents]
        summaries = [document.text or document.summary or "" for document in documents]
        prompts = self._engine.tokens.prompts([query] * len(documents), titles, summaries)
        return self._engine.logits(prompts), sum(len(ids) for ids, _ in prompts)


def api(reranker: Reranker) -> FastAPI:
    """The routes of a replica."""
    app = FastAPI(title="disranker")

    @app.exception_handler(RequestValidationError)
    async def refuse(_: Any, error: RequestValidationError) -> JSONResponse:
        # FastAPI's own reply repeats the input, which may be megabytes and is none of a log's business.
        faults = [{key: fault[key] for key in ("type", "loc", "msg")} for fault in error.errors()]
        return JSONResponse({"detail": faults}, status_code=422)

    @app.post("/v1/rerank", response_model=None)
    async def rerank(request: Request) -> dict[str, Any]:
        _check(request, reranker.settings)
        return await reranker.rerank(request)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return await reranker.healthz()

    return app


def build(args: dict[str, Any]) -> ray.serve.Application:
    """What `serve run serve.app:build bundle=...` and config.yaml run. Raises `Refused` for wrong settings."""
    try:
        settings = Settings.model_validate(args)
    except pydantic.ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise Refused(f"serve: {faults}; the settings are {', '.join(Settings.model_fields)}") from error
    # Ray's own 5 requests at a time would starve a replica, and its endless queue would hide that it is overloaded.
    deploy = ray.serve.deployment(max_ongoing_requests=64, max_queued_requests=256)
    return deploy(ray.serve.ingress()(Reranker)).bind(settings)


def serve_here(settings: Settings, host: str = "127.0.0.1", port: int = 8000) -> str:
    """The URL of the endpoint, started on the Ray this process is connected to; `ray.serve.shutdown()` ends it.

    Port 0 takes a free one. Raises `Refused` for a broken bundle, `RuntimeError` if Serve already listens elsewhere.
    """
    bundle.verify(settings.bundle)
    port = port or _free_port(host)
    ray.serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
    try:
        socket.create_connection((host, port), timeout=10).close()
    except OSError as error:
        # A Serve that runs keeps its address, and `start` only warns.
        raise RuntimeError(f"Serve was already up on this Ray and does not listen on {host}:{port}") from error
    ray.serve.run(build(settings.model_dump()), name="disranker", route_prefix="/")
    return f"http://{host}:{port}"


def _check(request: Request, settings: Settings) -> None:
    if request.model not in (None, settings.model):
        raise HTTPException(404, f"no model {request.model!r} here; it is {settings.model!r}, or left out")
    for field, size, limit in (
        ("documents", len(request.documents), settings.max_documents),
        ("query", len(request.query), settings.max_query_chars),
    ):
        if size > limit:
            fault = {"type": "too_long", "loc": ("body", field), "msg": f"{size} is too long; at most {limit}"}
            raise RequestValidationError([fault])


def _sigmoid(logit: float) -> float:
    """Without overflow at either end."""
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
