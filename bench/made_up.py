"""A store with just what the stage `score` reads, of any size, without training: a random teacher, made-up groups.

    python -m bench.made_up --folder runs/made-up [--small]      then: python -m jobs.score --recipe <what it prints>

A word of a text is one token, so that the length of a pair is known before any tokenizer has seen it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from disranker import recipe as recipes
from disranker import stages, tables
from disranker.contract import Tokens
from disranker.recipe import Recipe
from disranker.store import Store

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "\n")
SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnpqrstvwxz" for vowel in "aeiou"]
TITLE_TOKENS = 16
AROUND_DOCUMENT = 4  # <s>, two newlines, </s>
MOST = 1.25  # pairs are up to a quarter longer or shorter than the mean
LABELS_PER_WRITE = 50_000


@dataclass(frozen=True)
class Size:
    """Of the teacher; width over heads is a multiple of 32, which vLLM's attention on CPUs needs."""

    vocabulary: int = 16_384
    width: int = 384
    layers: int = 8
    heads: int = 6


FULL = Size()
TINY = Size(vocabulary=512, width=32, layers=1, heads=1)


@dataclass(frozen=True)
class Shape:
    """Of the lists. The instruction is the same at the start of every query and comes on top of `pair_tokens`."""

    documents: int = 20
    pair_tokens: int = 100  # mean
    query_tokens: int = 8
    instruction_tokens: int = 0

    @property
    def max_tokens(self) -> int:
        return self.instruction_tokens + round(self.pair_tokens * MOST)

    def summary_tokens(self, rng: np.random.Generator) -> int:
        pair = rng.integers(round(self.pair_tokens * (2 - MOST)), round(self.pair_tokens * MOST) + 1)
        return max(1, int(pair) - self.query_tokens - TITLE_TOKENS - AROUND_DOCUMENT)


PLAIN = Shape()


def make(
    folder: Path,
    queries: range,
    size: Size = FULL,
    shape: Shape = PLAIN,
    score: dict[str, Any] | None = None,
    seed: int = 1,
    parts: int = 8,
) -> Path:
    """The recipe of a store in `folder`. Made again with other queries it has other groups and keeps its labels.

    Query n has the same texts in every store of the seed; `score` are settings of that stage.
    """
    content = settings(folder, size, shape, score or {}, seed, parts)
    recipe = recipes.parse(content)
    store = Store(recipe.root)
    for artefact in ("teacher", "groups"):
        store.clear(artefact)
    write_teacher(Path(store.at("teacher")), recipe, seed)
    write_groups(store, queries, shape, words(size.vocabulary), seed, parts)
    commit(recipe, store, "teacher", "groups")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def settings(
    folder: Path, size: Size, shape: Shape, score: dict[str, Any], seed: int, parts: int
) -> dict[str, dict[str, Any] | Any]:
    teacher = {"vocabulary": size.vocabulary, "width": size.width, "layers": size.layers, "heads": size.heads}
    limits = {
        "max_query_tokens": shape.instruction_tokens + shape.query_tokens,
        "max_title_tokens": TITLE_TOKENS,
        "max_tokens": shape.max_tokens,
    }
    return {
        "root": str(folder.absolute() / "run"),
        "seed": seed,
        "ingest": {"parts": parts},
        "teacher": teacher | limits,
        "finetune": {"tokens_per_batch": 6 * shape.max_tokens},  # one list must fit, though none is trained on
        "score": score,
    }


def words(vocabulary: int) -> np.ndarray:
    """Distinct words of three syllables; with the special tokens they fill the vocabulary."""
    if vocabulary <= len(SPECIALS) or vocabulary > len(SYLLABLES) ** 3:
        raise ValueError(f"vocabulary {vocabulary}: between {len(SPECIALS) + 1} and {len(SYLLABLES) ** 3}")
    base = len(SYLLABLES)
    spelled = (
        SYLLABLES[n % base] + SYLLABLES[n // base % base] + SYLLABLES[n // base**2]
        for n in range(vocabulary - len(SPECIALS))
    )
    return np.array(list(spelled), dtype=object)


def write_teacher(folder: Path, recipe: Recipe, seed: int) -> None:
    """A Llama with random weights, a score head wide enough that pairs differ, tokenizer, contract."""
    import torch
    from transformers import LlamaForSequenceClassification
    from transformers.utils import logging

    from disranker import teacher

    logging.disable_progress_bar()
    cfg = recipe.teacher
    folder.mkdir(parents=True, exist_ok=True)
    _tokenizer(words(cfg.vocabulary)).save_pretrained(folder)
    torch.manual_seed(seed)
    # Weights as wide as in a trained model: wider ones would blow up what rounding leaves.
    config = teacher.llama(cfg, cfg.vocabulary, initializer_range=0.4 / cfg.width**0.5, num_labels=1)
    model = LlamaForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight, std=1 / cfg.width**0.5)
    model.save_pretrained(folder)
    Tokens.agree(folder, "decoder", cfg).contract.save(folder)


