"""One replica: the student that serves, perhaps a candidate beside it, and the threads that run and feed them."""

import asyncio
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray.serve
import ray.serve.exceptions
from fastapi import FastAPI
from ray.serve.context import _get_global_client

from disranker import cleaning, interleaving
from disranker.recipe import Refused
from serve import judgments, rollout
from serve.access import Keys, Limiter, check_host
from serve.api import api
from serve.batching import Batcher, Full, Late
from serve.dialects import Asked, Pairs, Scored, ranked
from serve.encoding import Encoded
from serve.faults import Fault
from serve.judgments import GIVEN, Comparison, Ranking
from serve.loaded import Loaded
from serve.observe import Observed
from serve.records import Event, Writer, query_record
from serve.rollout import Experiment, Marker, Role, Watch
from serve.settings import Served, Settings

T = TypeVar("T")

PROBE = Pairs(["query"], ["title"], ["summary"], ["probe"], "query")
FIRST_S = -1e9  # a probe passes all requests, or a full queue would look like a broken engine
LAST_S = 1e3  # nobody waits for what is only compared
SPEED = 1e4  # tokens per second, until an engine is measured
LOG = logging.getLogger("ray.serve")


@dataclass
class Trial:
    """A candidate that is tried."""

    experiment: Experiment
    candidate: Loaded
    watch: Watch


