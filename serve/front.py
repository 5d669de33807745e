"""What Ray's proxy calls before it reads a request by itself, where `VARIABLES` say so.

Ray takes `X-Request-Id` as UTF-8, whatever it is, into its logs and the reply: a byte that is none is a 500 of its own.
"""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from serve import dialects

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
    """Gives each request one id that is short and plain, which logs, records and the reply then share."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "headers": plain(scope["headers"])}
        await self._app(scope, receive, send)


def plain(headers: Headers) -> Headers:
    """Without what is Ray's own, and with one id: the client's where it is fit, else a new one."""
    given = [value for name, value in headers if name == REQUEST_ID]
    chosen = dialects.request_id(given[0].decode("latin-1") if len(given) == 1 else None)
    kept = [(name, value) for name, value in headers if name != REQUEST_ID and name.replace(b"-", b"_") not in RAYS_OWN]
    return [*kept, (REQUEST_ID, chosen.encode())]


def middlewares() -> list[Middleware]:
    return [Middleware(Front)]
