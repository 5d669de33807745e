"""Load on a rerank endpoint, as one JSON line: closed, where each client waits for its answer, or open, where requests
come whatever waits.

    python -m bench.load http://127.0.0.1:8000/v1/rerank requests.jsonl --closed 20x4
    python -m bench.load http://127.0.0.1:8000/v1/rerank requests.jsonl --open 5x8.5 --open 200x1.5 --seconds 60

20x4: 20 documents a request, 4 clients, or 4 requests a second. The file has {"query", "documents"} in each line; a
request of another size takes the documents of several. In open load a latency counts from when the request was due,
not from when this process came to send it.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import aiohttp

FIELDS = {"jina": "documents", "tei": "texts"}  # dialect -> where it has the documents
REFUSALS = {429, 503, 504}
MARGIN_S = 0.5  # of an answer after its deadline, for its way
MOST_WAIT_S = 5.0  # before the one retry, whatever Retry-After says


@dataclass
class Stream:
    """Requests of one size, and how they ended. Those that were due in the warm-up do not count."""

    documents: int
    number: float  # of clients, or of requests a second
    closed: bool
    seconds: list[float] = field(default_factory=list)  # of those that were answered
    statuses: Counter[int] = field(default_factory=Counter)  # in the end; 0: no reply at all
    retried: int = 0
    late: int = 0
    done: int = 0  # documents, by when they were answered
    faults: list[str] = field(default_factory=list)

    @classmethod
    def parsed(cls, closed: bool, text: str) -> "Stream":
        documents, number = text.split("x")
        return cls(int(documents), float(number), closed)

    def summary(self, seconds: float) -> dict[str, Any]:
        took = sorted(self.seconds) or [float("nan")]
        ranks = {
            f"p{percent}_ms": round(1e3 * took[min(len(took) - 1, len(took) * percent // 100)], 1)
            for percent in (50, 95, 99)
        }
        lost = sum(count for status, count in self.statuses.items() if status != 200 and status not in REFUSALS)
        return {
            "documents": self.documents,
            ("clients" if self.closed else "rate"): self.number,
            "requests": self.statuses.total(),
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "retried": self.retried,
            "lost": lost,
            "late": self.late,
            "docs_per_s": round(self.done / seconds, 1),
            **ranks,
            "faults": self.faults,
        }


@dataclass(frozen=True)
class Load:
    url: str
    seconds: float
    warmup_s: float
    timeout_s: float  # the deadline that each request asks for
    retry: bool
    headers: dict[str, str]

    async def on(self, streams: Sequence[Stream], bodies: Sequence[Iterator[bytes]]) -> None:
        began = time.perf_counter() + self.warmup_s
        # What waits is the server's to bound, not a pool's.
        connector = aiohttp.TCPConnector(limit=0)
        # A reply that comes far too late is a fault of the server, and must not become one of this client.
        limit = aiohttp.ClientTimeout(total=6 * self.timeout_s + 10)
        async with aiohttp.ClientSession(connector=connector, timeout=limit, headers=self.headers) as session:
            running = []
            for stream, given in zip(streams, bodies, strict=True):
                run, several = (self._client, int(stream.number)) if stream.closed else (self._arrivals, 1)
                running += [run(session, stream, given, began) for _ in range(several)]
            await asyncio.gather(*running)

    async def _client(self, session: Any, stream: Stream, bodies: Iterator[bytes], began: float) -> None:
        while (now := time.perf_counter()) < began + self.seconds:
            await self._send(session, stream, next(bodies), now, began)

    async def _arrivals(self, session: Any, stream: Stream, bodies: Iterator[bytes], began: float) -> None:
        rng, due, sent = random.Random(0), time.perf_counter(), []
        while due < began + self.seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            sent.append(asyncio.create_task(self._send(session, stream, next(bodies), due, began)))
            due += rng.expovariate(stream.number)
        await asyncio.gather(*sent)

    async def _send(self, session: Any, stream: Stream, body: bytes, due: float, began: float) -> None:
        status, wait_s = await self._post(session, stream, body)
        if again := self.retry and status in (0, 429, 503):
            await asyncio.sleep(wait_s)
            status, _ = await self._post(session, stream, body)
        now = time.perf_counter()
        if status == 200 and began <= now < began + self.seconds:
            stream.done += stream.documents
        if due < began:
            return
        stream.statuses[status] += 1
        stream.retried += again
        stream.late += not again and now - due > self.timeout_s + MARGIN_S
        if status == 200:
            stream.seconds.append(now - due)

    async def _post(self, session: Any, stream: Stream, body: bytes) -> tuple[int, float]:
        """Status, and how long to wait before it is tried again."""
        try:
            async with session.post(self.url, data=body) as reply:
                text = await reply.read()
                if reply.status not in {200, *REFUSALS} and len(stream.faults) < 3:
                    stream.faults.append(f"{reply.status} {text[:200]!r}")
                return reply.status, min(MOST_WAIT_S, float(reply.headers.get("Retry-After", 0)))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if len(stream.faults) < 3:
                stream.faults.append(f"{type(error).__name__}: {error}"[:200])
            return 0, 0.5  # a pool may have more connections to what died


def bodies(lines: Sequence[dict[str, Any]], documents: int, dialect: str, model: str) -> list[bytes]:
    """Requests of so many documents, as JSON. Raises `ValueError` where there are not enough for one."""
    found: list[bytes] = []
    texts: list[str] = []
    for line in lines:
        texts += line["documents"]
        while len(texts) >= documents:
            body = {"query": line["query"], FIELDS[dialect]: texts[:documents], "model": model}
            found.append(json.dumps(body).encode())
            texts = texts[documents:]
    if not found:
        raise ValueError(f"{len(texts)} documents in all are too few for a request of {documents}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("requests", type=Path)
    parser.add_argument("--closed", action="append", default=[], metavar="DOCUMENTSxCLIENTS")
    parser.add_argument("--open", action="append", default=[], metavar="DOCUMENTSxRATE")
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--warmup", type=float, default=4)
    parser.add_argument("--timeout", type=float, default=10, help="the deadline that a request asks for; default 10 s")
    parser.add_argument("--retry", action="store_true", help="once, after 429, 503 or a broken connection")
    parser.add_argument("--dialect", choices=FIELDS, default="jina")
    parser.add_argument("--model", default="disranker")
    parser.add_argument("--token")
    parser.add_argument("--start", type=int, default=0, help="with which request of the file")
    given = parser.parse_args(argv)
    streams = [Stream.parsed(True, text) for text in given.closed] + [Stream.parsed(False, text) for text in given.open]
    lines = [json.loads(line) for line in given.requests.read_text().splitlines()]
    start = given.start % len(lines)
    lines = lines[start:] + lines[:start]
    headers = {"Content-Type": "application/json", "X-Timeout-Ms": str(round(1000 * given.timeout))}
    headers |= {"Authorization": f"Bearer {given.token}"} if given.token else {}
    load = Load(given.url, given.seconds, given.warmup, given.timeout, given.retry, headers)
    asked = [cycle(bodies(lines, stream.documents, given.dialect, given.model)) for stream in streams]
    asyncio.run(load.on(streams, asked))
    print(json.dumps({"streams": [stream.summary(given.seconds) for stream in streams]}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
