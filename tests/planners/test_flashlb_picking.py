"""Which layers FlashLB plans, and which it leaves alone."""

import logging

import numpy as np
import pytest
from checker import assert_leads, ratios
from heats import EVEN_SOON, initial, loosened, shuffled, stuck, uneven, window, zipf

from flash_eplb.planners import flashlb
from flash_eplb.planners.flashlb import FlashLB

EFFORTS = ["fast", "balanced", "thorough"]

MANY = 10**6
"""Times the tokens of small heats, so that what they differ by is not by chance."""

STEADY = {
    "many tokens": {"skew": 1, "tokens": 10**6, "episodes": 64},
    "few tokens": {"skew": 1, "tokens": 2000, "episodes": 64},
    "decode": {"skew": 0.8, "tokens": 64 * 8, "episodes": 64},
    "short windows": {"skew": 1, "tokens": 5000, "episodes": 16},
    "shorter windows": {"skew": 1, "tokens": 20_000, "episodes": 4},
    "single episodes": {"skew": 1, "tokens": 10**6, "episodes": 1},
}


def steady(rng, experts, skew, tokens, episodes):
    """A function that draws windows of stationary heat of 4 layers."""
    popularity = zipf(rng, 4, experts, skew)
    return lambda: window(rng, popularity, episodes, tokens)


@pytest.mark.parametrize("name", STEADY)
@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("every_layer", [False, True])
@pytest.mark.parametrize(("ranks", "slots", "experts"), [(8, 9, 64), (4, 5, 16)])
def test_stationary_heat_gives_no_second_plan(name, effort, every_layer, ranks, slots, experts):
    draw = steady(np.random.default_rng(1), experts, **STEADY[name])
    planner = FlashLB(ranks, slots, effort=effort)
    first = planner.plan(draw(), initial(4, ranks, slots, experts), every_layer)
    assert len(first.layers) == 4
    for _ in range(50):
        later = planner.plan(draw(), first.placement)
        assert not later
        assert (later.placement == first.placement).all()


def test_counts_that_vary_by_more_than_chance_give_no_second_plan_either():
    rng = np.random.default_rng(25)
    rates = rng.gamma(20, 2000 / 64 / 20, (64 + 8 * 20, 3, 64))  # half of their variance
    heat, planner, placement = rng.poisson(rates), FlashLB(16, 5), initial(3, 16, 5, 64)
    placement = planner.plan(heat[:64], placement).placement
    for now in range(72, len(heat), 8):
        assert not planner.plan(heat[now - 64 : now], placement)


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("episodes", [8, 24])
def test_a_layer_without_tokens_in_half_of_each_window_is_planned_beside_others(half, episodes):
    rng = np.random.default_rng(0)
    popularity, placement = zipf(rng, 3, 32), initial(3, 8, 5, 32)
    planner = FlashLB(8, 5)
    for _ in range(3):
        heat = window(rng, popularity, episodes, 5000)
        np.split(heat, 2)[half][:, 1] = 0
        plan = planner.plan(heat, placement)
        placement = plan.placement
    assert ratios(window(rng, popularity), placement)[1] < 1.1
    assert not plan


@pytest.mark.parametrize("name", ["many tokens", "few tokens", "short windows"])
def test_planned_routing_gives_no_second_plan_either(name):
    draw = steady(np.random.default_rng(2), 64, **STEADY[name])
    planner = FlashLB(8, 9, routing="weighted")
    first = planner.plan(draw(), initial(4, 8, 9, 64))
    assert len(first.layers) == 4
    for _ in range(10):
        assert not planner.plan(draw(), first.placement)


@pytest.mark.parametrize("name", ["many tokens", "few tokens", "short windows"])
def test_a_new_object_on_stationary_heat_moves_no_weights(name):
    # A restarted planner has no promises; chance differences must not look like gains to it.
    draw = steady(np.random.default_rng(3), 128, **STEADY[name])
    first = FlashLB(16, 9).plan(draw(), initial(4, 16, 9, 128))
    for _ in range(6):
        assert not FlashLB(16, 9).plan(draw(), first.placement)


@pytest.mark.parametrize("name", ["many tokens", "few tokens"])
@pytest.mark.parametrize("limit", [{"max_moves": 20}, {"max_moves": 100}, {"max_layers": 1}])
def test_plans_within_limits_come_to_rest_on_stationary_heat(name, limit):
    draw = steady(np.random.default_rng(9), 64, **STEADY[name])
    planner, placement = FlashLB(8, 9, **limit), initial(4, 8, 9, 64)
    plans = []
    for _ in range(50):
        plans.append(planner.plan(draw(), placement))
        placement = plans[-1].placement
    assert sum(map(bool, plans)) > 1
    assert not any(plans[25:])
    heat = draw()
    before, after = (ratios(heat, slots) - 1 for slots in (initial(4, 8, 9, 64), placement))
    assert (after < 0.1 * before).all()


