"""(query, title, summary) -> token ids, the same in training, scoring and serving; and the digest that proves it.

Decoder:  [bos] query \\n title \\n summary </s>     the last token alone has seen all before it
Encoder:  [CLS] query [SEP] title summary [SEP]    segment 0 to the first [SEP], then 1
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import pydantic
from tokenizers import Tokenizer

from disranker.recipe import Refused, Student, Teacher, digest

Form = Literal["decoder", "encoder"]

FILE = "contract.json"
VERSION = 1  # of the templates above; a change makes old labels and checkpoints unusable, and says so


class Contract(pydantic.BaseModel):
    """What decides the ids of a text. Saved beside every model as `contract.json`."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    version: int = VERSION
    form: Form
    tokenizer: str  # digest of tokenizer.json
    pad: int
    open: int | None  # bos of a decoder (None if it has none), [CLS] of an encoder
    close: int  # </s> or [SEP]
    max_query_tokens: int
    max_title_tokens: int
    max_tokens: int
    pooling: Literal["last", "mean"] | None  # which tokens of a decoder its score is of; an encoder has its own way

    @property
    def digest(self) -> str:
        return digest(self.model_dump())

    def unlike(self, other: "Contract") -> str:
        """Where another differs, with both values."""
        ours, theirs = self.model_dump(), other.model_dump()
        return ", ".join(f"{name} {ours[name]} -> {theirs[name]}" for name in ours if ours[name] != theirs[name])

    def save(self, folder: str | Path) -> None:
        (Path(folder) / FILE).write_text(self.model_dump_json(indent=1))


class Tokens:
    """A contract with its tokenizer: texts in, ids out."""

    def __init__(self, contract: Contract, tokenizer: Tokenizer):
        self.contract = contract
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # "[SEP]" typed by a user is text, not a border between fields
        self._tokenizer = tokenizer
        self._newline = tokenizer.encode("\n", add_special_tokens=False).ids if contract.form == "decoder" else []

    def __reduce__(self) -> tuple[type["Tokens"], tuple[Contract, Tokenizer]]:
        # A tokenizer forgets on its way to another process what is set above.
        return Tokens, (self.contract, self._tokenizer)

    @classmethod
    def agree(cls, folder: str | Path, form: Form, limits: Teacher | Student) -> Self:
        """The contract of the tokenizer in `folder` under the limits of the recipe.

        Raises `Refused` where the tokenizer has no token to close a text with, or pads with that very token: the last
        token that is not padding carries the score, and would be lost.
        """
        from transformers import AutoTokenizer

        named = AutoTokenizer.from_pretrained(folder)
        opening, closing = ("cls_token", "sep_token") if form == "encoder" else ("bos_token", "eos_token")
        opened, closed = (getattr(named, f"{name}_id") for name in (opening, closing))
        _check_ends(folder, closing, closed, named.pad_token_id)
        pooling = limits.pooling if isinstance(limits, Teacher) else None
        if form == "encoder" and pooling == "mean":
            raise Refused(f"teacher.pooling mean is for decoders; {folder} holds an encoder")
        contract = Contract(
            form=form,
            tokenizer=file_digest(Path(folder) / "tokenizer.json"),
            pad=named.pad_token_id,
            open=opened,
            close=closed,
            max_query_tokens=limits.max_query_tokens,
            max_title_tokens=limits.max_title_tokens,
            max_tokens=limits.max_tokens,
            pooling=pooling if form == "decoder" else None,
        )
        return cls(contract, Tokenizer.from_file(str(Path(folder) / "tokenizer.json")))

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The contract saved with a model. Raises `Refused` if it was made for another tokenizer than is here."""
        contract = Contract.model_validate_json((Path(folder) / FILE).read_text())
        found = file_digest(Path(folder) / "tokenizer.json")
        if (contract.version, contract.tokenizer) != (VERSION, found):
            raise Refused(
                f"{folder}: {FILE} was made for tokenizer {contract.tokenizer} and template {contract.version}, "
                f"but here are tokenizer {found} and template {VERSION}"
            )
        return cls(contract, Tokenizer.from_file(str(Path(folder) / "tokenizer.json")))

    def pairs(self, queries: Sequence[str], titles: Sequence[str], summaries: Sequence[str]) -> list[list[int]]:
        """Ids of each (query, title, summary), between 2 and `max_tokens` long and always closed."""
        return [ids for ids, _ in self.prompts(queries, titles, summaries)]

    def prompts(
        self, queries: Sequence[str], titles: Sequence[str], summaries: Sequence[str]
    ) -> list[tuple[list[int], int]]:
        """As `pairs`, with the number of ids of the query: the prompt of the language model, or segment 0."""
        encoded = (self.ids(texts) for texts in (queries, titles, summaries))
        return [self.pair(*fields) for fields in zip(*encoded, strict=True)]

    def listed(self, query: str, docs: Sequence[dict[str, Any]]) -> list[tuple[list[int], int]]:
        """As `prompts`, for the documents of one query: rows with `title` and `summary`."""
        return self.prompts([query] * len(docs), [doc["title"] for doc in docs], [doc["summary"] for doc in docs])

    def passages(self, texts: Sequence[str]) -> list[list[list[int]]]:
        """Ids of each text alone, in pieces of at most `max_tokens`, each opened and closed; none of an empty text."""
        c = self.contract
        opened = [] if c.open is None else [c.open]
        room = c.max_tokens - len(opened) - 1
        return [
            [[*opened, *ids[start : start + room], c.close] for start in range(0, len(ids), room)]
            for ids in self.ids(texts)
        ]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text as a field of a pair, whole and without special tokens."""
        # A leading space gives a word the same ids at the start of a field as inside it (byte-level vocabularies).
        spaced = [f" {text}" if text else "" for text in texts] if self.contract.form == "decoder" else list(texts)
        return [encoding.ids for encoding in self._tokenizer.encode_batch(spaced, add_special_tokens=False)]

    def pair(self, query: list[int], title: list[int], summary: list[int]) -> tuple[list[int], int]:
        """As `prompts`, from the ids of the fields of one pair."""
        c = self.contract
        separator = self._newline if c.form == "decoder" else [c.close]
        prompt = ([] if c.open is None else [c.open]) + query[: c.max_query_tokens] + separator
        document = title[: c.max_title_tokens]
        if summary:
            document = document + self._newline + summary
        return [*(prompt + document)[: c.max_tokens - 1], c.close], len(prompt)

    def cuts(self, query: list[int], title: list[int], summary: list[int]) -> bool:
        """Whether `pair` leaves some of these ids out."""
        c = self.contract
        if len(query) > c.max_query_tokens or len(title) > c.max_title_tokens:
            return True
        around = (c.open is not None) + len(self._newline) * bool(summary) + len(self._newline or [c.close]) + 1
        return around + len(query) + len(title) + len(summary) > c.max_tokens


