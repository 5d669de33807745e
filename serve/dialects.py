"""Requests and replies of the rerank APIs that clients speak, and the pairs that they all come down to.

Keys that only other services know are ignored, so that a client of theirs needs no change but the address.
"""

import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Annotated, Any, Literal, Self

import pydantic

MAX_ID_CHARS = 512
QUERIES, DOCUMENTS = ("queries", "text_1", "data_1"), ("documents", "items", "text_2", "data_2")  # as vLLM names them
LISTS = (*QUERIES, *DOCUMENTS, "texts")
Text = Annotated[str, pydantic.StringConstraints(strip_whitespace=True, min_length=1)]
TopN = Annotated[int | None, pydantic.Field(ge=1, strict=True)]  # None: all


@dataclass(frozen=True)
class Pairs:
    """What is to be scored: a query, a title and a summary each; and where in the body they came from."""

    queries: list[str]
    titles: list[str]
    summaries: list[str]
    ids: list[str]  # of the documents; none where the pairs are not of one query
    query_field: str


@dataclass(frozen=True)
class Asked:
    """A request, whatever its dialect."""

    pairs: Pairs
    timeout_s: float
    request_id: str
    client: str | None = None  # who keeps an arm of an experiment


@dataclass(frozen=True)
class Scored:
    """What was found of some pairs, in their order."""

    logits: list[float]
    seconds: float  # of the engine
    tokens: int  # that the model read
    truncated: list[bool]  # pairs of which it could not read all
    model: str
    request_id: str
    order: list[int] | None = None  # places, best first, where that is not by logit alone
    teams: list[str] | None = None  # whose each position is, of an interleaved order

    def ranked(self) -> list[int]:
        """Places of the pairs, best first; of equal ones the first."""
        return ranked(self.logits) if self.order is None else self.order


class Document(pydantic.BaseModel):
    """A string or {"text"}, or {"title", "summary"}; other keys only come back with `return_documents`.

    A text takes the place of the summary, since a title has a small limit of its own.
    """

    model_config = pydantic.ConfigDict(extra="allow")

    text: str | None = None
    title: str | None = None
    summary: str | None = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _named(cls, document: Any) -> Any:
        return {"text": document} if isinstance(document, str) else document

    @pydantic.model_validator(mode="after")
    def _one_meaning(self) -> Self:
        if self.text is None and self.title is None and self.summary is None:
            raise ValueError("a document is a string, or an object with text, or with title and summary")
        if self.text is not None and self.summary is not None:
            raise ValueError("text takes the place of summary: give one of them")
        return self

    def name(self) -> str:
        """What records call it: its own `doc_id` or `id`, else a name made of its words."""
        for key in ("doc_id", "id"):
            given = (self.model_extra or {}).get(key)
            if isinstance(given, str | int) and not isinstance(given, bool) and str(given).strip():
                return str(given)[:MAX_ID_CHARS]
        return named(f"{self.title or ''}\n{self.text or self.summary or ''}")


class Group(pydantic.BaseModel):
    """One query with its list."""

    query: Text
    documents: Annotated[list[Document], pydantic.Field(min_length=1, fail_fast=True)]
    model: str | None = None

    def pairs(self) -> Pairs:
        titles = [document.title or "" for document in self.documents]
        summaries = [document.text or document.summary or "" for document in self.documents]
        ids = [document.name() for document in self.documents]
        return Pairs([self.query] * len(titles), titles, summaries, ids, "query")


class Rerank(Group):
    """Of Jina, Cohere (v1 and v2) and vLLM."""

    top_n: TopN = None
    return_documents: bool | None = None

    def reply(self, found: Scored, version: str) -> dict[str, Any]:
        """`results` best first; equal scores keep the order of the documents."""
        results: list[dict[str, Any]] = [
            {"index": place, "relevance_score": sigmoid(found.logits[place])} for place in found.ranked()[: self.top_n]
        ]
        if self.return_documents:
            for result in results:
                result["document"] = self.documents[result["index"]].model_dump(exclude_unset=True)
        usage = {"prompt_tokens": found.tokens, "total_tokens": found.tokens}
        meta: dict[str, Any] = {"api_version": {"version": version}, "billed_units": {"search_units": 1}}
        if warning := truncation(found):
            meta["warnings"] = [warning]
        return {"id": found.request_id, "model": found.model, "usage": usage, "results": results, "meta": meta}


