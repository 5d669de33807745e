"""What stands before Ray's proxy on each node, where `VARIABLES` say so.

Ray takes `X-Request-Id` as UTF-8, whatever it is, into its logs and the reply: a byte that is none is a 500 of its own.
When a replica dies with a request, Ray answers nothing, which the web server makes a 500; and a proxy that has just
started answers 404 until it knows the application. A client may try both again, and is told so.
"""

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve import dialects, faults

# To be set where Ray starts on each node, or in the runtime environment of what starts Serve.
VARIABLES = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.front:middlewares"}
REQUEST_ID = b"x-request-id"
# By which whoever asks would steer Ray itself, such as how long it waits; it takes each with - or _.
RAYS_OWN = {
    b"serve_multiplexed_model_id",
    b"x_session_id",
    b"x_request_timeout_seconds",
    b"x_request_disconnect_disabled",
}
Headers = list[tuple[bytes, bytes]]


class Front:
    """Gives each request one id that is short and plain, and a 503 where no replica answered."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = {**scope, "headers": plain(scope["headers"])}
        answered = False

        async def sent(message: Message) -> None:
            nonlocal answered
            answered = answered or (message["type"] == "http.response.start" and not _nowhere(message))
            if answered:
                await send(message)

        await self._app(scope, receive, sent)
        if not answered:
            content = faults.body(503, "no replica answered; try again", dict(scope["headers"])[REQUEST_ID].decode())
            await JSONResponse(content, 503, {"Retry-After": "1"})(scope, receive, send)


def _nowhere(start: Message) -> bool:
    """Whether this is the 404 of a proxy that knows no application; those of replicas are JSON."""
    return start["status"] == 404 and dict(start["headers"]).get(b"content-type", b"").startswith(b"text/plain")


def plain(headers: Headers) -> Headers:
    """Without what is Ray's own, and with one id: the client's where it is fit, else a new one."""
    given = [value for name, value in headers if name == REQUEST_ID]
    chosen = dialects.request_id(given[0].decode("latin-1") if len(given) == 1 else None)
    kept = [(name, value) for name, value in headers if name != REQUEST_ID and name.replace(b"-", b"_") not in RAYS_OWN]
    return [*kept, (REQUEST_ID, chosen.encode())]


def middlewares() -> list[Middleware]:
    return [Middleware(Front)]
