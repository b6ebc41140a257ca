import numpy as np
import pytest
from checker import assert_valid
from hypothesis import given
from hypothesis import strategies as st
from layers import assert_consistent, cases, moved, peaks, settled

from flash_eplb.planners.improve import improve
from flash_eplb.planners.swaps import even_out


def improved(layer, price=0.0, most=10**6, least=1e-6, fraction=0.0):
    improve(layer, np.float32(price), most, 8, 8, 16, 30, np.float32(least), np.float32(fraction))
    return layer.placement


@given(cases(), st.sampled_from([0, 0.001, 0.02, 0.2]), st.sampled_from([0, 1, 2, 3, 8, 100]))
def test_the_par_falls_by_the_price_of_the_moves_and_no_more_move_than_may(case, price, most):
    heat, today = case
    layer = settled(heat, today)
    placement = improved(layer, price, most)
    assert_consistent(layer)
    assert_valid(placement[None], heat.shape[1])
    moves = moved(placement, today)
    assert moves <= most
    assert peaks(heat, today) - peaks(heat, placement) >= price * moves - 1e-5


@given(cases(), st.integers(0, 3))
def test_slots_that_are_away_from_home_may_stay_there(case, more):
    heat, today = case
    home = np.roll(today, 1, axis=0)
    layer = settled(heat, today, home)
    away = moved(today, home)
    assert moved(improved(layer, 0.0, away + more), home) <= away + more
    assert peaks(heat, layer.placement) <= peaks(heat, today) * (1 + 1e-5)


@given(
    cases(),
    st.sampled_from([0, 0.01]),
    st.sampled_from([0, 2, 100]),
    st.sampled_from([0, 0.5, 1]),
)
def test_evening_out_makes_nothing_worse(case, price, room, share):
    heat, today = case
    layer = settled(heat, today)
    even_out(layer, np.float32(price), room, share)
    assert_consistent(layer)
    assert_valid(layer.placement[None], heat.shape[1])
    assert moved(layer.placement, today) <= room
    won = peaks(heat, today) - peaks(heat, layer.placement)
    assert won >= price * moved(layer.placement, today) - 1e-5


@pytest.mark.parametrize("episodes", [1, 6, 50, 64])
@pytest.mark.parametrize("idle", [0, 1, 3])
def test_ranks_that_would_only_trade_their_loads_keep_them(episodes, idle):
    heat = np.random.default_rng(episodes).random((episodes, 12 * (1 + idle))) ** 4
    heat[:, 12:] = 0
    heat *= 12 / heat.sum(axis=1, keepdims=True) / episodes
    today = np.arange(12 * (1 + idle)).reshape(1 + idle, 12).T
    assert even_out(settled(heat, today), np.float32(0), 10**6, 0) == 0


def test_swaps_find_the_even_placement():
    heat = np.array([[4, 3, 2, 1]]) * 2 / 10
    placement = improved(settled(heat, [[0, 1], [2, 3]]))
    assert peaks(heat, placement) == pytest.approx(1)


def test_swaps_look_at_the_episodes_and_not_at_their_mean():
    # On the mean all is even; but experts 0 and 1 are hot together, and so are 2 and 3.
    heat = np.array([[9, 9, 1, 1], [1, 1, 9, 9]]) * 2 / 40
    assert peaks(heat, improved(settled(heat, [[0, 1], [2, 3]]))) == pytest.approx(1)


@pytest.mark.parametrize(("fraction", "ratio"), [(0.1, 1), (0.2, 1.8)])
def test_a_step_must_win_its_fraction_of_the_excess(fraction, ratio):
    # One swap wins all of the excess; a rank is looked at if its margin is worth eight steps.
    heat = np.array([[9, 9, 1, 1], [1, 1, 9, 9]]) * 2 / 40
    placement = improved(settled(heat, [[0, 1], [2, 3]]), fraction=fraction)
    assert peaks(heat, placement) == pytest.approx(ratio)


def test_a_slot_of_a_cold_replica_goes_to_a_hot_expert():
    heat = np.array([[8, 1, 1]]) * 2 / 10
    placement = improved(settled(heat, [[0, 1], [1, 2]]))
    assert np.bincount(placement.ravel()).tolist() == [2, 1, 1]
    assert peaks(heat, placement) == pytest.approx(1)


@pytest.mark.parametrize("heat", [np.zeros((3, 4)), np.ones((3, 4)) / 6], ids=["none", "even"])
def test_where_nothing_is_to_be_won_nothing_moves(heat):
    today = np.array([[0, 1], [2, 3]])
    assert (improved(settled(heat, today)) == today).all()


def test_one_rank_stays_as_it_is():
    assert improved(settled(np.ones((2, 3)), [[2, 0, 1]])).tolist() == [[2, 0, 1]]
