"""One saved teacher, three who score it: the trainer, plain transformers, and vLLM behind the actor of the stage."""

import itertools
import multiprocessing
import os
import random
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from builders import TEXTS
from scipy.stats import kendalltau
from test_engine import WORDS, save_student
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from disranker import contract, teacher
from disranker.batches import Rows
from disranker.contract import Tokens
from disranker.recipe import Score, Teacher
from disranker.store import Store
from jobs import scorer

# Opening, query and title fill one block of the prefix cache; a head has 32 numbers, as vLLM's attention on CPUs wants.
LIMITS = Teacher(width=64, layers=2, heads=2, max_query_tokens=6, max_title_tokens=24, max_tokens=40)
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
SPREAD = {"initializer_range": 0.14}  # seven times what is usual: weights of chance then tell texts apart
# Of the range of scores: bfloat16 keeps 8 bits, so that each of some 20 steps is off by up to 1 in 512, to either side.
BFLOAT16 = 0.02


def bpe(folder, *order, **names):
    """A byte-level tokenizer whose first ids are the special tokens in this order; gives the size of its vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(order), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([f" {text}" for text in TEXTS], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return tokenizer.get_vocab_size()


def llama(folder):
    size = bpe(folder, "<pad>", "<s>", "</s>", pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    LlamaForCausalLM(teacher.llama(LIMITS, size, **SPREAD)).save_pretrained(folder)


def qwen3(folder):
    """Norms of queries and keys, two heads on one of keys, nothing to open a text with; pad comes right before eos."""
    size = bpe(folder, "<|endoftext|>", "<|im_end|>", pad_token="<|endoftext|>", eos_token="<|im_end|>")
    heads = {"num_key_value_heads": 1, "head_dim": 32}
    Qwen3ForCausalLM(Qwen3Config(vocab_size=size, eos_token_id=1, **heads, **SHAPE, **SPREAD)).save_pretrained(folder)


def bert(folder):
    save_student(folder, **SHAPE, **SPREAD)


def roberta(folder):
    """The place of the first token is 2, one more than the id of the padding."""
    names = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>"}
    size = bpe(folder, *names.values(), **names)
    positions = {"max_position_embeddings": LIMITS.max_tokens + 2, "type_vocab_size": 1}
    RobertaModel(RobertaConfig(vocab_size=size, **positions, **SHAPE, **SPREAD)).save_pretrained(folder)


def modernbert(folder):
    """Scores the mean of all tokens; in every second layer a token sees 8 to each side."""
    names = {"cls_token": "[CLS]", "pad_token": "[PAD]", "sep_token": "[SEP]"}
    size = bpe(folder, *names.values(), **names)
    config = ModernBertConfig(
        vocab_size=size, pad_token_id=1, bos_token_id=0, eos_token_id=2, cls_token_id=0, sep_token_id=2,
        max_position_embeddings=64, local_attention=16, layer_types=["full_attention", "sliding_attention"],
        classifier_pooling="mean", **SHAPE, **SPREAD,
    )  # fmt: skip
    ModernBertModel(config).save_pretrained(folder)


BASES = {
    "llama last": llama,
    "llama mean": llama,
    "qwen3 last": qwen3,
    "bert": bert,
    "roberta": roberta,
    "modernbert": modernbert,
}
UNICODE = ["红色 跑鞋", "👟🏃🏽‍♀️ shoe", "sa\u0308le cafe\u0301 Z\u0335\u0321", "حذاء أحمر"]
UNICODE += ["נעל", "ﬁt ½ Ⅷ", "a\u200bb\x00c\u00a0d"]
TYPED = ["</s>", "[SEP] shoe", "<pad>", "red <s> [CLS]", "[PAD] [MASK]", "<|im_end|> <|endoftext|>"]


def fields(tokens):
    """Queries, titles and summaries."""
    uncut = Tokens(tokens.contract.model_copy(update={"max_tokens": 1000}), tokens._tokenizer)
    draw = random.Random(0)

    def words(count):
        return " ".join(draw.choices(WORDS, k=count))

    found = list(itertools.product(["red shoe", ""], ["rain jacket", ""], ["warm light", ""]))
    for query, title in ((words(6), words(24)), (words(1), words(2))):
        by_length = {}
        for count in range(LIMITS.max_tokens + 3):
            texts = query, title, " ".join(WORDS[n % len(WORDS)] for n in range(count))
            by_length[len(uncut.pairs(*([text] for text in texts))[0])] = texts
        found += [by_length[length] for length in range(LIMITS.max_tokens - 3, LIMITS.max_tokens + 4)]
    found += [("red shoe", text, text) for text in UNICODE] + [(text, "shoe", "") for text in UNICODE]
    found += [("red shoe", text, text) for text in TYPED] + [(text, "shoe", "") for text in TYPED]
    return found + [("men", words(draw.randint(1, 10)), words(draw.randint(0, 20))) for _ in range(16)]


class Saved(NamedTuple):
    """A teacher as the fine-tuning leaves it, with texts to score."""

    name: str
    root: str  # of the store
    tokens: Tokens
    model: Any  # as the trainer knows it
    rows: list[tuple[list[int], int]]

    @property
    def folder(self):
        return f"{self.root}/teacher"


@pytest.fixture(scope="module", params=BASES)
def saved(request, tmp_path_factory):
    base, root = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("run")
    torch.manual_seed(1)
    BASES[request.param](base)
    form = contract.form(str(base))
    if form == "encoder":
        teacher.copy(str(base), base := tmp_path_factory.mktemp("copy"), form, LIMITS.max_tokens)
    pooling = "mean" if request.param.endswith("mean") else "last"
    tokens = Tokens.agree(base, form, LIMITS.model_copy(update={"pooling": pooling}))
    model, rows = teacher.scorer(base, tokens, seed=1).eval(), tokens.prompts(*zip(*fields(tokens), strict=True))
    turn(model, rows, pooling)
    teacher.save(model, tokens, base, root / "teacher")
    tokens = Tokens.load(root / "teacher")
    return Saved(request.param, str(root), tokens, teacher.scorer(root / "teacher", tokens, seed=2).eval(), rows)


@torch.no_grad()
def turn(model, rows, pooling):
    """Turns the head to where the texts differ most, as training would: by a head of chance they score much alike."""
    head = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)][-1]
    seen = []  # for each text what comes to the head: of all tokens, or of the one that is scored
    hook = head.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, -2)))
    for row in rows:
        teacher.raw_scores(model, Rows.padded([row], 0))
    hook.remove()
    texts = torch.stack([tokens.mean(0) if pooling == "mean" else tokens[-1] for tokens in seen])
    texts -= texts.mean(0)
    widest = torch.linalg.svd(texts)[2][0]
    head.weight.copy_(widest / (texts @ widest).std())


@torch.no_grad()
def trained(saved, batch):
    """Scores by the code that trains, in padded batches."""
    pad = saved.tokens.contract.pad
    starts = range(0, len(saved.rows), batch)
    padded = (Rows.padded(saved.rows[start : start + batch], pad) for start in starts)
    return torch.cat([teacher.raw_scores(saved.model, rows) for rows in padded]).numpy()


@pytest.fixture(scope="module")
@torch.no_grad()
def plain(saved):
    """Scores by transformers alone, text after text, from the folder that was saved."""
    model = AutoModelForSequenceClassification.from_pretrained(saved.folder, dtype=torch.float32).eval()

    def score(ids, prompt):
        given = {"input_ids": torch.tensor([ids])}
        if saved.name == "bert":
            given["token_type_ids"] = torch.tensor([[0] * prompt + [1] * (len(ids) - prompt)])
        if saved.name == "llama mean":
            return model.score(model.model(**given).last_hidden_state.mean(1)).item()
        return model(**given).logits.item()

    return np.array([score(*row) for row in saved.rows])


class Said(NamedTuple):
    together: np.ndarray
    alone: np.ndarray
    cached: int  # of all tokens that were scored together
    architecture: str


@pytest.fixture(scope="module")
def vllm():
    """A process in which one engine after another answers; its end frees what they leave behind."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), quietly) as process:
        yield lambda *asked: process.submit(answer, *asked).result(timeout=300)


