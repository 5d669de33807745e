import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from disranker import fit, spread
from disranker.batches import Rows
from disranker.recipe import Refused, Training

CFG = Training(epochs=2, lr=0.05, warmup_share=0.25, tokens_per_batch=8, clip_norm=1.0)


class Line:
    """Learns y = 2x - 1 from 12 points, 2 tokens each."""

    sizes = [(1, 2)] * 12
    metric, larger_is_better = "error", False

    def __init__(self, factor=1.0, errors=()):
        self.factor, self.seen, self.errors, self.validated = factor, [], errors, 0

    def batch(self, places):
        self.seen.append(places)
        x = torch.tensor([[place / 12] for place in places])
        batch = SimpleNamespace(x=x, rows=Rows.padded([([1, 2], 1)] * len(places), 0))
        batch.to = lambda _: batch
        return batch

    def query(self, place):
        return f"query {place}"

    def loss(self, model, batch):
        return self.factor * (model(batch.x) - 2 * batch.x + 1).square().mean()

    def validate(self, _):
        self.validated += 1
        return {"error": self.errors[self.validated - 1]} if self.errors else {}


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))


def trained(task, planned, cfg=CFG, *, state=None, stop=None, start=None):
    """(model, progress of each step, state after the last)."""
    run, told = fit.Fit(start or model(), task, planned, cfg), []
    if state:
        run.load(copy.deepcopy(state))
    for progress in run.steps():
        told.append(progress)
        if progress.step == stop:
            break
    return run.model, told, copy.deepcopy(run.state())


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
    assert [[places] for places in task.seen] == planned and len(planned) == 6
    assert [(p.step, p.tokens) for p in told] == [(n, 8) for n in range(1, 7)]
    assert told[-1].loss < told[0].loss


def test_each_epoch_sees_every_item_once_in_another_order():
    planned = fit.steps(Line(), CFG, seed=3)
    epochs = [planned[:3], planned[3:]]
    assert all(sorted(p for (batch,) in epoch for p in batch) == list(range(12)) for epoch in epochs)
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
    taken = [tuple(batch) for rank in ranks for (batch,) in rank]
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
    _, told, _ = trained(Line(), [[[0]]] * 8, cfg)
    falling = [0.05 * (1 + math.cos(math.pi * n / 6)) for n in range(6)]
    assert [p.lr for p in told] == pytest.approx([0.05, 0.1, *falling])


def test_without_warm_up_the_first_step_has_the_whole_rate_and_one_step_alone_works():
    _, told, _ = trained(Line(), [[[0]]] * 4, Training(lr=0.1, warmup_share=0.0))
    assert told[0].lr == pytest.approx(0.1) and told[1].lr == pytest.approx(0.1) and told[3].lr == pytest.approx(0.025)
    assert len(trained(Line(), [[[0]]])[1]) == 1


class Poisoned(Line):
    """One of its points makes every loss that it is part of no number."""

    def loss(self, model, batch):
        bad = torch.isclose(batch.x, torch.tensor(7 / 12)).any()
        return super().loss(model, batch) * (float("nan") if bad else 1.0)


@pytest.mark.parametrize(
    ("task", "culprits"), [(Poisoned(), ["query 7"]), (Line(float("inf")), ["query 6", "query 7"])]
)
def test_a_step_that_would_make_the_weights_no_numbers_is_not_taken_and_names_its_queries(task, culprits):
    found = model()
    run = fit.Fit(found, task, [[[0]], [[1, 2], [6, 7]]] if isinstance(task, Poisoned) else [[[6, 7]]], CFG)
    steps = run.steps()
    if isinstance(task, Poisoned):
        next(steps)
    before = copy.deepcopy(found.state_dict())
    with pytest.raises(
        fit.Diverged, match=rf"loss (nan|inf) and gradient norm (nan|inf) at step {run.done + 1}$"
    ) as told:
        next(steps)
    assert (told.value.step, told.value.queries) == (run.done + 1, culprits)
    assert all(torch.equal(weight, before[key]) for key, weight in found.state_dict().items())


class Together(Line):
    """Two points are fine alone and make a loss that is no number in one batch."""

    def loss(self, model, batch):
        return super().loss(model, batch) * (float("nan") if len(batch.x) > 1 else 1.0)


def test_where_no_item_alone_is_to_blame_all_queries_of_the_batch_are_named():
    with pytest.raises(fit.Diverged) as told:
        next(fit.Fit(model(), Together(), [[[3], [1, 2]]], CFG).steps())
    assert told.value.queries == ["query 1", "query 2"]


class Flat(Line):
    """Its loss is 2 for the first point and 4 for the others."""

    def loss(self, model, batch):
        return (2.0 if batch.x.min() == 0 else 4.0) + 0 * super().loss(model, batch)


def test_a_step_that_is_not_taken_tells_the_mean_loss_of_its_batches():
    found = model()
    for weight in found.parameters():
        weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(fit.Diverged, match=r"^loss 3 and gradient norm nan at step 1$") as told:
        next(fit.Fit(found, Flat(), [[[0], [5]]], CFG).steps())
    assert told.value.queries == ["query 0", "query 5"]


def test_gradients_are_clipped_to_a_norm_of_1():
    task, found = Line(factor=1e6), model()
    norms = [
        sum(p.grad.square().sum() for p in found.parameters()).sqrt().item()
        for _ in fit.Fit(found, task, [[[0, 1]], [[2, 3]], [[4, 5]]], CFG).steps()
    ]
    assert norms == pytest.approx([1, 1, 1], rel=1e-4)