@pytest.mark.parametrize(
    ("shape", "most"), [((256, 64, 5), 32), ((256, 64, 5), 4), ((128, 16, 9), 4)]
)
def test_plans_within_a_limit_of_moves_come_near_to_one_without(shape, most):
    # The same heat in all episodes: many ranks are equally high, and no single swap wins much.
    experts, ranks, slots = shape
    rng = np.random.default_rng(1)
    heat = np.repeat((rng.dirichlet(np.full(experts, 0.6), 1) * 1e6).astype(int)[None], 16, 0)
    start = shuffled(rng, 1, ranks, slots, experts)
    planner, placement = FlashLB(ranks, slots, max_moves=most), start
    for _ in range(60):
        placement = planner.plan(heat, placement).placement
    free = FlashLB(ranks, slots).plan(heat, start).placement
    before, within, without = (ratios(heat, slots)[0] - 1 for slots in (start, placement, free))
    assert within < 0.08 * before
    assert without < 0.02 * before


def above_new(shape, change, seed):
    """PAR of a layer 20 windows after a change of its heat, above that of a new object's plan."""
    experts, ranks, slots = shape
    rng = np.random.default_rng(seed)
    popularity = rng.dirichlet(np.full(experts, 0.6), 1)
    planner, placement = FlashLB(ranks, slots), shuffled(rng, 1, ranks, slots, experts)
    seen = np.empty((0, 1, experts), int)
    for turn in range(30):
        if turn == 10 and change == "one expert":
            popularity[0, 7] += 0.3
            popularity /= popularity.sum()
        elif turn == 10:
            popularity = rng.permuted(popularity, axis=1)
        seen = np.concatenate([seen, rng.poisson(popularity * experts * 1000, (8, 1, experts))])
        seen = seen[-64:]
        placement = planner.plan(seen, placement).placement
    return ratios(seen, placement)[0] - FlashLB(ranks, slots).plan(seen, placement).par_after[0]


@pytest.mark.parametrize("shape", [(256, 64, 5), (64, 64, 2), (256, 32, 9)])
@pytest.mark.parametrize("change", ["one expert", "all experts"])
def test_a_layer_with_a_promise_does_not_stay_far_from_what_a_new_object_reaches(shape, change):
    # a placement anew costs three times the price of its moves: 0.057 for 110 of 288 slots
    above = [above_new(shape, change, seed) for seed in range(3, 8)]
    assert np.mean(above) < 0.06


def exchanged(popularity, pairs):
    """`popularity` [experts] with that of its `pairs` hottest and coldest experts exchanged."""
    order = np.argsort(popularity)
    changed = popularity.copy()
    changed[order[:pairs]], changed[order[-pairs:]] = (
        popularity[order[-pairs:]],
        popularity[order[:pairs]],
    )
    return changed


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("every_layer", [False, True])
@pytest.mark.parametrize(("pairs", "episodes"), [(1, 32), (3, 16), (20, 32), (20, 1)])
def test_an_abrupt_change_of_one_layer_gives_a_plan_of_that_layer(
    effort, every_layer, pairs, episodes
):
    rng = np.random.default_rng(4)
    popularity, tokens = zipf(rng, 3, 64), 10**6 // episodes
    planner = FlashLB(8, 9, effort=effort)
    heat, placement = window(rng, popularity, episodes, tokens), initial(3, 8, 9, 64)
    plan = planner.plan(heat, placement, every_layer)
    popularity[1] = exchanged(popularity[1], pairs)
    picked = []
    for _ in range(3):
        later = planner.plan(window(rng, popularity, episodes, tokens), plan.placement)
        assert_leads(later, plan.placement, 64)
        picked += later.layers.tolist()
        plan = later
    assert set(picked) == {1}
    excess = ratios(window(rng, popularity, episodes, tokens), plan.placement) - 1
    assert (excess < 0.15).all()


@pytest.mark.parametrize("seed", range(3))
def test_a_layer_planned_from_few_episodes_does_not_stay_far_from_what_a_whole_window_allows(seed):
    rng = np.random.default_rng(seed)
    phase = np.arange(280)[:, None, None] / 40 + rng.random((2, 128))
    heat = rng.poisson(MANY * zipf(rng, 2, 128, 0.9) * (1 + 0.9 * np.sin(2 * np.pi * phase)))
    planner, placement = FlashLB(16, 9), initial(2, 16, 9, 128)
    for end in range(8, 281, 8):
        placement = planner.plan(heat[max(0, end - 64) : end], placement).placement
    assert (ratios(heat[-64:], placement) < 1.05).all()


