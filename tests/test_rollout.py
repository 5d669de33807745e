import math
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binomtest

from serve.rollout import Experiment, Marker, Watch, assign, difference, watched

CLIENTS = [f"client {n}" for n in range(2000)]
DIGEST = "ab" * 32
TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]))
WRONG = [("share", 0.0), ("share", 1.1), ("share", "0.1"), ("kind", "ab"), ("name", "a/b"), ("name", ""), ("shares", 1)]
WRONG += [("min_tau", -1.1), ("min_requests", 1), ("min_requests", 1001), ("watched", 0.0), ("max_latency_ratio", 0.0)]


def experiment(**changed):
    return Experiment(**{"name": "new", "kind": "canary", "bundle": "b", "share": 0.1} | changed)


def drawn(**changed):
    return {client for client in CLIENTS if assign(experiment(**changed), client, "r") != "live"}


def watch(candidate=(), live=(), taus=(), **changed):
    """A watch that saw seconds, or None for an error, of requests of each."""
    made = Watch(experiment(**changed))
    for pair in zip_longest(live, candidate, fillvalue=0):
        for role, seconds in zip(("live", "candidate"), pair, strict=True):
            if seconds != 0:
                made.seen(role, seconds is not None, seconds or 9.0)
    for tau in taus:
        made.compared(tau, False, 0.1)
    return made


def erring(errors, requests):
    return [None] * errors + [0.1] * (requests - errors)


def requests_until_out(seed, tau=0.9, spread=0.1, slower=1.0, errors=0.005):
    """When a made-up candidate is out, or None in 3000; a verdict after each 10th, and live scores each 5th too."""
    rng, made = np.random.default_rng(seed), Watch(experiment())
    for request in range(1, 3001):
        made.seen("live", rng.random() >= 0.005, rng.lognormal(-3, 0.6))
        made.seen("candidate", rng.random() >= errors, slower * rng.lognormal(-3, 0.6))
        if request % 5 == 0:
            made.compared(min(1.0, rng.normal(tau, spread)), False, 0.1)
        if request % 10 == 0 and made.verdict():
            return request
    return None


@pytest.mark.parametrize("wrong", WRONG)
def test_an_experiment_with_1_wrong_setting_is_refused(wrong):
    with pytest.raises(pydantic.ValidationError, match=wrong[0]):
        experiment(**dict([wrong]))


def test_10_percent_of_2000_clients_have_the_candidate_whatever_they_ask():
    assert len(drawn()) == pytest.approx(200, abs=45)
    assert {assign(experiment(), client, "another") for client in drawn()} == {"candidate"}
    assert len(drawn(share=0.5) & drawn(name="other", share=0.5)) == pytest.approx(500, abs=70)
    assert drawn(bundle="c", kind="interleave") == drawn()


@given(TEXT, TEXT, st.floats(0.01, 1), st.floats(0.01, 1), st.sampled_from(["canary", "interleave", "shadow"]))
@settings(deadline=None)
def test_a_larger_share_only_adds_to_the_candidate_up_to_a_share_of_1(client, request_id, one, other, kind):
    small, large, all_ = (
        assign(experiment(kind=kind, share=s), client, request_id) for s in (*sorted((one, other)), 1)
    )
    assert small in ("live", large) and large in ("live", all_) and all_ == {"canary": "candidate"}.get(kind, kind)


@pytest.mark.parametrize(("kind", "client"), [("shadow", "c"), ("canary", None), ("canary", ""), ("interleave", None)])
def test_a_shadow_and_a_request_without_a_client_are_drawn_by_their_1000_ids(kind, client):
    roles = [assign(experiment(kind=kind, share=0.3), client, f"r{n}") for n in range(1000)]
    assert 1000 - roles.count("live") == pytest.approx(300, abs=50)


def test_live_scores_20_percent_of_the_candidates_requests_too():
    mine = [f"r{n}" for n in range(20_000) if assign(experiment(), None, f"r{n}") == "candidate"]
    assert sum(watched(experiment(), each) for each in mine) == pytest.approx(0.2 * len(mine), abs=60)


