import random
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from disranker import interleaving
from disranker.interleaving import credit, needed, power, preference, team_draft
from disranker.world import ATTRACTIVENESS, EXAMINATION

MIRROR = {"live": "candidate", "candidate": "live"}
GRADES = (3, 2, 2, 1, 1, 0, 0, 0, 0, 0)  # of documents 0 to 9
BETTER, WORSE = list(range(10)), [5, 2, 0, 7, 1, 3, 6, 4, 8, 9]


@st.composite
def rankings(draw, documents=12):
    size = draw(st.integers(0, documents))
    return draw(st.permutations(range(size))), draw(st.permutations(range(size)))


def outcomes(pages, live, candidate, seed):
    """Of pages seen by made-up shoppers: a document is clicked if its position is examined and its grade attracts."""
    rng, found = random.Random(seed), []
    for page in range(pages):
        order, teams = team_draft(live, candidate, f"{seed} {page}")
        clicks = [p for p, d in enumerate(order) if rng.random() < EXAMINATION[p] * ATTRACTIVENESS[GRADES[d]]]
        found.append(credit(teams, clicks))
    return found


def test_4_documents_are_drafted_as_by_hand():
    # Live first: 0, then the candidate's best, 2. Candidate first: 1, since 2 and 0 are taken; 3 is left to live.
    order, teams = interleaving._draft([0, 1, 2, 3], [2, 0, 1, 3], iter([True, False]))
    assert order == [0, 2, 1, 3] and teams == ["live", "candidate", "candidate", "live"]


@given(rankings(), st.integers() | st.text(alphabet=st.characters(exclude_categories=["Cs"])))
@settings(deadline=None)
def test_a_draft_has_each_document_once_and_teams_that_differ_by_at_most_1(pair, seed):
    order, teams = team_draft(*pair, seed)
    assert sorted(order) == sorted(pair[0]) and len(teams) == len(order)
    assert abs(teams.count("live") - teams.count("candidate")) == len(order) % 2
    assert all({*teams[place : place + 2]} == {"live", "candidate"} for place in range(0, len(order) - 1, 2))
    assert team_draft(*pair, seed) == (order, teams)


@given(rankings(), st.integers(0, 99))
def test_each_document_is_the_best_that_its_team_had_left(pair, seed):
    order, teams = team_draft(*pair, seed)
    for place, team in enumerate(teams):
        ranking = pair[team == "candidate"]
        assert order[place] == next(document for document in ranking if document not in order[:place])


@given(rankings(), st.lists(st.booleans(), min_size=6, max_size=6))
def test_swapped_rankings_and_6_swapped_coins_swap_nothing_but_the_teams(pair, coins):
    order, teams = interleaving._draft(*pair, iter(coins))
    swapped = interleaving._draft(*reversed(pair), iter([not coin for coin in coins]))
    assert swapped == (order, [MIRROR[team] for team in teams])


@given(rankings(7))
def test_over_all_coins_each_position_is_of_live_in_half_of_the_drafts(pair):
    drafts = [interleaving._draft(*pair, iter(coins))[1] for coins in product([True, False], repeat=4)]
    assert all(sum(teams[place] == "live" for teams in drafts) == 8 for place in range(len(pair[0])))


def test_of_2000_seeds_each_tosses_its_own_fair_coins():
    drafts = [team_draft(BETTER, WORSE, seed)[1] for seed in range(2000)]
    assert all(abs(sum(teams[place] == "live" for teams in drafts) - 1000) < 100 for place in range(10))
    # 5 rounds of fair coins are alike in 1 of 16 drafts.
    assert abs(sum(len({*teams[::2]}) == 1 for teams in drafts) - 125) < 45


def test_identical_rankings_are_preferred_0_times_more_in_expectation():
    drafts = [interleaving._draft([4, 5, 6], [4, 5, 6], iter(coins)) for coins in product([True, False], repeat=2)]
    assert {tuple(order) for order, _ in drafts} == {(4, 5, 6)}
    for clicked in ([0], [1], [2], [0, 2], [0, 1, 2]):
        assert sum(credit(teams, clicked) for _, teams in drafts) == 0
    assert preference(outcomes(500, BETTER, BETTER, 1)).p > 0.05


@pytest.mark.parametrize("pair", [([1, 1], [1, 1]), ([1, 2], [1, 3]), ([1, 2], [1]), ([1, 2], [1, 2, 2])])
def test_rankings_that_do_not_have_the_same_documents_once_are_refused(pair):
    with pytest.raises(ValueError, match="same documents"):
        team_draft(*pair, 1)


