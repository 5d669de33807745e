import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disranker import losses

LOSSES = {
    "margin": lambda s, t, real: losses.margin(s, t, real, 0.7),
    "ranknet": losses.ranknet,
    "listwise": losses.listwise,
    "pointwise": losses.pointwise,
    "margin_mse": losses.margin_mse,
    "neighbours": lambda s, t, real: losses.margin_mse(s, t, real, "neighbours"),
    "gaps": lambda s, t, real: losses.margin_mse(s, t, real, "gaps", 0.4),
    "hybrid": lambda s, t, real: losses.hybrid(s, t, real, 0.5, 2.0),
    "hybrid of neighbours": lambda s, t, real: losses.hybrid(s, t, real, 0.5, 2.0, "neighbours"),
    "kl": lambda s, t, real: losses.kl(s, t, real, 2.0),
}


def row(*values):
    return torch.tensor([values], dtype=torch.float64)


def value(loss, scores, targets, real=None):
    real = torch.ones(1, len(scores), dtype=torch.bool) if real is None else real
    return LOSSES[loss](row(*scores), row(*targets), real).item()


def plain(loss, s, t):
    """The same in plain Python over one list without padding, as a function that autograd can follow."""
    places = range(len(t))
    above = [(i, j) for i in places for j in places if t[i] > t[j]]
    apart = [(i, j) for i in places for j in places if i != j]
    point = sum((s[i] - t[i]) ** 2 for i in places) / len(t)
    pairs = sum((s[i] - s[j] - t[i] + t[j]) ** 2 for i, j in apart) / max(1, len(apart))
    if loss == "margin":
        return sum((0.7 - s[i] + s[j]).clamp(min=0) for i, j in above) / max(1, len(above))
    if loss == "ranknet":
        return sum(torch.log(1 + torch.exp(s[j] - s[i])) for i, j in above) / max(1, len(above))
    if loss == "listwise":
        whole = torch.log(sum(torch.exp(score) for score in s))
        return sum(-t[i] * (s[i] - whole) for i in places) / sum(t)
    if loss == "kl":
        wanted, given = ([torch.exp(torch.as_tensor(x, dtype=torch.float64) / 2) for x in xs] for xs in (t, s))
        wanted, given = ([e / sum(es) for e in es] for es in (wanted, given))
        return 4 * sum(p * torch.log(p / q) for p, q in zip(wanted, given, strict=True))
    order = sorted(places, key=lambda i: t[i])  # Python's sort is stable as well
    beside = squared(s, t, itertools.pairwise(order))
    far = sorted([(i, j) for i in places for j in places if i < j], key=lambda pair: -abs(t[pair[0]] - t[pair[1]]))
    return {
        "pointwise": point,
        "margin_mse": pairs,
        "neighbours": beside,
        "gaps": squared(s, t, far[: math.ceil(round(0.4 * len(far), 6))]),
        "hybrid": 0.5 * point + 2 * pairs,
        "hybrid of neighbours": 0.5 * point + 2 * beside,
    }[loss]


def squared(s, t, pairs):
    """Mean squared difference of the differences over these pairs: each order gives the same."""
    each = [(s[i] - s[j] - t[i] + t[j]) ** 2 for i, j in pairs]
    return sum(each) / len(each)


numbers = st.floats(-5, 5).map(lambda x: round(x, 3))
lists = st.lists(st.tuples(numbers, st.integers(0, 3)), min_size=2, max_size=5)


