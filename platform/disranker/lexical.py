"""A head that tells which query tokens stand in the document: a second task for the student, in training alone.

A simple form of the Term Control Layer of RRADistill (arXiv 2410.18097). The head sees the last hidden state of each
query token, so that what it asks for has to come through the encoder.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from disranker import spread
from disranker.batches import Rows
from disranker.teacher import in_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Told(NamedTuple):
    """A tuple, so that FSDP finds the tensors in it."""

    logits: Tensor  # [rows, 1]
    occurs: Tensor  # [rows, length, 1], above 0 where a token is held to stand in the document


class Telling(nn.Module):
    """A student with the head; its own scores are what they are without it, and `teacher.save` leaves the head out."""

    def __init__(self, model: "PreTrainedModel", seed: int):
        super().__init__()
        self.model: Any = model
        self.config = model.config
        torch.manual_seed(seed)
        self.head = nn.Linear(model.config.hidden_size, 1)

    def forward(self, **inputs: Tensor) -> Told:
        output = self.model(**inputs, output_hidden_states=True)
        return Told(output.logits, self.head(output.hidden_states[-1]))


def scores(model: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
    """(raw logits [rows], `loss` as a mean over rows) of a `Telling`, in one pass."""

    def compute(piece: Rows) -> Tensor:
        output = model(**piece.inputs(spread.plain(model)))
        missed = loss(output.occurs.squeeze(-1).float(), piece)
        return torch.stack([output.logits.squeeze(-1).float(), missed], dim=1)

    raw, each = in_pieces(model, rows, compute).unbind(1)
    return raw, each.mean()


def loss(occurs: Tensor, rows: Rows) -> Tensor:
    """[rows], mean cross-entropy over the query tokens of each row; occurs: logits [rows, length]."""
    asked = query_tokens(rows)
    each = binary_cross_entropy_with_logits(occurs, in_document(rows).to(occurs), reduction="none")
    return each.masked_fill(~asked, 0).sum(1) / asked.sum(1).clamp(min=1)


def query_tokens(rows: Rows) -> Tensor:
    """[rows, length], true at the tokens of the query: segment 0 between [CLS] and [SEP]."""
    first = rows.real & (rows.segments == 0)
    places = torch.arange(first.shape[1], device=first.device)
    return first & (places > 0) & (places < first.sum(1, keepdim=True) - 1)


def in_document(rows: Rows) -> Tensor:
    """[rows, length], true at tokens whose id stands in segment 1."""
    document = rows.real & (rows.segments == 1)
    same = rows.ids.unsqueeze(2) == rows.ids.unsqueeze(1)
    return (same & document.unsqueeze(1)).any(2)