def test_credit_is_the_sign_of_2_clicks_less_1_and_counts_a_document_once():
    teams = ["live", "candidate", "candidate", "live"]
    assert [credit(teams, clicked) for clicked in ([1, 2, 0], [0, 3, 1], [0, 1], [], [1, 1, 0])] == [1, -1, 0, 0, 0]


@pytest.mark.parametrize("position", [-1, 2])
def test_a_click_off_the_list_of_2_is_refused(position):
    with pytest.raises(ValueError, match=f"no position {position} in a list of 2"):
        credit(["live", "candidate"], [position])


def test_8_wins_of_10_have_p_56_in_512_and_wilsons_interval_by_hand():
    found = preference([1] * 8 + [-1] * 2 + [0] * 5)
    assert (found.wins, found.losses, found.ties, found.share) == (8, 2, 5, 0.8)
    assert found.p == pytest.approx(56 / 512)  # 2 * (45 + 10 + 1) / 1024
    # centre (0.8 + z²/20) / (1 + z²/10), half width z sqrt(0.016 + z²/400) / (1 + z²/10), z = 1.96
    assert (found.low, found.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))


def test_less_confidence_is_a_narrower_interval():
    wide, narrow = preference([1, 1, -1], 0.99), preference([1, 1, -1], 0.5)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_ties_alone_are_no_preference_and_an_outcome_of_2_is_refused():
    found = preference([0, 0])
    assert (found.ties, found.share, found.low, found.high, found.p) == (2, None, None, None, None)
    with pytest.raises(ValueError, match="1, 0 or -1"):
        preference([1, 2])


def test_5_wins_of_5_are_never_significant_and_6_of_6_are():
    assert power(1.0, 0) == power(1.0, 5) == 0 and power(1.0, 6) == 1
    assert power(0.8, 6) == pytest.approx(0.8**6 + 0.2**6)  # p of 5 of 6 is 14 / 64


@given(st.floats(0.01, 0.99) | st.sampled_from([0.0, 1.0]), st.integers(1, 40), st.sampled_from([0.01, 0.05, 0.2]))
@settings(deadline=None, max_examples=20)
@example(0.7, 6, 0.03125)  # 6 of 6 have just this p
def test_power_is_the_chance_of_all_outcomes_that_preference_calls_significant(share, decided, alpha):
    significant = [n for n in range(decided + 1) if preference([1] * n + [-1] * (decided - n)).p <= alpha]
    assert power(share, decided, alpha) == pytest.approx(sum(binom.pmf(significant, decided, share)), abs=1e-9)


@given(st.floats(0.55, 1) | st.floats(0, 0.45), st.floats(0.3, 0.99), st.sampled_from([0.01, 0.05, 0.2]))
@settings(deadline=None, max_examples=30)
@example(0.6, 0.8, 0.05)
def test_from_the_needed_number_on_the_power_is_there_and_1_below_it_is_not(share, wanted, alpha):
    number = needed(share, wanted, alpha)
    assert power(share, number - 1, alpha) < wanted
    assert (interleaving._power(share, np.arange(number, 2 * number + 100), alpha) >= wanted).all()


def test_a_share_of_60_percent_needs_about_200_and_6_wins_need_6():
    assert needed(0.6) == needed(0.4) == pytest.approx(194, abs=20)  # 194: the normal approximation
    assert needed(1.0) == 6


@pytest.mark.parametrize("wrong", [(0.5,), (1.1,), (0.6, 0.04), (0.6, 1.0)])
def test_what_no_number_of_outcomes_can_show_is_refused(wrong):
    with pytest.raises(ValueError, match="needs a share"):
        needed(*wrong)


@pytest.mark.parametrize("wrong", [(1.5, 10), (0.5, -1), (0.5, 10, 0.0)])
def test_power_of_an_impossible_share_number_or_alpha_is_refused(wrong):
    with pytest.raises(ValueError, match="needs"):
        power(*wrong)


def test_the_better_of_2_rankings_wins_by_12_outcomes_as_often_as_their_power_says():
    decided = [outcome for outcome in outcomes(12_000, WORSE, BETTER, 3) if outcome]
    share = sum(outcome > 0 for outcome in decided[:4000]) / 4000
    trials = [preference(decided[start : start + 12]) for start in range(4000, len(decided) - 12, 12)]
    won = sum(trial.p <= 0.05 and trial.share > 0.5 for trial in trials) / len(trials)
    assert len(trials) > 200 and 0.3 < power(share, 12) < 0.9
    assert won == pytest.approx(power(share, 12), abs=0.1)  # 3 standard errors