@pytest.mark.parametrize("loss", LOSSES)
@settings(deadline=None)
@given(pairs=lists)
def test_values_and_gradients_are_those_of_the_plain_formula_also_beside_padding(loss, pairs):
    scores, grades = zip(*pairs, strict=True)
    targets = [float(grade) for grade in grades]
    if len(set(targets)) == 1:
        targets[0] += 1
    ours = torch.full((1, len(scores) + 2), 9.0, dtype=torch.float64)
    ours[0, : len(scores)] = torch.tensor(scores, dtype=torch.float64)
    ours.requires_grad_()
    real = torch.tensor([[True] * len(scores) + [False] * 2])
    found = LOSSES[loss](ours, row(*targets, 7.0, -7.0), real)
    theirs = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
    expected = plain(loss, list(theirs), targets)
    found.backward()
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), abs=1e-9)
    edge = loss == "margin" and any(abs(abs(a - b) - 0.7) < 1e-6 for a in scores for b in scores)
    assert edge or torch.allclose(ours.grad[0, : len(scores)], theirs.grad, atol=1e-9)
    assert not ours.grad[0, len(scores) :].any()


def sampled(s, t, real):
    torch.manual_seed(4)
    return losses.margin_mse(s, t, real, "sampled")


@pytest.mark.parametrize("loss", [*LOSSES.values(), sampled], ids=[*LOSSES, "sampled"])
@pytest.mark.parametrize("padding", [float("nan"), 1e9, -1e9, float("inf"), -float("inf")])
def test_padded_documents_never_matter(loss, padding):
    real = torch.tensor([[True, True, True, False], [True, True, False, False]])
    found = []
    for filler in (0.0, padding):
        scores = torch.tensor([[0.5, -1.0, 2.0, filler], [1.0, 3.0, filler, filler]], requires_grad=True)
        targets = torch.tensor([[1.0, 0.0, 2.0, filler], [2.0, 1.0, filler, filler]])
        result = loss(scores, targets, real)
        result.backward()
        assert scores.grad.isfinite().all() and not scores.grad[~real].any()
        found.append((result.item(), scores.grad.tolist()))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("loss", "scores", "targets", "expected"),
    [
        ("margin", (1.0, 0.0, 0.5), (2, 1, 0), (0 + 0.2 + 1.2) / 3),  # gaps 1, 0.5 and -0.5 against 0.7
        ("margin", (0.7, 0.0), (1, 0), 0.0),
        ("ranknet", (1.0, 0.0), (1, 0), math.log(1 + math.exp(-1))),
        ("ranknet", (0.0, 1.0), (1, 0), math.log(1 + math.exp(1))),
        ("ranknet", (0.0, 0.0), (1, 0), math.log(2)),
        ("listwise", (0.0, math.log(3)), (1, 1), (math.log(4) + math.log(4 / 3)) / 2),
        ("listwise", (0.0, math.log(3)), (0, 5), math.log(4 / 3)),
        ("pointwise", (1.0, 4.0), (0, 2), (1 + 4) / 2),
        ("margin_mse", (1.0, 4.0), (0, 2), 1.0),
        ("margin_mse", (1.0, 4.0, 0.0), (0, 2, 0), ((-3 + 2) ** 2 + 1**2 + (4 - 2) ** 2) / 3),
        ("neighbours", (1.0, 4.0, 0.0), (5, 2, 1), ((-3 - 3) ** 2 + (4 - 1) ** 2) / 2),
        ("gaps", (1.0, 4.0, 0.0), (5, 2, 1), ((1 - 4) ** 2 + (-3 - 3) ** 2) / 2),  # gaps 4 and 3, not 1
        ("hybrid", (1.0, 4.0), (0, 2), 0.5 * 2.5 + 2 * 1.0),
        ("hybrid of neighbours", (1.0, 4.0), (0, 2), 0.5 * 2.5 + 2 * 1.0),
        ("kl", (0.0, 2 * math.log(3)), (0.0, 0.0), 4 * 0.5 * (math.log(2) + math.log(2 / 3))),
        ("kl", (7.0, 8.0), (2.0, 3.0), 0.0),  # a softmax does not see a shift
    ],
)
def test_values_by_hand(loss, scores, targets, expected):
    assert value(loss, scores, targets) == pytest.approx(expected)


