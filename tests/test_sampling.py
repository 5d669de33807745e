import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disranker import sampling
from disranker.recipe import Aggregate, Sample

CFG = Sample(judged=2, shown=2, bm25=2, random=2)
CATALOGUE = [f"d{n}" for n in range(50)]
GRADES = {"d1": 3, "d2": 0, "d3": 1}
SHOWN = [{"doc_id": d, "impressions": n} for d, n in (("d9", 5), ("d4", 7), ("d5", 7), ("d1", 99))]
RANKED = ["d4", "d6", "d1", "d7", "d8"]


def chosen(grades=GRADES, shown=SHOWN, *, ranked=RANKED, catalogue=CATALOGUE, cfg=CFG, seed=1, query="shoe"):
    return sampling.candidates(query, grades, shown, ranked, catalogue, cfg, seed)


def of(found, source):
    return [doc_id for doc_id, told in found if told == source]


def test_10000_queries_split_into_70_10_and_20_percent():
    cfg = Aggregate(validation_share=0.1, test_share=0.2)
    found = Counter(sampling.split(f"query {n}", cfg, seed=1) for n in range(10_000))
    assert found["test"] == pytest.approx(2000, abs=160)
    assert found["validation"] == pytest.approx(1000, abs=120)
    assert found["train"] == 10_000 - found["test"] - found["validation"]


def test_shares_of_0_leave_all_to_training():
    cfg = Aggregate(validation_share=0.0, test_share=0.0)
    assert {sampling.split(f"q{n}", cfg, 1) for n in range(100)} == {"train"}


def test_a_larger_test_share_keeps_the_test_queries_it_had():
    small, large = Aggregate(test_share=0.2), Aggregate(test_share=0.4)
    queries = [f"q{n}" for n in range(500)]
    tests = [{q for q in queries if sampling.split(q, cfg, 1) == "test"} for cfg in (small, large)]
    assert tests[0] < tests[1]


def test_another_seed_is_another_split():
    cfg = Aggregate()
    found = [[sampling.split(f"q{n}", cfg, seed) for n in range(100)] for seed in (1, 2, 1)]
    assert found[0] == found[2] != found[1]


@settings(deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])), st.integers(0, 10**9))
def test_a_uniform_number_lies_in_0_to_1_and_is_the_same_again(text, seed):
    assert 0 <= sampling.uniform(text, seed) < 1 and sampling.uniform(text, seed) == sampling.uniform(text, seed)


def test_a_uniform_number_is_the_same_in_another_process():
    code = "from disranker import sampling; print(sampling.uniform('schuh ü', 7))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(told.stdout) == sampling.uniform("schuh ü", 7)


@pytest.mark.parametrize(
    ("searches", "limits"),
    [
        ([5, 3, 2], (5, 3)),  # covers 0.5, 0.8, 1.0
        ([2, 5, 3], (5, 3)),
        ([4, 3, 3], (3, 3)),  # 0.4 is not half; the next is, and its equal comes with it
        ([10, 1, 1], (10, 10)),
        ([1, 1, 1, 1], (1, 1)),
        ([7], (7, 7)),
        ([], (1, 1)),
    ],
)
def test_the_head_makes_up_half_of_all_searches_and_the_torso_the_next_3_tenths(searches, limits):
    assert sampling.band_limits(searches, 0.5, 0.3) == limits


def test_shares_that_make_up_1_leave_no_tail():
    assert sampling.band_limits([6, 3, 1], 0.6, 0.4) == (6, 1)


@pytest.mark.parametrize(
    ("searches", "band"),
    [(0, "unseen"), (1, "tail"), (2, "tail"), (3, "torso"), (4, "torso"), (5, "head"), (9, "head")],
)
def test_a_band_starts_at_its_limit(searches, band):
    assert sampling.band(searches, (5, 3)) == band


