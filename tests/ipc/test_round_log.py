import threading

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flash_eplb.ipc.round_log import TRANSFER, RoundLog, Transfer

MOST = 2**63 - 1


def numbered(number):
    """A transfer that tells its number in every field."""
    return Transfer(*((k + 2) * number + k for k in range(len(Transfer._fields))))


def body():
    """(memory, a log's part of it): the rest tells when something writes too far."""
    memory = np.full(RoundLog.SIZE + 64, 7, np.uint8)
    memory[: RoundLog.SIZE] = 0
    return memory, memory[: RoundLog.SIZE]


def whole(records):
    """The numbers of the records, none of which may be torn."""
    assert records.dtype == TRANSFER
    numbers = [(int(row["generation"])) // 2 for row in records]
    assert [tuple(row) for row in records.tolist()] == [tuple(numbered(n)) for n in numbers]
    return numbers


@given(st.lists(st.integers(0, MOST), min_size=13, max_size=13))
def test_each_field_comes_as_it_was_written(values):
    memory, area = body()
    writer, reader = RoundLog(area), RoundLog(area)
    writer.add(Transfer(*values))
    (row,) = reader.read()
    assert tuple(row.tolist()) == tuple(values)
    assert [int(row[name]) for name in Transfer._fields] == values
    assert (memory[RoundLog.SIZE :] == 7).all()


def test_an_empty_log_holds_nothing():
    assert len(RoundLog(body()[1]).read()) == 0


def test_each_reader_has_a_cursor_of_its_own_and_counts_what_it_lost():
    memory, area = body()
    writer, early, late = RoundLog(area), RoundLog(area), RoundLog(area)
    for number in range(3):
        writer.add(numbered(number))
    assert whole(early.read()) == [0, 1, 2]
    assert whole(early.read()) == []
    for number in range(3, 3 + RoundLog.CAPACITY + 5):
        writer.add(numbered(number))
    last = list(range(8, 8 + RoundLog.CAPACITY))
    assert whole(early.read()) == last
    assert early.lost == 5
    late.follow()
    assert whole(late.read()) == last
    assert late.lost == 0
    assert (memory[RoundLog.SIZE :] == 7).all()


def test_a_log_written_at_full_speed_is_never_torn():
    area = body()[1]
    writer, reader = RoundLog(area), RoundLog(area)
    stop = threading.Event()
    written = [0]

    def write():
        while not stop.is_set():
            writer.add(numbered(written[0]))
            written[0] += 1

    thread = threading.Thread(target=write)
    thread.start()
    found = []
    try:
        while len(found) < 3000:
            found += whole(reader.read())
    finally:
        stop.set()
        thread.join()
    found += whole(reader.read())
    assert found == sorted(set(found))
    assert len(found) + reader.lost == written[0]
