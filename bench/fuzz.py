"""What nobody should send, over Ray Serve and real sockets: no fault of ours, no hang, no memory that grows.

    python -m bench.fuzz                     10,000 requests made from our own /openapi.json, then hostile clients
    python -m bench.fuzz --requests 100000 --seconds 7200

An honest client asks all the while, and each of its answers is compared with its first.
"""

import asyncio
import contextlib
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import psutil

from bench import claims, engine, hostile, runs
from bench.claims import Line

if TYPE_CHECKING:
    from serve.settings import Served, Settings

TIMEOUT_S, MARGIN_S = 5.0, 10.0  # of the endpoint, and how much later an end still is no hang
OURS = {"Unavailable", "Deadline"}  # what a 503 or 504 of ours says
GROWTH, SLACK_MIB = 1.1, 32  # of memory after the warm-up
CHUNK = 100  # requests to one route before the next
MIB = 2**20
ALL = hostile.CLIENTS | hostile.NAMED
PARTS = {"replica": "ServeReplica", "proxy": "ProxyActor"}  # words in the titles of their processes


@dataclass(frozen=True)
class Plan:
    folder: Path
    requests: int = 10_000
    seconds: int = 7_200  # at most, of these
    idle: int = 200  # connections
    rounds: int = 20  # of all hostile clients


SMALL = {"requests": 200, "rounds": 1}


@dataclass
class Tally:
    """How requests ended."""

    statuses: Counter[str] = field(default_factory=Counter)
    faults: int = 0  # answers of 500 and above that are not ours under their own meaning
    hangs: int = 0
    unnamed: int = 0  # statuses that the schema does not name for their route

    def add(self, status: int, content: bytes, named: bool = True) -> None:
        self.statuses[str(status)] += 1
        self.faults += status >= 500 and not any(f'"error_type":"{kind}"'.encode() in content for kind in OURS)
        self.unnamed += not named

    @property
    def count(self) -> int:
        return self.statuses.total() + self.hangs


def measure(plan: Plan) -> Iterator[Line]:
    from serve.settings import Served, Settings

    records = str(plan.folder / "records")
    settings = Settings(max_documents=100, timeout_s=TIMEOUT_S, cache_mib=4, records=records)
    with served(Served(bundle=tiny(plan.folder)), settings) as url:
        fuzz(url, max(CHUNK, plan.requests // 10), plan.seconds, warm := Tally())
        asyncio.run(clients(url, 2, plan.idle))
        before = memory()
        with Honest(url) as honest:
            fuzz(url, plan.requests, plan.seconds, tally := Tally())
            bodies(url, tally)
            ended, held = asyncio.run(clients(url, plan.rounds, plan.idle))
        after = memory()
    wrong = {name for name, each in ended if tuple(each.statuses) not in ALL[name].statuses}
    yield zero("fuzz: faults", tally.faults + warm.faults, requests=tally.count, statuses=dict(tally.statuses))
    yield zero("fuzz: hangs", tally.hangs + warm.hangs, within_s=TIMEOUT_S + MARGIN_S)
    yield zero("fuzz: statuses that the schema does not name", tally.unnamed)
    yield zero("fuzz: hostile clients that hang", sum(each.hung for _, each in ended), connections=len(ended))
    yield zero("fuzz: hostile clients that got another end", len(wrong), which=sorted(wrong))
    # No bar: Ray's proxy has no limit for a head that does not end, so whatever stands before it needs one.
    yield {"claim": "fuzz: connections without a whole head, held as long as they like", "ours": held}
    kinds = dict(+honest.failures)
    yield zero("fuzz: failures of an honest client", sum(kinds.values()), requests=honest.count, kinds=kinds)
    for part, mib in after.items():
        limit = before[part] * GROWTH + SLACK_MIB
        yield claims.within(f"fuzz: memory of the {part}", [mib], limit, "MiB", warm=claims.shown(before[part]))


def zero(claim: str, found: int, **more: Any) -> Line:
    """A claim that something never was."""
    return {"claim": claim, "ours": found, "peer": None, "bar": 0, "passes": found == 0} | more


@contextlib.contextmanager
def served(config: "Served", settings: "Settings") -> Iterator[str]:
    """The URL of an endpoint on a Ray of its own."""
    import ray

    from serve import front
    from serve.app import serve_here

    variables = {"PYTHONPATH": f"{runs.ROOT}:{runs.ROOT / 'platform'}", "HF_HUB_OFFLINE": "1", **front.VARIABLES}
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": variables})
    try:
        yield serve_here(config, settings, port=0)
    finally:
        ray.serve.shutdown()
        ray.shutdown()


def tiny(folder: Path) -> str:
    """A bundle of random weights."""
    from disranker import bundle
    from disranker.store import Store

    (folder / "store").mkdir()
    student = Store(engine.made_up(folder / "store", small=True)).folder("student")
    bundle.write(folder / "bundle", student, name="tiny", report={})
    return str(folder / "bundle")


def fuzz(url: str, requests: int, seconds: float, tally: Tally) -> None:
    """So many requests that our own schema allows or forbids, route by route, again and again."""
    import schemathesis

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations, over = [found.ok() for found in schema.get_all_operations()], time.monotonic() + seconds
    while tally.count < requests and time.monotonic() < over:
        for operation in operations:
            _fuzz(operation, min(CHUNK, requests), tally)


def _fuzz(operation: Any, examples: int, tally: Tally) -> None:
    import requests
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st
    from schemathesis.generation import GenerationMode

    strategy = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in GenerationMode))
    known = {int(status) for status in operation.definition.raw["responses"]} | {405}

    # Nothing is raised, so nothing is made smaller: how often, not why.
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy)
    def one(case: Any) -> None:
        try:
            reply = case.call(timeout=TIMEOUT_S + MARGIN_S)
        except requests.Timeout:
            tally.hangs += 1
        else:
            tally.add(reply.status_code, reply.content, reply.status_code in known)

    one()


