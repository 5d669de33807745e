"""The decoder: language model, then scorer with a last-token head; or an encoder that scores from the start."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import embedding

from disranker import contract, losses, spread
from disranker.batches import Group, Lists, Rows, collate, deal
from disranker.contract import Form, Tokens
from disranker.recipe import Finetune
from disranker.recipe import Teacher as TeacherSettings

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel

PIECES = 8  # of a batch, by length
LEAST_TOKENS = 512  # of a piece: fewer would not fill a matrix product


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


def copy(base: str, folder: str | Path, form: Form, max_tokens: int) -> None:
    """Writes a base model and its tokenizer to a folder, weights as float32 safetensors; a new head has seed 0.

    Raises `Refused` where it is not made for texts of so many tokens.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    kind = AutoModelForCausalLM if form == "decoder" else AutoModelForSequenceClassification
    extra = {} if form == "decoder" else {"num_labels": 1, "ignore_mismatched_sizes": True}
    torch.manual_seed(0)
    model = kind.from_pretrained(base, dtype=torch.float32, use_safetensors=True, **extra)
    contract.check_positions(model, max_tokens, "teacher")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def language_model(folder: str | Path) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return model


def scorer(folder: str | Path, tokens: Tokens, seed: int) -> "PreTrainedModel | MeanPooled":
    """The model of a folder with a head that gives one raw logit; a new head where it has none."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32, use_safetensors=True
    )
    model.config.pad_token_id = tokens.contract.pad  # a decoder's score is taken at the last token that is not this
    return MeanPooled(model) if tokens.contract.pooling == "mean" else model


class Scored(NamedTuple):
    """A tuple, so that FSDP finds the tensor in it: it gathers weights again when the gradient comes by."""

    logits: Tensor  # [rows, 1]


class MeanPooled(nn.Module):
    """A decoder that scores the mean of all its tokens, where transformers scores the last one alone."""

    def __init__(self, model: "PreTrainedModel"):
        super().__init__()
        self.model: Any = model
        self.config = model.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Scored:
        hidden = self.model.base_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        # The head is one linear layer, so that the mean of its scores is the score of the mean.
        scores = self.model.score(hidden).squeeze(-1).float().masked_fill(attention_mask == 0, 0)
        return Scored(scores.sum(1, keepdim=True) / attention_mask.sum(1, keepdim=True))


def save(
    model: "PreTrainedModel | MeanPooled", tokens: Tokens, tokenizer_folder: str | Path, folder: str | Path
) -> None:
    """A plain Hugging Face folder with its tokenizer and `contract.json`."""
    from transformers import AutoTokenizer

    hugging_face(model).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    # save_pretrained may write tokenizer.json anew; the contract holds the digest of the bytes it was made with.
    (Path(folder) / "tokenizer.json").write_bytes((Path(tokenizer_folder) / "tokenizer.json").read_bytes())
    tokens.contract.save(folder)


def hugging_face(model: nn.Module) -> "PreTrainedModel":
    """The model as transformers knows it, out of what scores or trains it our way."""
    from transformers import PreTrainedModel

    return cast(PreTrainedModel, model if isinstance(model, PreTrainedModel) else model.model)


def raw_scores(model: nn.Module, rows: Rows) -> Tensor:
    """Raw logits [rows], float32."""
    return in_pieces(model, rows, lambda piece: _logits(model, piece))


def in_pieces(model: nn.Module, rows: Rows, compute: Callable[[Rows], Tensor]) -> Tensor:
    """What is computed with the model of each row, [rows, ...].

    Rows of like length go through the model together: the documents of one list differ in length, and padding all to
    the longest would be a third of the work. Under FSDP, where all workers must call the model equally often, they go
    at once.
    """
    order = rows.real.sum(1).argsort()
    most = min(PIECES, len(order), int(rows.real.sum()) // LEAST_TOKENS)
    pieces = 1 if isinstance(model, FSDPModule) else max(1, most)
    with _looked_up_once(model, rows.ids) if pieces > 1 and torch.is_grad_enabled() else nullcontext():
        found = torch.cat([compute(rows.some(places)) for places in order.tensor_split(pieces)])
    return found[order.argsort()]


@contextmanager
def _looked_up_once(model: nn.Module, ids: Tensor) -> Iterator[None]:
    """Within, the embeddings of all tokens of a batch are looked up once.

    A look-up has a gradient as large as the whole vocabulary; one for each piece was a tenth of a step.
    """
    table: Any = hugging_face(spread.plain(model)).get_input_embeddings()
    known = ids.unique()
    rows = table(known)
    place = torch.zeros(table.num_embeddings, dtype=torch.long, device=ids.device)
    place[known] = torch.arange(len(known), device=ids.device)
    table.forward = lambda ids: embedding(place[ids], rows)
    try:
        yield
    finally:
        del table.forward


def _logits(model: nn.Module, rows: Rows) -> Tensor:
    logits: Tensor = model(**rows.inputs(spread.plain(model))).logits
    return logits.squeeze(-1).float()


class Ranking:
    """Lists with targets; the teacher's fine-tuning. `train` and `validation` are rows of the table `groups`."""

    metric, larger_is_better = "pair_accuracy", True

    def __init__(
        self, train: Sequence[dict[str, Any]], validation: Sequence[dict[str, Any]], tokens: Tokens, cfg: Finetune
    ):
        self._pad, self._cfg = tokens.contract.pad, cfg
        self._train = [hand for group in lists(train, tokens, cfg) for hand in deal(group, cfg.documents_per_list)]
        self._validation = lists(validation, tokens, cfg)
        self.sizes = [group.size for group in self._train]

    def batch(self, places: list[int]) -> Lists:
        return collate([self._train[place] for place in places], self._pad)

    def query(self, place: int) -> str:
        return self._train[place].query

    def loss(self, model: nn.Module, batch: Lists) -> Tensor:
        scores = batch.spread(raw_scores(model, batch.rows))
        if self._cfg.loss == "margin":
            return losses.margin(scores, batch.targets, batch.real, self._cfg.margin, self._cfg.margin_by_gap)
        loss: Tensor = getattr(losses, self._cfg.loss)(scores, batch.targets, batch.real)
        return loss

    def validate(self, model: nn.Module) -> dict[str, float]:
        return {"pair_accuracy": pair_accuracy(model, self._validation, self._pad)}


