"""Scores for (query, title, summary): tokenise, run in batches of like length, give back in order."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self, cast

import torch
from transformers import BertForSequenceClassification

from disranker import bundle
from disranker.batches import Rows
from disranker.contract import Contract, Tokens
from disranker.recipe import Refused

Prompt = tuple[list[int], int]  # the ids of a pair, and how many of them belong to the query


class Engine:
    """A BERT cross-encoder with its contract, in float32 on the CPU. One thread at a time may use it."""

    def __init__(self, folder: str | Path, threads: int | None = None, tokens_per_batch: int = 4096):
        """From a folder that training left: a Hugging Face model, its tokenizer and `contract.json`.

        `threads` is set for all of torch in this process; None leaves what stands. A batch has at most
        `tokens_per_batch` tokens, padding included. Raises `Refused` if the model cannot serve its contract.
        """
        if tokens_per_batch < 1:
            raise ValueError(f"tokens_per_batch is {tokens_per_batch}; 1 or more would be right")
        if threads is not None:
            torch.set_num_threads(threads)
        self.tokens = Tokens.load(folder)
        self._model = _load(Path(folder), self.tokens.contract)
        self._tokens_per_batch = tokens_per_batch

    @classmethod
    def from_bundle(cls, folder: str | Path, threads: int | None = None, tokens_per_batch: int = 4096) -> Self:
        """As `Engine(...)`, from a bundle, and only if it is whole: raises `Refused` as `bundle.verify` does."""
        bundle.verify(folder)
        return cls(folder, threads, tokens_per_batch)

    def scores(self, queries: Sequence[str], titles: Sequence[str], summaries: Sequence[str]) -> list[float]:
        """A raw logit for each (query, title, summary), in their order. Raises `ValueError` if their numbers differ."""
        return self.logits(self.tokens.prompts(queries, titles, summaries))

    def logits(self, prompts: Sequence[Prompt]) -> list[float]:
        """A raw logit for each of `tokens.prompts`, in their order."""
        found = [0.0] * len(prompts)
        for rows in cut([len(ids) for ids, _ in prompts], self._tokens_per_batch):
            for row, logit in zip(rows, self._run([prompts[row] for row in rows]), strict=True):
                found[row] = logit
        return found

    @torch.inference_mode()
    def _run(self, prompts: Sequence[Prompt]) -> list[float]:
        rows = Rows.padded(prompts, self.tokens.contract.pad)
        output = self._model(**rows.inputs(self._model))
        return cast(list[float], output.logits.squeeze(-1).tolist())


def cut(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Rows by length, longest first, in batches of rows * longest <= `tokens_per_batch`; a longer row goes alone."""
    rows = sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True)
    while rows:
        fitting = max(1, tokens_per_batch // lengths[rows[0]])
        yield rows[:fitting]
        rows = rows[fitting:]


def _load(folder: Path, agreed: Contract) -> BertForSequenceClassification:
    model, loading = cast(
        tuple[BertForSequenceClassification, dict[str, set[str]]],
        BertForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
        ),
    )
    # Of missing weights transformers only warns, and then serves scores from random ones.
    if loading["missing_keys"]:
        raise Refused(f"{folder} is no whole BertForSequenceClassification: no {sorted(loading['missing_keys'])}")
    labels, positions = model.config.num_labels, model.config.max_position_embeddings
    if labels != 1 or agreed.form != "encoder":
        raise Refused(f"{folder} has {labels} labels and the contract of a {agreed.form}: 1 and an encoder is right")
    if positions < agreed.max_tokens:
        raise Refused(f"{folder} has {positions} positions, too few for the {agreed.max_tokens} tokens of its contract")
    return model  # in evaluation mode, as from_pretrained leaves it