def test_2_of_each_source_in_order_each_document_once():
    found = chosen()
    judged = of(found, "judged")
    assert [source for _, source in found] == ["judged"] * 2 + ["shown"] * 2 + ["bm25"] * 2 + ["random"] * 2
    assert len(dict(found)) == 8 and set(judged) < set(GRADES)
    left = [d for d in ("d1", "d4", "d5", "d9") if d not in judged]
    assert of(found, "shown") == left[:2]
    assert of(found, "bm25") == [d for d in RANKED if d not in {*judged, "d1", "d4", "d5", "d9"}][:2]


def test_a_document_that_was_shown_does_not_come_in_by_bm25_though_its_quota_is_full():
    found = chosen(grades={}, ranked=["d9", "d4", "d7"], cfg=Sample(judged=0, shown=1, bm25=2, random=0))
    assert found == [("d1", "shown"), ("d7", "bm25")]


MANY = {"head": 100, "torso": 200, "tail": 1000}


@pytest.mark.parametrize(
    ("queries", "ungraded", "floor", "shares"),
    [
        (MANY, {}, 0.2, (1, 1, 1)),
        (MANY, {"head": 0.5, "tail": 0.25}, 0.2, (0.5, 1, 0.25)),  # 250 of 500
        (MANY, {"tail": 0.0}, 0.2, (1, 1, 0.075)),  # 75 of 375
        (MANY, {"tail": 0.0}, 0.0, (1, 1, 0)),
        (MANY | {"tail": 100}, {}, 0.5, (1 / 3, 1 / 3, 1)),  # 100 of 200: all of the tail, and the others give way
        (MANY | {"tail": 100}, {"tail": 0.0}, 0.5, (1 / 3, 1 / 3, 1)),
        ({"head": 3, "torso": 2}, {}, 0.5, (1, 1, 1)),  # without a tail nothing can be kept for it
        ({"tail": 7}, {"tail": 0.5}, 0.5, (1, 1, 0.5)),
    ],
)
def test_quotas_by_band_keep_the_tail_at_its_floor(queries, ungraded, floor, shares):
    found = sampling.quotas(queries, Sample(ungraded=ungraded, tail_floor=floor))
    assert tuple(found[band] for band in ("head", "torso", "tail")) == pytest.approx(shares)


@given(st.tuples(*[st.integers(0, 50)] * 3), st.tuples(*[st.floats(0, 1)] * 3), st.floats(0, 0.9))
def test_the_tail_makes_up_its_floor_or_is_taken_whole_and_no_band_gets_more_than_the_recipe_says(counts, given, floor):
    bands = ("head", "torso", "tail")
    queries, asked = (dict(zip(bands, values, strict=True)) for values in (counts, given))
    found = sampling.quotas(queries, Sample(ungraded=asked, tail_floor=floor))
    taken = {band: found[band] * queries[band] for band in bands}
    assert not queries["tail"] or taken["tail"] >= floor * sum(taken.values()) - 1e-9
    assert all(0 <= found[band] <= asked[band] for band in ("head", "torso")) and asked["tail"] <= found["tail"] <= 1


@pytest.mark.parametrize(
    ("share", "places"),
    [(1.0, [0, 1, 2, 3, 4]), (0.5, [1, 3, 0]), (0.4, [3, 0]), (0.01, [3, 0]), (0.8, [1, 3, 0, 2])],
)
def test_both_ends_of_a_list_are_kept_the_upper_one_first(share, places):
    kept = sampling.ends([-1.0, 2.0, 0.0, 5.0, 0.5], share)
    assert [place for place, there in enumerate(kept) if there] == sorted(places)


def test_equal_scores_keep_their_order_at_the_ends_and_a_list_of_2_stays():
    assert sampling.ends([1.0, 1.0, 1.0, 1.0], 0.5) == [True, False, False, True]
    assert sampling.ends([1.0, 0.0], 0.1) == [True, True]


