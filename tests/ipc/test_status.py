import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_eplb.ipc.segment import ALIGNMENT
from flash_eplb.ipc.status import Board, Field, State, StatusBlock, StepTimings

WORD_VALUES = st.integers(-(2**63), 2**63 - 1)


def body(size):
    """(memory, its first `size` bytes): the rest tells when something writes too far."""
    memory = np.full(size + 64, 7, np.uint8)
    memory[:size] = 0
    return memory, memory[:size]


def untouched(memory):
    return (memory[-64:] == 7).all()


@given(st.lists(WORD_VALUES, min_size=len(Field), max_size=len(Field)))
def test_each_field_has_a_word_of_its_own(values):
    memory, area = body(StatusBlock.SIZE)
    writer, reader = StatusBlock(area), StatusBlock(area)
    for field, value in zip(Field, values, strict=True):
        writer[field] = value
    assert [reader[field] for field in Field] == values
    names = [field.name.lower() for field in Field]
    assert reader.snapshot() == dict(zip(names, values, strict=True))
    assert untouched(memory)


def test_a_fresh_block_is_idle_and_all_zero():
    block = StatusBlock(body(StatusBlock.SIZE)[1])
    assert set(block.snapshot().values()) == {0}
    assert block[Field.STATE] == State.IDLE


def test_a_counter_counts():
    block = StatusBlock(body(StatusBlock.SIZE)[1])
    block.add(Field.STALE)
    block.add(Field.STALE)
    block.add(Field.RECEIVED_BYTES, 2**40)
    assert block[Field.STALE] == 2
    assert block[Field.RECEIVED_BYTES] == 2**40
    assert sum(block.snapshot().values()) == 2 + 2**40


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5)),
    epochs=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4),
    data=st.data(),
)
def test_the_board_shows_what_was_written_last(shape, epochs, data):
    cells = int(np.prod(shape))
    memory, area = body(Board.size(cells))
    writer, reader = Board(area, shape), Board(area, shape)
    assert reader.read() is None
    for epoch in epochs:
        experts = st.lists(st.integers(0, 2**15 - 1), min_size=cells, max_size=cells)
        placement = np.array(data.draw(experts), np.int32).reshape(shape)
        writer.write(epoch, placement)
        assert untouched(memory)
        shown_epoch, shown = reader.read()
        assert shown_epoch == epoch
        assert shown.dtype == np.int32
        assert (shown == placement).all()


def test_a_board_is_not_read_while_it_is_written():
    _, area = body(Board.size(4))
    board = Board(area, (1, 2, 2))
    board.write(5, np.arange(4).reshape(1, 2, 2))
    sequence = area[:ALIGNMENT].view("<i8")
    sequence[0] += 1
    assert board.read() is None
    sequence[0] += 1
    assert board.read()[0] == 5


def test_a_placement_of_another_shape_is_refused_and_the_board_stays():
    board = Board(body(Board.size(4))[1], (1, 2, 2))
    board.write(5, np.arange(4).reshape(1, 2, 2))
    with pytest.raises(ValueError, match=r"has shape \(1, 2, 3\); the board is \(1, 2, 2\)"):
        board.write(6, np.zeros((1, 2, 3), np.int32))
    assert board.read()[0] == 5


def test_the_board_that_was_read_is_a_copy():
    board = Board(body(Board.size(4))[1], (1, 2, 2))
    board.write(1, np.zeros((1, 2, 2), np.int32))
    _, shown = board.read()
    board.write(2, np.ones((1, 2, 2), np.int32))
    assert not shown.any()


def test_a_board_written_at_full_speed_is_never_torn():
    shape = (58, 32, 9)
    area = body(Board.size(58 * 32 * 9))[1]
    writer, reader = Board(area, shape), Board(area, shape)
    writer.write(0, np.zeros(shape, np.int32))
    stop = threading.Event()

    def write():
        epoch = 0
        while not stop.is_set():
            epoch += 1
            writer.write(epoch, np.broadcast_to(np.int16(epoch % 1000), shape))

    thread = threading.Thread(target=write)
    thread.start()
    newest = -1
    try:
        for _ in range(3000):
            shown = reader.read()
            if shown is not None:
                epoch, placement = shown
                assert epoch >= newest
                assert (placement == epoch % 1000).all()
                newest = epoch
    finally:
        stop.set()
        thread.join()
    assert newest >= 0


@pytest.mark.parametrize("steps", [0, 1, 4095, 4096, 4097, 10_000])
def test_the_latest_timings_are_kept(steps):
    memory, area = body(StepTimings.SIZE)
    writer, reader = StepTimings(area), StepTimings(area)
    for step in range(steps):
        writer.add(step, 10 * step)
    assert untouched(memory)
    kept = range(max(0, steps - StepTimings.CAPACITY), steps)
    assert sorted(reader.read().tolist()) == [[step, 10 * step] for step in kept]


def test_timings_that_were_read_are_a_copy():
    timings = StepTimings(body(StepTimings.SIZE)[1])
    timings.add(1, 2)
    samples = timings.read()
    for _ in range(StepTimings.CAPACITY):
        timings.add(3, 4)
    assert samples.tolist() == [[1, 2]]
