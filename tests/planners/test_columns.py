"""Planning where a rank sends all of its tokens for an expert to one replica."""

import numpy as np
import pytest
from checker import assert_valid, episode_ratios, ratios
from heats import initial, shapes, shuffled, window, windows, zipf
from hypothesis import given
from hypothesis import strategies as st

from flash_eplb.loaders.routing import chosen_replicas
from flash_eplb.planners.columns import Columns, divided_par, even_senders, follow
from flash_eplb.planners.flashlb import FlashLB


@given(st.data())
def test_what_is_measured_is_what_the_ranks_do(data):
    ranks, slots, experts = data.draw(shapes())
    heat = data.draw(windows(2, experts, most_episodes=10)).astype(np.float64)
    placement = shuffled(np.random.default_rng(0), 2, ranks, slots, experts)
    layers = np.arange(2)
    even = even_senders(placement)
    planned = Columns(1, True, lambda work, rows: work(rows)).planned(heat, placement, layers)
    for columns in (even, planned):
        measured = divided_par(heat, placement, layers, columns)
        np.testing.assert_allclose(measured, episode_ratios(heat, placement, columns), rtol=1e-6)
    better = divided_par(heat, placement, layers, planned).mean(axis=0)
    assert (better <= divided_par(heat, placement, layers, even).mean(axis=0) * (1 + 1e-6)).all()
    for layer in layers:
        for columns in (None, even[layer], planned[layer]):
            wanted = even[layer] if columns is None else columns
            chosen = chosen_replicas(placement[layer], experts, columns)
            senders = np.zeros(ranks * slots, int)
            for row in chosen:
                senders[row] += 1
            replicas = np.bincount(placement[layer].ravel(), minlength=experts)
            several = replicas[placement[layer]] > 1
            np.testing.assert_array_equal(senders.reshape(ranks, slots)[several], wanted[several])


def token_wise():
    """Heat, and a placement that is even if each token chooses a replica, and not by ranks."""
    rng = np.random.default_rng(7)
    popularity = zipf(rng, 2, 64, 1.2)
    heat = window(rng, popularity)
    plan = FlashLB(8, 9).plan(heat, initial(2, 8, 9, 64), every_layer=True)
    return heat, window(rng, popularity), plan.placement


def test_a_layer_that_only_looks_even_is_planned():
    heat, later, placement = token_wise()
    assert (ratios(heat, placement) < 1.02).all()
    uneven = ratios(heat, placement, even_senders(placement))
    assert (uneven > 1.1).any()
    plan = FlashLB(8, 9, routing="by_source").plan(heat, placement)
    assert_valid(plan.placement, 64)
    assert plan
    np.testing.assert_allclose(plan.par_before, uneven, rtol=1e-6)
    picked = plan.changed
    after = ratios(heat, plan.placement, plan.columns)[picked]
    np.testing.assert_allclose(after, plan.par_after[picked], rtol=0.01)
    left = ratios(later, plan.placement, plan.columns)[picked] - 1
    assert (left < 0.5 * (uneven[picked] - 1)).all()


def test_a_plan_that_was_carried_out_is_not_made_again():
    heat, later, placement = token_wise()
    policy = FlashLB(8, 9, routing="by_source")
    first = policy.plan(heat, placement)
    second = policy.plan(later, first.placement)
    picked = first.layers
    assert not np.isin(picked, second.changed).any()
    now = ratios(later, first.placement, first.columns)[picked]
    np.testing.assert_allclose(second.par_before[picked], now, rtol=1e-6)


@pytest.mark.parametrize("threads", [1, 2])
def test_where_every_expert_has_one_slot_senders_are_of_no_matter(threads):
    rng = np.random.default_rng(3)
    heat, placement = window(rng, zipf(rng, 3, 64, 0.5)), initial(3, 8, 8, 64)
    plans = [
        FlashLB(8, 8, routing=routing, threads=threads).plan(heat, placement)
        for routing in ("uniform", "by_source")
    ]
    assert (plans[1].columns == 1).all()
    np.testing.assert_allclose(plans[1].par_before, plans[0].par_before, rtol=1e-5)
    np.testing.assert_allclose(plans[1].par_after, ratios(heat, plans[1].placement), rtol=1e-5)
    np.testing.assert_allclose(plans[1].par_after, plans[0].par_after, atol=0.01)


def test_a_layer_that_other_senders_even_out_moves_nothing():
    # Two replicas of expert 0, one of them beside a hot expert: half of the senders is too many.
    placement = np.array([[[0, 1], [0, 2], [3, 4], [5, 6]] * 2])
    placement[0, 4:] = [[7, 8], [9, 10], [11, 12], [13, 14]]
    rng = np.random.default_rng(0)
    popularity = np.full(15, 200.0)
    popularity[0], popularity[1] = 400, 300
    heat = rng.poisson(popularity, (40, 1, 15))
    policy = FlashLB(8, 2, routing="by_source")
    plan = policy.plan(heat, placement)
    assert plan.rerouted.tolist() == [0]
    assert len(plan.moves) == 0
    (part,) = plan.rounds(1)
    assert part.layers.tolist() == [0]
    assert (part.placement == placement).all()
    assert part.columns[0, 0, 0] < 4 < part.columns[0, 1, 0]
    assert plan.par_after[0] < plan.par_before[0] - 0.05
    later = rng.poisson(popularity, (40, 1, 15))
    assert ratios(later, placement, plan.columns)[0] < ratios(later, placement)[0] - 0.05
    assert not policy.plan(later, placement)


def test_columns_follow_their_experts_into_other_slots():
    placement, wanted = np.array([[4, 0, 2], [1, 3, 0]]), np.array([[2, 4, 0], [1, 0, 3]])
    columns = np.array([[7, 8, 9], [1, 2, 3]], np.int16)
    assert follow(placement, columns, wanted).tolist() == [[9, 7, 8], [1, 3, 2]]
