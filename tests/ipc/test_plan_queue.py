import struct
import zlib
from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_eplb.ipc.plan_queue import RECORD_VERSION, SLOTS, PlanQueue
from flash_eplb.ipc.round import RoundError

LIMIT = 100


def ends(limit=LIMIT):
    """(memory, producer, consumer) of an empty queue."""
    memory = np.zeros(PlanQueue.size(limit), np.uint8)
    return memory, PlanQueue(memory, limit), PlanQueue(memory, limit)


def slot_of(memory, number, limit=LIMIT):
    """The bytes of record `number`'s slot."""
    width = (len(memory) - 192) // SLOTS
    start = 192 + number % SLOTS * width
    return memory[start : start + width]


def write_slot(memory, number, record, version=RECORD_VERSION):
    """Everything that `put` does before it moves the head."""
    content = struct.pack("<IIII", version, len(record), zlib.crc32(record), 0) + record
    slot_of(memory, number)[: len(content)] = np.frombuffer(content, np.uint8)


@given(
    limit=st.integers(0, 200),
    data=st.data(),
    gets=st.lists(st.booleans(), max_size=40),
)
def test_records_come_out_as_they_went_in(limit, data, gets):
    _, producer, consumer = ends(limit)
    waiting = deque()
    for get in gets:
        assert consumer.has_record() == bool(waiting)
        assert producer.is_full() == (len(waiting) == SLOTS)
        if get and waiting:
            assert consumer.get() == waiting.popleft()
        elif not producer.is_full():
            record = data.draw(st.binary(max_size=limit))
            producer.put(record)
            waiting.append(record)
    while waiting:
        assert consumer.get() == waiting.popleft()
    assert not consumer.has_record()


def test_a_full_queue_refuses_and_keeps_what_it_has():
    _, producer, consumer = ends()
    for number in range(SLOTS):
        assert not producer.is_full()
        producer.put(b"%d" % number)
    assert producer.is_full()
    with pytest.raises(ValueError, match="no room for 1 bytes"):
        producer.put(b"x")
    assert consumer.get() == b"0"
    assert not producer.is_full()
    producer.put(b"4")
    assert [consumer.get() for _ in range(SLOTS)] == [b"1", b"2", b"3", b"4"]


def test_a_record_above_the_limit_is_refused():
    memory, producer, consumer = ends()
    producer.put(b"x" * LIMIT)
    assert consumer.get() == b"x" * LIMIT
    before = memory.copy()
    with pytest.raises(ValueError, match=r"no room for 101 bytes \(limit 100\)"):
        producer.put(b"x" * (LIMIT + 1))
    assert (memory == before).all()


@given(
    record=st.binary(min_size=1, max_size=LIMIT), place=st.integers(0), flips=st.integers(1, 255)
)
def test_a_damaged_byte_is_refused_and_the_next_record_is_whole(record, place, flips):
    memory, producer, consumer = ends()
    producer.put(record)
    producer.put(b"next")
    places = [*range(12), *range(16, 16 + len(record))]  # bytes 12 to 15 mean nothing
    slot_of(memory, 0)[places[place % len(places)]] ^= flips
    with pytest.raises(RoundError):
        consumer.get()
    assert consumer.get() == b"next"
    assert not consumer.has_record()


@pytest.mark.parametrize("length", [0, 1, 2, 4, 2**31, 2**32 - 1])
def test_a_wrong_length_is_refused(length):
    memory, producer, consumer = ends()
    producer.put(b"abc")
    slot_of(memory, 0)[4:8] = np.frombuffer(struct.pack("<I", length), np.uint8)
    with pytest.raises(RoundError, match="its checksum does not fit"):
        consumer.get()


@pytest.mark.parametrize("version", [0, RECORD_VERSION + 1, 2**32 - 1])
def test_another_version_is_refused_with_both_versions(version):
    memory, producer, consumer = ends()
    producer.put(b"abc")
    write_slot(memory, 0, b"abc", version)
    with pytest.raises(RoundError) as error:
        consumer.get()
    assert str(error.value).startswith(
        f"record version {version}, this loader reads {RECORD_VERSION};"
    )


@pytest.mark.parametrize("written", [1, 16, 40])
def test_a_producer_that_dies_in_a_record_leaves_nothing(written):
    memory, producer, consumer = ends()
    producer.put(b"first")
    write_slot(memory, 1, b"never sent" * 5)
    slot_of(memory, 1)[written:] = 0
    assert consumer.get() == b"first"
    assert not consumer.has_record()
    PlanQueue(memory, LIMIT).put(b"of its successor")
    assert consumer.get() == b"of its successor"
    assert not consumer.has_record()


def test_a_later_consumer_goes_on_where_the_first_stopped():
    memory, producer, consumer = ends()
    for record in (b"a", b"b", b"c"):
        producer.put(record)
    assert consumer.get() == b"a"
    assert PlanQueue(memory, LIMIT).get() == b"b"


def test_the_generation_is_the_latest_producers():
    memory, producer, consumer = ends()
    assert consumer.generation == 0
    producer.take_over(2**62 + 1)
    assert consumer.generation == 2**62 + 1
    PlanQueue(memory, LIMIT).take_over(3)
    assert consumer.generation == 3


@given(st.integers(0, 300))
def test_a_queue_stays_within_its_body(limit):
    size = PlanQueue.size(limit)
    memory = np.full(size + 64, 7, np.uint8)
    memory[:size] = 0
    producer, consumer = PlanQueue(memory[:size], limit), PlanQueue(memory[:size], limit)
    for _ in range(SLOTS):
        producer.put(b"x" * limit)
    assert [consumer.get() for _ in range(SLOTS)] == [b"x" * limit] * SLOTS
    assert (memory[size:] == 7).all()
