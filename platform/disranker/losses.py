"""Losses see scores: matrices [lists, documents], raw logits, a row is a query; `real` is true where a document stands.

The mean runs over documents or ordered pairs of all lists, so a long list weighs more than a short one.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus


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


def margin_mse(student: Tensor, teacher: Tensor, real: Tensor) -> Tensor:
    """mean over ordered in-query pairs of ((s_1 - s_2) - (t_1 - t_2))^2 (Hofstaetter et al., arXiv 2010.02666)."""
    distinct = _both(real) & ~torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
    return _mean((_differences(student, real) - _differences(teacher, real)).square(), distinct)


def hybrid(student: Tensor, teacher: Tensor, real: Tensor, alpha: float, beta: float) -> Tensor:
    """alpha * Point-MSE + beta * Margin-MSE, on raw logits standardised over the whole label set."""
    return alpha * point_mse(student, teacher, real) + beta * margin_mse(student, teacher, real)


def pair_accuracy(scores: Tensor, targets: Tensor, real: Tensor) -> tuple[int, int]:
    """(pairs in the right order, pairs with different targets); a tie in scores is wrong."""
    above = pairs_above(targets, real)
    return int((above & (_differences(scores, real) > 0)).sum()), int(above.sum())


def language(logits: Tensor, ids: Tensor, learned: Tensor, weights: Tensor) -> Tensor:
    """Weighted negative log-likelihood of the learned tokens, each given all before it.

    logits [rows, length, vocabulary]; ids [rows, length]; learned is true at title, summary and closing tokens;
    weights [rows].
    """
    chosen = learned[:, 1:]  # the head sees these alone: it is most of the cost of a small model
    each = cross_entropy(logits[:, :-1][chosen].float(), ids[:, 1:][chosen], reduction="none")
    weight = weights.unsqueeze(1).expand(chosen.shape)[chosen]
    return (each * weight).sum() / weight.sum().clamp(min=1e-9)


def _differences(scores: Tensor, real: Tensor) -> Tensor:
    scores = scores.masked_fill(~real, 0)  # a padded NaN would reach every gradient of its list
    return scores.unsqueeze(2) - scores.unsqueeze(1)


def _both(real: Tensor) -> Tensor:
    return real.unsqueeze(2) & real.unsqueeze(1)


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """0, with a gradient, where nothing is chosen."""
    return values.masked_fill(~chosen, 0).sum() / chosen.sum().clamp(min=1)
