import logging
import time

import numpy as np
import pytest
import torch
from fake_device import FakeDevice
from hypothesis import given
from hypothesis import strategies as st

from flash_eplb.collectors.heat import BUFFERS, LATE_STEPS, QUEUED, HeatCollector
from flash_eplb.ipc.flags import FLAG_DECODE, FLAG_DUMMY, FLAG_PREFILL
from flash_eplb.ipc.heat_ring import HeatRing


def ring(layers, columns, slots=1024):
    return HeatRing(
        np.zeros(HeatRing.size(layers, columns, slots), np.uint8), layers, columns, slots
    )


def counters(*rows):
    return [torch.tensor(row, dtype=torch.int32) for row in rows]


class Engine:
    """A rank of one layer and one column on a device; `step` counts `tokens` tokens."""

    def __init__(self, device=None):
        self.loads = counters([[0]])
        self.ring = ring(1, 1)
        self.device = device or FakeDevice()
        self.collector = HeatCollector(self.ring, self.loads, self.device)
        self.count = 0

    def step(self, tokens=1, flags=0, epoch=0):
        self.count += 1
        self.loads[0] += tokens
        self.collector.collect(self.count, tokens, flags, epoch)

    def records(self):
        """(step, tokens, flags, epoch, span, heat) of each record since the last call."""
        found = self.ring.read(1024)
        fields = (found.steps, found.tokens, found.flags, found.epochs, found.spans)
        return list(zip(*(f.tolist() for f in (*fields, found.heat[:, 0, 0])), strict=True))


def test_what_was_counted_before_the_first_step_is_forgotten():
    loads = counters([[5, 5]], [[6, 6], [6, 6]])
    heat = ring(3, 2)
    collector = HeatCollector(heat, loads)
    assert not any(load.any() for load in loads)
    assert len(heat.read().steps) == 0
    collector.collect(1, 0, 0, 0)
    assert not heat.read().heat.any()


@pytest.mark.parametrize("flags", [0, FLAG_DUMMY, FLAG_PREFILL, FLAG_DECODE | FLAG_PREFILL])
@pytest.mark.parametrize("models", [1, 2])
def test_on_the_cpu_a_step_becomes_one_record_at_once(flags, models):
    rows = [[1, 2], [3, 4], [5, 6]]
    parts = [rows] if models == 1 else [rows[:1], rows[1:]]  # a drafter of one layer comes first
    loads = [torch.zeros((len(part), 2), dtype=torch.int32) for part in parts]
    heat = ring(3, 2)
    collector = HeatCollector(heat, loads)
    for load, part in zip(loads, parts, strict=True):
        load += torch.tensor(part)
    before = time.monotonic_ns()
    collector.collect(step=17, tokens=21, flags=flags, epoch=3)
    records = heat.read()
    assert records.steps.tolist() == [17]
    assert before <= records.times[0] <= time.monotonic_ns()
    assert records.tokens.tolist() == [21]
    assert records.flags.tolist() == [flags]
    assert records.epochs.tolist() == [3]
    assert records.spans.tolist() == [1]
    assert records.heat[0].tolist() == ([[0, 0]] * 3 if flags == FLAG_DUMMY else rows)
    assert not any(load.any() for load in loads)


def test_counters_with_gaps_in_memory_are_read_and_zeroed_too():
    wide = torch.zeros((2, 6), dtype=torch.int32)
    heat = ring(2, 3)
    collector = HeatCollector(heat, [wide[:, ::2]])
    wide += torch.arange(12, dtype=torch.int32).reshape(2, 6)
    collector.collect(1, 1, 0, 0)
    assert heat.read().heat.tolist() == [[[0, 2, 4], [6, 8, 10]]]
    assert wide.tolist() == [[0, 1, 0, 3, 0, 5], [0, 7, 0, 9, 0, 11]]


def test_loads_that_do_not_fill_a_record_are_refused():
    with pytest.raises(ValueError, match=r"loads of \[1, 1\] layers for 3"):
        HeatCollector(ring(3, 4), counters([[0] * 4], [[0] * 4]))


def test_a_device_that_nobody_knows_is_refused_by_name():
    with pytest.raises(ValueError, match="on a meta device; cpu, cuda and npu are known"):
        HeatCollector(ring(1, 1), [torch.zeros((1, 1), dtype=torch.int32, device="meta")])


