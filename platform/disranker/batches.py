"""Groups -> padded tensors by a budget of tokens. A list is never split."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn


class Rows(NamedTuple):
    """Padded token ids: ids, real and segments all [rows, longest]; real is true at tokens, false at padding."""

    ids: Tensor
    real: Tensor
    segments: Tensor

    @classmethod
    def padded(cls, rows: Sequence[tuple[Sequence[int], int]], pad: int) -> Self:
        """rows: (ids, how many of them belong to the query)."""
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), longest), pad)
        real = torch.zeros(len(rows), longest, dtype=torch.bool)
        segments = torch.zeros(len(rows), longest, dtype=torch.long)
        for place, (row, prompt) in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
            real[place, : len(row)] = True
            segments[place, prompt : len(row)] = 1
        return cls(ids, real, segments)

    def to(self, device: torch.device) -> Self:
        return type(self)(*(tensor.to(device) for tensor in self))

    def some(self, places: Tensor) -> Self:
        """The rows at these places, padded to the longest of them alone."""
        longest = int(self.real[places].sum(1).max())
        return type(self)(*(tensor[places, :longest] for tensor in self))

    def inputs(self, model: nn.Module) -> dict[str, Tensor]:
        """What a Hugging Face model takes: the segments only where it tells them apart."""
        inputs = {"input_ids": self.ids, "attention_mask": self.real.long()}
        segments = getattr(model.config, "type_vocab_size", 0) > 1
        return inputs | ({"token_type_ids": self.segments} if segments else {})


@dataclass(frozen=True)
class Lists:
    """Some queries with their documents: rows are all documents in a line, targets and real are [lists, documents]."""

    rows: Rows
    targets: Tensor
    real: Tensor  # true where a document with a target stands

    def spread(self, scores: Tensor) -> Tensor:
        """Scores [rows] as [lists, documents], 0 where no document stands."""
        spread = torch.zeros(self.targets.shape, dtype=scores.dtype, device=scores.device)
        return spread.masked_scatter(self.real, scores)

    def to(self, device: torch.device) -> "Lists":
        return Lists(self.rows.to(device), self.targets.to(device), self.real.to(device))


class Group(NamedTuple):
    """One query's list, ready to train on."""

    rows: list[tuple[list[int], int]]  # (ids, how many belong to the query)
    targets: list[float]
    query: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """(rows, ids of the longest)."""
        return len(self.rows), max(len(ids) for ids, _ in self.rows)


def deal(group: Group, documents: int) -> list[Group]:
    """A list as several of at most so many documents, each spread over the whole range of targets.

    None has a single document, which could be compared with nothing: three in twos stay together. A batch then holds
    many queries instead of all documents of a few: the gradient is less noisy at the same cost.
    """
    hands = max(1, min(math.ceil(len(group.rows) / documents), len(group.rows) // 2))
    ranked = sorted(range(len(group.rows)), key=lambda place: group.targets[place])
    dealt = (ranked[hand::hands] for hand in range(hands))
    return [
        Group([group.rows[place] for place in hand], [group.targets[place] for place in hand], group.query)
        for hand in dealt
    ]


def collate(groups: Sequence[Group], pad: int) -> Lists:
    """Groups as one batch."""
    widest = max(len(group.rows) for group in groups)
    targets = torch.zeros(len(groups), widest)
    real = torch.zeros(len(groups), widest, dtype=torch.bool)
    for place, group in enumerate(groups):
        targets[place, : len(group.targets)] = torch.tensor(group.targets)
        real[place, : len(group.targets)] = True
    return Lists(Rows.padded([row for group in groups for row in group.rows], pad), targets, real)


def plan(sizes: Sequence[tuple[int, int]], tokens: int, seed: int) -> list[list[int]]:
    """Which items go together, as places in `sizes` (rows, longest): each once, padded area at most `tokens`.

    Items are shuffled, sorted by length within windows of about 50 batches so that little is padding, cut, and the
    batches shuffled again. The same seed gives the same plan. Raises `ValueError` for an item that fits no batch.
    """
    area = [rows * longest for rows, longest in sizes]
    if area and max(area) > tokens:
        raise ValueError(f"an item of {max(area)} tokens fits no batch of tokens_per_batch {tokens}")
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(sizes))
    window = max(1, 50 * tokens // max(1, int(np.mean(area or [1]))))
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        batches += _cut(sorted(order[start : start + window].tolist(), key=lambda i: (sizes[i][1], i)), sizes, tokens)
    return [batches[place] for place in draw.permutation(len(batches))]


def _cut(order: list[int], sizes: Sequence[tuple[int, int]], tokens: int) -> list[list[int]]:
    batches: list[list[int]] = []
    rows, longest = 0, 0
    for place in order:
        rows, longest = rows + sizes[place][0], max(longest, sizes[place][1])
        if not batches or rows * longest > tokens:
            batches.append([])
            rows, longest = sizes[place]
        batches[-1].append(place)
    return batches