def test_a_difference_of_3_documents_is_as_by_hand():
    # Of 3 pairs one turned; sigmoids of 0 and log 3 are 1/2 and 3/4.
    found = difference([math.log(3), 0.0, -1.0], [0.0, math.log(3), -1.0])
    assert found.tau == pytest.approx(1 / 3) and found.top_changed and found.shift == pytest.approx(0.5 / 3)
    assert difference([3.0, 2.0, 1.0], [5.0, 5.0, 0.0]).tau == pytest.approx(2 / math.sqrt(3 * 2))  # with 1 tie


def test_1_document_or_equal_logits_of_live_have_no_tau_and_equal_ones_of_the_candidate_have_0():
    assert difference([1.0], [2.0]).tau is None and difference([1.0, 1.0], [1.0, 2.0]).tau is None
    assert difference([1.0, 1.0], [2.0, 2.0]).tau is None and difference([1.0, 2.0], [1.0, 1.0]).tau == 0
    assert not difference([2.0, 1.0], [1.0, 1.0]).top_changed and difference([1.0, 2.0], [1.0, 1.0]).top_changed


@pytest.mark.parametrize("pair", [([], []), ([1.0], [1.0, 2.0]), ([1.0], [math.nan]), ([math.inf], [1.0])])
def test_logits_that_are_not_1_finite_number_each_are_refused(pair):
    with pytest.raises(ValueError, match="needs one each"):
        difference(*pair)


@given(st.integers(50, 200), st.integers(0, 50), st.floats(0, 1) | st.floats(0, 0.1))
@settings(deadline=None, max_examples=50)
def test_errors_are_out_just_if_their_lower_bound_of_999_in_1000_is_above_the_bar(requests, errors, bar):
    lower = binomtest(errors, requests, alternative="greater").proportion_ci(0.999).low
    assert (watch(erring(errors, requests), max_error_rate=bar).verdict() is not None) == (lower > bar)


def test_live_that_errs_more_than_the_bar_excuses_the_candidate_up_to_live_s_upper_bound():
    assert watch(erring(20, 100), erring(15, 100)).verdict() is None
    upper = beta.ppf(0.999, 16, 85)
    assert watch(erring(50, 100), erring(15, 100)).verdict() == f"error rate 0.5 of 100 requests, at most {upper:.3g}"
    assert watch(erring(100, 100), erring(100, 100)).verdict() is None
    assert watch(erring(20, 100), erring(2, 100)).verdict().endswith("at most 0.02")


def test_no_bar_is_judged_on_49_requests_and_all_are_on_50():
    assert watch(erring(49, 49)).verdict() is None and watch(erring(50, 50)).verdict().startswith("error rate 1 ")
    assert watch([9.0] * 49, [0.1] * 49).verdict() is None and watch([9.0] * 50, [0.1] * 50).verdict().startswith("p95")
    assert watch([9.0] * 100, [0.1] * 49).verdict() is None and watch([None] + [9.0] * 49, [0.1] * 50).verdict() is None
    assert watch(taus=[-1.0] * 49 + [None] * 99).verdict() is None  # without a tau they do not count
    assert watch(taus=[-1.0] * 50).verdict() == "mean Kendall tau -1 of 50 compared requests, at least 0.5"


def test_a_mean_tau_0_1_below_the_bar_is_out_and_0_09_below_may_be_chance():
    # The standard error of 100 that are 0.3 from their mean is 0.030, and the bar is 3.17 of them above: 0.096.
    assert watch(taus=[0.7, 0.1] * 50).verdict() is not None and watch(taus=[0.71, 0.11] * 50).verdict() is None
    assert watch(taus=[0.7, 0.1] * 50, min_tau=0.49).verdict() is None


def test_14_of_50_beyond_twice_lives_p95_are_out_and_13_may_be_chance():
    # Live's p95 is its 3rd longest; 13 or more beyond have probability 0.0019, 14 or more 0.0009.
    live = [0.1] * 46 + [0.15, 0.2, 0.3, 0.3]
    assert watch([0.1] * 37 + [0.41] * 13, live).verdict() is None
    assert watch([0.1] * 36 + [0.41] * 14, live).verdict().endswith("41 s of 50 requests, at most 2 times live's 0.2 s")
    assert watch([0.1] * 36 + [0.4] * 14, live).verdict() is None


