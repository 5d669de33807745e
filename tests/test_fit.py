import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from disranker import fit
from disranker.batches import Rows
from disranker.recipe import Refused, Training

CFG = Training(epochs=2, lr=0.05, warmup_share=0.25, tokens_per_batch=8, clip_norm=1.0)


class Line:
    """Learns y = 2x - 1 from 12 points, 2 tokens each."""

    sizes = [(1, 2)] * 12

    def __init__(self, factor=1.0):
        self.factor, self.seen = factor, []

    def batch(self, places):
        self.seen.append(places)
        x = torch.tensor([[place / 12] for place in places])
        batch = SimpleNamespace(x=x, rows=Rows.padded([([1, 2], 1)] * len(places), 0))
        batch.to = lambda _: batch
        return batch

    def loss(self, model, batch):
        return self.factor * (model(batch.x) - 2 * batch.x + 1).square().mean()

    def validate(self, _):
        return {}


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))


def trained(task, planned, cfg=CFG, *, state=None, stop=None, start=None):
    """(model, progress of each step, state after the last)."""
    found, told, kept = start or model(), [], None
    for progress, snapshot in fit.fit(found, task, planned, cfg, state):
        told.append(progress)
        kept = copy.deepcopy(snapshot())
        if progress.step == stop:
            break
    return found, told, kept


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_run_that_died_after_a_step_ends_with_the_very_same_weights(stop):
    planned = fit.steps(Line(), CFG, seed=3)
    whole, told, _ = trained(Line(), planned)
    _, _, state = trained(Line(), planned, stop=stop)
    again, rest, _ = trained(Line(), planned, state=state, start=model(seed=9))
    assert state["step"] == stop and [p.step for p in rest] == [p.step for p in told[stop:]]
    assert rest == told[stop:]
    for key, weight in whole.state_dict().items():
        assert torch.equal(weight, again.state_dict()[key])


def test_a_run_that_was_done_does_nothing_more():
    planned = fit.steps(Line(), CFG, seed=3)
    _, _, state = trained(Line(), planned)
    assert trained(Line(), planned, state=state)[1] == []


def test_6_steps_see_every_batch_of_the_plan_once_in_order_and_lower_the_loss():
    task = Line()
    planned = fit.steps(task, CFG, seed=3)
    _, told, _ = trained(task, planned)
    assert task.seen == planned and len(planned) == 6
    assert [(p.step, p.steps, p.tokens) for p in told] == [(n, 6, 8) for n in range(1, 7)]
    assert told[-1].loss < told[0].loss


def test_each_epoch_sees_every_item_once_in_another_order():
    planned = fit.steps(Line(), CFG, seed=3)
    epochs = [planned[:3], planned[3:]]
    assert all(sorted(p for batch in epoch for p in batch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] and planned == fit.steps(Line(), CFG, seed=3) != fit.steps(Line(), CFG, seed=4)


def test_2_ranks_take_equally_many_batches_and_none_twice():
    cfg = CFG.model_copy(update={"tokens_per_batch": 4})  # 6 batches an epoch
    ranks = [fit.steps(Line(), cfg, 3, rank, 2) for rank in range(2)]
    whole = fit.steps(Line(), cfg, 3)
    assert list(map(len, ranks)) == [6, 6]
    assert [batch for pair in zip(*ranks, strict=True) for batch in pair] == whole


def test_4_ranks_of_6_batches_leave_2_for_the_next_shuffle():
    cfg = CFG.model_copy(update={"tokens_per_batch": 4, "epochs": 1})
    ranks = [fit.steps(Line(), cfg, 3, rank, 4) for rank in range(4)]
    taken = [tuple(batch) for rank in ranks for batch in rank]
    assert list(map(len, ranks)) == [1] * 4 and len(set(taken)) == 4


def test_more_ranks_than_batches_share_them():
    cfg = CFG.model_copy(update={"tokens_per_batch": 24, "epochs": 1})
    assert [len(fit.steps(Line(), cfg, 3, rank, 3)) for rank in range(3)] == [1, 1, 1]


def test_nothing_to_train_on_is_refused():
    task = Line()
    task.sizes = []
    with pytest.raises(Refused, match="nothing to train on"):
        fit.steps(task, CFG, 1)


def test_the_learning_rate_rises_over_a_quarter_of_8_steps_and_falls_along_a_cosine():
    cfg = Training(lr=0.1, warmup_share=0.25)
    _, told, _ = trained(Line(), [[0]] * 8, cfg)
    falling = [0.05 * (1 + math.cos(math.pi * n / 6)) for n in range(6)]
    assert [p.lr for p in told] == pytest.approx([0.05, 0.1, *falling])


def test_without_warm_up_the_first_step_has_the_whole_rate_and_one_step_alone_works():
    _, told, _ = trained(Line(), [[0]] * 4, Training(lr=0.1, warmup_share=0.0))
    assert told[0].lr == pytest.approx(0.1) and told[1].lr == pytest.approx(0.1) and told[3].lr == pytest.approx(0.025)
    assert len(trained(Line(), [[0]])[1]) == 1


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_raises_before_the_weights_change(factor):
    found, before = model(), model().state_dict()
    with pytest.raises(FloatingPointError, match=r"at step 1: lower lr 0\.05 or clip_norm 1\.0"):
        next(fit.fit(found, Line(factor), [[0]], CFG))
    assert all(torch.equal(weight, before[key]) for key, weight in found.state_dict().items())


def test_gradients_are_clipped_to_a_norm_of_1():
    task, found = Line(factor=1e6), model()
    norms = [
        sum(p.grad.square().sum() for p in found.parameters()).sqrt().item()
        for _ in fit.fit(found, task, [[0, 1], [2, 3], [4, 5]], CFG)
    ]
    assert norms == pytest.approx([1, 1, 1], rel=1e-4)


def test_gradients_of_a_step_are_not_carried_over_to_the_next():
    cfg, found = CFG.model_copy(update={"clip_norm": 1e9}), model()
    run = fit.fit(found, Line(), [[0, 1], [2, 3]], cfg)
    next(run)
    alone = copy.deepcopy(found)
    alone.zero_grad()
    Line().loss(alone, Line().batch([2, 3])).backward()
    next(run)
    assert all(torch.allclose(a.grad, b.grad) for a, b in zip(found.parameters(), alone.parameters(), strict=True))


def test_the_first_step_is_that_of_adamw_with_decay():
    cfg = Training(lr=0.1, warmup_share=0.0, weight_decay=0.5, clip_norm=1e9)
    found, before = model(), model()
    batch = Line().batch([3])
    Line().loss(before, batch).backward()
    next(fit.fit(found, Line(), [[3]], cfg))
    for after, was in zip(found.parameters(), before.parameters(), strict=True):
        step = was.grad / (was.grad.abs() + 1e-8)
        assert torch.allclose(after, was * (1 - 0.1 * 0.5) - 0.1 * step, atol=1e-5)


def test_training_switches_drop_out_on_and_a_plain_model_is_itself():
    found = model().eval()
    next(fit.fit(found, Line(), [[0]], CFG))
    assert found.training and fit.plain(found) is found
