"""BM25 over the documents: first ranking, hard negatives, the baseline."""

from collections.abc import Mapping, Sequence
from typing import Self

import bm25s
import numpy as np

WORDS = r"(?u)\b\w+\b"


class BM25:
    """An index in memory (Lucene's formula, k1 1.2, b 0.75), through bm25s. Pickles without copying its arrays."""

    def __init__(self, doc_ids: Sequence[str], texts: Sequence[str]):
        self.doc_ids = list(doc_ids)
        self._place = {doc_id: place for place, doc_id in enumerate(self.doc_ids)}
        self._index = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
        self._index.index(_words(list(texts)), show_progress=False)

    @classmethod
    def of(cls, documents: Sequence[Mapping[str, str]]) -> Self:
        """An index of titles and summaries."""
        return cls([row["doc_id"] for row in documents], [f"{row['title']} {row['summary']}" for row in documents])

    def top(self, query: str, k: int) -> list[str]:
        """The k best documents that share a word with the query, best first, equals in the order of their ids."""
        scores = self._all(query)
        found = np.flatnonzero(scores > 0)
        if len(found) > k:  # a cut that keeps every document as good as the k-th
            found = found[scores[found] >= np.partition(scores[found], -k)[-k]]
        best = sorted(found, key=lambda place: (-scores[place], self.doc_ids[place]))
        return [self.doc_ids[place] for place in best[:k]]

    def scores(self, query: str, doc_ids: Sequence[str]) -> list[float]:
        """BM25 of each document for the query; 0 where no word is shared."""
        return list(map(float, self._all(query)[[self._place[doc_id] for doc_id in doc_ids]]))

    def _all(self, query: str) -> np.ndarray:
        words = _words([query])[0]
        known = [word for word in words if word in self._index.vocab_dict]
        return self._index.get_scores(known) if known else np.zeros(len(self.doc_ids), np.float32)


def _words(texts: list[str]) -> list[list[str]]:
    # No stop words and no stemmer: both belong to one language.
    words: list[list[str]] = bm25s.tokenize(
        texts, token_pattern=WORDS, stopwords=None, return_ids=False, show_progress=False
    )
    return words
