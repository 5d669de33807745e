import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disranker import perturb
from disranker.recipe import Evaluate

QUERY = "red running shoes"
CFG = Evaluate(resamples=300)

queries = st.lists(st.text("abc1é鞋", min_size=1, max_size=6), min_size=1, max_size=5).map(" ".join)


def test_a_typo_swaps_2_neighbouring_letters_of_the_longest_word_alone():
    made = {perturb.perturbed(QUERY, seed)["typo"] for seed in range(60)}
    longest = "running"
    places = [i for i in range(6) if longest[i] != longest[i + 1]]
    swapped = {longest[:i] + longest[i + 1] + longest[i] + longest[i + 2 :] for i in places}
    assert made == {f"red {word} shoes" for word in swapped} and len(swapped) == 5


def test_3_words_have_2_swaps_of_neighbours_and_3_ways_to_lose_one():
    swapped = {perturb.perturbed(QUERY, seed)["words swapped"] for seed in range(60)}
    dropped = {perturb.perturbed(QUERY, seed)["word dropped"] for seed in range(60)}
    assert swapped == {"running red shoes", "red shoes running"}
    assert dropped == {"running shoes", "red shoes", "red running"}


@pytest.mark.parametrize(
    ("query", "kinds"),
    [
        ("shoes", {"typo"}),
        ("aaa", set()),
        ("a", set()),
        ("", set()),
        ("4711 0815", {"words swapped", "word dropped"}),
        ("aa aa", {"word dropped"}),
        ("a b", {"words swapped", "word dropped"}),
    ],
)
def test_a_query_has_only_the_kinds_that_change_it(query, kinds):
    assert perturb.perturbed(query, 1).keys() == kinds


def test_2_equal_words_beside_a_third_never_keep_their_query_from_being_changed():
    assert {perturb.perturbed("aa aa b", seed)["words swapped"] for seed in range(30)} == {"aa b aa"}


@given(queries, st.integers(0, 3))
def test_letters_and_words_are_kept_but_for_the_1_word_that_is_dropped(query, seed):
    made = perturb.perturbed(query, seed)
    assert query not in made.values()
    assert Counter(made.get("typo", query)) == Counter(query)
    assert Counter(made.get("words swapped", query).split()) == Counter(query.split())
    if "word dropped" in made:
        assert (Counter(query.split()) - Counter(made["word dropped"].split())).total() == 1


def test_another_process_perturbs_the_same_query_in_the_same_way():
    program = f"from disranker import perturb; print(perturb.perturbed({QUERY!r}, 5))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(perturb.perturbed(QUERY, 5))


JUDGED = {f"q{i}": {"a": 1, "b": 0} for i in range(4)}
RIGHT, WRONG = {"a": 2.0, "b": 1.0}, {"a": 1.0, "b": 2.0}


def test_a_drop_is_measured_over_the_2_changed_queries_and_falls_from_1_to_082():
    runs = {"bm25": dict.fromkeys(JUDGED, RIGHT), "student": {"q0": WRONG, "q1": RIGHT, "q2": WRONG, "q3": WRONG}}
    after = {("typo", "bm25"): {"q0": WRONG, "q1": RIGHT}, ("typo", "student"): {"q1": RIGHT}}
    bm25, student = perturb.drops(JUDGED, runs, after, CFG, 1)
    lost = 1 - 0.6309297535714575  # NDCG with the only relevant document at rank 2
    assert (bm25["kind"], bm25["model"], bm25["queries"], bm25["clean"]) == ("typo", "bm25", 2, 1.0)
    assert bm25["difference"] == pytest.approx(-lost / 2) == pytest.approx(bm25["perturbed"] - 1)
    assert bm25["low"] == pytest.approx(-lost) and bm25["high"] == 0.0
    assert (student["queries"], student["clean"], student["difference"]) == (1, 1.0, 0.0)


def test_a_kind_that_changed_no_query_has_no_row():
    runs = {"bm25": dict.fromkeys(JUDGED, RIGHT)}
    assert perturb.drops(JUDGED, runs, {("typo", "bm25"): {}}, CFG, 1) == []
