import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flash_eplb.planners.par import par
from flash_eplb.planners.search import (
    place,
    recount,
    relabel,
    replica_counts,
    scale_heat,
    search_layer,
)
from flash_eplb.planners.swaps import held_by, improve, layer_par, moved


def random_heat(rng, episodes, experts):
    """Heat from even to very skewed, with idle experts and idle episodes."""
    popularity = np.arange(1, experts + 1) ** -rng.uniform(0, 3)
    heat = rng.poisson(rng.choice([1, 30, 1000]) * rng.permutation(popularity), (episodes, experts))
    heat[rng.random(episodes) < 0.2] = 0
    heat[rng.integers(episodes)] += 1
    return heat


@st.composite
def layers(draw):
    """(heat [episodes, experts], today's placement int32[ranks, slots])."""
    ranks, slots = draw(st.integers(2, 8)), draw(st.integers(1, 6))
    experts = draw(st.integers(max(2, slots), max(2, ranks * slots)))
    assume(ranks * slots >= experts)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    placement = (np.arange(ranks * slots) % experts).reshape(ranks, slots)
    heat = random_heat(rng, draw(st.integers(1, 8)), experts)
    return heat, rng.permutation(experts)[placement].astype(np.int32)


def assert_valid(placement, experts):
    assert {expert for rank in placement.tolist() for expert in rank} == set(range(experts))
    for rank in placement.tolist():
        assert len(set(rank)) == len(rank)


@given(layers())
@settings(deadline=None)
def test_scaled_heat_gives_the_par_of_the_busy_episodes(layer):
    heat, placement = layer
    idle = np.mean(heat.sum(axis=1) == 0)
    scaled = layer_par(scale_heat(heat, len(placement)), placement)
    assert scaled + idle == pytest.approx(par(heat, placement), rel=1e-5)


@given(layers(), st.data())
@settings(deadline=None)
def test_any_replica_counts_can_be_placed(layer, data):
    heat, today = layer
    (ranks, slots), experts = today.shape, heat.shape[1]
    counts = np.ones(experts, np.int32)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    while counts.sum() < ranks * slots:
        counts[rng.choice(np.flatnonzero(counts < ranks))] += 1
    placement = place(scale_heat(heat, ranks), counts, ranks, slots)
    assert_valid(placement, experts)
    assert (np.bincount(placement.ravel()) == counts).all()


def test_an_expert_that_fits_only_where_it_is_makes_another_give_way():
    # Heaviest first leaves one free slot, on the rank that holds expert 2 already.
    heat = np.array([[10], [9], [1]], np.float32)
    placement = place(heat, np.array([1, 1, 2], np.int32), 2, 2)
    assert_valid(placement, 3)
    heat = np.array([[8], [4], [2], [1]], np.float32)
    for counts in ([1, 1, 1, 3], [3, 1, 1, 1], [1, 2, 2, 1]):
        assert_valid(place(heat, np.array(counts, np.int32), 3, 2), 4)


@given(layers(), st.floats(0, 3))
@settings(deadline=None)
def test_counts_are_the_min_max_of_the_weights(layer, z):
    heat, today = layer
    ranks, experts = len(today), heat.shape[1]
    weights = heat.mean(axis=0) + z * heat.std(axis=0)
    counts = replica_counts(weights, today.size, ranks)
    assert counts.sum() == today.size
    assert counts.min() >= 1
    assert counts.max() <= ranks
    heaviest = max(weights[e] / counts[e] for e in range(experts) if counts[e] < ranks or True)
    for donor in np.flatnonzero(counts > 1):
        # Taking a replica back makes that expert at least as heavy as any that is not everywhere.
        open_ = [weights[e] / counts[e] for e in range(experts) if counts[e] < ranks]
        assert not open_ or weights[donor] / (counts[donor] - 1) >= max(open_) * (1 - 1e-9)
    assert heaviest >= weights.sum() / today.size * (1 - 1e-9)


@given(layers(), st.integers(0, 5))
@settings(deadline=None)
def test_recount_changes_at_most_so_many_slots(layer, most):
    heat, today = layer
    scaled = scale_heat(heat, len(today))
    placement = recount(scaled, today, scaled.mean(axis=1).astype(np.float64), most)
    assert_valid(placement, heat.shape[1])
    assert (placement != today).sum() <= most


def test_recount_gives_a_slot_of_a_cold_replica_to_a_hot_expert():
    heat = np.array([[8, 1, 1, 1]]).T.astype(np.float32)
    today = np.array([[0, 1], [2, 3], [1, 2]], np.int32)
    placement = recount(heat, today, heat.mean(axis=1).astype(np.float64), 6)
    assert np.bincount(placement.ravel()).tolist() == [3, 1, 1, 1]


@given(layers(), st.floats(0, 0.2), st.integers(0, 8))
@settings(deadline=None)
def test_swaps_lower_par_and_keep_to_their_room(layer, price, room):
    heat, today = layer
    scaled = scale_heat(heat, len(today))
    home = held_by(today, heat.shape[1])
    placement = today.copy()
    improve(scaled, placement, home, price, room)
    assert_valid(placement, heat.shape[1])
    assert moved(placement, home) <= room
    gain = layer_par(scaled, today) - layer_par(scaled, placement)
    assert gain >= price * moved(placement, home) - 1e-5


def test_swaps_find_the_even_placement():
    heat = np.array([[4], [3], [2], [1]], np.float32) * np.float32(2 / 10)
    placement = np.array([[0, 1], [2, 3]], np.int32)
    improve(heat, placement, held_by(placement, 4), 0.0, 4)
    assert layer_par(heat, placement) == pytest.approx(1.0)


@given(layers())
@settings(deadline=None)
def test_relabelling_brings_a_shuffled_placement_home(layer):
    _, today = layer
    shuffled = np.random.default_rng(0).permutation(today)
    home = held_by(today, int(today.max()) + 1)
    assert moved(relabel(shuffled, home), home) == 0


@given(layers(), st.floats(0, 0.1), st.integers(0, 40))
@settings(deadline=None)
def test_the_search_returns_a_valid_placement_within_its_moves(layer, price, most):
    heat, today = layer
    placement = search_layer(scale_heat(heat, len(today)), today, 0.67, price, most)
    assert_valid(placement, heat.shape[1])
    assert moved(placement, held_by(today, heat.shape[1])) <= most
