import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_engine import WORDS, some_pairs

from disranker.contract import Tokens
from serve.encoding import ENTRY_BYTES, Encoder

TEXT = st.lists(st.sampled_from(WORDS), max_size=70).map(" ".join)


@pytest.fixture(scope="module")
def tokens(released):
    return Tokens.load(released)


def counted(tokens):
    """A tokenizer that tells which texts it was given."""
    seen = []

    class Counting:
        contract, pair, cuts = tokens.contract, tokens.pair, tokens.cuts

        def ids(self, texts):
            seen.extend(texts)
            return tokens.ids(texts)

    return Counting(), seen


def test_prompts_are_those_of_the_contract_at_first_and_from_the_cache(tokens):
    encoder, pairs = Encoder(tokens, 2**20), some_pairs(50)
    for _ in range(2):
        assert encoder.prompts(*pairs).prompts == tokens.prompts(*pairs)


@given(query=TEXT, title=TEXT, summary=TEXT)
def test_a_pair_is_called_truncated_just_where_a_longer_contract_would_read_more(tokens, query, title, summary):
    longer = tokens.contract.model_copy(update={"max_query_tokens": 200, "max_title_tokens": 200, "max_tokens": 600})
    whole = Tokens(longer, tokens._tokenizer).prompts([query], [title], [summary])
    found = Encoder(tokens, 2**20).prompts([query], [title], [summary])
    assert found.truncated == [whole != found.prompts]


def test_a_document_is_tokenised_once_whatever_the_query(tokens):
    counting, seen = counted(tokens)
    encoder = Encoder(counting, 2**20)
    encoder.prompts(["red", "red"], ["a", "b"], ["c", "d"])
    encoder.prompts(["blue", "blue"], ["b", "ab"], ["d", ""])
    assert sorted(seen) == sorted(["red", "a", "b", "c", "d", "blue", "ab", ""])


def test_a_title_and_a_summary_are_not_taken_for_another_pair_with_the_same_letters(tokens):
    pairs = ["red"] * 3, ["ab", "a", ""], ["c", "bc", "abc"]
    assert Encoder(tokens, 2**20).prompts(*pairs).prompts == tokens.prompts(*pairs)


def test_the_cache_forgets_what_was_not_used_longest_and_keeps_within_its_bytes(tokens):
    counting, seen = counted(tokens)
    encoder = Encoder(counting, 3 * (ENTRY_BYTES + 8))
    for title in ("a", "b", "c", "a", "d", "a", "b"):
        encoder.prompts(["red"], [title], ["e"])
    assert [text for text in seen if text in "abcd"] == ["a", "b", "c", "d", "b"]
    assert encoder._documents.currsize <= encoder._documents.maxsize


def test_a_document_larger_than_the_cache_is_encoded_and_not_kept(tokens):
    encoder, pairs = Encoder(tokens, 10), some_pairs(5)
    assert encoder.prompts(*pairs).prompts == tokens.prompts(*pairs)
    assert encoder._documents.currsize == 0


def test_of_a_megabyte_no_more_is_tokenised_than_could_be_read_and_the_rest_is_told(tokens):
    counting, seen = counted(tokens)
    found = Encoder(counting, 2**20).prompts(["red " * 10**5], ["blue " * 10**5], ["shoe " * 10**5])
    assert max(map(len, seen)) == 64 * 64 and found.truncated == [True]
    assert found.prompts == tokens.prompts(["red " * 100], ["blue " * 100], ["shoe " * 100])