class Reranker:
    """What Ray Serve runs. The event loop neither tokenises nor runs a model."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.keys = Keys.load(settings.keys, os.environ)
        self.limiter = Limiter()
        if host := _host():
            check_host(host, self.keys)
        self.observed = Observed()
        ran = partial(self.observed.batch, tokens_per_batch=settings.tokens_per_batch)
        self._batcher = Batcher(settings.tokens_per_batch, settings.max_wait_s, SPEED, ran=ran)
        self._encoding = ThreadPoolExecutor(1, "encoding")
        self._loading = ThreadPoolExecutor(1, "loading")
        self._loaded: list[Loaded] = []  # the last is live; one before it is kept, so that a return takes no time
        self._trial: Trial | None = None
        self._refused: str | None = None  # why the last change was not made
        self._background: set[asyncio.Task[None]] = set()
        self._marker = Marker(Path(settings.state, "out")) if settings.state else None
        names = ("ubi_queries", "ubi_events", judgments.PREFIX)
        self._writers = self._queries, self._events, self._judgments = [self._writer(name) for name in names]

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Asked for by `ray.serve.ingress()` once a replica is made."""
        return api(self)

    # What serves

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Ray Serve calls it at first and with each change. Requests are served all the while, by what was there.

        What cannot be loaded leaves what serves as it is, and `ready` says why: to raise would end this replica, which
        works. Only at first, with nothing that served before, it raises `Refused`.
        """
        self._refused = None
        try:
            served = Served.checked(config)
            live, experiment = await self._load(served.bundle), served.experiment
        except Refused as error:
            self._refuse(error)
            if self._loaded:
                return
            if (last := await self._last()) is None:
                raise
            live, experiment = last, None
        self._loaded = [*(kept for kept in self._loaded if kept is not live), live][-2:]
        self._batcher.tokens_per_s = live.tokens_per_s
        self._remember(live)
        await self._try(experiment)

    async def _load(self, folder: str) -> Loaded:
        """A bundle that is here already, or loaded beside what serves. Raises `Refused`."""
        for kept in self._loaded:
            if kept.folder == folder and kept.unchanged():
                return kept
        return await self._in(self._loading, Loaded.of, folder, self.settings)

    async def _last(self) -> Loaded | None:
        """What served before this replica was made, if that can still be loaded."""
        with suppress(OSError, ValueError, LookupError, Refused):
            return await self._load(json.loads(self._state().read_text())["bundle"])
        return None

    def _remember(self, live: Loaded) -> None:
        if not self.settings.state:
            return
        try:
            self._state().parent.mkdir(parents=True, exist_ok=True)
            unfinished = self._state().with_suffix(f".{os.getpid()}")
            unfinished.write_text(json.dumps({"bundle": live.folder}))
            unfinished.replace(self._state())
        except OSError as error:  # no reason not to serve
            LOG.error("what serves is not written down: %s", error)

    def _state(self) -> Path:
        return Path(self.settings.state or os.devnull, "serving.json")

    async def _try(self, experiment: Experiment | None) -> None:
        """Puts the candidate of an experiment beside what serves, unless it was taken out before."""
        if experiment is None:
            self._trial = None
            return
        if self._trial and self._trial.experiment == experiment and self._trial.candidate.unchanged():
            return
        try:
            candidate = await self._load(experiment.bundle)
        except Refused as error:
            self._trial = None
            self._refuse(error)
            return
        self._trial = Trial(experiment, candidate, Watch(experiment))
        self._look()

    def _look(self) -> None:
        """Takes the candidate out if a bar was missed here, or by another replica."""
        if not (trial := self._trial):
            return
        names = trial.experiment.name, trial.candidate.digest
        reason = (self._marker and self._marker.out(*names)) or trial.watch.verdict()
        if reason is None:
            return
        self._trial = None
        self._refuse(Refused(f"experiment {names[0]}: the candidate is out: {reason}"))
        if self._marker:
            with suppress(OSError):
                self._marker.take_out(*names, reason)

    def _refuse(self, error: Exception) -> None:
        self._refused = str(error)
        LOG.error("serving goes on as before: %s", error)

    # Requests

    async def rerank(self, asked: Asked) -> Scored:
        """A raw logit for each pair. Raises `Fault` if there is none in time, or too much waits."""
        live, trial = self._live(), self._trial if asked.pairs.ids else None
        role: Role = rollout.assign(trial.experiment, asked.client, asked.request_id) if trial else "live"
        if trial and role == "candidate" and trial.watch.unproven():
            role = "shadow"  # no user has the answers of a canary before it has shown that it is not plainly worse
        with _told(asked):
            scored = await self._answered(asked, live, trial, role)
        self._record(asked, scored, trial, role)
        return scored

    async def compare(self, asked: Asked) -> Comparison:
        """The candidate against live, or live against the order in which documents were given. `Fault` as `rerank`.

        Counts neither for the experiment nor in the records of queries: who judges does not search.
        """
        live, trial = self._live(), self._trial
        with _told(asked):
            if trial is None:
                scored = await self._scores(asked, live, "live", 0)
                given = Ranking("given", GIVEN, list(range(len(scored.logits))))
                return Comparison(given, Ranking.by("live", live.digest, scored), scored)
            scored, tried = await asyncio.gather(
                self._scores(asked, live, "live", 0), self._scores(asked, trial.candidate, "candidate", 0)
            )
        old = Ranking.by("live", live.digest, scored)
        return Comparison(old, Ranking.by("candidate", trial.candidate.digest, tried), scored)

    async def _answered(self, asked: Asked, live: Loaded, trial: Trial | None, role: Role) -> Scored:
        if trial is None or role in ("live", "shadow"):
            found = await self._watched(asked, live, trial, "live")
            if trial and role == "shadow":
                self._later(self._compare(asked, trial, live=found.logits))
            return found
        try:
            if role == "interleave":
                candidate = self._watched(asked, trial.candidate, trial, role)
                both = await asyncio.gather(candidate, self._watched(asked, live, trial, "live"))
                return _interleaved(*both, asked.request_id)
            found = await self._watched(asked, trial.candidate, trial, "candidate")
        except (Full, Late):
            raise
        except Exception:  # of the candidate, which users must not feel
            LOG.exception("experiment %s: the candidate fails, live answers", trial.experiment.name)
            self._look()
            return await self._watched(asked, live, trial, "live")
        if rollout.watched(trial.experiment, asked.request_id):
            self._later(self._compare(asked, trial, candidate=found.logits))
        return found

    async def _watched(
        self, asked: Asked, student: Loaded, trial: Trial | None, role: Role, later_s: float = 0
    ) -> Scored:
        """Scores of a student; while a candidate is tried, with a note of how it did.

        What counts is the time of the engine: both students wait in one queue, some of it on purpose.
        """
        try:
            found = await self._scores(asked, student, role, later_s)
        except (Full, Late, asyncio.CancelledError):
            raise  # says nothing of the student
        except Exception:
            if trial:
                trial.watch.seen(role, False, 0.0)
            raise
        if trial:
            trial.watch.seen(role, True, found.seconds)
        return found

    async def _scores(self, asked: Asked, student: Loaded, role: Role, later_s: float) -> Scored:
        began = time.monotonic()
        self._batcher.admit(asked.timeout_s)  # before the work of tokenising, and after it, when others came
        encoded = await self._encoded(student, asked.pairs)
        encoding_s = time.monotonic() - began
        left_s = asked.timeout_s - encoding_s
        self._batcher.admit(left_s)
        done = await asyncio.wrap_future(self._batcher.submit(student.engine.logits, encoded.prompts, left_s, later_s))
        if not all(map(math.isfinite, done.logits)):
            raise ArithmeticError("the model gave a score that is no number")
        tokens = sum(len(ids) for ids, _ in encoded.prompts)
        self.observed.scored(role, tokens, encoded.truncated, encoding_s, done.seconds)
        self.observed.waited(time.monotonic() - began - encoding_s - done.seconds)
        return Scored(done.logits, done.seconds, tokens, encoded.truncated, self.settings.model, asked.request_id)

    async def _compare(self, asked: Asked, trial: Trial, **given: list[float]) -> None:
        """Scores by the student that did not answer, and what changed between both."""
        missing: Role = "candidate" if "live" in given else "live"
        student = trial.candidate if missing == "candidate" else self._live()
        try:
            given[missing] = (await self._watched(asked, student, trial, missing, LAST_S)).logits
            found = rollout.difference(given["live"], given["candidate"])
            trial.watch.compared(found.tau, found.top_changed, found.shift)
        except (Full, Late):
            pass  # nobody waited for it
        except Exception:
            LOG.exception("experiment %s: no comparison", trial.experiment.name)
        self._look()

    def _later(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)  # or it could be collected before it is done
        task.add_done_callback(self._background.discard)

    # Records

    def _record(self, asked: Asked, scored: Scored, trial: Trial | None, role: Role) -> None:
        if not (self._queries and asked.pairs.ids and cleaning.normalise(asked.pairs.queries[0])):
            return  # a query of nothing but blanks, of whatever kind, is none for ingest either
        attributes = {"experiment": trial.experiment.name if trial else "", "arm": role, "bundle": self._live().digest}
        record = query_record(
            query_id=asked.request_id,
            client=asked.client or "anonymous",
            query=asked.pairs.queries[0],
            hits=[asked.pairs.ids[place] for place in scored.ranked()],
            time=time.time(),
            application=self.settings.application,
            attributes=attributes,
            teams=scored.teams,
        )
        self._queries.write(record)

    def keep(self, events: list[Event]) -> None:
        """Writes what clients saw done with answers. Raises `Fault` where no records are kept."""
        if not self._events:
            raise Fault(404, "no events are kept here: the setting records is empty")
        for event in events:
            self._events.write(event.record())

    def judged(self, row: dict[str, Any]) -> None:
        """Writes a judgment. Raises `Fault` where no records are kept, or where it finds no room."""
        if not (writer := self._judgments):
            raise Fault(404, "no judgments are kept here: the setting records is empty")
        lost = writer.dropped
        writer.write(row)
        if writer.dropped > lost:  # who judged can press again, other than a click
            raise Fault(503, "the disk does not keep up", 1.0)

    def _writer(self, prefix: str) -> Writer | None:
        cfg = self.settings
        return Writer(cfg.records, prefix, cfg.record_bytes, cfg.record_age_s) if cfg.records else None

    # Health

    async def check_health(self) -> None:
        """Ray Serve asks for it, and replaces a replica for which it raises. Raises `Fault` while nothing serves."""
        self._look()
        self._observe()
        live = self._live()
        encoded = await self._encoded(live, PROBE)
        answer = self._batcher.submit(live.engine.logits, encoded.prompts, self.settings.timeout_s, FIRST_S)
        await asyncio.wait_for(asyncio.wrap_future(answer), self.settings.timeout_s)

    def _observe(self) -> None:
        lost = sum(writer.dropped + writer.errors for writer in self._writers if writer)
        self.observed.state(self._batcher.depth(), lost, self._trial.watch.summary() if self._trial else None)

    async def ready(self) -> dict[str, Any]:
        """What serves, after a pair went all the way through it. Raises `Fault` where it does not."""
        try:
            await self.check_health()
        except Fault:
            raise  # which says what is missing
        except Exception as error:
            raise Fault(503, f"the model does not answer: {type(error).__name__}", 1.0) from error
        found = {"status": "ok", "model": self.settings.model, "bundle": self._live().digest}
        if self._trial:
            found["experiment"] = {"name": self._trial.experiment.name, **self._trial.watch.summary()}
        return found | ({"refused": self._refused} if self._refused else {})

    def close(self) -> None:
        """Fails what waits, and ends the threads."""
        self._batcher.close()
        self._encoding.shutdown()
        self._loading.shutdown()
        for writer in self._writers:
            if writer:
                writer.close()

    def __del__(self) -> None:
        """Ray Serve calls it when a replica ends in peace; a file of records so gets its name."""
        with suppress(AttributeError):  # of a replica that was refused before it was made
            self.close()

    def _live(self) -> Loaded:
        if not self._loaded:
            raise Fault(503, "no bundle is loaded yet", 1.0)
        return self._loaded[-1]

    async def _encoded(self, student: Loaded, pairs: Pairs) -> Encoded:
        return await self._in(self._encoding, student.encoder.prompts, pairs.queries, pairs.titles, pairs.summaries)

    async def _in(self, thread: ThreadPoolExecutor, work: Callable[..., T], *given: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(thread, work, *given)


@contextmanager
def _told(asked: Asked) -> Iterator[None]:
    """What goes wrong with an answer, as a client is told."""
    try:
        yield
    except Full as full:
        raise Fault(429, str(full), full.after_s) from None
    except Late:
        raise Fault(504, f"no answer within {asked.timeout_s:g} s") from None
    except Exception as error:  # of the model, and nothing that the client sent
        LOG.exception("no scores for request %s", asked.request_id)
        raise Fault(503, "the model failed", 1.0) from error


def _interleaved(candidate: Scored, live: Scored, request_id: str) -> Scored:
    """Both rankings in one, by team draft. Its scores are those of live in the new order: clients sort by them."""
    order, teams = interleaving.team_draft(ranked(live.logits), ranked(candidate.logits), request_id)
    logits = list(live.logits)
    for place, logit in zip(order, sorted(live.logits, reverse=True), strict=True):
        logits[place] = logit
    return replace(live, logits=logits, order=order, teams=teams)


def _host() -> str | None:
    """The address that Serve listens on, as a replica knows it; None outside of Serve."""
    try:
        ray.serve.get_replica_context()
    except ray.serve.exceptions.RayServeException:
        return None
    return str(_get_global_client().http_config.host)
