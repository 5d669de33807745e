"""Losses see scores: matrices [lists, documents], raw logits, a row is a query; `real` is true where a document stands.

The mean runs over documents or ordered pairs of all lists, so a long list weighs more than a short one.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from disranker.recipe import Pairs


def pairs_above(targets: Tensor, real: Tensor) -> Tensor:
    """[lists, documents, documents], true at (i, j) where i is to stand above j."""
    return (targets.unsqueeze(2) > targets.unsqueeze(1)) & _both(real)


def margin(scores: Tensor, targets: Tensor, real: Tensor, gap: float, by_target: bool = False) -> Tensor:
    """mean over pairs y_i > y_j of max(0, gap - (s_i - s_j)): the paper's rank loss in its probable form.

    `by_target`: the gap is that of targets that differ by 1, and grows with y_i - y_j.
    """
    wanted = gap * _differences(targets, real) if by_target else gap
    return _mean((wanted - _differences(scores, real)).clamp(min=0), pairs_above(targets, real))


def ranknet(scores: Tensor, targets: Tensor, real: Tensor) -> Tensor:
    """mean over pairs y_i > y_j of log(1 + exp(s_j - s_i)) (Burges et al. 2005)."""
    return _mean(softplus(-_differences(scores, real)), pairs_above(targets, real))


def listwise(scores: Tensor, targets: Tensor, real: Tensor) -> Tensor:
    """Cross-entropy of the softmax of scores against targets that sum to 1 in each list (ListNet, Cao et al. 2007)."""
    wanted = targets.masked_fill(~real, 0).clamp(min=0)
    total = wanted.sum(1, keepdim=True)
    informative = total.squeeze(1) > 0
    chances = torch.log_softmax(scores.masked_fill(~real, -torch.inf), dim=1).masked_fill(~real, 0)
    each = -(wanted / total.clamp(min=1e-9) * chances).sum(1)
    return _mean(each, informative)


def pointwise(scores: Tensor, targets: Tensor, real: Tensor) -> Tensor:
    """Mean squared error of each score."""
    return _mean((scores - targets).masked_fill(~real, 0).square(), real)


point_mse = pointwise  # the student's loss against the teacher's score has the same form


def margin_mse(student: Tensor, teacher: Tensor, real: Tensor, pairs: Pairs = "all", share: float = 0.5) -> Tensor:
    """mean over ordered in-query pairs of ((s_1 - s_2) - (t_1 - t_2))^2 (Hofstaetter et al., arXiv 2010.02666).

    The mean is over the pairs that `compared` chooses, each in both orders.
    """
    chosen = compared(teacher, real, pairs, share)
    return _mean((_differences(student, real) - _differences(teacher, real)).square(), chosen)


def compared(teacher: Tensor, real: Tensor, pairs: Pairs, share: float) -> Tensor:
    """[lists, documents, documents], symmetric, true at the pairs that Margin-MSE compares.

    `neighbours` follow each other in the teacher's order; `gaps` are the share of a list's pairs, at least one, that
    the teacher holds furthest apart; `sampled` is as large a share, one pair after the other drawn with chances as the
    gaps of those that are left, so that two documents of one teacher score are no pair. torch's seed decides the draw.
    """
    apart = _both(real).triu(1)  # each pair once
    gaps = _differences(teacher, real).abs()
    if pairs == "neighbours":
        places = _places(teacher.masked_fill(~real, torch.inf))
        apart = apart & (_differences(places, real).abs() == 1)
    elif pairs == "gaps":
        apart = _most(gaps, apart, share)
    elif pairs == "sampled":
        # The first of exponential waiting times with these rates are such draws (Efraimidis and Spirakis 2006).
        waits = torch.empty_like(gaps).exponential_() / gaps
        apart = _most(-waits, apart & (gaps > 0), share)
    return apart | apart.transpose(1, 2)


def hybrid(
    student: Tensor,
    teacher: Tensor,
    real: Tensor,
    alpha: float,
    beta: float,
    pairs: Pairs = "all",
    share: float = 0.5,
) -> Tensor:
    """alpha * Point-MSE + beta * Margin-MSE, on raw logits standardised over the whole label set."""
    return alpha * point_mse(student, teacher, real) + beta * margin_mse(student, teacher, real, pairs, share)


def kl(student: Tensor, teacher: Tensor, real: Tensor, temperature: float) -> Tensor:
    """temperature^2 * mean over lists of KL(softmax(t / temperature) || softmax(s / temperature)).

    Hinton et al., arXiv 1503.02531: with the square, gradients keep their size. A list of one document teaches nothing
    and does not count.
    """
    wanted, given = (
        torch.log_softmax((scores / temperature).masked_fill(~real, -torch.inf), dim=1).masked_fill(~real, 0)
        for scores in (teacher, student)
    )
    each = (wanted.exp() * (wanted - given)).sum(1)  # 0 where no document stands: both are 0 there
    return temperature**2 * _mean(each, real.sum(1) > 1)


def pair_accuracy(scores: Tensor, targets: Tensor, real: Tensor) -> tuple[int, int]:
    """(pairs in the right order, pairs with different targets); a tie in scores is wrong."""
    above = pairs_above(targets, real)
    return int((above & (_differences(scores, real) > 0)).sum()), int(above.sum())


def language(logits: Tensor, ids: Tensor, learned: Tensor, weights: Tensor) -> Tensor:
    """Weighted negative log-likelihood of the learned tokens, each given all before it.

    logits [rows, length, vocabulary]; ids [rows, length]; learned is true at title, summary and closing tokens;
    weights [rows].
    """
    chosen = learned[:, 1:]  # the model made logits of all tokens; float32 and the softmax are of these alone
    each = cross_entropy(logits[:, :-1][chosen].float(), ids[:, 1:][chosen], reduction="none")
    weight = weights.unsqueeze(1).expand(chosen.shape)[chosen]
    return (each * weight).sum() / weight.sum().clamp(min=1e-9)


def _differences(scores: Tensor, real: Tensor) -> Tensor:
    scores = scores.masked_fill(~real, 0)  # a padded NaN would reach every gradient of its list
    return scores.unsqueeze(2) - scores.unsqueeze(1)


def _both(real: Tensor) -> Tensor:
    return real.unsqueeze(2) & real.unsqueeze(1)


def _places(values: Tensor) -> Tensor:
    """The place of each value in rising order of the last dimension; of equal ones the first comes first."""
    return values.argsort(dim=-1, stable=True).argsort(dim=-1)


def _most(values: Tensor, among: Tensor, share: float) -> Tensor:
    """True at the share of each list's pairs in `among`, rounded up, that has the largest values."""
    wanted = (among.sum((1, 2)) * share).ceil()
    order = _places(-values.masked_fill(~among, -torch.inf).flatten(1)).view(among.shape)
    return among & (order < wanted.view(-1, 1, 1))


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """0, with a gradient, where nothing is chosen."""
    return values.masked_fill(~chosen, 0).sum() / chosen.sum().clamp(min=1)
