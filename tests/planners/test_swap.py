import numpy as np
import pytest

from flash_eplb.planners.par import par
from flash_eplb.planners.swap import STEP, Swap


def initial(layers, ranks, slots, experts):
    layer = (np.arange(ranks * slots) % experts).reshape(ranks, slots)
    return np.stack([layer] * layers).astype(np.int32)


def test_two_hot_experts_part():
    plan = Swap(2, 2).plan(np.array([[[9, 9, 1, 1]]]), np.array([[[0, 1], [2, 3]]]))
    assert plan.par_before[0] == pytest.approx(1.8)
    assert plan.par_after[0] == pytest.approx(1.0)
    assert len(plan.moves) == 2


def test_it_looks_at_the_episodes_and_not_at_their_mean():
    # On the mean all is even; but experts 0 and 1 are hot together, and so are 2 and 3.
    heat = np.array([[[9, 9, 1, 1]], [[1, 1, 9, 9]]])
    plan = Swap(2, 2).plan(heat, np.array([[[0, 1], [2, 3]]]))
    assert plan.par_after[0] == pytest.approx(1.0)


def exchanges(layer):
    """All placements one valid exchange away."""
    ranks, slots = layer.shape
    for a, i, b, j in np.ndindex(ranks, slots, ranks, slots):
        if a < b and layer[a, i] not in layer[b] and layer[b, j] not in layer[a]:
            other = layer.copy()
            other[a, i], other[b, j] = layer[b, j], layer[a, i]
            yield other


@pytest.mark.parametrize("seed", range(6))
def test_it_stops_only_where_no_exchange_gains(seed):
    rng = np.random.default_rng(seed)
    heat = rng.poisson(300 * rng.permutation(np.arange(1, 17) ** -0.8), (5, 1, 16))
    plan = Swap(4, 5, min_excess=0.0, min_gain=0.0).plan(heat, initial(1, 4, 5, 16))
    assert plan.par_before[0] - plan.par_after[0] > 0.1
    for other in exchanges(plan.placement[0]):
        assert par(heat[:, 0], other) > plan.par_after[0] - STEP - 1e-9
    assert not Swap(4, 5, min_excess=0.0, min_gain=0.0).plan(heat, plan.placement)


def uneven(excess):
    """Heat of 4 experts on [[0, 1], [2, 3]] that one exchange of two slots makes even."""
    return [10 + excess, 10 + excess, 10 - excess, 10 - excess]


def test_the_layers_that_win_most_per_move_get_the_moves():
    heat = np.array([[uneven(2), uneven(6), uneven(4)]])
    placement = np.array([[[0, 1], [2, 3]]] * 3)
    layers = [
        Swap(2, 2, max_moves=moves).plan(heat, placement).layers.tolist()
        for moves in (0, 2, 3, 4, 5, 6, 7, 10**30)
    ]
    assert layers == [[], [1], [1], [1, 2], [1, 2], [1, 2, 0], [1, 2, 0], [1, 2, 0]]


def test_a_layer_takes_as_many_exchanges_as_there_is_room():
    heat = np.array([[[40, 30, 30, 20, 4, 3, 2, 1]]])
    placement = np.arange(8).reshape(1, 2, 4)
    full = Swap(2, 4, min_gain=0.0).plan(heat, placement)
    part = Swap(2, 4, min_gain=0.0, max_moves=2).plan(heat, placement)
    assert len(full.moves) > 2
    assert len(part.moves) == 2
    assert full.par_after[0] < part.par_after[0] < part.par_before[0]


def test_what_wins_too_little_is_left():
    heat, placement = np.array([[uneven(2)]]), np.array([[[0, 1], [2, 3]]])
    assert Swap(2, 2, min_excess=0.19, min_gain=0.19).plan(heat, placement)
    assert not Swap(2, 2, min_excess=0.21).plan(heat, placement)
    assert not Swap(2, 2, min_gain=0.21).plan(heat, placement)


def test_plans_of_few_moves_lead_to_the_same_balance():
    rng = np.random.default_rng(8)
    heat = rng.poisson(2000 * rng.permutation(np.arange(1, 65) ** -0.6), (8, 2, 64))
    placement = initial(2, 8, 9, 64)
    policy = Swap(8, 9, max_moves=4, min_gain=0.0)
    whole = Swap(8, 9).plan(heat, placement)
    for _ in range(30):
        placement = policy.plan(heat, placement).placement
    assert (par(heat, placement) - 1 < 0.1 + 0.5 * (whole.par_after - 1)).all()
