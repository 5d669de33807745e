"""What a client is told when it does not get an answer: typed, short, and without a word of what it sent.

The body suits each client: `message` is Cohere's, `detail` Jina's, `error` and `error_type` TEI's.
"""

import math
from typing import Any

from fastapi import HTTPException

KINDS = {
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    405: "MethodNotAllowed",
    408: "TooSlow",
    413: "TooLarge",
    422: "Validation",
    429: "Overloaded",
    503: "Unavailable",
    504: "Deadline",
}

# After a 408 whatever else comes on the connection is the rest of a body that nobody waits for.
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 408: {"Connection": "close"}}


class Fault(HTTPException):
    """An answer that is none."""

    def __init__(self, status: int, message: str, retry_after_s: float | None = None):
        headers = dict(HEADERS.get(status, {}))
        if retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
        super().__init__(status, message, headers)


def body(status: int, message: str, request_id: str, detail: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """The JSON of a reply that refuses."""
    return {
        "message": message,
        "detail": message if detail is None else detail,
        "error": message,
        "error_type": KINDS.get(status, "Error"),
        "request_id": request_id,
    }
