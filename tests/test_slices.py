from hypothesis import given
from hypothesis import strategies as st

from disranker import slices


def test_a_tail_query_without_a_click_and_one_never_searched_make_the_fourth_band():
    bands = {"a": "tail", "b": "head", "c": "unseen", "d": "tail", "e": "head"}
    found = slices.by_band(bands, {"b", "d"})
    assert list(found.items()) == [("head", ["b"]), ("tail", ["d"]), ("never clicked", ["a", "c", "e"])]


def test_queries_of_4_and_of_6_words_are_one_slice_and_empty_slices_are_left_out():
    found = slices.by_words(["a b c d e f", "a", "a b", "a b c d"])
    assert list(found.items()) == [
        ("1 word", ["a"]),
        ("2 words", ["a b"]),
        ("4 words or more", ["a b c d e f", "a b c d"]),
    ]
    assert list(slices.by_words(["a b c"])) == ["3 words"]


def test_9_lengths_are_3_thirds_named_by_their_limits():
    found = slices.by_length({f"q{n}": float(n) for n in range(9, 0, -1)})
    assert list(found) == ["short, up to 3 words", "in between", "long, over 6 words"]
    assert [sorted(queries) for queries in found.values()] == [
        ["q1", "q2", "q3"],
        ["q4", "q5", "q6"],
        ["q7", "q8", "q9"],
    ]


def test_documents_that_are_all_of_5_words_are_1_slice():
    assert slices.by_length({"a": 5.0, "b": 5.0}) == {"short, up to 5 words": ["a", "b"]}
    assert slices.by_length({}) == {}


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 50), min_size=1))
def test_every_query_is_in_exactly_1_slice_of_each_kind(words):
    for found in (slices.by_length(words), slices.by_words(words), slices.by_band(dict.fromkeys(words, "tail"), [])):
        assert sorted(query for queries in found.values() for query in queries) == sorted(words)
