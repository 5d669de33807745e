import math
import pickle

import pytest

from disranker.retrieval import BM25

TEXTS = {"d2": "red shoe", "d1": "Red SHOE", "d3": "red red coat", "d4": "blue coat of wool", "d5": ""}


@pytest.fixture(scope="module")
def index():
    return BM25(list(TEXTS), list(TEXTS.values()))


def by_hand(word, text):
    """Lucene's BM25 of one word, k1 1.2, b 0.75."""
    words = [text.lower().split() for text in TEXTS.values()]
    containing = sum(word in of for of in words)
    idf = math.log(1 + (len(words) - containing + 0.5) / (containing + 0.5))
    mean = sum(map(len, words)) / len(words)
    count = text.lower().split().count(word)
    return idf * count / (count + 1.2 * (1 - 0.75 + 0.75 * len(text.split()) / mean))


def test_scores_are_those_of_the_formula(index):
    expected = [by_hand("red", text) + by_hand("coat", text) for text in TEXTS.values()]
    assert index.scores("red coat", list(TEXTS)) == pytest.approx(expected, rel=1e-5)


def test_scores_stand_in_the_order_asked_for_and_are_0_without_a_shared_word(index):
    assert index.scores("wool", ["d1", "d4"]) == [0, pytest.approx(by_hand("wool", TEXTS["d4"]), rel=1e-5)]


def test_the_best_come_first_and_equals_in_the_order_of_ids(index):
    assert index.top("red shoe", 3) == ["d1", "d2", "d3"]
    assert index.top("red shoe", 1) == ["d1"]  # a cut between equals


def test_documents_without_a_shared_word_are_not_found(index):
    assert index.top("wool", 10) == ["d4"] and index.top("zebra", 10) == [] and index.top("", 5) == []
    assert index.top("red", 0) == []


def test_short_words_common_words_and_other_scripts_are_words():
    index = BM25(["a", "b", "c"], ["the x of", "赤い 靴", "und ü"])
    assert index.top("THE", 3) == ["a"] and index.top("x", 3) == ["a"] and index.top("靴", 3) == ["b"]
    assert index.top("Ü", 3) == ["c"]


def test_an_index_sent_to_another_process_ranks_the_same(index):
    assert pickle.loads(pickle.dumps(index)).top("red coat", 5) == index.top("red coat", 5)