class TeiRerank(pydantic.BaseModel):
    """Of Hugging Face's text-embeddings-inference."""

    query: Text
    texts: Annotated[list[str], pydantic.Field(min_length=1, fail_fast=True)]
    raw_scores: bool = False  # logits, not their sigmoid
    return_text: bool = False
    truncate: bool | None = None  # false: a text that is too long is refused
    truncation_direction: Literal["right", "Right"] = "right"

    def pairs(self) -> Pairs:
        count, ids = len(self.texts), [named(text) for text in self.texts]
        return Pairs([self.query] * count, [""] * count, self.texts, ids, "query")

    def reply(self, found: Scored) -> list[dict[str, Any]]:
        """Best first, without a word around it; that something was cut off stands in a header."""
        score = float if self.raw_scores else sigmoid
        results: list[dict[str, Any]] = []
        for place in found.ranked():
            text = {"text": self.texts[place]} if self.return_text else {}
            results.append({"index": place, **text, "score": score(found.logits[place])})
        return results


def _named(names: Sequence[str]) -> Any:
    """A field that different versions of a client name differently."""
    return pydantic.Field(validation_alias=pydantic.AliasChoices(*names))


class Score(pydantic.BaseModel):
    """Of vLLM: one query and several documents, or as many queries as documents."""

    queries: Annotated[Text | list[Text], _named(QUERIES)]
    documents: Annotated[str | list[str], _named(DOCUMENTS)]
    use_activation: bool | None = None  # false: logits, not their sigmoid
    model: str | None = None

    @pydantic.model_validator(mode="after")
    def _go_together(self) -> Self:
        queries, documents = self._listed()
        if not queries or not documents or len(queries) not in (1, len(documents)):
            raise ValueError(
                f"{len(queries)} queries and {len(documents)} documents: give one query, or one for each document"
            )
        return self

    def pairs(self) -> Pairs:
        queries, documents = self._listed()
        queries = queries * len(documents) if len(queries) == 1 else queries
        return Pairs(queries, [""] * len(documents), documents, [], "queries")

    def reply(self, found: Scored) -> dict[str, Any]:
        """Scores in the order of the pairs."""
        score = float if self.use_activation is False else sigmoid
        data = [{"index": place, "object": "score", "score": score(logit)} for place, logit in enumerate(found.logits)]
        usage = {"prompt_tokens": found.tokens, "total_tokens": found.tokens, "completion_tokens": 0}
        about = {"id": f"score-{found.request_id}", "object": "list", "created": int(time.time()), "model": found.model}
        return about | {"data": data, "usage": usage}

    def _listed(self) -> tuple[list[str], list[str]]:
        queries = [self.queries] if isinstance(self.queries, str) else self.queries
        return queries, [self.documents] if isinstance(self.documents, str) else self.documents


def named(text: str) -> str:
    """The same name for the same words."""
    return f"text-{blake2b(text.encode(), digest_size=8).hexdigest()}"


def ranked(logits: Sequence[float]) -> list[int]:
    """Places of the scores, best first; of equal ones the first."""
    return sorted(range(len(logits)), key=lambda place: -logits[place])


def truncation(found: Scored) -> str | None:
    """What a reply says where the model could not read all."""
    cut = sum(found.truncated)
    return (
        f"{cut} of {len(found.truncated)} pairs were longer than the model reads; the rest was cut off" if cut else None
    )


def sigmoid(logit: float) -> float:
    """Without overflow at either end."""
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def request_id(given: str | None) -> str:
    """The client's own where it is short and plain, so that its logs and ours meet; else a new one."""
    if given and len(given) <= 64 and given.isascii() and all(letter.isalnum() or letter in "-_." for letter in given):
        return given
    return str(uuid.uuid4())
