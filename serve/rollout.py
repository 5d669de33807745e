"""A new student (the candidate) beside the one that serves (live): who gets it, how it does, when it is out."""

import json
import math
import re
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pydantic
from annotated_types import Ge, Gt, Le
from scipy import special, stats  # takes a second, for which no request should wait

from disranker import sampling
from disranker.inputs import Positive, Settings, Share

Role = Literal["live", "shadow", "candidate", "interleave"]
Seen = tuple[bool, float]  # whether a student answered a request, and after how many seconds
Part = Annotated[float, Gt(0), Le(1)]

NAME = "[A-Za-z0-9._-]{1,64}"  # of an experiment or a digest, in logs and names of files
ARM, WATCHED = 0, 1  # seeds of two draws that must not agree
WINDOW = 1000  # requests
# Each request is a chance for bad luck: of candidates just at the bar for errors, 2% are out within 5000 (18% at 0.01).
CHANCE = 0.001


class Experiment(Settings):
    """One candidate and how it is tried. A bar (max, min) counts as missed only if `CHANCE` would not do it."""

    name: Annotated[str, pydantic.StringConstraints(pattern=f"^{NAME}$")]  # another name draws other clients
    kind: Literal["shadow", "canary", "interleave"]
    bundle: str  # folder of the candidate
    share: Part  # of clients, or in a shadow of requests
    watched: Part = 0.2  # of a canary's requests, once it answers: live scores them too, to compare
    max_error_rate: Share = 0.02
    max_latency_ratio: Positive = 2.0  # of the candidate's p95 to live's
    min_tau: Annotated[float, Ge(-1), Le(1)] = 0.5  # mean over requests that both scored
    min_requests: Annotated[int, Ge(2), Le(WINDOW)] = 50  # no bar is judged on fewer


@dataclass(frozen=True)
class Difference:
    """Between two students on the documents of one request."""

    tau: float | None  # Kendall's, tau-b
    top_changed: bool
    shift: float  # mean absolute difference of the scores, which are sigmoids of the logits


def assign(experiment: Experiment, client: str | None, request_id: str) -> Role:
    """Who answers: drawn by client, who keeps the candidate as the share grows; without one, or in a shadow, by id."""
    who = request_id if experiment.kind == "shadow" else client or request_id
    if sampling.uniform(f"{experiment.name} {who}", ARM) >= experiment.share:
        return "live"
    return "candidate" if experiment.kind == "canary" else experiment.kind


def watched(experiment: Experiment, request_id: str) -> bool:
    """Whether live scores too what a canary answers."""
    return sampling.uniform(f"{experiment.name} {request_id}", WATCHED) < experiment.watched


def difference(live: Sequence[float], candidate: Sequence[float]) -> Difference:
    """What changed, from both logits of each document; equal ones keep the order of the documents, as in a reply.

    Tau is None where live's are all equal, which is no order, and 0 where only the candidate's are: a student that
    tells no documents apart must not go unjudged. Raises `ValueError` unless both lists are as long, and all finite.
    """
    old, new = np.asarray(live, dtype=float), np.asarray(candidate, dtype=float)
    if old.shape != new.shape or not old.size or not np.isfinite([old, new]).all():
        raise ValueError(f"{old.size} logits of live, {new.size} of the candidate: needs one each, and finite")
    tau = None if np.ptp(old) == 0 else 0.0 if np.ptp(new) == 0 else float(stats.kendalltau(old, new).statistic)
    shift = float(np.abs(special.expit(old) - special.expit(new)).mean())
    return Difference(tau, bool(old.argmax() != new.argmax()), shift)


