import os

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_eplb.ipc.liveness import SegmentAbsentError, SegmentError, SegmentInUseError
from flash_eplb.ipc.names import rank_name
from flash_eplb.ipc.rank_segment import (
    RankAreas,
    RankHeader,
    RankSegment,
    segment_bytes,
    why_silent,
)
from flash_eplb.ipc.round import Round, encode_round, record_limit
from flash_eplb.ipc.round_log import RoundLog, Transfer
from flash_eplb.ipc.shape import GroupShape, ModelShape
from flash_eplb.ipc.status import Field, State, StepTimings

SHAPE = GroupShape(
    models=(ModelShape("draft", 1), ModelShape("main", 2)),
    experts=5,
    ranks=2,
    slots=3,
    counting=(0, 1),
    row_bytes=(10, 20, 30),
    staging_rows=2,
    ring_slots=8,
)
PLACEMENT = np.arange(18, dtype=np.int32).reshape(3, 2, 3)

WORKER = """
import sys
import numpy as np
from flash_eplb.ipc.rank_segment import RankSegment
from flash_eplb.ipc.shape import GroupShape, ModelShape
from flash_eplb.ipc.status import Field

models = (ModelShape("draft", 1), ModelShape("main", 2))
shape = GroupShape(models, 5, 2, 3, (0, 1), (10, 20, 30), 2, 8)
segment = RankSegment.create(sys.argv[1], shape, 1, 77)
segment.status[Field.STEP] = 11
segment.timings.add(3, 4)
segment.board.write(6, np.arange(18).reshape(3, 2, 3))
heat = np.arange(18, dtype=np.int32).reshape(3, 6)
segment.heat.push(1, 2, 3, 0, 5, heat)
segment.publish()
print("ready", flush=True)
sys.stdin.readline()
plans = segment.plans
print(plans.generation, plans.get().decode(), plans.has_record(), flush=True)
sys.stdin.read()
segment.close()
"""


def fill(areas, shape):
    """Write every area to its last byte; returns a check that none has changed another."""
    placement = np.arange(shape.layers * shape.columns, dtype=np.int32) % 2**15
    placement = placement.reshape(shape.layers, shape.ranks, shape.slots)
    record = b"r" * record_limit(shape)
    for field in Field:
        areas.status[field] = -1 - field
    for step in range(StepTimings.CAPACITY):
        areas.timings.add(step, -step)
    for number in range(RoundLog.CAPACITY):
        areas.rounds.add(Transfer(*[number + 1] * len(Transfer._fields)))
    areas.board.write(9, placement)
    areas.plans.take_over(8)
    while not areas.plans.is_full():
        areas.plans.put(record)
    for step in range(shape.ring_slots):
        heat = np.full((shape.layers, shape.columns), step + 1, np.int32)
        areas.heat.push(step, step, step, 0, 0, heat)

    def check(others):
        assert [others.status[field] for field in Field] == [-1 - field for field in Field]
        timings = others.timings.read()
        assert (timings[:, 0] == np.arange(StepTimings.CAPACITY)).all()
        assert (timings[:, 1] == -timings[:, 0]).all()
        logged = np.array(others.rounds.read().tolist())
        assert (logged == np.arange(1, RoundLog.CAPACITY + 1)[:, None]).all()
        epoch, shown = others.board.read()
        assert epoch == 9
        assert (shown == placement).all()
        assert others.plans.generation == 8
        while others.plans.has_record():
            assert others.plans.get() == record
        records = others.heat.read(shape.ring_slots)
        assert records.steps.tolist() == list(range(shape.ring_slots))
        assert (records.heat == records.steps[:, None, None] + 1).all()

    return check


@given(
    st.builds(
        GroupShape,
        models=st.lists(
            st.builds(ModelShape, st.text(max_size=5), st.integers(1, 4)), min_size=1, max_size=3
        ).map(tuple),
        experts=st.integers(1, 9),
        ranks=st.integers(1, 5),
        slots=st.integers(1, 9),
        counting=st.just((0,)),
        row_bytes=st.just((1,)),
        staging_rows=st.integers(1, 9),
        ring_slots=st.integers(8, 20),
    )
)
def test_the_areas_do_not_overlap_and_stay_within_the_body(shape):
    size = segment_bytes(shape)
    memory = np.full(size + 64, 7, np.uint8)
    memory[:size] = 0
    areas = RankAreas(memory[:size], shape)
    readers = RankAreas(memory[:size], shape)
    fill(areas, shape)(readers)
    assert (memory[size:] == 7).all()


