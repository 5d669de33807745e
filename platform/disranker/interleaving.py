"""Which of two rankings shoppers prefer, told by the clicks on one list that is drafted from both."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from disranker import sampling

Team = Literal["live", "candidate"]


@dataclass(frozen=True)
class Preference:
    """How often the candidate won; share, interval and p are of the outcomes that were no tie, None without any."""

    wins: int
    losses: int
    ties: int
    share: float | None  # wins / (wins + losses)
    low: float | None  # Wilson's interval
    high: float | None
    p: float | None  # two-sided, of a share of one half


def team_draft(live: Sequence[int], candidate: Sequence[int], seed: str | int) -> tuple[list[int], list[Team]]:
    """One list from two rankings of the same documents, and the team of each of its positions.

    In each round both teams take the best document of their ranking that is left, in the order a coin decides
    (Radlinski, Kurup and Joachims, CIKM 2008, algorithm 2). The same seed tosses the same coins, so give each request
    one of its own. Raises `ValueError` for rankings of different documents, or of one document twice.
    """
    if len({*live}) != len(live) or sorted(live) != sorted(candidate):
        raise ValueError("team draft needs two rankings of the same documents, each document once in each")
    return _draft(live, candidate, (sampling.uniform(str(seed), turn) < 0.5 for turn in count()))


def credit(teams: Sequence[Team], clicked: Iterable[int]) -> int:
    """1 if more documents of the candidate were clicked, -1 if more of the live ranking, else 0.

    `clicked`: positions from 0; a second click on a document adds nothing. Raises `ValueError` for one off the list.
    """
    positions = {*clicked}
    if outside := [position for position in positions if not 0 <= position < len(teams)]:
        raise ValueError(f"no position {outside[0]} in a list of {len(teams)}")
    of_candidate = sum(teams[position] == "candidate" for position in positions)
    of_live = len(positions) - of_candidate
    return (of_candidate > of_live) - (of_candidate < of_live)


def preference(outcomes: Iterable[int], confidence: float = 0.95) -> Preference:
    """What many of `credit` say together: binomial test and Wilson's interval.

    Both hold for independent outcomes. Pages of one shopper are not, so let each shopper give one: the sign of the sum.
    """
    from scipy.stats import binomtest  # takes a second to import, and drafting has no use for it

    found = list(outcomes)
    wins, losses, ties = (found.count(outcome) for outcome in (1, -1, 0))
    if wins + losses + ties != len(found):
        raise ValueError("an outcome is 1, 0 or -1")
    if not wins + losses:
        return Preference(wins, losses, ties, None, None, None, None)
    test = binomtest(wins, wins + losses)
    interval = test.proportion_ci(confidence, method="wilson")
    share = wins / (wins + losses)
    return Preference(wins, losses, ties, share, float(interval.low), float(interval.high), float(test.pvalue))


def power(share: float, decided: int, alpha: float = 0.05) -> float:
    """The chance that `preference` finds p <= alpha, if the candidate wins a true share of the `decided` outcomes."""
    if not (0 <= share <= 1 and decided >= 0 and 0 < alpha < 1):
        raise ValueError(f"share {share}, decided {decided}, alpha {alpha}: needs 0 to 1, 0 or more, and within 0 to 1")
    return float(_power(share, np.array([decided]), alpha)[0])


def needed(share: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """The least number of decided outcomes from which on the test always has the power.

    Exact power falls a little wherever one more win becomes needed, so a smaller number may have it too, by luck.
    Raises `ValueError` for a share of one half, which no number of outcomes can tell from one half.
    """
    if not (0 <= share <= 1 and share != 0.5 and 0 < alpha < power < 1):
        raise ValueError(f"share {share}, power {power}, alpha {alpha}: needs a share but 0.5, and alpha below power")
    about = _by_normal(share, power, alpha)
    # Exact and normal differ in the order of the root; a test searches all numbers to be sure of the 10.
    reach = 10 * math.isqrt(about) + 50
    numbers = np.arange(max(0, about - reach), about + reach)
    last: int = numbers[_power(share, numbers, alpha) < power].max()
    return int(last) + 1


def _draft(live: Sequence[int], candidate: Sequence[int], live_first: Iterator[bool]) -> tuple[list[int], list[Team]]:
    """As `team_draft`, with a coin for each round."""
    left = {"live": iter(live), "candidate": iter(candidate)}
    order: list[int] = []
    teams: list[Team] = []
    taken: set[int] = set()
    while len(order) < len(live):
        turns: tuple[Team, Team] = ("live", "candidate") if next(live_first) else ("candidate", "live")
        for team in turns[: len(live) - len(order)]:
            document = next(document for document in left[team] if document not in taken)
            taken.add(document)
            order.append(document)
            teams.append(team)
    return order, teams


def _power(share: float, decided: npt.NDArray[np.int64], alpha: float) -> npt.NDArray[Any]:
    from scipy.stats import binom

    # What fair coins exceed with a chance of at most alpha / 2: one win more than that, or one loss, and p <= alpha.
    most = binom.isf(alpha / 2, decided, 0.5)
    return np.asarray(binom.sf(most, decided, share) + binom.cdf(decided - most - 1, decided, share))


def _by_normal(share: float, power: float, alpha: float) -> int:
    """`needed` if a share were normal: a one-sample test of a proportion."""
    from scipy.stats import norm

    spread = norm.isf(alpha / 2) / 2 + norm.isf(1 - power) * math.sqrt(share * (1 - share))
    return int(np.ceil((spread / (share - 0.5)) ** 2))
