"""The BERT cross-encoder: from a checkpoint, from some of its layers, or from nothing; and what it learns."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from disranker import contract, losses
from disranker.batches import Group, Lists, collate, deal
from disranker.contract import Tokens
from disranker.recipe import Distill, Refused
from disranker.recipe import Student as StudentSettings
from disranker.teacher import pair_accuracy, raw_scores


def scratch(folder: str | Path, texts: Iterable[str], cfg: StudentSettings, seed: int) -> None:
    """Writes a small BERT with random weights and a WordPiece tokenizer of the texts."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    tokenizer = BertWordPieceTokenizer(lowercase=True)
    tokenizer.train_from_iterator(texts, vocab_size=cfg.vocabulary, show_progress=False)
    BertTokenizer(tokenizer_object=tokenizer._tokenizer).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=cfg.width,
        intermediate_size=cfg.width * 4,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        max_position_embeddings=cfg.max_tokens,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = 1
    BertForSequenceClassification(config).save_pretrained(folder)


def shortened(base: str, folder: str | Path, cfg: StudentSettings, seed: int) -> None:
    """Writes the base with some of its layers and all of its vocabulary; a new head where it has none of one score.

    Raises `Refused` if it has too few layers or positions.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise Refused(f"student.base {base}: no model there; give a folder, a hub name, or scratch") from error
    if config.model_type != "bert":
        raise Refused(f"student.base {base} is a {config.model_type}; a student is a bert")
    chosen = layers(config.num_hidden_layers, cfg)
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        base,
        num_labels=1,
        dtype=torch.float32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        ignore_mismatched_sizes=True,
    )
    contract.check_positions(model, cfg.max_tokens, "student")
    model.bert.encoder.layer = nn.ModuleList(model.bert.encoder.layer[place] for place in chosen)
    model.config.num_hidden_layers = len(chosen)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def layers(available: int, cfg: StudentSettings) -> list[int]:
    """Which layers of the base a student takes, from 0. Raises `Refused` if there are too few."""
    found = {
        "first": list(range(available)),
        "last": list(range(available))[-cfg.layers :],
        "every_second": list(range(0, available, 2)),
    }[cfg.take][: cfg.layers]
    if len(found) < cfg.layers:
        raise Refused(f"student: {cfg.take} gives {len(found)} of {available} layers, layers asks for {cfg.layers}")
    return found


def load(folder: str | Path) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32, use_safetensors=True
    )
    return model


class Distillation:
    """Lists with the teacher's scores, standardised by the mean and deviation of the whole label set."""

    metric, larger_is_better = "teacher_pair_accuracy", True

    def __init__(
        self,
        train: Sequence[tuple[Mapping[str, Any], Sequence[float]]],
        validation: Sequence[tuple[Mapping[str, Any], Sequence[float]]],
        tokens: Tokens,
        cfg: Distill,
        mean: float,
        deviation: float,
    ):
        """train, validation: (row of `groups`, raw teacher score of each of its documents)."""
        self._pad, self._cfg = tokens.contract.pad, cfg
        self._train, self._validation = (
            [
                Group(tokens.listed(g["query"], g["docs"]), standardised(s, mean, deviation), g["query"])
                for g, s in pairs
            ]
            for pairs in (train, validation)
        )
        self._train = [hand for group in self._train for hand in deal(group, cfg.documents_per_list)]
        self.sizes = [group.size for group in self._train]

    def batch(self, places: list[int]) -> Lists:
        return collate([self._train[place] for place in places], self._pad)

    def query(self, place: int) -> str:
        return self._train[place].query

    def loss(self, model: nn.Module, batch: Lists) -> Tensor:
        scores = batch.spread(raw_scores(model, batch.rows))
        return losses.hybrid(scores, batch.targets, batch.real, self._cfg.alpha, self._cfg.beta)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Agreement with the teacher on queries that it was not trained on."""
        return {"teacher_pair_accuracy": pair_accuracy(model, self._validation, self._pad)}


def standardised(scores: Sequence[float], mean: float, deviation: float) -> list[float]:
    """Raises `ValueError` for a teacher that gives every document the same score."""
    if not deviation > 0:
        raise ValueError("the teacher gives every document the same score: nothing can be distilled from it")
    return [(score - mean) / deviation for score in scores]