@settings(deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=7))
def test_point_is_mean_squared_plus_variance_and_margin_2n_over_n_minus_1_of_it(pairs):
    student, teacher = zip(*pairs, strict=True)
    e = torch.tensor(student, dtype=torch.float64) - torch.tensor(teacher, dtype=torch.float64)
    n, variance = len(pairs), e.var(correction=0).item()
    assert value("pointwise", student, teacher) == pytest.approx(e.mean().item() ** 2 + variance, abs=1e-9)
    assert value("margin_mse", student, teacher) == pytest.approx(2 * n / (n - 1) * variance, abs=1e-9)


def test_margin_mse_ignores_a_shift_of_all_teacher_scores_and_point_mse_does_not():
    assert value("margin_mse", (1, 4, 2), (103, 100, 101)) == pytest.approx(value("margin_mse", (1, 4, 2), (3, 0, 1)))
    assert value("pointwise", (1, 4), (5, 5)) != value("pointwise", (1, 4), (6, 6))


# Which pairs Margin-MSE compares


def compared(teacher, pairs, share=0.5):
    """The pairs (i, j), i < j, of one list; and the matrix has each in both orders."""
    found = losses.compared(row(*teacher), torch.ones(1, len(teacher), dtype=torch.bool), pairs, share)[0]
    assert torch.equal(found, found.T) and not found.diagonal().any()
    return [(i, j) for i, j in found.nonzero().tolist() if i < j]


@pytest.mark.parametrize(
    ("pairs", "share", "expected"),
    [
        ("all", 0.1, [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]),
        ("neighbours", 0.1, [(0, 2), (0, 3), (1, 2)]),
        ("gaps", 0.5, [(0, 1), (1, 3), (2, 3)]),  # 5, 9 and 6 of 5, 2, 4, 3, 9, 6
        ("gaps", 0.34, [(0, 1), (1, 3), (2, 3)]),  # 2.04 pairs are 3
        ("gaps", 0.33, [(1, 3), (2, 3)]),
        ("gaps", 0.001, [(1, 3)]),
        ("gaps", 1.0, [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]),
        ("sampled", 1.0, [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]),
    ],
)
def test_which_pairs_of_scores_5_0_3_9_are_compared(pairs, share, expected):
    assert compared((5, 0, 3, 9), pairs, share) == expected


def test_of_equal_scores_the_first_document_is_the_neighbour_and_none_is_sampled():
    assert compared((1, 0, 1, 1), "neighbours") == [(0, 1), (0, 2), (2, 3)]
    assert compared((1, 0, 1, 1), "sampled", 1.0) == [(0, 1), (1, 2), (1, 3)]
    assert compared((1, 1, 1), "sampled", 1.0) == [] and len(compared((1, 1, 1), "gaps", 1.0)) == 3


def test_a_pair_is_sampled_with_a_chance_as_its_gap():
    lists = 30_000
    teacher = torch.tensor([[0.0, 1.0, 3.0]]).expand(lists, 3)
    torch.manual_seed(5)
    one = losses.compared(teacher, torch.ones(lists, 3, dtype=torch.bool), "sampled", 1 / 3).triu(1)
    assert one.sum((1, 2)).eq(1).all()
    found = [one[:, i, j].float().mean().item() for i, j in ((0, 1), (1, 2), (0, 2))]
    assert found == pytest.approx([1 / 6, 2 / 6, 3 / 6], abs=0.01)


def test_the_second_pair_is_sampled_from_those_that_are_left():
    lists = 30_000
    torch.manual_seed(5)
    teacher = torch.tensor([[0.0, 1.0, 3.0]]).expand(lists, 3)
    two = losses.compared(teacher, torch.ones(lists, 3, dtype=torch.bool), "sampled", 2 / 3).triu(1)
    # gaps 1, 2, 3: the gap of 1 is left out if 3 comes first and 2 then, or the other way round
    without = (1 - two[:, 0, 1].float()).mean().item()
    assert two.sum((1, 2)).eq(2).all() and without == pytest.approx(1 / 2 * 2 / 3 + 1 / 3 * 3 / 4, abs=0.01)


def test_torchs_seed_decides_which_pairs_are_sampled():
    def drawn(seed):
        torch.manual_seed(seed)
        return compared(range(8), "sampled")

    assert drawn(1) == drawn(1) != drawn(2) and len(drawn(1)) == 14