def test_slow_drift_moves_few_slots():
    moved = []
    for seed in range(12):  # from 6% to 50%, 23% on average
        rng = np.random.default_rng(seed)
        popularity, planner = zipf(rng, 1, 256), FlashLB(32, 9)
        placement = planner.plan(window(rng, popularity), initial(1, 32, 9, 256)).placement
        shifted = popularity * np.exp(rng.normal(0, 0.3, popularity.shape))
        again = planner.plan(window(rng, shifted / shifted.sum()), placement)
        assert again
        moved.append(len(again.moves) / placement.size)
    assert np.mean(moved) < 0.3


def test_a_layer_below_the_floor_is_left_alone():
    heat, placement = np.array([[uneven(2), uneven(0.4)]] * 4), np.array([EVEN_SOON] * 2)
    settings = {"min_gain": 0.0, "move_price": 0.0}
    assert FlashLB(2, 2, min_excess=0.3, **settings).plan(heat, placement).layers.tolist() == []
    assert FlashLB(2, 2, min_excess=0.1, **settings).plan(heat, placement).layers.tolist() == [0]
    assert FlashLB(2, 2, min_excess=0.0, **settings).plan(heat, placement).layers.tolist() == [0, 1]
    every = FlashLB(2, 2, min_excess=0.3, **settings).plan(heat, placement, every_layer=True)
    assert every.layers.tolist() == [0, 1]


def test_near_balanced_heat_gives_no_plan():
    rng = np.random.default_rng(6)
    heat, placement = window(rng, np.full((2, 64), 1 / 64), 64, 20_000), initial(2, 8, 8, 64)
    assert (ratios(heat, placement) > 1.02).all()
    assert not FlashLB(8, 8).plan(heat, placement)


@pytest.mark.parametrize(("ranks", "slots", "tokens"), [(32, 8, 2000), (8, 8, 20_000)])
def test_two_episodes_of_even_popularity_give_no_first_plan(ranks, slots, tokens):
    experts, plans = ranks * slots, 0
    even = np.full((1, experts), 1 / experts)
    for seed in range(20):
        heat = window(np.random.default_rng(seed), even, 2, tokens)
        plans += bool(FlashLB(ranks, slots).plan(heat, initial(1, ranks, slots, experts)))
    assert plans <= 2


@pytest.mark.parametrize("episodes", [1, 2, 4])
def test_a_plan_wins_at_least_min_gain(episodes):
    heat, placement = np.array([[uneven(2)]] * episodes), np.array([EVEN_SOON])
    assert FlashLB(2, 2, min_gain=0.19).plan(heat, placement)
    assert not FlashLB(2, 2, min_gain=0.21).plan(heat, placement)


def test_a_plan_pays_for_its_moves():
    # It wins 0.2 by moving 2 of 4 slots.
    placement = np.array([EVEN_SOON])
    for price, worth in ((0.38, True), (0.42, False)):
        planner = FlashLB(2, 2, move_price=price, half_life=0)
        plan = planner.plan(MANY * np.array([[uneven(6)]] * 4), placement)
        assert plan
        worse = np.empty((4, 1, 4))
        worse[:, 0, plan.placement[0].ravel()] = uneven(2)
        assert bool(planner.plan(MANY * worse, plan.placement)) == worth


def test_the_first_plan_of_a_layer_is_all_but_free():
    heat, placement = MANY * np.array([[uneven(2)]] * 4), np.array([EVEN_SOON])
    assert FlashLB(2, 2, move_price=1e3).plan(heat, placement)
    assert not FlashLB(2, 2, move_price=1e3, min_gain=0).plan(np.ones((4, 1, 4)), placement)
    # where moves are limited, what is far would take many plans
    assert not FlashLB(2, 2, move_price=1e3, max_moves=2).plan(heat, placement)
    assert not FlashLB(2, 2, move_price=1e3).plan(heat, placement, max_moves=2)
    assert FlashLB(2, 2, move_price=1, max_moves=2).plan(heat, placement)


def test_moves_that_cost_more_are_fewer():
    rng = np.random.default_rng(7)
    popularity = zipf(rng, 2, 64)
    heat = window(rng, popularity)
    changed = window(rng, rng.permuted(popularity, axis=1))
    moves = []
    for price in (0.001, 0.3, 1, 1e3):
        planner = FlashLB(8, 9, move_price=price)
        placement = planner.plan(heat, initial(2, 8, 9, 64)).placement
        moves.append(len(planner.plan(changed, placement).moves))
    assert moves[0] > moves[1] > moves[2] > moves[3] == 0, moves