def test_gradients_of_a_step_are_not_carried_over_to_the_next():
    cfg, found = CFG.model_copy(update={"clip_norm": 1e9}), model()
    run = fit.Fit(found, Line(), [[[0, 1]], [[2, 3]]], cfg).steps()
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
    next(fit.Fit(found, Line(), [[[3]]], cfg).steps())
    for after, was in zip(found.parameters(), before.parameters(), strict=True):
        step = was.grad / (was.grad.abs() + 1e-8)
        assert torch.allclose(after, was * (1 - 0.1 * 0.5) - 0.1 * step, atol=1e-5)


def test_training_switches_drop_out_on_and_a_plain_model_is_itself():
    found = model().eval()
    next(fit.Fit(found, Line(), [[[0]]], CFG).steps())
    assert found.training and spread.plain(found) is found


def test_4_validations_of_8_steps_and_one_before_the_first():
    task = Line(errors=[9, 3, 2, 1, 4])
    run = fit.Fit(model(), task, [[[0]]] * 8, Training())
    list(run.steps())
    assert [(one["step"], one["error"]) for one in run.validations] == [(0, 9), (2, 3), (4, 2), (6, 1), (8, 4)]
    assert run.best == {"step": 6, "metric": "error", "value": 1}


@pytest.mark.parametrize("larger", [False, True])
def test_the_best_weights_are_those_at_its_step_and_never_those_of_the_start(larger):
    task = Line(errors=[9, 3, 2, 4, 5] if not larger else [9, 3, 5, 4, 2])
    task.larger_is_better = larger
    run, kept = fit.Fit(model(), task, [[[0]]] * 8, Training()), None
    for progress in run.steps():
        kept = copy.deepcopy(run.model.state_dict()) if progress.step == 4 else kept
    assert any(not torch.equal(weight, kept[key]) for key, weight in run.model.state_dict().items())
    run.finish()
    assert run.best["step"] == 4
    assert all(torch.equal(weight, kept[key]) for key, weight in run.model.state_dict().items())


def test_a_run_that_died_after_its_best_step_still_ends_with_the_best_weights():
    errors, planned = [9, 3, 1, 4, 5], [[[n]] for n in range(8)]
    whole, again = fit.Fit(model(), Line(errors=errors), planned, Training()), None
    list(whole.steps())
    whole.finish()
    _, _, state = trained(Line(errors=errors), planned, Training(), stop=5)
    again = fit.Fit(model(seed=9), Line(errors=errors[3:]), planned, Training())
    again.load(state)
    list(again.steps())
    again.finish()
    assert again.best == whole.best and again.validations == whole.validations and again.curve == whole.curve
    for key, weight in whole.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[key])


def test_a_run_stops_2_validations_after_its_best_and_goes_on_without_patience():
    for patience, done in ((2, 6), (0, 8)):
        run = fit.Fit(model(), Line(errors=[9, 3, 4, 5, 6]), [[[0]]] * 8, Training(patience=patience))
        assert len(list(run.steps())) == done == run.done


def test_without_a_finite_measure_the_last_weights_stay():
    for errors in ([], [float("nan")] * 5):
        run = fit.Fit(model(), Line(errors=errors), [[[0]]] * 4, Training())
        list(run.steps())
        last = copy.deepcopy(run.model.state_dict())
        run.finish()
        assert run.best is None and all(torch.equal(w, last[key]) for key, w in run.model.state_dict().items())
        assert [set(one) for one in run.validations] == [{"step"}] * 5


def test_2_batches_a_step_are_one_of_both():
    two, one = (fit.Fit(model(), Line(), planned, CFG) for planned in ([[[0, 1], [2, 3]]], [[[0, 1, 2, 3]]]))
    for run in (two, one):
        (progress,) = run.steps()
        assert progress.tokens == 8
    assert two.curve[0]["loss"] == pytest.approx(one.curve[0]["loss"])
    assert two.curve[0]["gradient_norm"] == pytest.approx(one.curve[0]["gradient_norm"])
    for a, b in zip(two.model.parameters(), one.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_6_batches_accumulated_by_2_make_3_steps_an_epoch_and_4_by_3_make_2():
    cfg = CFG.model_copy(update={"tokens_per_batch": 5, "accumulate": 2})  # 2 items a batch
    planned = fit.steps(Line(), cfg, 3)
    assert [len(step) for step in planned] == [2, 2, 2] * 2
    cfg = cfg.model_copy(update={"tokens_per_batch": 6})  # 3 items a batch: 4 batches
    assert [len(step) for step in fit.steps(Line(), cfg.model_copy(update={"accumulate": 3}), 3)] == [3, 1] * 2


class Dropped(Line):
    """Its loss is a number drawn anew at each step."""

    def loss(self, model, batch):
        return super().loss(model, batch) * torch.rand(1).item()


def test_what_is_drawn_at_a_step_depends_on_its_number_and_the_seed_alone():
    planned = [[[0]]] * 4
    _, whole, _ = trained(Dropped(), planned)
    _, _, state = trained(Dropped(), planned, stop=2)
    torch.manual_seed(77)
    assert trained(Dropped(), planned, state=state)[1] == whole[2:]
    assert next(fit.Fit(model(), Dropped(), planned, CFG, seed=1).steps()) != whole[0]


def test_in_bfloat16_the_loss_is_computed_narrow_and_the_weights_stay_float32():
    run = fit.Fit(model(), Line(), [[[0]]], CFG.model_copy(update={"precision": "bfloat16"}))
    seen = []
    run.model.register_forward_hook(lambda *given: seen.append(given[2].dtype))
    list(run.steps())
    assert seen == [torch.bfloat16] and {weight.dtype for weight in run.model.parameters()} == {torch.float32}