class Watch:
    """What one replica saw lately of live and candidate; for one thread, such as that of an event loop."""

    def __init__(self, experiment: Experiment):
        self._bars = experiment
        # Each of the candidate with the last of live before it: a window of live's own would be of fewer minutes, and
        # have forgotten an outage of both that the candidate's still remembers.
        self._seen: deque[tuple[Seen, Seen | None]] = deque(maxlen=WINDOW)
        self._live: Seen | None = None
        self._compared: deque[tuple[float, bool, float]] = deque(maxlen=WINDOW)
        self._reason: str | None = None

    def seen(self, role: Role, ok: bool, seconds: float) -> None:
        """One request. `role`: live for what live did, any other for what the candidate did."""
        if role == "live":
            self._live = ok, seconds
        else:
            self._seen.append(((ok, seconds), self._live))
            self._live = None

    def compared(self, tau: float | None, top_changed: bool, shift: float) -> None:
        """One `difference`; without a tau it does not count."""
        if tau is not None:
            self._compared.append((tau, top_changed, shift))

    def unproven(self) -> bool:
        """Whether too few requests were compared to judge the order, or it looks below the bar, by chance or not."""
        taus = [tau for tau, *_ in self._compared]
        return len(taus) < self._bars.min_requests or float(np.mean(taus)) < self._bars.min_tau

    def verdict(self) -> str | None:
        """The first bar that was missed, and by how much; None as long as there is none."""
        self._reason = self._reason or self._errors() or self._order() or self._latency()
        return self._reason

    def summary(self) -> dict[str, float | None]:
        """For a log: counts, p95 of the answers, means of the differences; None for what nothing tells yet."""
        means = np.mean(self._compared, axis=0).tolist() if self._compared else [None] * 3
        found = dict(zip(("tau", "top_changed", "shift"), means, strict=True)) | {"compared": len(self._compared)}
        for who, window in zip(("candidate", "live"), self._windows(), strict=True):
            times = _times(window)
            found |= {f"{who}_requests": len(window), f"{who}_errors": len(window) - len(times)}
            found[f"{who}_p95_s"] = times[-_rank(times)] if times else None
        return found

    def _errors(self) -> str | None:
        """Whether the error rate's lower bound (Clopper and Pearson 1934) is above the bar."""
        (errors, requests), (of_live, lives) = ((len(w) - len(_times(w)), len(w)) for w in self._windows())
        if of_live > (bar := self._bars.max_error_rate) * lives:  # then what live's own rate may be: its upper bound
            bar = special.bdtri(of_live, lives, CHANCE) if of_live < lives else 1.0
        # The lower bound is above a rate just if so many errors are too unlikely at that rate.
        if requests < self._bars.min_requests or special.bdtrc(errors - 1, requests, bar) >= CHANCE:
            return None
        return f"error rate {errors / requests:.3g} of {requests} requests, at most {bar:.3g}"

    def _order(self) -> str | None:
        """Whether the upper bound (Student's t) of the mean tau is below the bar."""
        taus, bar = [tau for tau, *_ in self._compared], self._bars.min_tau
        if len(taus) < self._bars.min_requests:
            return None
        mean, error = np.mean(taus), np.std(taus, ddof=1) / math.sqrt(len(taus))
        if mean + special.stdtrit(len(taus) - 1, 1 - CHANCE) * error >= bar:
            return None
        return f"mean Kendall tau {mean:.3g} of {len(taus)} compared requests, at least {bar:.3g}"

    def _latency(self) -> str | None:
        """Whether too many answers take longer than live's p95 allows, which need not be known exactly for that.

        If the candidate just takes `ratio` times as long, then of its m answers the count beyond `ratio` times the r-th
        longest of live's n is beta-binomial (m, r, n - r + 1), whatever the times (Gumbel and von Schelling 1950).
        """
        times, live = map(_times, self._windows())
        rank, ratio = _rank(live), self._bars.max_latency_ratio
        if min(len(times), len(live)) < self._bars.min_requests:
            return None
        beyond = sum(each > ratio * live[-rank] for each in times)
        if stats.betabinom.sf(beyond - 1, len(times), rank, len(live) - rank + 1) >= CHANCE:
            return None
        p95 = times[-_rank(times)]
        return f"p95 {p95:.3g} s of {len(times)} requests, at most {ratio:.3g} times live's {live[-rank]:.3g} s"

    def _windows(self) -> tuple[list[Seen], list[Seen]]:
        return [candidate for candidate, _ in self._seen], [live for _, live in self._seen if live]


class Marker:
    """Which candidates are out: a file for each, in a folder that all replicas share and that outlives them."""

    def __init__(self, folder: str | Path):
        self._folder = Path(folder)

    def take_out(self, name: str, digest: str, reason: str) -> None:
        """Marks the candidate of an experiment for good; its file is whole or not there. Raises `OSError`."""
        path = self._path(name, digest)
        self._folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
        part.write_text(json.dumps({"name": name, "digest": digest, "reason": reason}))
        part.replace(path)

    def out(self, name: str, digest: str) -> str | None:
        """Why the candidate is out, or None. A broken file is a reason too: none is written for any other end."""
        path = self._path(name, digest)
        try:
            return str(json.loads(path.read_text())["reason"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError) as error:
            return f"{path} is broken ({type(error).__name__}: {error})"

    def _path(self, name: str, digest: str) -> Path:
        if not re.fullmatch(NAME, name) or not re.fullmatch(NAME, digest):
            raise ValueError(f"experiment {name!r} and digest {digest!r} name a file: each needs to be {NAME}")
        return self._folder / f"{name}@{digest}.json"


def _times(window: Sequence[Seen]) -> list[float]:
    """Seconds of the answered requests, longest last."""
    return sorted(seconds for ok, seconds in window if ok)


def _rank(times: Sequence[float]) -> int:
    """Which of the longest is p95."""
    return math.ceil(len(times) / 20)