def test_every_layer_looks_where_picking_does_not():
    heat, placement = np.array([[[52, 50, 48, 50]]] * 4), np.array([EVEN_SOON])
    assert not FlashLB(2, 2).plan(heat, placement)
    plan = FlashLB(2, 2).plan(heat, placement, every_layer=True)
    np.testing.assert_allclose(plan.par_after, 1)


def test_a_layer_that_keeps_its_promise_is_left_alone():
    heat, placement = stuck()
    planner = FlashLB(4, 2, floor=9)
    plan = planner.plan(heat, placement)
    assert plan.par_after[0] == pytest.approx(5 / 3)
    for _ in range(3):
        later = planner.plan(loosened(plan.placement), plan.placement)
        assert later.par_before[0] == pytest.approx(1.5)
        assert not later
    assert FlashLB(4, 2).plan(loosened(plan.placement), plan.placement)


@pytest.mark.parametrize("every_layer", [False, True])
def test_a_layer_that_breaks_its_promise_is_planned_again(every_layer):
    # Still better than before the first plan, but worse than was promised.
    placement = np.array([EVEN_SOON])
    planner = FlashLB(2, 2, min_gain=0.01, half_life=0)
    plan = planner.plan(np.array([[uneven(6)]] * 4), placement, every_layer)
    assert plan.par_after[0] == pytest.approx(1)
    worse = np.empty((4, 1, 4))
    worse[:, 0, plan.placement[0].ravel()] = uneven(3)
    again = planner.plan(worse, plan.placement)
    assert again.par_before[0] == pytest.approx(1.3)
    assert again.par_after[0] == pytest.approx(1)


@pytest.mark.parametrize("tolerance", [0.05, 0.2])
def test_the_tolerance_says_how_far_a_promise_may_be_missed(tolerance):
    planner = FlashLB(2, 2, tolerance=tolerance, min_gain=0.01, floor=9, half_life=0)
    plan = planner.plan(MANY * np.array([[uneven(6)]] * 4), np.array([EVEN_SOON]))
    worse = np.empty((4, 1, 4))
    worse[:, 0, plan.placement[0].ravel()] = uneven(1)
    assert bool(planner.plan(MANY * worse, plan.placement)) == (tolerance < 0.1)


def test_above_the_floor_a_promise_does_not_stand_in_the_way():
    heat, placement = stuck()
    for floor in (0.4, 0.6):
        planner = FlashLB(4, 2, floor=floor)
        plan = planner.plan(heat, placement)
        later = planner.plan(loosened(plan.placement), plan.placement)
        assert later.par_before[0] == pytest.approx(1.5)
        assert bool(later) == (floor < 0.5)


def test_few_tokens_that_drift_are_followed_with_few_moves(monkeypatch):
    def excess_and_moves(seed):
        rng = np.random.default_rng(seed)
        popularity, placement = zipf(rng, 2, 64, 0.6), initial(2, 8, 9, 64)
        planner, excess, moves = FlashLB(8, 9), [], []
        for _ in range(8):
            episodes = []
            for _ in range(64):
                popularity = popularity * np.exp(rng.normal(0, 0.02, popularity.shape))
                popularity /= popularity.sum(axis=1, keepdims=True)
                episodes.append(rng.poisson(3000 * popularity))
            plan = planner.plan(np.array(episodes), placement)
            placement = plan.placement
            excess.append(ratios(popularity[None], placement).mean() - 1)
            moves.append(len(plan.moves) / placement.size)
        return np.mean(excess[1:]), np.mean(moves[1:])

    ours = np.array([excess_and_moves(seed) for seed in range(3)])
    assert ours[:, 1].max() < 0.25
    none = np.zeros(2)
    monkeypatch.setattr(flashlb, "forecast", lambda heat, past, span: (heat, none))
    without = [excess_and_moves(seed)[0] for seed in range(3)]
    assert ours[:, 0].mean() < 0.9 * np.mean(without)


def test_a_cap_of_one_move_without_a_redundant_expert_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("flash_eplb"), "propagate", True)
    heat, placement = stuck()
    planner = FlashLB(4, 2, max_moves=1)
    assert not planner.plan(heat, placement)
    assert not planner.plan(heat, placement)
    assert [record.getMessage() for record in caplog.records] == [
        "max_moves is 1 (EPLB_MAX_MOVES), with which nothing moves: there is no redundant expert, "
        "so two change places at once; give 2 or more, or no cap"
    ]
    caplog.clear()
    assert FlashLB(4, 2, max_moves=2).plan(heat, placement)
    assert FlashLB(4, 3, max_moves=1).plan(heat, initial(1, 4, 3, 8))
    assert not caplog.records
