from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disranker.batches import Group, Lists, Rows, collate, deal, plan

sizes = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 20)), max_size=60)
PAIR = Group([([5, 6, 7], 2), ([8, 9, 10, 11], 1)], [1.0, 2.0])
THREE = Group([([1], 1), ([2, 3], 1), ([4, 4], 2)], [3.0, 4.0, 5.0])


@settings(deadline=None)
@given(sizes, st.integers(100, 300), st.integers(0, 99))
def test_each_item_is_in_one_batch_and_no_batch_exceeds_its_tokens(sizes, tokens, seed):
    found = plan(sizes, tokens, seed)
    assert sorted(place for batch in found for place in batch) == list(range(len(sizes)))
    assert all(sum(sizes[p][0] for p in batch) * max(sizes[p][1] for p in batch) <= tokens for batch in found)
    assert found == plan(sizes, tokens, seed) and all(found)


def test_another_seed_is_another_plan_with_other_batches():
    sizes = [(2, 5 + n % 3) for n in range(3000)]
    plans = [plan(sizes, 60, seed) for seed in (1, 2)]
    assert plans[0] != plans[1] and {tuple(b) for b in plans[0]} != {tuple(b) for b in plans[1]}


def test_batches_do_not_come_in_the_order_of_length():
    order = [max(batch) for batch in plan([(1, n) for n in range(1, 200)], 400, 1)]
    assert order != sorted(order)


def test_items_of_exactly_the_budget_stand_alone_and_1_more_token_is_an_error():
    assert sorted(plan([(4, 25), (10, 10)], 100, 1)) == [[0], [1]]
    with pytest.raises(ValueError, match="an item of 101 tokens fits no batch of tokens_per_batch 100"):
        plan([(1, 1), (1, 101)], 100, 1)


def test_4_items_of_25_fill_100_tokens():
    assert sorted(map(len, plan([(1, 25)] * 8, 100, 1))) == [4, 4]


def test_less_than_a_tenth_of_2000_lists_of_mixed_length_is_padding():
    lengths = np.random.default_rng(0).integers(5, 60, 2000)
    sizes = [(3, int(n)) for n in lengths]
    area = sum(sum(sizes[p][0] for p in b) * max(sizes[p][1] for p in b) for b in plan(sizes, 2000, 1))
    assert 1 - 3 * lengths.sum() / area < 0.1


def test_nothing_gives_an_empty_plan():
    assert plan([], 100, 1) == []


def numbered(targets):
    """A list whose rows hold their place."""
    return Group([([place], 1) for place in range(len(targets))], [float(target) for target in targets])


def test_a_list_of_6_is_dealt_into_2_of_3_each_over_the_whole_range():
    found = deal(numbered([5, 0, 3, 1, 4, 2]), 3)
    assert [hand.targets for hand in found] == [[0, 2, 4], [1, 3, 5]]
    assert [[ids[0] for ids, _ in hand.rows] for hand in found] == [[1, 5, 4], [3, 2, 0]]


@pytest.mark.parametrize(
    ("size", "documents", "hands"), [(6, 100, 1), (6, 6, 1), (7, 6, 2), (30, 6, 5), (31, 6, 6), (3, 2, 1)]
)
def test_no_hand_of_more_than_2_holds_more_than_asked_and_there_are_as_few_as_that_allows(size, documents, hands):
    assert len(deal(numbered(range(size)), documents)) == hands


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(2, 10))
def test_each_document_is_dealt_once_with_its_target(targets, documents):
    hands = deal(numbered(targets), documents)
    dealt = [(ids[0], target) for hand in hands for (ids, _), target in zip(hand.rows, hand.targets, strict=True)]
    assert sorted(dealt) == [(place, float(target)) for place, target in enumerate(targets)]
    sizes = [len(hand.rows) for hand in hands]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= min(2, len(targets)) and max(sizes) <= max(documents, 3)
    lowest, highest = sorted(targets)[len(hands) - 1], sorted(targets)[-len(hands)]
    assert all(min(hand.targets) <= lowest and max(hand.targets) >= highest for hand in hands)


def test_rows_are_padded_on_the_right_with_the_document_in_segment_1():
    found = Rows.padded([([5, 6, 7], 2), ([8], 1), ([9, 10], 0)], pad=3)
    assert found.ids.tolist() == [[5, 6, 7], [8, 3, 3], [9, 10, 3]]
    assert found.real.int().tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert found.segments.tolist() == [[0, 0, 1], [0, 0, 0], [1, 1, 0]]


def test_some_rows_are_padded_to_the_longest_of_them_alone():
    found = Rows.padded([([5, 6, 7], 2), ([8], 1), ([9, 10], 0)], pad=3).some(torch.tensor([2, 1]))
    assert found.ids.tolist() == [[9, 10], [8, 3]] and found.real.int().tolist() == [[1, 1], [1, 0]]
    assert found.segments.tolist() == [[1, 1], [0, 0]]


def test_a_model_that_knows_2_segments_takes_them_and_one_that_knows_1_or_none_does_not():
    rows = Rows.padded([([5, 6], 1), ([7], 1)], pad=0)

    def inputs_of(**config):
        return rows.inputs(SimpleNamespace(config=SimpleNamespace(**config)))

    for config in ({}, {"type_vocab_size": 1}):  # a Llama, a RoBERTa
        assert set(inputs_of(**config)) == {"input_ids", "attention_mask"}
    inputs = inputs_of(type_vocab_size=2)
    assert inputs["token_type_ids"].tolist() == [[0, 1], [0, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1], [1, 0]] and inputs["attention_mask"].dtype == torch.long


def test_lists_of_2_and_3_documents_become_5_rows_and_a_matrix_of_2_by_3():
    found = collate([PAIR, THREE], pad=0)
    assert found.rows.ids.shape == (5, 4) and found.rows.ids[3].tolist() == [2, 3, 0, 0]
    assert found.targets.tolist() == [[1, 2, 0], [3, 4, 5]]
    assert found.real.tolist() == [[True, True, False], [True, True, True]]


def test_scores_in_a_line_are_put_in_the_places_of_their_documents():
    found = collate([PAIR, THREE], pad=0).spread(torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0], requires_grad=True))
    assert found.tolist() == [[10, 20, 0], [30, 40, 50]]
    assert found.requires_grad


def test_a_batch_moves_to_a_device_whole():
    moved = collate([PAIR], pad=0).to(torch.device("meta"))
    assert isinstance(moved, Lists) and isinstance(moved.rows, Rows)
    assert {t.device.type for t in (*moved.rows, moved.targets, moved.real)} == {"meta"}


def test_the_size_of_a_group_is_its_rows_and_its_longest():
    assert PAIR.size == (2, 4) and THREE.size == (3, 2)
