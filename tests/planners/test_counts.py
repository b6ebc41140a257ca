import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_eplb.planners.counts import least_threshold, replica_counts


def counts_of(weights, slots, ranks, slack=1.0):
    weights = np.array(weights, np.float32)
    threshold = least_threshold(weights, slots, ranks)
    return replica_counts(weights, slots, ranks, threshold, np.float32(slack))


def heaviest(weights, counts):
    return max(weight / count for weight, count in zip(weights, counts, strict=True))


WEIGHTS = st.floats(0, 100, width=32) | st.sampled_from([0.0, 1.0, 1e-6, 1e6])


@st.composite
def allotments(draw, most_experts=40, most_ranks=40):
    """(weights, slots, ranks) that can be filled."""
    ranks = draw(st.integers(1, most_ranks))
    weights = draw(st.lists(WEIGHTS, min_size=2, max_size=most_experts))
    return weights, draw(st.integers(len(weights), len(weights) * ranks)), ranks


@given(allotments(), st.sampled_from([1, 1.1, 1.3, 1.75, 2]))
def test_counts_fill_the_slots_and_no_expert_has_more_than_ranks(case, slack):
    weights, slots, ranks = case
    counts = counts_of(weights, slots, ranks, slack)
    assert counts.dtype == np.int32
    assert counts.sum() == slots
    assert counts.min() >= 1
    assert counts.max() <= ranks


@given(allotments(most_experts=4, most_ranks=4))
def test_without_slack_the_heaviest_replica_is_as_light_as_can_be(case):
    weights, slots, ranks = case
    least = min(
        heaviest(weights, counts)
        for counts in itertools.product(range(1, ranks + 1), repeat=len(weights))
        if sum(counts) == slots
    )
    assert heaviest(weights, counts_of(weights, slots, ranks)) <= least * (1 + 1e-5) + 1e-6


@given(allotments(), st.sampled_from([1.1, 1.5, 2]))
def test_with_slack_the_heaviest_replica_is_no_more_than_that_heavier(case, slack):
    weights, slots, ranks = case
    least = heaviest(weights, counts_of(weights, slots, ranks))
    most = heaviest(weights, counts_of(weights, slots, ranks, slack))
    assert most <= least * slack * (1 + 1e-5) + 1e-6


def test_what_is_left_with_slack_goes_to_the_lightest():
    # Replicas of at most 1.5 take all 12 slots; of at most 2.25, 4 + 2 + 1 + 1 of them.
    assert counts_of([9, 4, 2, 1], 12, 8).tolist() == [6, 3, 2, 1]
    assert counts_of([9, 4, 2, 1], 12, 8, 1.5).tolist() == [5, 3, 2, 2]


@pytest.mark.parametrize("slack", [1, 2])
def test_experts_without_heat_share_the_slots(slack):
    assert sorted(counts_of([0, 0, 0], 5, 4, slack)) in ([1, 1, 3], [1, 2, 2])
    assert counts_of([0, 7, 0], 5, 3).tolist()[1] == 3