def test_the_cut_of_graded_documents_does_not_depend_on_their_order_in_a_file():
    turned = dict(reversed(GRADES.items()))
    assert chosen(turned) == chosen()
    cuts = {frozenset(of(chosen(query=f"q{n}"), "judged")) for n in range(30)}
    assert len(cuts) == 3


def test_shown_documents_of_equal_impressions_stand_by_id():
    cfg = Sample(judged=0, shown=3, bm25=0, random=0)
    assert of(chosen(cfg=cfg), "shown") == ["d1", "d4", "d5"]
    assert chosen(shown=SHOWN[::-1], cfg=cfg) == chosen(cfg=cfg)


def test_a_source_with_too_few_is_not_filled_up_by_another():
    found = chosen(grades={}, shown=[], ranked=iter(["d3"]))
    assert [source for _, source in found] == ["bm25", "random", "random"]


def test_random_documents_differ_by_query_and_seed_and_come_again():
    first = of(chosen(), "random")
    assert first == of(chosen(), "random")
    assert len({tuple(of(chosen(seed=seed), "random")) for seed in range(10)}) > 7
    assert len({tuple(of(chosen(query=f"q{n}"), "random")) for n in range(10)}) > 7


def test_a_catalogue_of_5_gives_5():
    found = chosen(
        catalogue=["d1", "d2", "d3", "d4", "d5"], ranked=[], cfg=Sample(judged=1, shown=1, bm25=0, random=20)
    )
    assert sorted(dict(found)) == ["d1", "d2", "d3", "d4", "d5"]


def test_a_catalogue_smaller_than_what_was_judged_ends_too():
    found = chosen(
        grades={f"x{n}": 1 for n in range(5)}, cfg=Sample(judged=5, shown=0, bm25=0, random=3), catalogue=["d1", "d2"]
    )
    assert len(found) == 5


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(CATALOGUE), st.integers(0, 3)),
    st.dictionaries(st.sampled_from(CATALOGUE), st.integers(1, 9)),
    st.lists(st.sampled_from(CATALOGUE), unique=True),
    st.lists(st.integers(0, 6), min_size=4, max_size=4),
    st.integers(0, 5),
)
def test_no_source_exceeds_its_quota_and_no_document_comes_twice(grades, impressions, ranked, quotas, seed):
    cfg = Sample(**dict(zip(("judged", "shown", "bm25", "random"), quotas, strict=True)))
    shown = [{"doc_id": d, "impressions": n} for d, n in impressions.items()]
    found = chosen(grades, shown, ranked=ranked, cfg=cfg, seed=seed)
    assert len({d for d, _ in found}) == len(found)
    counts = Counter(source for _, source in found)
    assert all(counts[source] <= getattr(cfg, source) for source in counts)
    assert counts["random"] == cfg.random and counts["judged"] == min(cfg.judged, len(grades))


def test_a_group_holds_texts_grades_and_evidence_and_leaves_out_what_the_catalogue_lacks():
    query = {"query": "shoe", "split": "train", "band": "head", "searches": 3}
    texts = {"a": {"title": "A", "summary": "aa"}, "b": {"title": "B", "summary": ""}}
    evidence = [{"doc_id": "a", "attractiveness": 0.5, "impressions": 7}]
    found = sampling.group(query, [("a", "shown"), ("z", "judged"), ("b", "judged")], texts, evidence, {"b": 0})
    a = {
        "doc_id": "a",
        "title": "A",
        "summary": "aa",
        "source": "shown",
        "grade": None,
        "attractiveness": 0.5,
        "impressions": 7,
        "asked": True,
    }
    b = {
        "doc_id": "b",
        "title": "B",
        "summary": "",
        "source": "judged",
        "grade": 0,
        "attractiveness": None,
        "impressions": None,
        "asked": True,
    }
    assert found == {"query": "shoe", "split": "train", "band": "head", "docs": [a, b]}