@torch.no_grad()
def pair_accuracy(model: nn.Module, groups: Sequence[Group], pad: int) -> float:
    """Share of in-query pairs with different targets that the model puts in the right order; NaN without any."""
    model.eval()
    device = next(model.parameters()).device
    scored = [(group.targets, raw_scores(model, Rows.padded(group.rows, pad).to(device)).tolist()) for group in groups]
    model.train()
    share = in_order(scored)
    return math.nan if share is None else share


def in_order(lists: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float | None:
    """Share of in-query pairs with different targets whose scores are in their order; None without any.

    lists: (targets, scores) of each; a tie in scores is wrong.
    """
    right = total = 0
    for targets, scores in lists:
        given, wanted = torch.tensor([scores]), torch.tensor([targets])
        good, pairs = losses.pair_accuracy(given, wanted, torch.ones_like(wanted, dtype=torch.bool))
        right, total = right + good, total + pairs
    return right / total if total else None


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


def comparable(docs: Sequence[dict[str, Any]], cfg: Finetune) -> bool:
    """Whether two documents of one list have different targets."""
    return len(set(targets(docs, cfg)) - {None}) > 1


def lists(groups: Sequence[dict[str, Any]], tokens: Tokens, cfg: Finetune) -> list[Group]:
    """Groups with at least two different targets, ready to train on."""
    found = []
    for group in groups:
        wanted = targets(group["docs"], cfg)
        known = [(doc, target) for doc, target in zip(group["docs"], wanted, strict=True) if target is not None]
        if len({target for _, target in known}) > 1:
            docs, values = zip(*known, strict=True)
            found.append(Group(tokens.listed(group["query"], docs), list(values), group["query"]))
    return found
