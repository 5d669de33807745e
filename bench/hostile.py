"""What nobody should send, as bodies and as clients on raw sockets: shared by `bench.fuzz` and the tests."""

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

BODIES = {
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
PATHS = ("/v1/rerank", "/rerank", "/score", "/v1/events", "/v1/compare", "/v1/judgments")  # that read a body
ASK = b'{"query": "red shoe", "documents": ["red shoe", "rain jacket"]}'
SLOW = b'{"query": "r'  # of a body that never ends
BYTE_S = 0.05  # between two bytes of a slow sender


@dataclass(frozen=True)
class Ended:
    """How a connection ended, as its client saw it."""

    statuses: list[int]  # of all answers on it
    hung: bool  # whether it was still open when its time was over
    seconds: float


@dataclass(frozen=True)
class Client:
    """One that speaks on a raw socket. `statuses`: the answers it may get, on a connection that then closes."""

    pieces: tuple[bytes, ...]  # each is sent `BYTE_S` after the one before
    statuses: tuple[tuple[int, ...], ...]
    half_closed: bool = False  # says that nothing more will come
    cut: bool = False  # is gone before the answer


def head(*lines: bytes, path: bytes = b"/v1/rerank", close: bool = True) -> bytes:
    """Of a POST, with what it needs but for a length."""
    given = (b"POST " + path + b" HTTP/1.1", b"host: x", b"content-type: application/json", *lines)
    return b"\r\n".join((*given, *[b"connection: close"] * close)) + b"\r\n\r\n"


def sized(size: int = len(ASK), *lines: bytes, close: bool = True) -> bytes:
    return head(b"content-length: %d" % size, *lines, close=close)


def one_by_one(text: bytes) -> tuple[bytes, ...]:
    return tuple(bytes([byte]) for byte in text)


NOTHING: tuple[int, ...] = ()
CLIENTS = {
    "a body byte by byte that stops": Client((sized(close=False), *one_by_one(SLOW)), ((408,),)),
    "a body that never begins": Client((sized(close=False),), ((408,),)),
    "a length that is too long": Client((sized(len(ASK) + 1, close=False), ASK), ((408,),)),
    "a length that is too short": Client((sized(5, close=False) + ASK,), ((422, 400), (400,))),
    "a length below 0": Client((sized(-1) + ASK,), ((400,),)),
    "a length that is no number": Client((head(b"content-length: many") + ASK,), ((400,),)),
    "two lengths": Client((sized(len(ASK), b"content-length: 3") + ASK,), ((400,),)),
    "a length of a terabyte": Client((sized(10**12) + ASK,), ((413,),)),
    "a length and chunks": Client((sized(len(ASK), b"transfer-encoding: chunked") + ASK,), ((400,),)),
    "chunks that are none": Client((head(b"transfer-encoding: chunked") + b"zz\r\n" + ASK,), ((400,), NOTHING)),
    "a chunk that never ends": Client((head(b"transfer-encoding: chunked", close=False), b"ff\r\n", SLOW), ((408,),)),
    "half closed in its body": Client((sized(), SLOW), (NOTHING, (400,)), half_closed=True),
    "half closed after its body": Client((sized() + ASK,), (NOTHING, (200,)), half_closed=True),
    "10 in one go": Client(((sized(close=False) + ASK) * 9 + sized() + ASK,), ((200,) * 10,)),
    "not HTTP": Client((b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),), ((400,), NOTHING)),
    "cut while it is answered": Client((sized() + ASK,), (NOTHING,), cut=True),
    "cut in its body": Client((sized(), SLOW), (NOTHING,), cut=True),
}
# Of a header that Ray's proxy reads before any of our code but `serve.front`.
VALUES = {
    "no UTF-8": b"\xff\xfe",
    "latin-1": "\u00e9".encode("latin-1"),
    "8000 letters": b"a" * 8000,
    "a tab": b"a\tb",
    "a control character": b"a\x01b",
    "nothing": b"",
    "markup": b"<script>",
}
HEADERS = (b"x-request-id", b"x-session-id", b"serve-multiplexed-model-id", b"x-request-timeout-seconds")
NAMED = {
    f"{header.decode()}: {what}": Client((sized(len(ASK), header + b": " + value) + ASK,), ((200,), (400,)))
    for header in HEADERS
    for what, value in VALUES.items()
}


async def send(host: str, port: int, client: Client, within_s: float) -> Ended:
    """What comes back until the connection closes, or the time is over."""
    began, answered, hung = time.monotonic(), b"", False
    reader, writer = await asyncio.open_connection(host, port)
    with contextlib.suppress(ConnectionError):  # of one that was closed on us: an end, too
        for piece in client.pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(BYTE_S * (len(client.pieces) > 1))
        if client.half_closed:
            writer.write_eof()
        try:
            while not client.cut and (read := await asyncio.wait_for(reader.read(2**16), _left_s(began, within_s))):
                answered += read
        except TimeoutError:
            hung = True
    writer.transport.abort()
    statuses = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answered)]
    return Ended(statuses, hung, time.monotonic() - began)


def _left_s(began: float, within_s: float) -> float:
    return max(0.0, began + within_s - time.monotonic())


@contextlib.asynccontextmanager
async def idle(host: str, port: int, count: int, said: bytes = b"") -> AsyncIterator[list[asyncio.StreamReader]]:
    """Connections on which nothing comes, or the begin of a head."""
    opened: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    try:
        for _ in range(count):
            opened.append(await asyncio.open_connection(host, port))
            opened[-1][1].write(said)
        yield [reader for reader, _ in opened]
    finally:
        for _, writer in opened:
            writer.transport.abort()


async def beside(work: Awaitable[object], ask: Callable[[], Awaitable[int]]) -> list[int]:
    """The statuses that an honest client gets, one request after the other, until the work is done and 5 more."""
    running, statuses, more = asyncio.ensure_future(work), [], 5
    while more:
        statuses.append(await ask())
        more -= running.done()
    await running
    return statuses
