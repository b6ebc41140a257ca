"""What FlashLB reaches where the best is known, and how far small budgets bring it."""

import itertools

import numpy as np
import pytest
from checker import assert_leads, gains_per_move, ratios
from heats import EVEN_SOON, initial, shuffled, uneven, window, zipf

from flash_eplb.planners.deepseek import DeepSeek
from flash_eplb.planners.flashlb import FlashLB

EFFORTS = ["fast", "balanced", "thorough"]

EXAMPLE = np.array([[[600, 560, 120, 120, 20, 10, 10, 10]]])
"""Mean load on 8 ranks 181.25; the least peak with uniform routing is 196.67 (proven)."""


def example_peak(placement, every_layer=True, **settings):
    plan = FlashLB(8, 2, **settings).plan(EXAMPLE, placement, every_layer)
    return ratios(EXAMPLE, plan.placement, plan.columns)[0] * EXAMPLE.sum() / 8


@pytest.mark.parametrize("effort", EFFORTS)
def test_the_example_with_a_known_optimum_is_solved(effort):
    placement = initial(1, 8, 2, 8)
    assert example_peak(placement, effort=effort) <= 196.67 + 1e-3
    assert example_peak(placement, effort=effort, routing="weighted") <= 181.5


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("every_layer", [False, True])
def test_the_example_is_solved_from_any_placement_though_moves_have_a_price(seed, every_layer):
    placement = shuffled(np.random.default_rng(seed), 1, 8, 2, 8)
    assert example_peak(placement, every_layer) <= 196.67 + 1e-3
    assert example_peak(placement, every_layer, routing="weighted") < 186


def least_par(heat, ranks, slots):
    """The PAR of the best placement of heat [episodes, experts], by trying all."""
    experts = heat.shape[1]
    sets = np.array(list(itertools.combinations(range(experts), slots)))
    holds = (sets[:, :, None] == np.arange(experts)).any(axis=1)  # [sets, experts]
    first, *others = np.meshgrid(*[np.arange(len(sets))] * ranks, indexing="ij")
    chosen = np.stack([first.ravel(), *map(np.ravel, others)], axis=1)
    chosen = chosen[(np.diff(chosen, axis=1) >= 0).all(axis=1)]  # ranks are alike
    counts = holds[chosen].sum(axis=1)
    chosen, counts = chosen[(counts > 0).all(axis=1)], counts[(counts > 0).all(axis=1)]
    shares = holds[chosen] / counts[:, None]  # [placements, ranks, experts]
    loads = shares @ heat.T
    return (loads.max(axis=1) * ranks / heat.sum(axis=1)).mean(axis=1).min()


def test_small_layers_are_planned_all_but_best():
    rng = np.random.default_rng(1)
    excess = []
    for _ in range(100):
        ranks, slots, experts = [(2, 3, 4), (2, 4, 7), (3, 2, 5), (3, 3, 6), (4, 2, 5)][
            rng.integers(5)
        ]
        heat = 1 + window(rng, zipf(rng, 1, experts, rng.uniform(0, 2)), rng.integers(1, 7), 300)
        planner = FlashLB(ranks, slots, effort="thorough")
        plan = planner.plan(heat, initial(1, ranks, slots, experts), every_layer=True)
        excess.append(ratios(heat, plan.placement)[0] / least_par(heat[:, 0], ranks, slots) - 1)
    assert min(excess) > -1e-9
    assert np.mean(excess) < 0.005
    assert max(excess) < 0.02


def test_few_experts_on_many_ranks_are_planned_from_few_tokens():
    popularity, placement, reached = np.array([[0.46, 0.18, 0.18, 0.18]]), initial(1, 31, 2, 4), []
    for seed in range(12):
        heat = window(np.random.default_rng(seed), popularity, 64, 60)
        reached.append(ratios(popularity[None], FlashLB(31, 2).plan(heat, placement).placement))
    assert ratios(popularity[None], placement)[0] == pytest.approx(1.24)
    assert np.mean(reached) < 1.05


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("skew", [0.8, 1.2])
@pytest.mark.parametrize("shape", [(512, 512, 2), (256, 128, 3), (512, 256, 4), (384, 200, 3)])
def test_many_ranks_with_few_slots_are_evener_than_the_greedy_makes_them(shape, skew, effort):
    experts, ranks, slots = shape
    rng = np.random.default_rng(8)
    heat = window(rng, zipf(rng, 1, experts, skew), 16, tokens=1_000_000)
    placement = initial(1, ranks, slots, experts)
    greedy = DeepSeek(ranks, slots).plan(heat, placement).placement
    ours = FlashLB(ranks, slots, effort=effort).plan(heat, placement).placement
    assert ratios(heat, ours)[0] < ratios(heat, greedy)[0] + 0.002


