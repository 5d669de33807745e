"""Pairs of all waiting requests, in batches of a bounded cost, on the one thread that runs the engine.

A request is due at its arrival plus `PATIENCE` times the time its own pairs take: a small one passes a large one, but
not for ever, since the large one came first. Each time the engine is free, a batch is cut from whatever waits then: a
small request with others that it does not have to wait for, one of some size by itself, and of a large one a piece, so
that small ones go between.
"""

import threading
import time
from bisect import insort
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from disranker.engine import Prompt

Forward = Callable[[Sequence[Prompt]], list[float]]  # a raw logit for each


class Done(NamedTuple):
    """All pairs of a request."""

    logits: list[float]
    seconds: float  # of the engine, of batches with others its share by tokens


Answer = Future[Done]
Clock = Callable[[], float]

PATIENCE = 4.0
WHOLE = 2  # batches: a request of no more runs in one forward pass, which is faster than two
PIECES = 2  # of a batch, for what is larger: who comes meanwhile waits for one of them
PADDED = 1.2  # as many times the tokens may requests have together as they have each alone
SMOOTHING = 0.1  # weight of the last batch in the speed that is expected of the next


class Full(Exception):
    """More waits than could be done in time; `after_s` says when to come again."""

    def __init__(self, after_s: float):
        super().__init__(f"the queue is full; try again in {after_s:.1f} s")
        self.after_s = after_s


class Late(Exception):
    """The deadline passed before all pairs had a score."""


@dataclass(eq=False)
class _Work:
    """The pairs of one request for one model, and how far they are."""

    forward: Forward
    prompts: Sequence[Prompt]
    deadline: float  # on the batcher's clock
    due: float
    scores: list[float]
    left: list[int]  # rows without a score that no batch has, longest last
    answer: Answer = field(default_factory=Future)
    seconds: float = 0.0

    def length(self, row: int) -> int:
        return len(self.prompts[row][0])

    def area(self) -> int:
        """Tokens of the rows that are left, as one batch."""
        return len(self.left) * self.length(self.left[-1])


class Batcher:
    """Takes requests from any thread, each of at least one pair; ends with `close()`."""

    def __init__(
        self,
        tokens_per_batch: int,
        max_wait_s: float,
        tokens_per_s: float,
        clock: Clock = time.monotonic,
        ran: Callable[[list[int]], None] = lambda lengths: None,
    ):
        """`tokens_per_batch`: of requests that go together, padding included.

        `max_wait_s`: a request is refused if what waits already would take longer. `tokens_per_s`: a first guess of
        the engine's speed; each batch corrects it. `ran` is told the lengths of the pairs of each.
        """
        self.tokens_per_s = tokens_per_s
        self._tokens_per_batch = tokens_per_batch
        self._max_wait_s = max_wait_s
        self._clock = clock
        self._ran = ran
        self._waiting: list[_Work] = []  # by due
        self._tokens = 0  # that wait
        self._closed = False
        self._some = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def admit(self, timeout_s: float) -> None:
        """Raises `Full` where so much waits that an answer would take longer than this, or than `max_wait_s`."""
        if (wait := self._tokens / self.tokens_per_s) > min(self._max_wait_s, timeout_s):
            raise Full(wait)

    def submit(self, forward: Forward, prompts: Sequence[Prompt], timeout_s: float, later_s: float = 0.0) -> Answer:
        """`Done`, logits in the order of the prompts; or `Late`; or what `forward` raises. To cancel takes them out.

        `later_s`: by how much others may pass; negative for what passes them.
        """
        now, tokens = self._clock(), sum(len(ids) for ids, _ in prompts)
        longest_last = sorted(range(len(prompts)), key=lambda row: len(prompts[row][0]))
        with self._some:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            due = now + later_s + PATIENCE * tokens / self.tokens_per_s
            work = _Work(forward, prompts, now + timeout_s, due, [0.0] * len(prompts), longest_last)
            insort(self._waiting, work, key=lambda each: each.due)
            self._tokens += tokens
            self._some.notify()
        return work.answer

    def depth(self) -> tuple[int, int]:
        """(requests, tokens) that wait."""
        return len(self._waiting), self._tokens

    def close(self) -> None:
        """Fails what waits and ends the thread, after the batch that runs."""
        with self._some:
            self._closed = True
            for work in list(self._waiting):
                self._fail(work, RuntimeError("the batcher is closed"))
            self._some.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._some:
                while not (batch := self._next()) and not self._closed:
                    self._some.wait()
                if not batch:
                    return
            self._score(batch)

    def _next(self) -> list[tuple[_Work, int]]:
        """Rows of one batch: what is due first, with others that end with it; or a piece of it, its longest rows."""
        now = self._clock()
        for work in list(self._waiting):
            if work.answer.cancelled():
                self._take(work, 0, len(work.left))
            elif work.deadline <= now:
                self._fail(work, Late())
        if not self._waiting:
            return []
        first = self._waiting[0]
        longest = first.length(first.left[-1])
        if first.area() > WHOLE * self._tokens_per_batch:
            fitting = max(1, self._tokens_per_batch // PIECES // longest)
            return [(first, row) for row in self._take(first, len(first.left) - fitting, len(first.left))]
        together, rows, apart = [first], len(first.left), first.area()
        for work in [each for each in self._waiting[1:] if each.forward == first.forward]:
            longer, more = max(longest, work.length(work.left[-1])), len(work.left)
            if longer * (rows + more) <= min(self._tokens_per_batch, PADDED * (apart + work.area())):
                longest, rows, apart = longer, rows + more, apart + work.area()
                together.append(work)
        return [(work, row) for work in together for row in self._take(work, 0, len(work.left))]

    def _take(self, work: _Work, start: int, end: int) -> list[int]:
        rows = work.left[start:end]
        del work.left[start:end]
        self._tokens -= sum(map(work.length, rows))
        if not work.left:
            self._waiting.remove(work)
        return rows

    def _fail(self, work: _Work, error: Exception) -> None:
        if work.left:
            self._take(work, 0, len(work.left))
        if work.answer.set_running_or_notify_cancel():
            work.answer.set_exception(error)

    def _score(self, batch: list[tuple[_Work, int]]) -> None:
        prompts = [work.prompts[row] for work, row in batch]
        works = {id(work): work for work, _ in batch}.values()
        began = time.perf_counter()
        try:
            logits = batch[0][0].forward(prompts)
        except Exception as error:  # of the model: each request is told, and the next may do better
            with self._some:
                for work in works:
                    self._fail(work, error)
            return
        took, tokens = max(time.perf_counter() - began, 1e-9), sum(len(ids) for ids, _ in prompts)
        self._ran([len(ids) for ids, _ in prompts])
        with self._some:
            self.tokens_per_s += SMOOTHING * (tokens / took - self.tokens_per_s)
            for (work, row), logit in zip(batch, logits, strict=True):
                work.scores[row] = logit
                work.seconds += took * work.length(row) / tokens
            for work in works:
                if not work.left and work.answer.set_running_or_notify_cancel():
                    work.answer.set_result(Done(work.scores, work.seconds))
