import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_eplb.ipc import heat_ring
from flash_eplb.ipc.heat_ring import HeatRing
from flash_eplb.ipc.segment import take_name


def body(layers, columns, slots):
    return np.zeros(HeatRing.size(layers, columns, slots), np.uint8)


def counts(index, layers, columns):
    """Heat from which the number of its record can be read in every cell."""
    cells = np.arange(layers * columns, dtype=np.int32).reshape(layers, columns)
    return cells + np.int32(index * 10_001)


def push(ring, index, layers, columns, models=1):
    heat = counts(index, layers, columns)
    parts = [part.copy() for part in np.array_split(heat, models)]
    ring.push(index, 3 * index, 5 * index, index % 2, 7 * index, parts)
    assert not any(part.any() for part in parts)


def check(records, layers, columns):
    """Every record is whole; returns their numbers."""
    for index, *rest, heat in zip(*records, strict=True):
        assert rest == [3 * index, 5 * index, index % 2, 7 * index]
        assert (heat == counts(index, layers, columns)).all()
    return records.steps.tolist()


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 19), st.integers(1, 6)),
    models=st.integers(1, 3),
    actions=st.lists(
        st.one_of(
            st.tuples(st.just("push"), st.integers(1, 9)),
            st.tuples(st.just("read"), st.integers(1, 9)),
        ),
        max_size=30,
    ),
)
def test_what_is_not_read_is_counted_as_lost(shape, models, actions):
    layers, columns, slots = shape
    memory = body(*shape)
    writer, reader = HeatRing(memory, *shape), HeatRing(memory, *shape)
    written = cursor = lost = 0
    for action, number in [*actions, ("read", 99)]:
        if action == "push":
            for index in range(written, written + number):
                push(writer, index, layers, columns, models)
            written += number
            continue
        oldest = max(cursor, written - slots)
        lost += oldest - cursor
        cursor = min(written, oldest + number)
        records = reader.read(number)
        assert check(records, layers, columns) == list(range(oldest, cursor))
        assert reader.lost == lost
    assert cursor == written


@given(st.integers(1, 4), st.integers(0, 5), st.integers(0, 5))
def test_a_ring_stays_within_its_body(slots, layers, columns):
    size = HeatRing.size(layers, columns, slots)
    memory = np.full(size + 64, 7, np.uint8)
    memory[:size] = 0
    ring = HeatRing(memory[:size], layers, columns, slots)
    for index in range(2 * slots):
        push(ring, index, layers, columns)
    assert (memory[size:] == 7).all()


def test_models_are_concatenated_and_their_counts_set_to_zero():
    ring = HeatRing(body(3, 2, 4), 3, 2, 4)
    models = [np.array([[1, 2]], np.int32), np.array([[3, 4], [5, 6]], np.int32)]
    ring.push(9, 8, 7, 6, 5, models)
    assert [model.tolist() for model in models] == [[[0, 0]], [[0, 0], [0, 0]]]
    records = ring.read()
    assert [field.tolist() for field in records[:5]] == [[9], [8], [7], [6], [5]]
    assert records.heat.tolist() == [[[1, 2], [3, 4], [5, 6]]]
    assert records.heat.dtype == np.int32


def test_counts_with_gaps_in_memory_are_read_and_zeroed_too():
    ring = HeatRing(body(2, 3, 2), 2, 3, 2)
    wide = np.arange(12, dtype=np.int32).reshape(2, 6)
    ring.push(0, 0, 0, 0, 0, [wide[:, ::2]])
    assert wide.tolist() == [[0, 1, 0, 3, 0, 5], [0, 7, 0, 9, 0, 11]]
    assert ring.read().heat.tolist() == [[[0, 2, 4], [6, 8, 10]]]


def test_an_empty_ring_has_nothing():
    records = HeatRing(body(1, 1, 1), 1, 1, 1).read()
    assert [len(field) for field in records] == [0] * 6


def test_two_readers_do_not_disturb_each_other():
    memory = body(1, 2, 4)
    writer, early, late = (HeatRing(memory, 1, 2, 4) for _ in range(3))
    push(writer, 0, 1, 2)
    assert check(early.read(), 1, 2) == [0]
    for index in range(1, 7):
        push(writer, index, 1, 2)
    assert check(early.read(), 1, 2) == [3, 4, 5, 6]
    assert check(late.read(), 1, 2) == [3, 4, 5, 6]
    assert (early.lost, late.lost) == (2, 3)


def test_a_follower_loses_nothing_that_was_gone_before_it_came():
    memory = body(1, 2, 4)
    writer, reader = HeatRing(memory, 1, 2, 4), HeatRing(memory, 1, 2, 4)
    reader.follow()
    assert check(reader.read(), 1, 2) == []
    for index in range(6):
        push(writer, index, 1, 2)
    late = HeatRing(memory, 1, 2, 4)
    late.follow()
    assert check(late.read(), 1, 2) == check(reader.read(), 1, 2) == [2, 3, 4, 5]
    assert (reader.lost, late.lost) == (2, 0)
    push(writer, 6, 1, 2)
    assert check(late.read(), 1, 2) == [6]


def test_a_writer_that_dies_in_a_record_leaves_the_others():
    memory = body(1, 2, 3)
    writer, reader = HeatRing(memory, 1, 2, 3), HeatRing(memory, 1, 2, 3)
    for index in range(3):
        push(writer, index, 1, 2)
    heat_ring._begin(writer._words, 8, 3, 3, 9, 15, 1, 21)  # over record 0, and never ended
    assert check(reader.read(), 1, 2) == [1, 2]
    assert reader.lost == 1
    assert check(reader.read(), 1, 2) == []
    assert reader.lost == 1


WRITER = """
import sys
import numpy as np
from flash_eplb.ipc.heat_ring import HeatRing
from flash_eplb.ipc.segment import Segment

name, records, layers, columns, slots = sys.argv[1], *map(int, sys.argv[2:])
segment = Segment.open(name, writable=True)
ring = HeatRing(segment.body, layers, columns, slots)
cells = np.arange(layers * columns, dtype=np.int32).reshape(layers, columns)
heat = np.empty_like(cells)
for index in range(records):
    np.add(cells, index * 10_001, out=heat)
    ring.push(index, 3 * index, 5 * index, index % 2, 7 * index, [heat])
    if index == 0:
        print("writing", flush=True)
print("written", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("layers", "columns", "slots", "written"), [(16, 256, 3, 20_000), (64, 4096, 1, 2000)]
)
def test_a_process_writes_at_full_speed_and_no_record_is_torn(
    session, start, layers, columns, slots, written
):
    # The large records are read into pages that are new each time, which is slower than writing,
    # so that the writer overtakes the reader within a record again and again.
    name = f"/eplb.{session}.ring"
    size = HeatRing.size(layers, columns, slots)
    segment = take_name(session, name, b"", size, 1)
    segment.publish()
    reader = HeatRing(segment.body, layers, columns, slots)
    done = threading.Event()
    script = start(WRITER, name, written, layers, columns, slots)
    assert script.line() == "writing"
    waiter = threading.Thread(target=lambda: (script.line(), done.set()))
    waiter.start()
    read = []
    while True:
        last = done.is_set()
        read += check(reader.read(), layers, columns)
        if last and reader._cursor == written:
            break
    waiter.join()
    segment.close()
    assert read == sorted(set(read))
    assert len(read) + reader.lost == written
