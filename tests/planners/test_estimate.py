import numpy as np
import pytest
from hypothesis import given
from layers import cases, loads, settled

from flash_eplb.planners.estimate import (
    FAR,
    FARTHEST,
    NEAR,
    enter,
    harm_of,
    measure_all,
)


def measured(heat, placement):
    """(layer, heat of a replica, room of each rank under the peak float64[ranks, episodes])."""
    layer = settled(heat, placement)
    heaviest = (layer.mean * layer.share).max()
    measure_all(layer, heaviest)
    load = loads(heat, placement)
    return layer, heaviest, load.max(axis=0) - load


@given(cases())
def test_the_harm_is_exact_where_it_was_measured_and_never_above_it_beyond(case):
    layer, heaviest, room = measured(*case)
    for rank in range(len(room)):

        def cost(more, rank=rank):
            return np.maximum(0, more - room[rank]).sum()

        for share in (NEAR, FAR, FARTHEST):
            more = np.float32(share) * heaviest
            found = harm_of(layer.harm, rank, more)
            assert found == pytest.approx(cost(more), rel=1e-3, abs=1e-5)
        assert harm_of(layer.harm, rank, 2 * heaviest) <= cost(2 * heaviest) * 1.001 + 1e-5
        assert harm_of(layer.harm, rank, np.float32(0)) == pytest.approx(0, abs=1e-5)


def test_the_best_candidates_are_kept_in_order():
    gains, steps, filled = np.empty(3, np.float32), np.empty((3, 3), np.int32), 0
    for number, gain in enumerate([0.2, 0.5, 0.1, 0.3, 0.05]):
        if filled < 3 or gain > gains[2]:
            filled = enter(gains, steps, filled, np.float32(gain), number, 0, 0)
    assert steps[:, 0].tolist() == [1, 3, 0]
    np.testing.assert_allclose(gains, [0.5, 0.3, 0.2])