@settings(deadline=None)
@given(lists=st.lists(st.lists(st.integers(0, 4), max_size=6), min_size=1, max_size=3), share=st.floats(0.01, 1))
def test_each_list_has_its_share_of_pairs_and_padding_is_in_none(lists, share):
    real = torch.tensor([[place < len(one) for place in range(7)] for one in lists])
    teacher = torch.full(real.shape, torch.nan).masked_scatter(
        real, torch.tensor([float(x) for one in lists for x in one])
    )
    for pairs in ("all", "neighbours", "gaps", "sampled"):
        found = losses.compared(teacher, real, pairs, share)
        assert torch.equal(found, found.transpose(1, 2)) and not found[~real].any()
        for one, matrix in zip(lists, found, strict=True):
            n, apart = len(one), sum(a != b for i, a in enumerate(one) for b in one[:i])
            few = {"gaps": n * (n - 1) // 2, "sampled": apart}
            wanted = {"all": n * (n - 1) // 2, "neighbours": max(0, n - 1)} | {
                name: math.ceil(torch.tensor(share) * count) for name, count in few.items()
            }
            assert matrix.sum() == 2 * wanted[pairs]


@settings(deadline=None, max_examples=30)
@given(st.lists(numbers, min_size=2, max_size=6), st.floats(0.1, 1))
def test_a_student_that_is_off_by_one_number_everywhere_loses_nothing_over_any_pairs(scores, share):
    teacher = row(*scores)
    real = torch.ones_like(teacher, dtype=torch.bool)
    for choice in ("all", "neighbours", "gaps", "sampled"):
        assert losses.margin_mse(teacher + 3, teacher, real, choice, share).item() == pytest.approx(0, abs=1e-12)
        assert losses.hybrid(teacher + 3, teacher, real, 0.5, 1, choice, share).item() == pytest.approx(4.5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 20.0])
def test_a_soft_kl_has_gradients_near_a_mean_squared_error_of_centred_scores(temperature):
    """At a high temperature the gradient is (s - t) / n for centred scores (Hinton et al.): the square sees to it."""
    scores, teacher = row(0.5, -1.0, 0.5).requires_grad_(), row(1.0, 1.0, -2.0)
    losses.kl(scores, teacher, torch.ones(1, 3, dtype=torch.bool), temperature).backward()
    near = torch.allclose(scores.grad, (scores.detach() - teacher) / 3, atol=0.05)
    assert near == (temperature == 20)


def test_kl_counts_lists_of_2_documents_and_more_alone():
    scores, teacher = torch.tensor([[1.0, 0.0], [5.0, 9.0]]), torch.zeros(2, 2)
    one = losses.kl(scores[:1], teacher[:1], torch.tensor([[True, True]]), 1.0)
    assert losses.kl(scores, teacher, torch.tensor([[True, True], [True, False]]), 1.0) == one > 0


def test_a_margin_by_gap_asks_3_times_as_much_of_grades_that_differ_by_3():
    scores, real = row(1.0, 0.4, 0.0), torch.ones(1, 3, dtype=torch.bool)
    # grades 3, 2, 0; gap 0.5 a grade: pairs want 0.5, 1.5 and 1.0, have 0.6, 1.0 and 0.4
    assert losses.margin(scores, row(3, 2, 0), real, 0.5, True).item() == pytest.approx((0 + 0.5 + 0.6) / 3)
    assert losses.margin(scores, row(3, 2, 0), real, 0.5).item() == pytest.approx((0 + 0 + 0.1) / 3)


@pytest.mark.parametrize("loss", ["margin", "ranknet", "listwise"])
def test_the_better_document_is_pushed_up_and_the_worse_down(loss):
    scores = row(0.1, 0.0).requires_grad_()
    LOSSES[loss](scores, row(1, 0), torch.ones(1, 2, dtype=torch.bool)).backward()
    assert scores.grad[0, 0] < 0 < scores.grad[0, 1]
    assert value(loss, (2, 0), (1, 0)) < value(loss, (0, 2), (1, 0))


