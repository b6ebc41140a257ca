import numpy as np
import pytest
from checker import assert_valid, ratios
from heats import shapes, zipf
from hypothesis import given
from hypothesis import strategies as st

from flash_eplb.planners.counts import least_threshold, replica_counts
from flash_eplb.planners.place import place


@st.composite
def layers(draw):
    """(heat float32[experts, episodes], replica counts, ranks, slots)."""
    ranks, slots, experts = draw(shapes())
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    counts = np.ones(experts, np.int32)
    odds = rng.random(experts) ** draw(st.sampled_from([0, 1, 8]))
    while counts.sum() < ranks * slots:
        free = np.flatnonzero(counts < ranks)
        counts[rng.choice(free, p=odds[free] / odds[free].sum())] += 1
    heat = rng.poisson(9, (experts, draw(st.integers(1, 9)))) * rng.integers(0, 3, (experts, 1))
    return heat.astype(np.float32), counts, ranks, slots


@given(layers())
def test_any_replica_counts_can_be_placed(layer):
    heat, counts, ranks, slots = layer
    placement, _ = place(heat, counts, ranks, slots)
    assert placement.shape == (ranks, slots)
    assert_valid(placement[None], len(heat))
    assert (np.bincount(placement.ravel()) == counts).all()


@given(layers())
def test_its_peaks_are_those_of_the_placement(layer):
    heat, counts, ranks, slots = layer
    placement, peaks = place(heat, counts, ranks, slots)
    shares = heat / counts[:, None]
    assert peaks == pytest.approx(shares[placement].sum(axis=1).max(axis=0).sum(), rel=1e-5)


def test_an_expert_that_fits_only_where_it_is_makes_another_give_way():
    # Heaviest first leaves one free slot, on the rank that holds expert 2 already.
    heat = np.array([[10], [9], [1]], np.float32)
    placement, _ = place(heat, np.array([1, 1, 2], np.int32), 2, 2)
    assert_valid(placement[None], 3)
    heat = np.array([[8], [4], [2], [1]], np.float32)
    for counts in ([1, 1, 1, 3], [3, 1, 1, 1], [1, 2, 2, 1]):
        assert_valid(place(heat, np.array(counts, np.int32), 3, 2)[0][None], 4)


def test_experts_that_are_hot_together_part():
    heat = np.array([[9, 1], [9, 1], [1, 9], [1, 9]], np.float32)
    placement, peaks = place(heat, np.ones(4, np.int32), 2, 2)
    assert peaks == 20
    np.testing.assert_allclose(ratios(heat.T[:, None], placement[None]), 1)


def test_more_ranks_than_are_compared_get_as_much_as_each_other():
    rng = np.random.default_rng(3)
    heat = zipf(rng, 1, 512, 1.2)[0].astype(np.float32)
    counts = replica_counts(heat, 1024, 256, least_threshold(heat, 1024, 256), np.float32(1.3))
    placement, peak = place(heat[:, None], counts, 256, 4)
    assert_valid(placement[None], 512)
    assert peak * 256 < 1.05