def test_an_outage_of_both_that_a_busy_live_forgot_is_no_fault_of_the_candidate():
    made = Watch(experiment())
    for request in range(20_000):  # one of 20 is the candidate's; half of the first 4000 fail, at both
        made.seen("candidate" if request % 20 == 19 else "live", request >= 4000 or request % 40 >= 20, 0.1)
    assert made.summary()["candidate_errors"] == made.summary()["live_errors"] == 100 and made.verdict() is None


def test_a_candidate_that_begins_to_fail_after_5000_requests_is_out_soon_and_stays_out():
    made = watch([0.1] * 5000, [0.1] * 5000, [0.9] * 5000)
    assert {made.summary()[key] for key in ("candidate_requests", "live_requests", "compared")} == {1000}
    for ok in [False] * 45 + [True] * 2000:
        made.seen("shadow", ok, 0.1)
        made.verdict()
    assert made.verdict() == "error rate 0.036 of 1000 requests, at most 0.02"


def test_a_summary_tells_p95_and_means_of_3_requests_and_nothing_of_none():
    assert watch().summary()["tau"] is None and watch().summary()["live_p95_s"] is None
    made = watch([0.3, None, 0.2], [0.1], [0.5])
    made.compared(0.7, True, 0.3)
    found = {"requests": 3, "errors": 1, "p95_s": 0.3, "live_requests": 1, "live_errors": 0, "live_p95_s": 0.1}
    found |= {"compared": 2, "tau": pytest.approx(0.6), "top_changed": 0.5, "shift": pytest.approx(0.2)}
    assert {key.removeprefix("candidate_"): value for key, value in made.summary().items()} == found


def test_a_good_candidate_stays_in_for_3000_requests_and_a_bad_one_is_out_soon():
    # Longer simulations: of good candidates 0 of 100 were out within 5000 requests, of ones just at a bar 2 to 4.
    assert [requests_until_out(seed) for seed in range(3)] == [None] * 3
    assert all(250 <= requests_until_out(seed, tau=0.0, spread=0.3) <= 350 for seed in range(3))  # 50 compared
    assert requests_until_out(5, slower=4.0) <= 150 and requests_until_out(6, errors=0.1) <= 300


def test_a_candidate_that_is_out_is_out_for_all_replicas_and_1_other_is_not(tmp_path, monkeypatch):
    mine, other = Marker(tmp_path / "out"), Marker(str(tmp_path / "out"))
    assert mine.out("new", DIGEST) is None
    mine.take_out("new", DIGEST, "error rate 0.5")
    other.take_out("new", DIGEST, "mean Kendall tau 0 ü")
    assert mine.out("new", DIGEST) == other.out("new", DIGEST) == "mean Kendall tau 0 ü"
    assert mine.out("newer", DIGEST) is mine.out("new", "cd" * 32) is None and len([*tmp_path.glob("*/*")]) == 1
    monkeypatch.delattr(Path, "replace")  # as if it ended before its file was whole
    with pytest.raises(AttributeError):
        mine.take_out("newer", DIGEST, "r")
    assert mine.out("newer", DIGEST) is None


@pytest.mark.parametrize("content", [b"", b'{"reason": "err', b"{}", b"[]", b"1", b"\xff\xfe", None])
def test_1_broken_marker_says_that_the_candidate_is_out(tmp_path, content):
    file = tmp_path / f"new@{DIGEST}.json"
    file.mkdir() if content is None else file.write_bytes(content)
    assert f"{file} is broken" in Marker(tmp_path).out("new", DIGEST)
    for names in (("../new", DIGEST), ("new", "../x"), ("", DIGEST), ("a" * 65, DIGEST)):
        with pytest.raises(ValueError, match="name a file"):  # nor is one outside the folder
            Marker(tmp_path).out(*names)