@pytest.mark.parametrize("loss", ["margin", "ranknet"])
def test_documents_of_equal_grade_are_no_pair(loss):
    assert value(loss, (3, -3), (1, 1)) == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_a_list_without_anything_to_learn_gives_0_with_a_gradient_of_0(loss):
    scores = torch.tensor([[1.0, 2.0]], requires_grad=True)
    result = LOSSES[loss](scores, torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool))
    result.backward()
    assert result.item() == 0 and scores.grad.tolist() == [[0, 0]]


def test_listwise_leaves_out_a_list_of_only_irrelevant_documents_and_counts_a_negative_target_as_0():
    both = torch.ones(2, 2, dtype=torch.bool)
    one = losses.listwise(row(0, 1), row(1, 0), both[:1])
    two = losses.listwise(torch.cat([row(0, 1), row(5, 6)]), torch.cat([row(1, -3), row(0, 0)]), both)
    assert two.item() == pytest.approx(one.item()) == pytest.approx(math.log(1 + math.e))


def test_the_mean_runs_over_the_pairs_of_all_lists():
    scores = torch.tensor([[0.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
    targets = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    real = torch.tensor([[True, True, True], [True, True, False]])
    assert losses.margin(scores, targets, real, 0.5).item() == pytest.approx((3 * 0.5 + 1.5) / 4)
    assert losses.pointwise(scores, targets, real).item() == pytest.approx((4 + 1 + 0 + 0 + 4) / 5)


def test_pairs_above_and_pair_accuracy_count_a_tie_in_scores_as_wrong():
    targets, real = row(2, 0, 2), torch.tensor([[True, True, True]])
    assert losses.pairs_above(targets, real).nonzero().tolist() == [[0, 0, 1], [0, 2, 1]]
    assert losses.pair_accuracy(row(1, 0, 0), targets, real) == (1, 2)
    assert losses.pair_accuracy(row(1, 0, 9), targets, torch.tensor([[True, True, False]])) == (1, 1)


# language()


def language(learned, weights=(1.0,), rows=1):
    """Loss of uniform logits over 4 tokens, with one surprising position."""
    logits = torch.zeros(rows, 4, 4)
    logits[0, 1, 3] = math.log(5)  # token 3 follows position 1 with chance 5/8
    ids = torch.tensor([[0, 1, 3, 2]] * rows)
    return losses.language(logits, ids, torch.tensor(learned), torch.tensor(weights)).item()


def test_each_learned_token_is_told_by_the_position_before_it():
    assert language([[False, False, True, True]]) == pytest.approx((math.log(8 / 5) + math.log(4)) / 2)
    assert language([[False, False, True, False]]) == pytest.approx(math.log(8 / 5))


def test_query_tokens_carry_no_loss():
    logits = torch.zeros(1, 4, 4, requires_grad=True)
    losses.language(
        logits, torch.tensor([[0, 1, 3, 2]]), torch.tensor([[False, False, True, True]]), torch.ones(1)
    ).backward()
    assert logits.grad.abs().sum(2)[0].bool().tolist() == [False, True, True, False]


def test_a_row_of_weight_3_counts_3_times_as_much():
    learned = [[False, False, True, False]] * 2
    assert language(learned, (3.0, 1.0), rows=2) == pytest.approx((3 * math.log(8 / 5) + math.log(4)) / 4)


def test_nothing_learned_is_0():
    assert language([[False] * 4]) == 0 and language([[True] * 4], (0.0,)) == 0


def test_half_precision_logits_are_summed_in_float32():
    logits = torch.zeros(1, 2, 4, dtype=torch.bfloat16)
    found = losses.language(logits, torch.tensor([[0, 1]]), torch.tensor([[False, True]]), torch.ones(1))
    assert found.dtype == torch.float32 and found.item() == pytest.approx(math.log(4), abs=1e-6)