def bodies(url: str, tally: Tally) -> None:
    headers = {"content-type": "application/json"}
    with httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_S + MARGIN_S) as client:
        for path in hostile.PATHS:
            for content in hostile.BODIES.values():
                try:
                    reply = client.post(path, content=content)
                    tally.add(reply.status_code, reply.content)
                except httpx.TimeoutException:
                    tally.hangs += 1


async def clients(url: str, rounds: int, idle: int) -> tuple[list[tuple[str, hostile.Ended]], int]:
    """How all hostile clients end, round by round beside idle connections, and how many of these are still open."""
    host, port = str(urlsplit(url).hostname), int(urlsplit(url).port or 80)
    ended: list[tuple[str, hostile.Ended]] = []
    half = hostile.sized()[:20]
    async with hostile.idle(host, port, idle) as silent, hostile.idle(host, port, idle, half) as stopped:
        for _ in range(rounds):
            sent = (hostile.send(host, port, each, TIMEOUT_S + MARGIN_S) for each in ALL.values())
            ended += zip(ALL, await asyncio.gather(*sent), strict=True)
        held = sum(not reader.at_eof() for reader in (*silent, *stopped))
    return ended, held


class Honest(threading.Thread):
    """A client that asks the same again and again while it is open."""

    def __init__(self, url: str):
        super().__init__(daemon=True)
        self.count, self.failures = 0, Counter[str]()
        self._url, self._over = url, threading.Event()

    def __enter__(self) -> "Honest":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        asked, first = {"query": "red shoe", "texts": ["red shoe", "rain jacket", "blue"]}, None
        with httpx.Client(base_url=self._url, timeout=TIMEOUT_S + MARGIN_S) as client:
            while not self._over.wait(0.05):
                self.count += 1
                try:
                    reply = client.post("/rerank", json=asked)
                    reply.raise_for_status()
                    scores = _scores(reply)
                    first = first or scores
                    # Not to the last digit: other requests in a batch change how sums are rounded.
                    off = max(abs(one - other) for one, other in zip(scores, first, strict=True))
                    self.failures["other scores"] += off > 1e-4
                except (httpx.HTTPError, ValueError) as error:
                    self.failures[str(error)[:80]] += 1


def _scores(reply: httpx.Response) -> list[float]:
    """By document."""
    return [each["score"] for each in sorted(reply.json(), key=lambda each: each["index"])]


def memory() -> dict[str, float]:
    """MiB of each part's processes."""
    found = {part: runs.workers([os.getpid()], word) for part, word in PARTS.items()}
    return {part: sum(_resident(each) for each in processes) / MIB for part, processes in found.items()}


def _resident(process: psutil.Process) -> int:
    return int(process.memory_info().rss)


def main(argv: list[str] | None = None) -> int:
    return claims.command("bench.fuzz", Plan, {"fuzz": measure}, SMALL, argv, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