@pytest.mark.parametrize("every_layer", [False, True])
@pytest.mark.parametrize(("experts", "ranks"), [(48, 64), (256, 320)])
@pytest.mark.parametrize("episodes", [32, 50])
def test_with_a_slot_per_rank_only_replicas_that_are_new_move(
    experts, ranks, episodes, every_layer
):
    rng = np.random.default_rng(5)
    heat = window(rng, zipf(rng, 1, experts), episodes)
    plan = FlashLB(ranks, 1).plan(heat, initial(1, ranks, 1, experts), every_layer)
    before, after = (np.bincount(p.ravel()) for p in (plan.before, plan.placement))
    assert len(plan.moves) == np.maximum(0, after - before).sum() > 0


@pytest.mark.parametrize("every_layer", [False, True])
@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("room", [0, 1, 2, 3, 5, 17, 40])
def test_no_plan_takes_more_moves_than_it_may(room, effort, every_layer):
    rng = np.random.default_rng(2)
    heat, placement = window(rng, zipf(rng, 3, 64)), initial(3, 8, 9, 64)
    for own, argument in ((room, None), (None, room), (room, 100), (100, room)):
        planner = FlashLB(8, 9, effort=effort, max_moves=own)
        plan = planner.plan(heat, placement, every_layer, max_moves=argument)
        assert_leads(plan, placement, 64)
        assert len(plan.moves) <= room
        if room > 1:
            assert plan


@pytest.mark.parametrize(("room", "left"), [(1, 0.5), (2, 0.4), (3, 0.2), (5, 0.1)])
@pytest.mark.parametrize("fresh", [False, True], ids=["one object", "a fresh object each time"])
def test_small_budgets_lead_to_balance(room, left, fresh):
    rng = np.random.default_rng(3)
    popularity = zipf(rng, 2, 64)
    placement = initial(2, 8, 9, 64)
    excess = (ratios(window(rng, popularity), placement) - 1).sum()
    planner = FlashLB(8, 9, max_moves=room)
    for _ in range(240 // room):
        if fresh:
            planner = FlashLB(8, 9, max_moves=room)
        plan = planner.plan(window(rng, popularity), placement)
        assert len(plan.moves) <= room
        placement = plan.placement
    assert (ratios(window(rng, popularity), placement) - 1).sum() < left * excess


@pytest.mark.parametrize("most", [0, 1, 2])
def test_no_plan_takes_more_layers_than_it_may_and_all_get_their_turn(most):
    rng = np.random.default_rng(4)
    popularity = zipf(rng, 4, 64)
    placement = initial(4, 8, 9, 64)
    planner = FlashLB(8, 9, max_layers=most)
    picked = []
    for _ in range(6):
        plan = planner.plan(window(rng, popularity), placement)
        assert len(plan.layers) <= most
        picked += plan.layers.tolist()
        placement = plan.placement
    assert sorted(picked) == (list(range(4)) if most else [])


def layers_of_unlike_gain(rng):
    popularity = np.concatenate([zipf(rng, 1, 64, skew) for skew in (0.5, 0, 1.5, 1, 0.8)])
    return window(rng, popularity), initial(5, 8, 9, 64)


@pytest.mark.parametrize("every_layer", [False, True])
def test_the_layers_that_win_most_per_move_come_first(every_layer):
    heat, placement = layers_of_unlike_gain(np.random.default_rng(5))
    full = FlashLB(8, 9).plan(heat, placement, every_layer)
    assert len(full.layers) > 3
    assert (np.diff(gains_per_move(full)) < 0).all()
    for most in (1, 2, 3):
        plan = FlashLB(8, 9, max_layers=most).plan(heat, placement, every_layer)
        assert plan.layers.tolist() == full.layers[:most].tolist()


def test_the_order_counts_what_planned_routing_wins():
    rng = np.random.default_rng(6)
    for _ in range(20):
        heat = window(rng, zipf(rng, 4, 12, 1.2), 4, 500)
        plan = FlashLB(5, 3, routing="weighted").plan(heat, initial(4, 5, 3, 12))
        assert (np.diff(gains_per_move(plan)) <= 1e-9).all()


def test_moves_go_where_they_win_most():
    heat = np.array([[uneven(2), uneven(6), uneven(4)]])
    placement = np.array([EVEN_SOON] * 3)
    layers = [
        FlashLB(2, 2, max_moves=room).plan(heat, placement).layers.tolist() for room in range(8)
    ]
    assert layers == [[], [], [1], [1], [1, 2], [1, 2], [1, 2, 0], [1, 2, 0]]
