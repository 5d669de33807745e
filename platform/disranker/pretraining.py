"""Continued pre-training of a decoder: query -> clicked title and summary, and general text against forgetting."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from disranker import batches, losses, passages, spread
from disranker.batches import Rows
from disranker.contract import Tokens
from disranker.recipe import Pretrain
from disranker.tables import BANDS


class Example(NamedTuple):
    ids: list[int]
    prompt: int  # ids at its start that are given and not learned
    weight: float
    query: str = ""  # of general text none

    @property
    def size(self) -> tuple[int, int]:
        """(rows, ids)."""
        return 1, len(self.ids)


class Texts(NamedTuple):
    """Padded rows with the tokens to learn."""

    rows: Rows
    weights: Tensor  # [rows]

    @property
    def learned(self) -> Tensor:
        """[rows, longest], true at title, summary and closing tokens, and at all of general text but its first one."""
        return self.rows.real & (self.rows.segments == 1)

    def to(self, device: torch.device) -> Self:
        return type(self)(self.rows.to(device), self.weights.to(device))


class Pretraining:
    """Query -> clicked title and summary, and passages; the query carries no loss.

    `train` and `validation` are rows of the table `clicked`; of the passages of `general` the seed takes a share.
    """

    metric, larger_is_better = "perplexity", False

    def __init__(
        self,
        train: Sequence[dict[str, Any]],
        validation: Sequence[dict[str, Any]],
        tokens: Tokens,
        cfg: Pretrain,
        general: Iterable[str] = (),
        seed: int = 0,
    ):
        self._pad, self._tokens_per_batch = tokens.contract.pad, cfg.tokens_per_batch
        clicked = _examples(train, tokens, weights(train, cfg.satisfied_weight))
        self.clicked_tokens = sum(len(example.ids) for example in clicked)
        others = _general(general, tokens, clicked, wanted(self.clicked_tokens, cfg.general_share), seed)
        self.general_tokens = sum(len(example.ids) for example in others)
        self._train = clicked + others
        self._held_out: dict[str, list[Example]] = {}
        for row, example in zip(validation, _examples(validation, tokens, [1.0] * len(validation)), strict=True):
            self._held_out.setdefault(row["band"], []).append(example)
        self.sizes = [example.size for example in self._train]

    def batch(self, places: list[int]) -> Texts:
        return self._texts([self._train[place] for place in places])

    def query(self, place: int) -> str:
        return self._train[place].query

    def loss(self, model: nn.Module, batch: Texts) -> Tensor:
        logits = model(**batch.rows.inputs(spread.plain(model))).logits
        return losses.language(logits, batch.rows.ids, batch.learned, batch.weights)

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """Perplexity of held-out clicked documents, each token equal: of all, and of the bands that have some."""
        model.eval()
        sums = {band: self._surprise(model, examples) for band, examples in self._held_out.items()}
        model.train()
        if not sums:
            return {}
        nats, learned = (sum(values) for values in zip(*sums.values(), strict=True))
        of_bands = {f"perplexity_{band}": math.exp(sums[band][0] / sums[band][1]) for band in BANDS if band in sums}
        return {"perplexity": math.exp(nats / learned)} | of_bands

    def _surprise(self, model: nn.Module, examples: Sequence[Example]) -> tuple[float, int]:
        """(negative log-likelihood of the learned tokens together, how many they are)."""
        nats, count = 0.0, 0
        device = next(model.parameters()).device
        for places in batches.plan([example.size for example in examples], self._tokens_per_batch, seed=0):
            batch = self._texts([examples[place] for place in places]).to(device)
            learned = int(batch.learned.sum())
            nats, count = nats + self.loss(model, batch).item() * learned, count + learned
        return nats, count

    def _texts(self, examples: Sequence[Example]) -> Texts:
        rows = Rows.padded([(example.ids, example.prompt) for example in examples], self._pad)
        return Texts(rows, torch.tensor([example.weight for example in examples]))


def weights(rows: Iterable[dict[str, Any]], satisfied_weight: float) -> list[float]:
    """How much each row of the table `clicked` counts: its attractiveness, times what a click of it counts on average.

    A click that satisfied counts `satisfied_weight`, another one 1.
    """
    return [row["attractiveness"] * (1 + (satisfied_weight - 1) * row["satisfied_share"]) for row in rows]


def wanted(clicked_tokens: int, general_share: float) -> int:
    """How many tokens make up this share of an epoch, beside those of clicked documents and their queries."""
    return math.ceil(clicked_tokens * general_share / (1 - general_share))


def _examples(rows: Sequence[dict[str, Any]], tokens: Tokens, weights: Iterable[float]) -> list[Example]:
    encoded = tokens.prompts([r["query"] for r in rows], [r["title"] for r in rows], [r["summary"] for r in rows])
    known = zip(encoded, weights, rows, strict=True)
    return [Example(ids, prompt, weight, row["query"]) for (ids, prompt), weight, row in known]


def _general(texts: Iterable[str], tokens: Tokens, clicked: Sequence[Example], most: int, seed: int) -> list[Example]:
    """Passages, learned but for the first token, which has none before it; they weigh the mean of the clicked ones."""
    weight = sum(example.weight for example in clicked) / max(1, len(clicked))
    return [Example(ids, 1, weight) for ids in passages.taken(texts, tokens, most, seed)]
