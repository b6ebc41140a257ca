import time

import numpy as np
import pytest

from flash_eplb.collectors.heat import HeatCollector
from flash_eplb.ipc.heat_ring import FLAG_DUMMY, HeatRing


def ring(layers, columns, slots=4):
    return HeatRing(
        np.zeros(HeatRing.size(layers, columns, slots), np.uint8), layers, columns, slots
    )


def test_what_was_counted_before_the_first_step_is_forgotten():
    loads = [np.full((1, 2), 5, np.int32), np.full((2, 2), 6, np.int32)]
    heat = ring(3, 2)
    collector = HeatCollector(heat, loads)
    assert not any(load.any() for load in loads)
    assert len(heat.read().steps) == 0
    collector.collect(1, 0, False, 0)
    assert not heat.read().heat.any()


@pytest.mark.parametrize("is_dummy", [False, True])
def test_a_step_becomes_one_record(is_dummy):
    loads = [np.zeros((1, 2), np.int32), np.zeros((2, 2), np.int32)]
    heat = ring(3, 2)
    collector = HeatCollector(heat, loads)
    loads[0][:] = [[1, 2]]
    loads[1][:] = [[3, 4], [5, 6]]
    before = time.monotonic_ns()
    collector.collect(step=17, tokens=21, is_dummy=is_dummy, epoch=3)
    records = heat.read()
    assert records.steps.tolist() == [17]
    assert before <= records.times[0] <= time.monotonic_ns()
    assert records.tokens.tolist() == [21]
    assert records.flags.tolist() == [FLAG_DUMMY if is_dummy else 0]
    assert records.epochs.tolist() == [3]
    counted = [[1, 2], [3, 4], [5, 6]]
    assert records.heat[0].tolist() == (np.zeros((3, 2)).tolist() if is_dummy else counted)
    assert not any(load.any() for load in loads)


def test_each_record_holds_its_own_step_only():
    loads = [np.zeros((2, 3), np.int32)]
    heat = ring(2, 3)
    collector = HeatCollector(heat, loads)
    for step in range(4):
        loads[0] += step
        collector.collect(step, 6 * step, step == 2, 0)
    records = heat.read()
    assert records.steps.tolist() == [0, 1, 2, 3]
    assert records.heat[:, 0, 0].tolist() == [0, 1, 0, 3]
    assert records.flags.tolist() == [0, 0, FLAG_DUMMY, 0]


def test_loads_that_do_not_fill_a_record_are_refused():
    ring = HeatRing(np.zeros(HeatRing.size(3, 4, 8), np.uint8), 3, 4, 8)
    with pytest.raises(ValueError, match=r"loads of \[1, 1\] layers for 3"):
        HeatCollector(ring, [np.zeros((1, 4), np.int32)] * 2)