def test_layers_and_columns_follow_from_the_shape():
    assert (SHAPE.layers, SHAPE.columns) == (3, 6)


def test_what_a_worker_writes_another_process_reads_and_answers(session, start):
    script = start(WORKER, session)
    script.line()
    rank = RankSegment.open(rank_name(session, 1), writable=True)
    assert rank.header == RankHeader(SHAPE, 1, session)
    assert rank.generation == 77
    assert rank.owner_is_alive()
    assert rank.status[Field.STEP] == 11
    assert rank.timings.read().tolist() == [[3, 4]]
    epoch, placement = rank.board.read()
    assert (epoch, placement.tolist()) == (6, PLACEMENT.tolist())
    records = rank.heat.read()
    assert [field.tolist() for field in records[:5]] == [[1], [2], [3], [0], [5]]
    assert (records.heat == PLACEMENT.reshape(3, 6)).all()
    rank.plans.take_over(99)
    rank.plans.put(b"round")
    script.say("go")
    assert script.line() == "99 round False"
    rank.close()
    assert script.end() == 0


def test_a_second_worker_of_the_rank_is_refused(session):
    rank = RankSegment.create(session, SHAPE, 0, 1)
    with pytest.raises(SegmentInUseError):
        RankSegment.create(session, SHAPE, 0, 2)
    rank.close()


def test_a_segment_is_open_to_others_when_it_is_published(session):
    rank = RankSegment.create(session, SHAPE, 0, 1)
    with pytest.raises(SegmentError, match="is not ready"):
        RankSegment.open(rank_name(session, 0))
    rank.publish()
    RankSegment.open(rank_name(session, 0)).close()
    rank.close()


def test_a_reader_can_read_all_of_it_without_writing(session):
    rank = RankSegment.create(session, SHAPE, 0, 1)
    check = fill(rank, SHAPE)
    rank.publish()
    reader = RankSegment.open(rank_name(session, 0))
    reader.plans = rank.plans  # taking a record writes
    check(reader)
    reader.close()
    rank.close()


def test_the_file_is_as_long_as_the_shape_says(session):
    rank = RankSegment.create(session, SHAPE, 0, 1)
    assert len(rank.segment.body) == segment_bytes(SHAPE)
    rank.close()


def test_a_rank_votes_no_more_once_it_has_stopped_or_is_dead(session, start):
    script = start(WORKER, session)
    script.line()
    worker = RankSegment.open(rank_name(session, 1), writable=True)
    assert worker.why_silent() == why_silent(session, 1) == ""
    worker.status[Field.STATE] = State.STOPPED
    assert worker.why_silent() == why_silent(session, 1) == "has stopped balancing"
    script.kill()
    assert worker.why_silent() == why_silent(session, 1) == "is dead"
    worker.close()
    os.unlink(f"/dev/shm{rank_name(session, 1)}")


def test_that_a_name_is_gone_says_nothing_of_its_owner(session):
    mine = RankSegment.create(session, SHAPE, 1, 7)
    found = RankSegment.open(rank_name(session, 1), published=False)
    os.unlink(f"/dev/shm{rank_name(session, 1)}")
    assert found.why_silent() == ""
    with pytest.raises(SegmentAbsentError):
        why_silent(session, 1)
    mine.close()
    assert found.why_silent() == "is dead"
    found.close()


FIRST = """
import gc, sys, threading
from flash_eplb.ipc.rank_segment import decode_header
from flash_eplb.ipc.round import decode_round

def decode():
    start.wait()
    read(content)

read = {"header": decode_header, "round": decode_round}[sys.argv[1]]
content = bytes.fromhex(sys.argv[2])
sys.setswitchinterval(1e-6)
gc.set_threshold(1)
start = threading.Barrier(8)
threads = [threading.Thread(target=decode) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
FIRST_READ = {
    "header": msgspec.msgpack.encode(RankHeader(SHAPE, 1, "a")),
    "round": encode_round(Round(1, 1, 1, True, 0, 3, 2, 3, b"")),
}


@pytest.mark.parametrize("what", FIRST_READ)
def test_threads_may_be_the_first_to_read_one_at_once(start, what):
    """In four processes: it is by chance that they are all within msgspec's first look at it."""
    scripts = [start(FIRST, what, FIRST_READ[what].hex()) for _ in range(4)]
    assert [script.end() for script in scripts] == [0] * 4
