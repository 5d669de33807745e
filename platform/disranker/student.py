"""The BERT cross-encoder: from a checkpoint, from some of its layers, or from nothing; and what it learns."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from disranker import contract, lexical, losses
from disranker.batches import Group, Lists, collate, deal
from disranker.contract import Tokens
from disranker.recipe import Distill, Refused
from disranker.recipe import Student as StudentSettings
from disranker.teacher import pair_accuracy, raw_scores

if TYPE_CHECKING:
    from tokenizers import BertWordPieceTokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
NEW = ("classifier.", "bert.pooler.")  # what a base need not have
ROUNDING = 1e-6  # of float32 and of the sums over it, relative


def scratch(folder: str | Path, texts: Iterable[str], cfg: StudentSettings, seed: int) -> None:
    """Writes a small BERT with random weights and a WordPiece tokenizer of the texts."""
    from transformers import BertTokenizer

    tokenizer = _word_pieces(list(texts), cfg.vocabulary)
    BertTokenizer(tokenizer_object=tokenizer._tokenizer).save_pretrained(folder)
    _random(folder, cfg, seed, tokenizer.get_vocab_size(), tokenizer.token_to_id("[PAD]"))


def _random(folder: str | Path, cfg: StudentSettings, seed: int, vocabulary: int, pad: int) -> None:
    """Writes a BERT of random weights in the size of the recipe."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=vocabulary,
        pad_token_id=pad,
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


def _word_pieces(texts: Sequence[str], vocabulary: int) -> "BertWordPieceTokenizer":
    """The same one each time: left alone, training numbers "##" letters by a random hash, and breaks ties by number."""
    from tokenizers import BertWordPieceTokenizer

    letters = BertWordPieceTokenizer(lowercase=True)
    letters.train_from_iterator(texts, vocab_size=1, show_progress=False)
    numbered = [*SPECIAL, *sorted(letter for letter in letters.get_vocab() if letter.startswith("##"))]
    trained = BertWordPieceTokenizer(lowercase=True)
    trained.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=numbered, show_progress=False)
    return BertWordPieceTokenizer(vocab=trained.get_vocab(), lowercase=True)


def shortened(base: str, folder: str | Path, cfg: StudentSettings, seed: int) -> None:
    """Writes the base with some of its layers and all of its vocabulary; a new head where it has none of one score.

    With `take: none` the vocabulary alone is of the base. Raises `Refused` if the base lacks weights, or has too few
    layers or positions.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise Refused(f"student.base {base}: no model there; give a folder, a hub name, or scratch") from error
    if config.model_type != "bert":
        raise Refused(f"student.base {base} is a {config.model_type}; a student is a bert")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    if cfg.take == "none":
        _random(folder, cfg, seed, config.vocab_size, config.pad_token_id)
        return
    chosen = layers(config.num_hidden_layers, cfg)
    torch.manual_seed(seed)
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        base,
        num_labels=1,
        dtype=torch.float32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    # Of missing weights transformers only warns, and leaves random ones; a head may be new.
    absent = [*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])]
    if body := sorted(name for name in absent if not name.startswith(NEW)):
        raise Refused(f"student.base {base} is no whole bert: it lacks {len(body)} weights, one is {body[0]}")
    contract.check_positions(model, cfg.max_tokens, "student")
    model.bert.encoder.layer = nn.ModuleList(model.bert.encoder.layer[place] for place in chosen)
    model.config.num_hidden_layers = len(chosen)
    model.save_pretrained(folder)


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
    """Lists with targets: the teacher's standardised scores, or for comparison human grades or click evidence."""

    larger_is_better = True

    def __init__(
        self, train: Sequence[Group], validation: Sequence[Group], graded: Sequence[Group], pad: int, cfg: Distill
    ):
        """train, validation: with the targets of `cfg`; graded: validation lists with human grades, also to measure."""
        self._pad, self._cfg = pad, cfg
        self._train = [hand for group in train for hand in deal(group, cfg.documents_per_list)]
        self.sizes = [group.size for group in self._train]
        self.metric = "teacher_pair_accuracy" if cfg.targets == "teacher" else "pair_accuracy"
        self._validation = {self.metric: validation} | ({"pair_accuracy": graded} if graded else {})

    def batch(self, places: list[int]) -> Lists:
        return collate([self._train[place] for place in places], self._pad)

    def query(self, place: int) -> str:
        return self._train[place].query

    def loss(self, model: nn.Module, batch: Lists) -> Tensor:
        if not self._cfg.lexical:
            return self._ranking(raw_scores(model, batch.rows), batch)
        scores, missed = lexical.scores(model, batch.rows)
        return self._ranking(scores, batch) + self._cfg.lexical * missed

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Agreement with the targets, and with human grades, on queries that it was not trained on."""
        return {name: pair_accuracy(model, lists, self._pad) for name, lists in self._validation.items()}

    def _ranking(self, scores: Tensor, batch: Lists) -> Tensor:
        cfg, given = self._cfg, (batch.spread(scores), batch.targets, batch.real)
        if cfg.loss == "hybrid":
            return losses.hybrid(*given, cfg.alpha, cfg.beta, cfg.pairs, cfg.pair_share)
        if cfg.loss == "kl":
            return losses.kl(*given, cfg.temperature)
        return losses.margin(*given, cfg.margin) if cfg.loss == "margin" else losses.ranknet(*given)


def taught(
    labelled: Sequence[tuple[Mapping[str, Any], Sequence[float]]], tokens: Tokens, mean: float, deviation: float
) -> list[Group]:
    """Lists with the teacher's scores, standardised by the mean and deviation of the whole label set.

    labelled: (row of `groups`, raw teacher score of each of its documents).
    """
    return [
        Group(tokens.listed(group["query"], group["docs"]), standardised(scores, mean, deviation), group["query"])
        for group, scores in labelled
    ]


def standardised(scores: Sequence[float], mean: float, deviation: float) -> list[float]:
    """Raises `Refused` for a teacher that gives every document the same score."""
    check_scale(mean, deviation)
    return [(score - mean) / deviation for score in scores]


def check_scale(mean: float, deviation: float) -> None:
    """Raises `Refused` where a teacher's scores differ by no more than the rounding of float32, or are no numbers."""
    if not deviation > ROUNDING * abs(mean):
        raise Refused(
            f"distill: the teacher gives every document the same score, {mean:.6g}: nothing can be distilled from it"
        )


def asked(group: Mapping[str, Any], scores: Sequence[float | None]) -> Counter[str]:
    """How many pairs of one list the teacher was asked for, how many of them have no label, lists to learn from."""
    missing = [score is None for doc, score in zip(group["docs"], scores, strict=True) if doc["asked"]]
    known = sum(score is not None for score in scores)
    return Counter(pairs=len(missing), missing=sum(missing), lists=int(group["split"] == "train" and known > 1))


def check_labels(counts: Mapping[str, int], cfg: Distill) -> None:
    """Raises `Refused` where too many pairs have no label, or no training list has two; counts: sums of `asked`."""
    pairs, missing = counts.get("pairs", 0), counts.get("missing", 0)
    if missing > cfg.max_missing_share * pairs:
        raise Refused(
            f"distill: {missing} of {pairs} pairs ({missing / pairs:.1%}) have no label, more than "
            f"distill.max_missing_share {cfg.max_missing_share:g} allows"
        )
    if not counts.get("lists"):
        raise Refused(f"distill: no training list has two documents to compare by targets {cfg.targets}")
