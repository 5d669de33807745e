"""Queries as hurried people type them, and what that costs a ranking: two letters swapped, words swapped, a word lost.

Grades stay those of the query as it was: whoever mistypes it wants the same. What stands here is a made-up kind of
haste, the same for every model; it tells models apart and does not say how often people err.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from random import Random
from typing import Any

from disranker import metrics
from disranker.metrics import Qrels, Run
from disranker.recipe import Evaluate
from disranker.report import HEADLINE


def perturbed(query: str, seed: int) -> dict[str, str]:
    """Kind -> the query perturbed; without the kinds that cannot change it. The same for the same seed and query."""
    # A text as seed is hashed the same way in every process, which Python's own hash is not.
    made = {kind: change(query.split(), Random(f"{seed} {kind} {query}")) for kind, change in KINDS.items()}
    return {kind: text for kind, words in made.items() if words and (text := " ".join(words)) != query}


def drops(
    qrels: Qrels, runs: Mapping[str, Run], perturbed: Mapping[tuple[str, str], Run], cfg: Evaluate, seed: int
) -> list[dict[str, Any]]:
    """NDCG@10 before and after for each (kind, model) of `perturbed`, and its difference with a paired interval.

    Each over the queries that the kind changed: those that the perturbed run holds.
    """
    found = []
    for (kind, model), run in perturbed.items():
        changed = {query: grades for query, grades in qrels.items() if query in run}
        if not changed:
            continue
        after, before = (metrics.tally(changed, one) for one in (run, runs[model]))
        difference = asdict(metrics.compare(after, before, cfg, seed)[HEADLINE])
        at = metrics.METRICS.index(HEADLINE)
        means = {"clean": float(before[:, at, 0].mean()), "perturbed": float(after[:, at, 0].mean())}
        found.append({"kind": kind, "model": model, "queries": len(changed)} | means | difference)
    return found


def _typo(words: list[str], random: Random) -> list[str]:
    """Two neighbouring letters swapped in the longest word; none where all its letters are the same."""
    if not words:
        return []
    at = max(range(len(words)), key=lambda i: len(words[i]))
    word = words[at]
    places = [i for i in range(len(word) - 1) if word[i : i + 2].isalpha() and word[i] != word[i + 1]]
    if not places:
        return []
    place = random.choice(places)
    mistyped = word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    return [*words[:at], mistyped, *words[at + 1 :]]


def _swapped(words: list[str], random: Random) -> list[str]:
    """Two neighbouring words swapped that are not the same."""
    places = [i for i in range(len(words) - 1) if words[i] != words[i + 1]]
    if not places:
        return []
    place = random.choice(places)
    return [*words[:place], words[place + 1], words[place], *words[place + 2 :]]


def _dropped(words: list[str], random: Random) -> list[str]:
    """One word less: of a query of one word nothing."""
    if not words:
        return []
    place = random.randrange(len(words))
    return [*words[:place], *words[place + 1 :]]


KINDS: dict[str, Callable[[list[str], Random], list[str]]] = {
    "typo": _typo,
    "words swapped": _swapped,
    "word dropped": _dropped,
}