def _check_ends(folder: str | Path, closing: str, closed: int | None, pad: int | None) -> None:
    """Raises `Refused` where a text cannot be closed, or padding cannot be told from the token that closes it."""
    if closed is None:
        fault, mend = f"no {closing}, which closes every text", f"set {closing}"
    elif pad is None:
        fault, mend = "no pad_token", f"set pad_token, to another token than {closing} ({closed})"
    elif pad == closed:
        fault, mend = f"one token ({pad}) for pad_token and {closing}", "set pad_token to another"
    else:
        return
    raise Refused(f"tokenizer in {folder} has {fault}; {mend} in its tokenizer_config.json")


def form(base: str) -> Form:
    """What kind of model lies in a folder or under a hub name.

    Raises `Refused` if none does, or one that could be a decoder but has lost its language head.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if base == "scratch":
        return "decoder"
    try:
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise Refused(
            f"teacher.base {base}: no model there ({str(error).splitlines()[0]}); give a folder, a hub name, or scratch"
        ) from error
    architectures = config.architectures or []
    if set(architectures) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):  # not all are called *ForCausalLM
        return "decoder"
    if config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise Refused(
            f"teacher.base {base}: {', '.join(architectures) or config.model_type} has no causal head to pre-train "
            "with, and is no encoder; give a causal language model, or one of the kind of BERT"
        )
    return "encoder"


def check_positions(model: Any, max_tokens: int, section: str) -> None:
    """Raises `Refused` where a Hugging Face model has no position for the last token of a text of `max_tokens`.

    A model that counts no positions, as Bloom, has no limit.
    """
    if (positions := getattr(model.config, "max_position_embeddings", None)) is None:
        return
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    # RoBERTa counts positions from one more than the id of its padding.
    before = next((table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None), 0)
    if max_tokens > (most := positions - before):
        raise Refused(f"{section}.max_tokens {max_tokens}: the model of {section}.base has {most} positions")


def file_digest(path: str | Path) -> str:
    """A short, stable name for the content of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