def quietly():
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def answer(root, rows, dtype):
    """The scores of the actor of the stage, in steps of 128 tokens; first all together, then each alone."""
    from vllm.distributed import cleanup_dist_env_and_memory

    actor = scorer.Scorer(Store(root), "t", Score(dtype=dtype, max_batched_tokens=128))
    asked = [{"ids": ids, "prompt": prompt} for ids, prompt in rows]
    actor.cached = 0
    together, cached = np.array(actor.scores(asked)), actor.cached
    alone = np.array([actor.scores([row])[0] for row in asked])
    said = Said(together, alone, cached, actor.engine.llm_engine.model_config.architecture)
    del actor
    cleanup_dist_env_and_memory()
    return said


@pytest.fixture(scope="module")
def float32(saved, vllm):
    return vllm(saved.root, saved.rows, "float32")


def test_more_than_50_pairs_of_3_ids_up_to_the_limit_of_40_differ_in_score(saved, plain):
    lengths = [len(ids) for ids, _ in saved.rows]
    uncut = Tokens(saved.tokens.contract.model_copy(update={"max_tokens": 1000}), saved.tokens._tokenizer)
    would = {len(ids) for ids in uncut.pairs(*zip(*fields(saved.tokens), strict=True))}
    assert {37, 38, 39, 40, 41, 42, 43} <= would and min(lengths) <= 3
    assert max(lengths) == 40 and lengths.count(40) >= 8 and {37, 38, 39} < set(lengths)
    assert len({tuple(ids) for ids, _ in saved.rows}) > 50 and plain.std() == pytest.approx(1, abs=0.05)


