"""Queries in slices that one number over all of them hides: how often asked, how long, how long their documents."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from disranker.tables import BANDS

Slices = Mapping[str, Sequence[str]]  # slice -> its queries, in the order to show

NEVER = "never clicked"
MOST_WORDS = 4  # queries of so many words, and of more, are one slice


def by_band(bands: Mapping[str, str], clicked: Collection[str]) -> dict[str, list[str]]:
    """Head, torso and tail of the queries with a click in the log, and apart from them those without one.

    For these the log had nothing to teach, whether they were never searched or only never clicked; left in the tail,
    they would hide what clicks do for it.
    """
    of = {query: band if query in clicked else NEVER for query, band in bands.items()}
    return _sliced(of, (*BANDS, NEVER))


def by_words(queries: Collection[str]) -> dict[str, list[str]]:
    """Queries by their number of words, parted by spaces: a language that writes none has queries of one word."""
    names = ["1 word", *(f"{n} words" for n in range(2, MOST_WORDS)), f"{MOST_WORDS} words or more"]
    return _sliced({query: names[min(max(len(query.split()), 1), MOST_WORDS) - 1] for query in queries}, names)


def by_length(words: Mapping[str, float]) -> dict[str, list[str]]:
    """Queries in thirds by the mean length of their judged documents; `words` has it by query. Equals stay together."""
    if not words:
        return {}
    lengths = np.array(list(words.values()))
    low, high = np.quantile(lengths, [1 / 3, 2 / 3], method="inverted_cdf")
    names = (f"short, up to {low:.0f} words", "in between", f"long, over {high:.0f} words")
    places = np.searchsorted([low, high], lengths)  # at a limit counts as below it
    return _sliced({query: names[place] for query, place in zip(words, places, strict=True)}, names)


def _sliced(of: Mapping[str, str], names: Sequence[str]) -> dict[str, list[str]]:
    """Without the slices that hold no query."""
    found: dict[str, list[str]] = {name: [] for name in names}
    for query, name in of.items():
        found[name].append(query)
    return {name: queries for name, queries in found.items() if queries}
