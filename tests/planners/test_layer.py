from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from layers import assert_consistent, cases, moved, peaks, settled

from flash_eplb.planners import layer as kernels
from flash_eplb.planners.layer import merged, peak, replace, replace_gain, swap, swap_gain


def swaps(placement):
    """All valid exchanges (rank, slot, other rank, other slot)."""
    ranks, slots = placement.shape
    for rank, slot, other, other_slot in np.ndindex(ranks, slots, ranks, slots):
        a, b = placement[rank, slot], placement[other, other_slot]
        if rank != other and a not in placement[other] and b not in placement[rank]:
            yield rank, slot, other, other_slot


def replacements(placement, experts):
    """All valid replacements (rank, slot, arriving expert)."""
    counts = np.bincount(placement.ravel())
    for rank, slot in np.ndindex(*placement.shape):
        for arriving in range(experts):
            if counts[placement[rank, slot]] > 1 and arriving not in placement[rank]:
                yield rank, slot, np.int32(arriving)


@given(cases())
def test_a_settled_layer_is_consistent(case):
    heat, placement = case
    layer = settled(heat, placement)
    assert_consistent(layer)
    assert peak(layer) == pytest.approx(peaks(heat, placement), rel=1e-5)
    np.testing.assert_allclose(layer.mean, heat.mean(axis=0), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(layer.coarse.sum(axis=1), heat.sum(axis=0), rtol=1e-5, atol=1e-9)
    assert kernels.moved(layer) == 0


@given(cases(most_slots=12))
def test_the_gain_of_a_swap_is_exact(case):
    heat, placement = case
    layer = settled(heat, placement)
    before = peaks(heat, placement)
    for rank, slot, other, other_slot in swaps(placement):
        a, b = placement[rank, slot], placement[other, other_slot]
        after = placement.copy()
        after[rank, slot], after[other, other_slot] = b, a
        gain = swap_gain(layer, rank, a, other, b)
        assert gain == pytest.approx(before - peaks(heat, after), abs=1e-5 * len(placement))


@given(cases(most_slots=12))
def test_the_gain_of_a_replacement_is_exact(case):
    heat, placement = case
    layer = settled(heat, placement)
    before = peaks(heat, placement)
    for rank, slot, arriving in replacements(placement, heat.shape[1]):
        after = placement.copy()
        after[rank, slot] = arriving
        gain = replace_gain(layer, rank, placement[rank, slot], arriving)
        assert gain == pytest.approx(before - peaks(heat, after), abs=1e-5 * len(placement))


def test_a_replica_that_arrives_may_make_its_rank_the_peak():
    # Expert 0 goes from halves to thirds: 6 and 6 to 4 each, but 4 + 5 on the rank of expert 3.
    heat, placement = np.array([[12, 1, 1, 5]]), np.array([[0, 1], [0, 2], [2, 3]])
    gain = replace_gain(settled(heat, placement), 2, np.int32(2), np.int32(0))
    assert gain == pytest.approx(7 - 9)


@given(cases())
def test_after_many_changes_a_layer_is_still_consistent(case):
    heat, today = case
    layer = settled(heat, today)
    rng = np.random.default_rng(0)
    for _ in range(20):
        changes = [*swaps(layer.placement), *replacements(layer.placement, heat.shape[1])]
        if not changes:
            return
        change = changes[rng.integers(len(changes))]
        (swap if len(change) == 4 else replace)(layer, *change)
        assert_consistent(layer)
        assert kernels.moved(layer) == moved(layer.placement, today)


@pytest.mark.parametrize(("episodes", "most", "sizes"), [(5, 8, [1] * 5), (7, 3, [3, 3, 1])])
def test_merged_heat_adds_up_stretches(episodes, most, sizes):
    heat = np.arange(1, 1 + 2 * episodes, dtype=np.float32).reshape(2, episodes)
    bounds = np.cumsum([0, *sizes])
    summed = merged(np.ascontiguousarray(heat.T), most)
    expected = [heat[:, first:last].sum(axis=1) for first, last in pairwise(bounds)]
    np.testing.assert_array_equal(summed.T, expected)