def write_groups(store: Store, queries: range, shape: Shape, vocabulary: np.ndarray, seed: int, parts: int) -> None:
    """The table `groups`, one part in memory at a time."""
    instruction = _text(np.random.default_rng(seed), vocabulary, shape.instruction_tokens)
    asked = [f"{instruction} {_query(n, shape, vocabulary, seed)[0]}".strip() for n in queries]
    part_of = tables.part_of(asked, parts)
    for part in range(parts):
        places = np.flatnonzero(part_of == part)
        rows = [group(queries[place], asked[place], shape, vocabulary, seed) for place in places]
        store.write("groups", part, rows)


def group(number: int, query: str, shape: Shape, vocabulary: np.ndarray, seed: int) -> dict[str, Any]:
    """Query `number` with its list, as the table `groups` holds it."""
    _, rng = _query(number, shape, vocabulary, seed)
    nothing = dict.fromkeys(("grade", "attractiveness", "impressions"))
    docs = [
        {
            "doc_id": f"{number}-{place}",
            "title": _text(rng, vocabulary, TITLE_TOKENS),
            "summary": _text(rng, vocabulary, shape.summary_tokens(rng)),
            "source": "random",
            "asked": True,
        }
        | nothing
        for place in range(shape.documents)
    ]
    return {"query": query, "split": "train", "band": "head", "docs": docs}


def commit(recipe: Recipe, store: Store, *artefacts: str) -> None:
    """Makes artefacts stand, with the fingerprints that the stages of the recipe expect."""
    for step in stages.steps(recipe):
        for artefact in set(step.stage.writes) & set(artefacts):
            manifest = {"artefact": artefact, "stage": step.stage.name, "fingerprint": step.fingerprint}
            manifest |= {"settings": step.settings, "reads": step.reads, "inputs": step.inputs, "counts": {}}
            store.commit(artefact, manifest)


def label(recipe: Recipe, labels: int, seed: int = 1) -> None:
    """Gives the store that many labels with made-up scores: of all pairs it has, and of others up to the number."""
    from jobs.score import Teacher

    store = Store(recipe.root)
    teacher = Teacher.of(recipe, store)
    keys: list[str] = []
    for part in range(recipe.ingest.parts):
        for listed in store.read("groups", part=part).to_pylist():
            keys += [key for key, _, _ in teacher.keyed(listed)]
    rng = np.random.default_rng(seed)
    keys += [row.tobytes().hex() for row in rng.integers(0, 256, (max(0, labels - len(keys)), 16), np.uint8)]
    for start in range(0, len(keys), LABELS_PER_WRITE):
        batch = keys[start : start + LABELS_PER_WRITE]
        teacher.labels.write(batch, rng.normal(size=len(batch)).tolist())
    teacher.labels.merge()


def _tokenizer(vocabulary: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: number for number, word in enumerate([*SPECIALS, *vocabulary])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _query(number: int, shape: Shape, vocabulary: np.ndarray, seed: int) -> tuple[str, np.random.Generator]:
    """The words of a query without the instruction, and what draws its list."""
    rng = np.random.default_rng([seed, number])
    return _text(rng, vocabulary, shape.query_tokens), rng


def _text(rng: np.random.Generator, vocabulary: np.ndarray, tokens: int) -> str:
    return " ".join(vocabulary[rng.integers(len(vocabulary), size=tokens)])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.made_up", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--small", action="store_true", help="a tiny teacher and 10 queries")
    parser.add_argument("--queries", type=int, help="default 1,000, or 10")
    parser.add_argument("--pair-tokens", type=int, default=Shape.pair_tokens)
    parser.add_argument("--instruction-tokens", type=int, default=Shape.instruction_tokens)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(argv)
    queries = range(given.queries or (10 if given.small else 1000))
    shape = Shape(pair_tokens=given.pair_tokens, instruction_tokens=given.instruction_tokens)
    recipe = make(given.folder, queries, TINY if given.small else FULL, shape, seed=given.seed)
    print(json.dumps({"recipe": str(recipe), "pairs": len(queries) * shape.documents}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