def test_a_record_is_written_when_its_copy_has_arrived():
    engine = Engine()
    engine.step(tokens=3, epoch=4)
    assert engine.loads[0].item() == 0  # zeroed behind the copy
    assert engine.records() == []
    engine.step(tokens=5, epoch=4)
    assert engine.records() == []
    engine.device.run()
    engine.step(tokens=7, epoch=5)
    assert engine.records() == [(1, 3, 0, 4, 1, 3)]
    engine.device.run(2)
    engine.step(tokens=9, epoch=5)
    assert engine.records() == [(2, 5, 0, 4, 1, 5), (3, 7, 0, 5, 1, 7)]
    assert (engine.collector.merged, engine.collector.dropped) == (0, 0)


def test_steps_add_up_while_all_buffers_are_on_their_way():
    engine = Engine()
    for _ in range(BUFFERS):
        engine.step(tokens=1, flags=FLAG_DECODE)
    engine.step(tokens=10, flags=FLAG_PREFILL)
    engine.step(tokens=100, flags=FLAG_DECODE)
    assert engine.loads[0].item() == 110  # neither copied nor zeroed
    assert engine.collector.merged == 2
    engine.device.run(BUFFERS)
    engine.step(tokens=1000, flags=FLAG_DECODE)
    engine.device.run()
    engine.step()
    whole = [(step, 1, FLAG_DECODE, 0, 1, 1) for step in range(1, BUFFERS + 1)]
    both = FLAG_DECODE | FLAG_PREFILL
    assert engine.records() == [*whole, (BUFFERS + 3, 1110, both, 0, 3, 1110)]
    assert engine.collector.dropped == 0


def test_counts_never_add_up_over_a_commit():
    engine = Engine()
    for _ in range(BUFFERS + 2):
        engine.step(tokens=1, epoch=0)
    engine.device.run(BUFFERS)
    engine.step(tokens=10, epoch=1)  # counted with the two before it: of no use
    assert engine.collector.dropped == 3
    engine.step(tokens=100, epoch=1)
    engine.device.run()
    engine.step(epoch=1)
    records = engine.records()
    assert [record[0] for record in records] == [*range(1, BUFFERS + 1), BUFFERS + 4]
    assert records[-1] == (BUFFERS + 4, 100, 0, 1, 1, 100)


def test_the_epoch_is_that_of_the_step_and_not_of_the_arrival():
    engine = Engine()
    engine.step(tokens=2, epoch=7)
    engine.step(tokens=3, epoch=8)
    engine.device.run(2)
    engine.step(epoch=9)
    assert engine.records() == [(1, 2, 0, 7, 1, 2), (2, 3, 0, 8, 1, 3)]


def test_a_dummy_step_is_recorded_in_its_turn_and_what_it_counted_is_not():
    engine = Engine()
    engine.step(tokens=3)
    engine.step(tokens=50, flags=FLAG_DUMMY)
    assert engine.records() == []  # the step before it is still on its way
    engine.device.run()
    engine.step(tokens=4)
    engine.device.run()
    engine.step()
    assert engine.records() == [
        (1, 3, 0, 0, 1, 3),
        (2, 50, FLAG_DUMMY, 0, 1, 0),
        (3, 4, 0, 0, 1, 4),
    ]


def test_a_dummy_step_drops_what_had_been_left_to_it():
    engine = Engine()
    for _ in range(BUFFERS + 2):
        engine.step(tokens=1)
    engine.step(tokens=9, flags=FLAG_DUMMY)
    assert engine.collector.dropped == 2
    engine.device.run(BUFFERS)
    engine.step(tokens=5)
    engine.device.run()
    engine.step()
    assert engine.records()[BUFFERS:] == [
        (BUFFERS + 3, 9, FLAG_DUMMY, 0, 1, 0),
        (BUFFERS + 4, 5, 0, 0, 1, 5),
    ]


def test_events_that_pass_out_of_step_do_not_change_the_order():
    engine = Engine()
    for tokens in (1, 2, 3):
        engine.step(tokens)
    device = engine.device
    copies = [item for item in device.stream if isinstance(item, tuple)]
    for target, values in copies:
        target.copy_(values)
    device.run(order=[2, 1])
    engine.step(4)
    assert engine.records() == []
    device.run(order=[0])
    engine.step(5)
    assert [record[0] for record in engine.records()] == [1, 2, 3]


