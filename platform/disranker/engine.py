"""Scores for (query, title, summary): tokenise, run in batches of like length, give back in order."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from disranker import bundle, engines
from disranker.batches import Rows
from disranker.contract import Tokens

Prompt = tuple[list[int], int]  # the ids of a pair, and how many of them belong to the query


class Engine:
    """A BERT cross-encoder with its contract, in one of the forms of `engines`. One thread at a time may use it."""

    def __init__(
        self,
        folder: str | Path,
        threads: int | None = None,
        tokens_per_batch: int = 4096,
        engine: engines.Name = "torch",
    ):
        """From a folder that training left, or a bundle: a Hugging Face model, its tokenizer and `contract.json`.

        `threads` as in `engines.load`. A batch has at most `tokens_per_batch` tokens, padding included. Raises
        `Refused` if the model cannot serve its contract, or the folder lacks the files of the engine.
        """
        if tokens_per_batch < 1:
            raise ValueError(f"tokens_per_batch is {tokens_per_batch}; 1 or more would be right")
        self.tokens = Tokens.load(folder)
        self._forward = engines.load(folder, engine, self.tokens.contract, threads)
        self._tokens_per_batch = tokens_per_batch

    @classmethod
    def from_bundle(
        cls,
        folder: str | Path,
        threads: int | None = None,
        tokens_per_batch: int = 4096,
        engine: engines.Name | None = None,
    ) -> Self:
        """As `Engine(...)`, from a bundle, and only if it is whole: raises `Refused` as `bundle.verify` does.

        Without `engine` it is the one that the bundle chose when it was made.
        """
        chosen = bundle.verify(folder)["engine"]
        return cls(folder, threads, tokens_per_batch, engine or chosen)

    def scores(self, queries: Sequence[str], titles: Sequence[str], summaries: Sequence[str]) -> list[float]:
        """A raw logit for each (query, title, summary), in their order. Raises `ValueError` if their numbers differ."""
        return self.logits(self.tokens.prompts(queries, titles, summaries))

    def logits(self, prompts: Sequence[Prompt]) -> list[float]:
        """A raw logit for each of `tokens.prompts`, in their order."""
        found = [0.0] * len(prompts)
        for rows in cut([len(ids) for ids, _ in prompts], self._tokens_per_batch):
            padded = Rows.padded([prompts[row] for row in rows], self.tokens.contract.pad)
            for row, logit in zip(rows, self._forward(padded), strict=True):
                found[row] = logit
        return found


def cut(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Rows by length, longest first, in batches of rows * longest <= `tokens_per_batch`; a longer row goes alone."""
    rows = sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True)
    while rows:
        fitting = max(1, tokens_per_batch // lengths[rows[0]])
        yield rows[:fitting]
        rows = rows[fitting:]
