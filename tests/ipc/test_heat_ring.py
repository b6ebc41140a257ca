import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_eplb.ipc.heat_ring import HeatRing
from flash_eplb.ipc.segment import ALIGNMENT, take_name


def body(layers, columns, slots):
    return np.zeros(HeatRing.size(layers, columns, slots), np.uint8)


def counts(index, layers, columns):
    """Heat from which the number of its record can be read in every cell."""
    cells = np.arange(layers * columns, dtype=np.int32).reshape(layers, columns)
    return cells + np.int32(index * 10_001)


def push(ring, index, layers, columns):
    heat = counts(index, layers, columns)
    ring.push(index, 3 * index, 5 * index, index % 2, 7 * index, heat, 9 * index)
    assert (heat == counts(index, layers, columns)).all()


def check(records, layers, columns):
    """Every record is whole; returns their numbers."""
    for index, *rest, heat in zip(*records, strict=True):
        assert rest == [3 * index, 5 * index, index % 2, 7 * index, 9 * index]
        assert (heat == counts(index, layers, columns)).all()
    return records.steps.tolist()


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 19), st.integers(1, 6)),
    actions=st.lists(
        st.one_of(
            st.tuples(st.just("push"), st.integers(1, 9)),
            st.tuples(st.just("read"), st.integers(1, 9)),
        ),
        max_size=30,
    ),
)
def test_what_is_not_read_is_counted_as_lost(shape, actions):
    layers, columns, slots = shape
    memory = body(*shape)
    writer, reader = HeatRing(memory, *shape), HeatRing(memory, *shape)
    written = cursor = lost = 0
    for action, number in [*actions, ("read", 99)]:
        if action == "push":
            for index in range(written, written + number):
                push(writer, index, layers, columns)
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


def test_a_record_holds_every_field():
    ring = HeatRing(body(2, 2, 4), 2, 2, 4)
    ring.push(9, 8, 7, 6, 5, np.array([[1, 2], [3, 4]], np.int32), span=3)
    ring.push(10, 8, 7, 6, 5, np.array([[5, 6], [7, 8]], np.int32))
    records = ring.read()
    assert records.steps.tolist() == [9, 10]
    assert [field.tolist() for field in records[1:5]] == [[8, 8], [7, 7], [6, 6], [5, 5]]
    assert records.spans.tolist() == [3, 1]
    assert records.heat.tolist() == [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
    assert records.heat.dtype == np.int32


@pytest.mark.parametrize("last", [0, 1, 2**16 - 1, 2**16, 2**31 - 1, -1, -(2**16), -(2**31)])
def test_a_count_of_any_size_comes_back(last):
    ring = HeatRing(body(2, 9, 2), 2, 9, 2)
    heat = np.zeros((2, 9), np.int32)
    heat[1, 8] = last
    for number in (1, 2, 3):  # the third where the first one was, of the same bytes or of half
        heat[0, 0] = number
        ring.push(number, 0, 0, 0, 0, heat)
        assert (ring.read().heat[0] == heat).all()
        ring.push(number, 0, 0, 0, 0, heat % 2**16)
        assert (ring.read().heat[0] == heat % 2**16).all()


def test_small_counts_take_half_the_bytes():
    memory = body(1, 64, 1)
    HeatRing(memory, 1, 64, 1).push(1, 1, 1, 1, 1, np.full((1, 64), 2**16 - 1, np.int32), 1)
    counts = memory[ALIGNMENT + 64 :]
    assert (counts[:128] == 255).all()
    assert not counts[128:].any()


@pytest.mark.parametrize(
    ("counts", "found"),
    [
        (np.zeros((2, 3), np.uint32), r"uint32\[2, 3\]"),
        (np.zeros((2, 3), np.float32), r"float32\[2, 3\]"),
        (np.zeros((2, 4), np.int32), r"int32\[2, 4\]"),
        (np.zeros((2, 2), np.int32), r"int32\[2, 2\]"),
        (np.zeros((2, 3), np.int64), r"int64\[2, 3\]"),
        (np.zeros((2, 6), np.int32)[:, ::2], r"int32\[2, 3\]"),
    ],
)
def test_counts_that_are_no_record_are_refused(counts, found):
    memory = body(2, 3, 2)
    with pytest.raises(ValueError, match=rf"counts are {found}; a record holds contiguous int32"):
        HeatRing(memory, 2, 3, 2).push(0, 0, 0, 0, 0, counts)
    assert not memory.any()


def test_an_empty_ring_has_nothing():
    records = HeatRing(body(1, 1, 1), 1, 1, 1).read()
    assert [len(field) for field in records] == [0] * 7


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


def test_a_record_that_is_being_written_is_lost_and_the_others_are_whole():
    memory = body(1, 2, 8)
    writer, reader = HeatRing(memory, 1, 2, 8), HeatRing(memory, 1, 2, 8)
    for index in range(8):
        push(writer, index, 1, 2)
    memory[ALIGNMENT : ALIGNMENT + 8].view("<i8")[0] = 2 * 8 + 1  # record 8 over record 0
    assert check(reader.read(), 1, 2) == [1, 2, 3, 4, 5, 6, 7]
    assert reader.lost == 1
    assert check(reader.read(), 1, 2) == []
    assert reader.lost == 1


def test_a_head_that_was_no_head_does_not_silence_the_reader_for_ever():
    memory = body(1, 2, 3)
    writer, reader = HeatRing(memory, 1, 2, 3), HeatRing(memory, 1, 2, 3)
    push(writer, 0, 1, 2)
    head = memory[:8].view("<i8")
    head[0] = 2**40
    assert check(reader.read(), 1, 2) == []
    head[0] = 1
    for index in range(1, 4):
        reader.read()
        push(writer, index, 1, 2)
    assert 3 in check(reader.read(), 1, 2)


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
    ring.push(index, 3 * index, 5 * index, index % 2, 7 * index, heat, 9 * index)
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