def test_a_device_that_never_answers_costs_heat_and_says_so_once(caplog):
    engine = Engine()
    engine.device.stream = type("Never", (), {"append": lambda self, item: None})()
    with caplog.at_level(logging.ERROR):
        for _ in range(3 * LATE_STEPS):
            engine.step(tokens=1)
    assert engine.records() == []
    assert engine.device.buffers == BUFFERS
    assert engine.loads[0].item() == 3 * LATE_STEPS - BUFFERS
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"no heat has come from the device for {LATE_STEPS + 1} steps")


def test_dummy_steps_behind_a_copy_that_never_arrives_do_not_pile_up():
    engine = Engine()
    engine.step(tokens=1)
    for _ in range(2 * QUEUED):
        engine.step(flags=FLAG_DUMMY)
    assert engine.collector.dropped == QUEUED + 1
    engine.device.run()
    engine.step(tokens=1)
    assert len(engine.records()) == QUEUED


def test_a_step_behind_as_many_as_may_wait_keeps_its_heat_and_no_buffer_is_lost():
    """Idle ranks run dummy steps; a request that comes while their device stands still is next."""
    engine = Engine()
    engine.step(tokens=1)
    for _ in range(QUEUED):
        engine.step(flags=FLAG_DUMMY)
    dropped = engine.collector.dropped
    for _ in range(BUFFERS):
        engine.step(tokens=7)
    engine.device.run()
    engine.step(tokens=2)
    engine.device.run()
    for _ in range(BUFFERS):
        engine.step(tokens=3)
    engine.device.run(BUFFERS)
    engine.step(flags=FLAG_DUMMY)
    heat = [(tokens, span) for _, tokens, flags, _, span, _ in engine.records() if not flags]
    assert heat == [(1, 1), (BUFFERS * 7 + 2, BUFFERS + 1), *[(3, 1)] * BUFFERS]
    assert engine.collector.dropped == dropped


@given(
    st.lists(
        st.tuples(
            st.integers(1, 9),  # tokens
            st.sampled_from([0, 0, 0, 0, FLAG_DUMMY]),
            st.sampled_from([0, 0, 0, 0, 1]),  # rounds committed before the step
            st.integers(0, 3),  # events that pass before it
        ),
        max_size=60,
    )
)
def test_every_token_is_recorded_under_its_epoch_or_counted_as_dropped(steps):
    engine = Engine()
    epoch = 0
    counted = {}
    for number, (tokens, flags, commits, events) in enumerate(steps, 1):
        engine.device.run(events)
        epoch += commits
        engine.step(tokens, flags, epoch)
        counted[number] = (0 if flags & FLAG_DUMMY else tokens, epoch)
    for number in range(len(steps) + 1, len(steps) + BUFFERS + 3):  # what is left comes out
        engine.device.run(BUFFERS)
        engine.step(0, 0, epoch)
        counted[number] = (0, epoch)
    engine.device.run(BUFFERS)
    engine.step(0, FLAG_DUMMY, epoch)
    counted[engine.count] = (0, epoch)
    seen = []
    for step, _, _, recorded, span, heat in engine.records():
        covered = range(step - span + 1, step + 1)
        assert heat == sum(counted[number][0] for number in covered)
        assert {counted[number][1] for number in covered} == {recorded}
        seen += covered
    assert seen == sorted(set(seen))
    assert len(seen) + engine.collector.dropped == engine.count


def test_what_arrives_in_a_dummy_step_counts_for_own_slots():
    ring = HeatRing(np.zeros(HeatRing.size(1, 2, 8), np.uint8), 1, 2, 8)
    load = torch.zeros((1, 2), dtype=torch.int64)
    collector = HeatCollector(ring, [load], counts_dummies=True)
    load += 3
    collector.collect(1, 0, FLAG_DUMMY, 0)
    assert load.sum() == 0
    records = ring.read(8)
    assert records.heat.tolist() == [[[3, 3]]]
    assert records.flags.tolist() == [FLAG_DUMMY]
