"""A cut of `bench.shoppers`: what the endpoint wrote down tells which student is better, and a bad one is out."""

import asyncio
import random
from itertools import pairwise

import pytest

from bench import shoppers
from disranker.engine import Engine
from disranker.interleaving import preference

SHOPPERS = 150


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    folder = tmp_path_factory.mktemp("students")
    weights = {"better": shoppers.BETTER, "worse": shoppers.WORSE, "bad": shoppers.BAD}
    return {name: shoppers.student(folder / name, each) for name, each in weights.items()}


@pytest.mark.parametrize("name, weights", [("better", shoppers.BETTER), ("worse", shoppers.WORSE)])
def test_a_written_student_orders_64_documents_by_what_their_words_count(students, name, weights):
    texts = [f"{word} {tone}" for word in shoppers.WORDS for tone in shoppers.TONES]
    random.Random(1).shuffle(texts)
    known = {text: sum(shoppers.counts(word, *weights) for word in text.split()) for text in texts}
    scores = dict(zip(texts, Engine(students[name]).scores(["shoe"] * 64, [""] * 64, texts), strict=True))
    by_score = sorted(texts, key=scores.get)
    assert all(known[one] < known[other] + 1e-6 for one, other in pairwise(by_score))


def test_150_shoppers_prefer_the_better_student_whichever_side_it_is_on(students, tmp_path):
    for number, (live, candidate, sign) in enumerate((("worse", "better", 1), ("better", "worse", -1))):
        found = shoppers.in_process(tmp_path / str(number), students[live], students[candidate], SHOPPERS, seed=4)
        said = preference(found)
        assert len(found) == SHOPPERS
        assert said.p < 1e-3 and (said.share - 0.5) * sign > 0.1


def test_150_shoppers_prefer_neither_of_two_equal_students(students, tmp_path):
    found = shoppers.in_process(tmp_path / "equal", students["better"], students["better"], SHOPPERS, seed=4)
    assert preference(found).p > 0.05


def test_a_bad_student_in_a_canary_is_out_by_itself_before_anybody_has_its_answers(students, tmp_path):
    plan = shoppers.Plan(tmp_path, canary=600)
    line = asyncio.run(shoppers.canary(plan, students["better"], students["bad"]))
    assert "mean Kendall tau" in line["reason"]
    assert (line["failed"], line["after"], line["ours"]) == (0, 0, 0)
    assert 50 <= line["of"] < 1200
