"""Prompts of pairs; a document that was seen lately is not tokenised again."""

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

from cachetools import LRUCache

from disranker.contract import Tokens
from disranker.engine import Prompt

KEY_BYTES = 16
CHARS_PER_TOKEN = 64  # of a text no more is looked at than a contract could ever take: a megabyte takes a second
ENTRY_BYTES = 400  # of an entry without its ids: key, arrays and places in the cache


class Encoded(NamedTuple):
    prompts: list[Prompt]
    truncated: list[bool]  # pairs that are longer than the model reads


class _Document(NamedTuple):
    title: "array[int]"
    summary: "array[int]"  # as much of it as could ever be read, and one more that tells of the rest


class Encoder:
    """For the tokenizer and contract of one student. One thread at a time may use it."""

    def __init__(self, tokens: Tokens, cache_bytes: int):
        self.tokens = tokens
        self._documents: LRUCache[bytes, _Document] = LRUCache(cache_bytes, _size)

    def prompts(self, queries: Sequence[str], titles: Sequence[str], summaries: Sequence[str]) -> Encoded:
        """A prompt for each (query, title, summary), the same as `Tokens.prompts` gives."""
        distinct = list(dict.fromkeys(queries))
        encoded = dict(zip(distinct, self._ids(distinct), strict=True))
        prompts, truncated = [], []
        for query, document in zip(queries, self._encoded(titles, summaries), strict=True):
            fields = encoded[query], document.title.tolist(), document.summary.tolist()
            prompts.append(self.tokens.pair(*fields))
            truncated.append(self.tokens.cuts(*fields))
        return Encoded(prompts, truncated)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        most = CHARS_PER_TOKEN * self.tokens.contract.max_tokens
        return self.tokens.ids([text[:most] for text in texts])

    def _encoded(self, titles: Sequence[str], summaries: Sequence[str]) -> list[_Document]:
        keys = [_key(title, summary) for title, summary in zip(titles, summaries, strict=True)]
        found = {key: self._documents[key] for key in keys if key in self._documents}
        new = {key: place for place, key in enumerate(keys) if key not in found}
        limits = self.tokens.contract
        for key, title, summary in zip(
            new,
            self._ids([titles[place] for place in new.values()]),
            self._ids([summaries[place] for place in new.values()]),
            strict=True,
        ):
            kept = title[: limits.max_title_tokens + 1], summary[: limits.max_tokens]
            found[key] = _Document(*(array("i", ids) for ids in kept))
            if _size(found[key]) <= self._documents.maxsize:
                self._documents[key] = found[key]
        return [found[key] for key in keys]


def _key(title: str, summary: str) -> bytes:
    # The length of the title keeps ("ab", "c") from ("a", "bc").
    return blake2b(f"{len(title)} {title}{summary}".encode(), digest_size=KEY_BYTES).digest()


def _size(document: _Document) -> int:
    return ENTRY_BYTES + 4 * (len(document.title) + len(document.summary))