def test_the_trainer_and_transformers_agree_to_4_digits(saved, plain):
    assert trained(saved, 32) == pytest.approx(plain, abs=1e-4)


def test_a_text_has_one_score_alone_and_in_a_padded_batch_of_32(saved):
    assert trained(saved, 32) == pytest.approx(trained(saved, 1), abs=1e-5)


def test_vllm_and_transformers_agree_to_4_digits_together_and_alone(plain, float32):
    assert float32.together == pytest.approx(plain, abs=1e-4)
    assert float32.alone == pytest.approx(plain, abs=1e-4)


def test_only_a_score_of_the_last_token_takes_a_common_start_from_the_cache(saved, float32):
    assert (float32.cached > 0) is saved.name.endswith("last")


def test_vllm_runs_the_architecture_that_was_saved(saved, float32):
    assert [float32.architecture] == saved.model.config.architectures


def test_bfloat16_stays_near_and_keeps_the_order(saved, plain, vllm):
    found = vllm(saved.root, saved.rows, "bfloat16").together
    assert np.abs(found - plain).max() < BFLOAT16 * np.ptp(plain)
    once = list({tuple(ids): place for place, (ids, _) in enumerate(saved.rows)}.values())
    assert kendalltau(found[once], plain[once]).statistic >= 0.99


@pytest.mark.parametrize("saved", ["llama last", "llama mean", "qwen3 last"], indirect=True)
@torch.no_grad()
def test_padding_beside_the_closing_token_changes_no_score_of_a_decoder(saved, plain):
    (ids, prompt), pad = saved.rows[0], saved.tokens.contract.pad
    rows = Rows.padded([(ids, prompt), (ids + ids, prompt)], pad)
    assert ids[-1] == saved.tokens.contract.close and set(rows.ids[0, len(ids) :].tolist()) == {pad}
    assert teacher.raw_scores(saved.model, rows)[0].item() == pytest.approx(plain[0], abs=1e-5)


@pytest.mark.parametrize("saved", ["llama last", "qwen3 last"], indirect=True)
@torch.no_grad()
def test_a_decoder_that_takes_another_token_for_padding_is_scored_elsewhere(saved, plain):
    model = AutoModelForSequenceClassification.from_pretrained(saved.folder, dtype=torch.float32).eval()
    ids, right = saved.rows[0][0], saved.tokens.contract

    def score(ids, pad):
        model.config.pad_token_id = pad
        return model(input_ids=torch.tensor([ids])).logits.item()

    assert score([*ids, right.pad], right.pad) == pytest.approx(plain[0], abs=1e-5)
    assert abs(score([*ids, right.pad], right.close) - plain[0]) > 0.01  # at the padding
    assert abs(score(ids, right.close) - plain[0]) > 0.01  # one too early
