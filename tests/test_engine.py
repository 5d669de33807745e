import random
import string

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

from disranker.contract import Tokens
from disranker.engine import Engine, cut
from disranker.recipe import Refused, Student

WORDS = [
    "red",
    "blue",
    "shoe",
    "shoes",
    "running",
    "trail",
    "light",
    "warm",
    "jacket",
    "rain",
    "men",
    "kids",
    "size",
    "sale",
]
SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def save_student(folder, **config):
    """A BERT of random weights, large enough that documents differ in score, with tokenizer and contract."""
    # A vocabulary that is written, not trained: training breaks ties differently in each process, and scores with it.
    letters = [mark + letter for mark in ("", "##") for letter in string.ascii_lowercase]
    vocabulary = {token: number for number, token in enumerate([*SPECIAL.values(), *WORDS, *letters])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    limits = {"max_position_embeddings": 64, "num_labels": 1, "initializer_range": 0.5}
    model = BertForSequenceClassification(BertConfig(vocab_size=120, pad_token_id=0, **shape | limits | config))
    model.save_pretrained(folder)
    Tokens.agree(folder, "encoder", Student()).contract.save(folder)
    return folder


def some_pairs(count, seed=0):
    """Queries, titles and summaries of 0 to 60 words, some of them empty."""
    draw = random.Random(seed)
    return tuple([" ".join(draw.choices(WORDS, k=draw.randint(0, most))) for _ in range(count)] for most in (6, 10, 60))


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return save_student(tmp_path_factory.mktemp("student"))


def one_by_one(folder, queries, titles, summaries):
    """What transformers alone gives, one pair at a time and so without any padding."""
    tokens = Tokens.load(folder)
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        for ids, of_query in tokens.prompts(queries, titles, summaries):
            segments = [0] * of_query + [1] * (len(ids) - of_query)
            yield model(torch.tensor([ids]), token_type_ids=torch.tensor([segments])).logits.item()


def test_40_scores_equal_those_of_transformers_one_by_one_to_5_digits_in_the_order_given(student):
    pairs = some_pairs(40)
    scores = Engine(student, tokens_per_batch=256).scores(*pairs)
    assert scores == pytest.approx(list(one_by_one(student, *pairs)), abs=1e-5)
    assert len({round(score, 3) for score in scores}) > 30  # otherwise order would not matter


def test_the_score_of_a_pair_does_not_depend_on_the_batch_it_is_in(student):
    pairs = some_pairs(24)
    small, large = (Engine(student, tokens_per_batch=budget).scores(*pairs) for budget in (1, 4096))
    assert small == pytest.approx(large, abs=1e-5)


def test_no_pairs_have_no_scores(student):
    assert Engine(student).scores([], [], []) == []


def test_two_queries_for_one_title_are_an_error(student):
    with pytest.raises(ValueError):
        Engine(student).scores(["red", "blue"], ["shoe"], [""])


def test_segment_1_starts_after_the_first_sep(student):
    engine, seen = Engine(student), {}
    engine._forward.model.register_forward_pre_hook(lambda _model, _args, kwargs: seen.update(kwargs), with_kwargs=True)
    engine.scores(["red shoe"], ["trail shoe"], [""])  # [CLS] red shoe [SEP] | trail shoe [SEP]
    assert seen["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]


def test_batches_of_100_tokens_hold_2_rows_of_50_or_9_of_11():
    assert list(cut([11, 50, 11, 50], 100)) == [[1, 3], [0, 2]]
    assert [len(rows) for rows in cut([11] * 10, 100)] == [9, 1]


@given(st.lists(st.integers(1, 64)), st.integers(1, 500))
def test_every_row_is_in_one_batch_and_no_batch_of_two_is_over_budget(lengths, budget):
    batches = list(cut(lengths, budget))
    assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
    assert all(len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= budget for rows in batches)


def test_threads_are_set_for_torch(student):
    before = torch.get_num_threads()
    try:
        Engine(student, threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_budget_of_0_tokens_is_an_error(student):
    with pytest.raises(ValueError, match="tokens_per_batch is 0"):
        Engine(student, tokens_per_batch=0)


def test_a_model_without_its_scoring_head_is_refused(tmp_path):
    save_student(tmp_path)
    BertModel.from_pretrained(tmp_path).save_pretrained(tmp_path)
    with pytest.raises(Refused, match=r"classifier\.weight"):
        Engine(tmp_path)


def test_a_model_of_3_labels_is_refused(tmp_path):
    with pytest.raises(Refused, match="3 labels"):
        Engine(save_student(tmp_path, num_labels=3))


def test_a_model_of_32_positions_is_refused_for_a_contract_of_64_tokens(tmp_path):
    with pytest.raises(Refused, match=r"32 positions.* 64 tokens"):
        Engine(save_student(tmp_path, max_position_embeddings=32))


def test_a_contract_of_a_decoder_is_refused(tmp_path):
    agreed = Tokens.load(save_student(tmp_path)).contract
    agreed.model_copy(update={"form": "decoder"}).save(tmp_path)
    with pytest.raises(Refused, match="contract of a decoder"):
        Engine(tmp_path)
