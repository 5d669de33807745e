import threading
import time
from concurrent.futures import CancelledError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.batching import Batcher, Full, Late


class Model:
    """Scores a prompt with its first id, one batch at a time as it is let to."""

    def __init__(self, free=True):
        self.batches = []
        self.gate = threading.Semaphore(10**6 if free else 0)

    def __call__(self, prompts):
        self.batches.append([(ids[0], len(ids)) for ids, _ in prompts])
        self.gate.acquire()
        return [float(ids[0]) for ids, _ in prompts]

    def wait(self, batches):
        while len(self.batches) < batches:
            time.sleep(0.001)


def prompts(*lengths, name=0):
    return [([name * 1000 + place] + [7] * (length - 1), 2) for place, length in enumerate(lengths)]


@pytest.fixture
def batcher():
    made = Batcher(tokens_per_batch=20, max_wait_s=10, tokens_per_s=100)
    yield made
    made.close()


def test_each_gets_its_own_scores_in_its_own_order(batcher):
    model = Model()
    answers = [batcher.submit(model, prompts(3, 9, 1, 5, name=name), 10) for name in range(20)]
    for name, answer in enumerate(answers):
        assert answer.result(5).logits == [name * 1000 + place for place in range(4)]


def ran(batcher, *requests):
    """Batches as the names of their pairs' requests, of requests that all wait: those of the first are named 1."""
    model = Model(free=False)
    batcher.submit(model, prompts(1), 10)
    model.wait(1)
    answers = [batcher.submit(model, prompts(*lengths, name=name), 10) for name, lengths in enumerate(requests, 1)]
    model.gate.release(99)
    for name, answer in enumerate(answers, 1):
        assert answer.result(5).logits == [1000 * name + place for place in range(len(requests[name - 1]))]
    return [[first // 1000 for first, _ in batch] for batch in model.batches[1:]]


def test_small_requests_go_together_as_long_as_none_waits_for_more_than_a_batch(batcher):
    assert ran(batcher, *[[4, 4]] * 4) == [[1, 1, 2, 2], [3, 3, 4, 4]]  # 4 rows of 4 are 16 tokens, 6 are 24


def test_a_request_of_some_size_goes_whole_and_by_itself(batcher):
    assert ran(batcher, [5] * 8, [2]) == [[2], [1] * 8]  # 40 tokens, 2 batches
    assert ran(batcher, [5] * 6, [5] * 6) == [[1] * 6, [2] * 6]


def test_a_large_request_goes_in_pieces_and_whole_once_little_is_left(batcher):
    assert ran(batcher, [5] * 12) == [[1] * 2, [1] * 2, [1] * 8]


def test_requests_of_unlike_length_are_not_padded_for_each_other(batcher):
    assert ran(batcher, [2, 2], [6]) == [[1, 1], [2]]  # 3 rows of 6 are 18, for 10 tokens
    assert ran(batcher, [5, 5], [6]) == [[2, 1, 1]]  # 18 for 16


def test_a_row_longer_than_a_batch_goes_alone_and_none_waits_for_a_longer_one(batcher):
    model = Model(free=False)
    batcher.submit(model, prompts(1), 10)
    model.wait(1)
    long = batcher.submit(model, prompts(3, 50), 10)
    for _ in range(9):
        model.gate.release()
    assert long.result(5).logits == [0, 1]
    assert model.batches[1:] == [[(1, 50)], [(0, 3)]]


def test_a_small_request_passes_a_large_one_that_came_first_but_not_one_that_came_long_before():
    now = [0.0]
    batcher, model = Batcher(20, 1e9, 100, clock=lambda: now[0]), Model(free=False)
    batcher.submit(model, prompts(1), 1e9)
    model.wait(1)
    batcher.submit(model, prompts(*[10] * 10, name=1), 1e9)  # 100 tokens: 1 s, due after 4
    now[0] = 3.0
    batcher.submit(model, prompts(10, name=2), 1e9)  # 0.1 s, due at 3.4
    now[0] = 3.9
    late = batcher.submit(model, prompts(11, name=3), 1e9)  # due at 4.3, and too long to go with that
    for _ in range(20):
        model.gate.release()
    late.result(5)
    batcher.close()
    assert [first // 1000 for batch in model.batches[1:] for first, _ in batch] == [2, *[1] * 10, 3]


def test_what_must_be_first_passes_all(batcher):
    model = Model(free=False)
    batcher.submit(model, prompts(1), 10)
    model.wait(1)
    batcher.submit(model, prompts(20, name=1), 10)
    probe = batcher.submit(model, prompts(20, name=2), 10, later_s=-1e9)
    for _ in range(5):
        model.gate.release()
    probe.result(5)
    assert model.batches[1] == [(2000, 20)]


def test_two_models_share_no_batch(batcher):
    one, two = Model(free=False), Model()
    batcher.submit(one, prompts(1), 10)
    one.wait(1)
    answers = [batcher.submit(model, prompts(2, name=name), 10) for name, model in ((1, one), (2, two), (3, one))]
    for _ in range(5):
        one.gate.release()
    assert [answer.result(5).logits for answer in answers] == [[1000], [2000], [3000]]
    assert one.batches[1:] == [[(1000, 2), (3000, 2)]] and two.batches == [[(2000, 2)]]


def test_what_is_late_says_so_and_is_not_scored():
    now = [0.0]
    batcher, model = Batcher(20, 1e9, 100, clock=lambda: now[0]), Model(free=False)
    batcher.submit(model, prompts(1), 1e9)
    model.wait(1)
    late, other = batcher.submit(model, prompts(2, name=1), 1.0), batcher.submit(model, prompts(2, name=2), 3.0)
    now[0] = 2.0
    model.gate.release(9)
    assert other.result(5).logits == [2000]
    with pytest.raises(Late):
        late.result(5)
    batcher.close()
    assert model.batches[1:] == [[(2000, 2)]]


def test_what_is_cancelled_is_not_scored_and_no_longer_waits(batcher):
    model = Model(free=False)
    batcher.submit(model, prompts(1), 10)
    model.wait(1)
    gone, other = batcher.submit(model, prompts(2, name=1), 10), batcher.submit(model, prompts(2, name=2), 10)
    assert gone.cancel() and batcher.depth() == (2, 4)
    model.gate.release(9)
    assert other.result(5).logits == [2000]
    with pytest.raises(CancelledError):
        gone.result(5)
    assert model.batches[1:] == [[(2000, 2)]] and batcher.depth() == (0, 0)


def test_more_than_can_be_done_in_time_is_refused_with_the_seconds_to_wait():
    batcher, model = Batcher(20, max_wait_s=2, tokens_per_s=100), Model(free=False)
    batcher.submit(model, prompts(1), 10)
    model.wait(1)
    batcher.submit(model, prompts(*[10] * 15), 10)  # 1.5 s
    batcher.admit(10)
    with pytest.raises(Full) as of_the_client:
        batcher.admit(1.0)
    batcher.submit(model, prompts(*[10] * 15), 10)
    with pytest.raises(Full) as of_the_queue:
        batcher.admit(10)
    model.gate.release(99)
    batcher.close()
    assert (of_the_client.value.after_s, of_the_queue.value.after_s) == (pytest.approx(1.5), pytest.approx(3.0))


def test_a_model_that_fails_tells_each_request_of_its_batch_and_goes_on(batcher):
    def broken(_):
        raise OSError("no memory")

    answers = [batcher.submit(broken, prompts(*[15] * 3), 10) for _ in range(2)]
    for answer in answers:
        with pytest.raises(OSError, match="no memory"):
            answer.result(5)
    assert batcher.submit(Model(), prompts(2), 10).result(5).logits == [0]
    assert batcher.depth() == (0, 0)


def test_the_speed_that_is_expected_follows_the_speed_that_is_seen(batcher):
    def slow(given):
        time.sleep(0.02)
        return [0.0] * len(given)

    for _ in range(40):
        batcher.submit(slow, prompts(1), 10).result(5)
    assert 25 < batcher.tokens_per_s < 55  # 50 tokens a second, from 100


def test_the_seconds_of_a_batch_are_shared_by_tokens():
    batcher, model = Batcher(100, 10, 100), Model(free=False)
    batcher.submit(model, prompts(1), 10)
    model.wait(1)
    one, three = (batcher.submit(model, prompts(*[10] * rows), 10) for rows in (1, 3))
    model.gate.release()
    model.wait(2)
    time.sleep(0.05)
    model.gate.release()
    seconds = [answer.result(5).seconds for answer in (one, three)]
    batcher.close()
    assert seconds[1] == pytest.approx(3 * seconds[0]) and sum(seconds) > 0.05


def test_closing_fails_what_waits_and_what_comes_after_and_lets_a_batch_finish():
    batcher, model = Batcher(20, 10, 100), Model(free=False)
    running = batcher.submit(model, prompts(1), 10)
    model.wait(1)
    waiting = batcher.submit(model, prompts(2), 10)
    closing = threading.Thread(target=batcher.close)
    closing.start()
    with pytest.raises(RuntimeError, match="closed"):
        waiting.result(5)
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit(model, prompts(2), 10)
    model.gate.release()
    closing.join(5)
    assert running.result(5).logits == [0] and not closing.is_alive()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=12), min_size=1, max_size=8))
def test_any_requests_are_scored_whole_in_batches_that_hold_the_budget(requests):
    batcher, model = Batcher(40, 1e9, 100), Model()
    answers = [batcher.submit(model, prompts(*lengths, name=name), 60) for name, lengths in enumerate(requests)]
    for name, (lengths, answer) in enumerate(zip(requests, answers, strict=True)):
        assert answer.result(5).logits == [name * 1000 + place for place in range(len(lengths))]
    batcher.close()
    scored = sorted(length for batch in model.batches for _, length in batch)
    assert scored == sorted(length for lengths in requests for length in lengths)
    assert all(len(batch) * max(length for _, length in batch) <= 2 * 40 for batch in model.batches)
