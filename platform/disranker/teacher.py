"""The decoder: language model, then scorer with a last-token head; or an encoder that scores from the start."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from disranker import losses
from disranker.batches import Group, Lists, Rows, collate, deal
from disranker.contract import Form, Tokens
from disranker.recipe import Finetune
from disranker.recipe import Teacher as TeacherSettings

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel

VALIDATION_BATCH = 32  # items scored together when validating


def scratch(folder: str | Path, texts: Iterable[str], cfg: TeacherSettings, seed: int) -> None:
    """Writes a small Llama with random weights and a byte-level BPE tokenizer of the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=cfg.vocabulary, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((f" {text}" for text in texts), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    LlamaForCausalLM(llama(cfg, tokenizer.get_vocab_size(), tie_word_embeddings=True)).save_pretrained(folder)


def llama(cfg: TeacherSettings, vocabulary: int, **more: Any) -> "LlamaConfig":
    """A Llama of the recipe's size whose tokens begin with <pad>, <s>, </s>; `more` goes to the config as it is."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=cfg.width,
        intermediate_size=cfg.width * 3,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.heads,
        max_position_embeddings=cfg.max_tokens,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )


def copy(base: str, folder: str | Path, form: Form) -> None:
    """Writes a base model and its tokenizer to a folder, weights as float32 safetensors; a new head has seed 0."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    kind = AutoModelForCausalLM if form == "decoder" else AutoModelForSequenceClassification
    extra = {} if form == "decoder" else {"num_labels": 1}
    torch.manual_seed(0)
    kind.from_pretrained(base, dtype=torch.float32, use_safetensors=True, **extra).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def language_model(folder: str | Path) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return model


def scorer(folder: str | Path, tokens: Tokens, seed: int) -> "PreTrainedModel":
    """The model of a folder with a head that gives one raw logit; a new head where it has none."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32, use_safetensors=True
    )
    model.config.pad_token_id = tokens.contract.pad  # a decoder's score is taken at the last token that is not this
    return model


def save(model: "PreTrainedModel", tokens: Tokens, tokenizer_folder: str | Path, folder: str | Path) -> None:
    """A plain Hugging Face folder with its tokenizer and `contract.json`."""
    from transformers import AutoTokenizer

    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    # save_pretrained may write tokenizer.json anew; the contract holds the digest of the bytes it was made with.
    (Path(folder) / "tokenizer.json").write_bytes((Path(tokenizer_folder) / "tokenizer.json").read_bytes())
    tokens.contract.save(folder)


def raw_scores(model: nn.Module, rows: Rows, form: str) -> Tensor:
    """Raw logits [rows]."""
    logits: Tensor = model(**rows.inputs(form)).logits
    return logits.squeeze(-1)


class Texts(NamedTuple):
    """Padded rows with the tokens to learn."""

    rows: Rows
    weights: Tensor  # [rows]

    def to(self, device: torch.device) -> Self:
        return type(self)(self.rows.to(device), self.weights.to(device))


class Pretraining:
    """Query -> clicked title and summary; the query carries no loss."""

    def __init__(self, train: Sequence[dict[str, Any]], validation: Sequence[dict[str, Any]], tokens: Tokens):
        self._pad = tokens.contract.pad
        self._train, self._validation = (
            [(*row, w) for row, w in _examples(rows, tokens)] for rows in (train, validation)
        )
        self.sizes = [(1, len(ids)) for ids, _, _ in self._train]

    def batch(self, places: list[int]) -> Texts:
        return self._texts([self._train[place] for place in places])

    def loss(self, model: nn.Module, batch: Texts) -> Tensor:
        logits = model(**batch.rows.inputs("decoder")).logits
        learned = batch.rows.real & (batch.rows.segments == 1)
        return losses.language(logits, batch.rows.ids, learned, batch.weights)

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """Perplexity of held-out clicked documents, each token equal."""
        model.eval()
        total, count = 0.0, 0
        device = next(model.parameters()).device
        for start in range(0, len(self._validation), VALIDATION_BATCH):
            rows = [(ids, prompt, 1.0) for ids, prompt, _ in self._validation[start : start + VALIDATION_BATCH]]
            batch = self._texts(rows).to(device)
            learned = int((batch.rows.segments == 1).sum())
            total, count = total + self.loss(model, batch).item() * learned, count + learned
        model.train()
        return {"perplexity": math.exp(total / count)} if count else {}

    def _texts(self, rows: Sequence[tuple[list[int], int, float]]) -> Texts:
        return Texts(Rows.padded([row[:2] for row in rows], self._pad), torch.tensor([weight for _, _, weight in rows]))


class Ranking:
    """Lists with targets; the teacher's fine-tuning. `train` and `validation` are rows of the table `groups`."""

    def __init__(
        self, train: Sequence[dict[str, Any]], validation: Sequence[dict[str, Any]], tokens: Tokens, cfg: Finetune
    ):
        self._pad, self._form, self._cfg = tokens.contract.pad, tokens.contract.form, cfg
        self._train = [hand for group in _lists(train, tokens, cfg) for hand in deal(group, cfg.documents_per_list)]
        self._validation = _lists(validation, tokens, cfg)
        self.sizes = [group.size for group in self._train]

    def batch(self, places: list[int]) -> Lists:
        return collate([self._train[place] for place in places], self._pad)

    def loss(self, model: nn.Module, batch: Lists) -> Tensor:
        scores = batch.spread(raw_scores(model, batch.rows, self._form))
        if self._cfg.loss == "margin":
            return losses.margin(scores, batch.targets, batch.real, self._cfg.margin)
        loss: Tensor = getattr(losses, self._cfg.loss)(scores, batch.targets, batch.real)
        return loss

    def validate(self, model: nn.Module) -> dict[str, float]:
        return {"pair_accuracy": pair_accuracy(model, self._validation, self._pad, self._form)}


@torch.no_grad()
def pair_accuracy(model: nn.Module, groups: Sequence[Group], pad: int, form: str) -> float:
    """Share of in-query pairs with different targets that the model puts in the right order; NaN without any."""
    model.eval()
    right, total = 0, 0
    device = next(model.parameters()).device
    for group in groups:
        batch = collate([group], pad).to(device)
        good, all_pairs = losses.pair_accuracy(
            batch.spread(raw_scores(model, batch.rows, form)), batch.targets, batch.real
        )
        right, total = right + good, total + all_pairs
    model.train()
    return right / total if total else math.nan


def targets(docs: Sequence[dict[str, Any]], cfg: Finetune) -> list[float | None]:
    """What the teacher is to learn of each document of one list; None where nothing is known.

    Grades and attractiveness are different scales, so a list has one or the other: its grades if they differ and the
    recipe wants them. A random document counts as irrelevant on either.
    """
    random = [0.0 if doc["source"] == "random" else None for doc in docs]
    graded = [float(doc["grade"]) if doc["grade"] is not None else r for doc, r in zip(docs, random, strict=True)]
    enough = [(doc["impressions"] or 0) >= max(1, cfg.min_impressions) for doc in docs]
    clicked = [doc["attractiveness"] if known else r for doc, known, r in zip(docs, enough, random, strict=True)]
    judged = {doc["grade"] for doc in docs if doc["grade"] is not None}
    if cfg.labels == "grades" or (cfg.labels == "grades_then_evidence" and len(judged) > 1):
        return graded if judged else [None] * len(docs)
    return clicked


def _lists(groups: Sequence[dict[str, Any]], tokens: Tokens, cfg: Finetune) -> list[Group]:
    """Groups with at least two different targets, ready to train on."""
    found = []
    for group in groups:
        wanted = targets(group["docs"], cfg)
        known = [(doc, target) for doc, target in zip(group["docs"], wanted, strict=True) if target is not None]
        if len({target for _, target in known}) > 1:
            docs, values = zip(*known, strict=True)
            found.append(Group(tokens.listed(group["query"], docs), list(values)))
    return found


def _examples(rows: Sequence[dict[str, Any]], tokens: Tokens) -> Iterable[tuple[tuple[list[int], int], float]]:
    encoded = tokens.prompts([r["query"] for r in rows], [r["title"] for r in rows], [r["summary"] for r in rows])
    return zip(encoded, (row["weight"] for row in rows), strict=True)
