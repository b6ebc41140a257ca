import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from cluster import GENERATION, SWAP, swap

from flash_eplb.eplb.choice import pace_of
from flash_eplb.eplb.config import load_config
from flash_eplb.ipc.placement import MOVE
from flash_eplb.ipc.plan_queue import SLOTS
from flash_eplb.ipc.status import Field, State
from flash_eplb.planners.plan import make_plan


def random_placement(dice: random.Random, layers: int, experts: int, ranks: int, slots: int):
    """Any valid placement: one slot for each expert first, the rest wherever it fits."""
    made = np.full((layers, ranks, slots), -1, np.int32)
    for layer in range(layers):
        while True:
            held = [set() for _ in range(ranks)]
            for expert in range(experts):
                free = [r for r in range(ranks) if len(held[r]) < slots]
                held[dice.choice(free)].add(expert)
            try:
                for rank in range(ranks):
                    rest = [e for e in range(experts) if e not in held[rank]]
                    held[rank] |= set(dice.sample(rest, slots - len(held[rank])))
                break
            except ValueError:
                continue
        for rank in range(ranks):
            made[layer, rank] = dice.sample(sorted(held[rank]), slots)
    return made


def test_a_planner_has_patience_for_the_votes_of_a_round(cluster, environment):
    """Though no vote falls within the timeout, and the round comes just after one."""
    votes, timeout = 32, 4
    group = cluster(vote_steps=votes, timeout_steps=timeout)
    group.tick(votes)
    group.send(group.record(SWAP))
    steps = 0
    while not group.ranks[0].commits:
        steps += 1
        group.tick()
        time.sleep(0.01)  # a vote is as far away as in an engine
        assert not group.ranks[0].segment.status[Field.ABORTED]
    assert steps == 4 * votes
    pace = pace_of(load_config(vote_steps=votes, plan_timeout_steps=timeout))
    assert pace.timeout_steps == steps + 2 * timeout


def test_a_round_is_committed_on_all_ranks_at_the_same_step(cluster):
    group = cluster()
    group.send(group.record(SWAP))
    group.tick_until(lambda: group.ranks[0].loader.epoch == 1)
    steps = [rank.commits for rank in group.ranks]
    assert steps[0] == steps[1] == steps[2]
    assert group.ranks[0].loader.placement[1, 0, 0] == 3
    group.check_consistent()
    status = group.ranks[0].segment.status
    assert status[Field.COMMITTED] == status[Field.EPOCH] == status[Field.MOVED_ROWS] == 1
    assert status[Field.COMMITTED_ROUND] == 1
    assert status[Field.RECEIVED_BYTES] == group.shape.row_bytes[1]
    assert group.ranks[2].segment.status[Field.MOVED_ROWS] == 0
    group.tick()  # a step with a commit is long enough without its log
    logged = [rank.segment.rounds.read() for rank in group.ranks]
    assert [len(rows) for rows in logged] == [1, 1, 1]
    for rank, (row,) in zip(group.ranks, logged, strict=True):
        assert [row[n] for n in ("generation", "plan", "sequence")] == [GENERATION, 1, 1]
        assert row["committed"] == 1
        assert 0 < row["start_step"] < row["end_step"] == steps[0][0]
        points = [row[n] for n in ("start_ns", "begin_ns", "staged_ns", "commit_ns", "end_ns")]
        assert points[0] > 0
        assert points == sorted(points)
        moved = 1 if rank is not group.ranks[2] else 0
        assert row["rows"] == moved
        assert row["received_bytes"] == moved * group.shape.row_bytes[1]


def test_a_stager_takes_no_core_from_the_main_thread_that_wakes_it(cluster):
    group = cluster()
    for rank in group.ranks:
        thread = rank.loader._stagers._stager._thread
        assert os.sched_getscheduler(thread.native_id) == os.SCHED_BATCH
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_random_plans_leave_every_slot_with_its_expert(cluster, rows):
    group = cluster(layers=2, experts=5, ranks=3, slots=3, rows=rows, vote_steps=1)
    dice = random.Random(rows)
    sequence = 1
    for number in range(1, 6):
        before = group.ranks[0].loader.placement
        plan = make_plan(before, random_placement(dice, 2, 5, 3, 3))
        rounds = plan.rounds(rows)
        target = group.ranks[0].loader.epoch + len(rounds)
        waiting = [
            group.record(
                r.moves, plan=number, sequence=sequence + n, epoch=target - len(rounds) + n
            )
            for n, r in enumerate(rounds)
        ]
        sequence += len(rounds)

        def push(waiting=waiting):
            while waiting and not any(r.segment.plans.is_full() for r in group.ranks):
                group.send(waiting.pop(0))

        while group.ranks[0].loader.epoch < target:
            push()
            group.tick()
        group.check_consistent()
        assert np.array_equal(group.ranks[0].loader.placement, plan.placement)
    assert all(rank.segment.status[Field.REFUSED] == 0 for rank in group.ranks)


def test_experts_that_move_within_a_rank_are_copied(cluster):
    group = cluster()
    group.send(group.record(swap(0, (0, 0, 0), (2, 0, 2))))
    group.tick_until(lambda: group.ranks[0].loader.epoch == 1)
    group.check_consistent()
    assert group.ranks[0].segment.status[Field.RECEIVED_BYTES] == 0


def test_columns_are_committed_with_the_placement(cluster):
    group = cluster()
    columns = np.arange(2, 11, dtype="<i2").reshape(1, 3, 3)
    group.send(group.record(SWAP, columns=columns.tobytes()))
    group.tick_until(lambda: group.ranks[0].loader.epoch == 1)
    for rank in group.ranks:
        assert (rank.engine.columns[1] == columns[0]).all()
        assert (rank.engine.columns[[0, 2]] == 1).all()
    group.check_consistent()
    group.send(group.record(swap(1, (3, 0, 0), (0, 1, 0)), plan=2, sequence=2))
    group.tick_until(lambda: group.ranks[0].loader.epoch == 2)
    assert all((rank.engine.columns == 1).all() for rank in group.ranks)


def test_nothing_starts_unless_all_ranks_hold_the_same_round(cluster):
    group = cluster()
    group.send(group.record(SWAP), ranks=[0, 1])
    group.tick(40)
    assert all(rank.segment.status[Field.STATE] == State.IDLE for rank in group.ranks)
    group.send(group.record(SWAP[::-1]), ranks=[2])  # the same number, other content
    group.tick(40)
    assert all(rank.loader.epoch == 0 for rank in group.ranks)
    group.send(group.record(SWAP, plan=2, sequence=2))  # a newer plan supersedes both
    group.tick_until(lambda: group.ranks[0].loader.epoch == 1)
    group.check_consistent()
    assert [rank.segment.status[Field.STALE] for rank in group.ranks] == [1, 1, 1]


def test_rounds_of_a_dead_planner_that_were_not_started_are_dropped(cluster):
    group = cluster()
    group.send(group.record(SWAP), ranks=[0])
    group.tick(10)
    for rank in group.ranks:
        rank.segment.plans.take_over(GENERATION + 1)
    group.tick(10)
    assert group.ranks[0].segment.status[Field.STALE] == 1
    successor = group.record(SWAP, generation=GENERATION + 1)
    group.send(successor)
    group.tick_until(lambda: group.ranks[0].loader.epoch == 1)
    group.check_consistent()
    status = group.ranks[0].segment.status
    assert status[Field.GENERATION] == GENERATION + 1
    assert status[Field.COMMITTED_ROUND] == 1


def test_what_a_planner_writes_after_its_successor_took_over_changes_nothing_that_is_told(cluster):
    group = cluster()
    for rank in group.ranks:
        rank.segment.plans.take_over(GENERATION + 1)
    group.send(group.record(SWAP, generation=GENERATION + 1))
    group.tick_until(lambda: group.ranks[0].loader.epoch == 1)
    group.send(group.record(SWAP))
    group.tick(10)
    for rank in group.ranks:
        status = rank.segment.status
        assert (status[Field.GENERATION], status[Field.COMMITTED_ROUND]) == (GENERATION + 1, 1)
        assert (status[Field.DROPPED_ROUND], status[Field.STALE]) == (0, 1)


BAD = {
    "made for": lambda g: g.record(SWAP, slots=4),
    "expert 3 has no slot": lambda g: g.record(np.array([(1, 0, 0, 0, 1, 0)], MOVE)),
    "expert 1 stands twice on rank 0": lambda g: g.record(np.array([(1, 1, 2, 1, 0, 0)], MOVE)),
    "moves nothing": lambda g: g.record(SWAP[:0]),
    "not a round": lambda g: b"\x93\x01\x02\x03",
    "EPLB_STAGING_ROWS": lambda g: g.record(
        np.concatenate([swap(layer, (0, 0, 0), (3, 1, 0)) for layer in range(3)])
    ),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_plan_is_refused_counted_and_logged_once(cluster, caplog, reason):
    group = cluster()
    with caplog.at_level("ERROR", "flash_eplb.loader"):
        for _ in range(2):
            group.send(BAD[reason](group))
            group.tick(8)
    complaints = [r.getMessage() for r in caplog.records if "refuses" in r.getMessage()]
    assert len(complaints) == len(group.ranks)
    assert all(reason in text for text in complaints)
    assert all(rank.segment.status[Field.REFUSED] == 2 for rank in group.ranks)
    assert all(rank.loader.epoch == 0 for rank in group.ranks)
    group.check_consistent()
    group.send(group.record(SWAP, plan=9, sequence=9))
    group.tick_until(lambda: group.ranks[0].loader.epoch == 1)
    group.check_consistent()


def test_a_damaged_record_on_one_rank_starts_nothing_anywhere(cluster):
    group = cluster()
    group.send(group.record(SWAP), ranks=[0, 1])
    plans = group.ranks[2].segment.plans
    plans.put(group.record(SWAP))
    plans._slots[0, 30] ^= 1
    group.tick(40)
    assert [rank.segment.status[Field.REFUSED] for rank in group.ranks] == [0, 0, 1]
    assert all(rank.loader.epoch == 0 for rank in group.ranks)
    group.check_consistent()


def test_rounds_ahead_wait_in_the_queue_until_their_epoch(cluster):
    group = cluster(rows=1)
    back = swap(1, (3, 0, 0), (0, 1, 0))
    for number, moves in enumerate([SWAP, back, SWAP, back][:SLOTS]):
        group.send(group.record(moves, sequence=number + 1, epoch=number))
    group.tick_until(lambda: group.ranks[0].loader.epoch == SLOTS)
    group.check_consistent()
    assert group.ranks[0].segment.status[Field.COMMITTED_ROUND] == SLOTS


def test_a_round_from_another_epoch_is_stale(cluster):
    group = cluster()
    group.send(group.record(SWAP, epoch=5))
    group.tick_until(lambda: all(rank.segment.status[Field.STALE] for rank in group.ranks))
    assert all(rank.segment.status[Field.STALE] == 1 for rank in group.ranks)
    assert all(rank.segment.status[Field.DROPPED_ROUND] == 1 for rank in group.ranks)


def test_the_rest_of_a_plan_that_lost_a_round_is_never_started(cluster):
    """Its epochs may come true by another plan's commits, but not the placements they stand for."""
    group = cluster()
    other = swap(0, (1, 0, 1), (4, 1, 1))
    third = swap(2, (2, 0, 2), (5, 1, 2))
    group.send(group.record(SWAP, plan=1, sequence=1, epoch=0))
    group.tick_until(lambda: group.ranks[0].loader._active is not None)  # then it is given up
    group.send(group.record(other, plan=2, sequence=2, epoch=0, last=False))
    group.send(group.record(third, plan=2, sequence=3, epoch=1))
    group.tick_until(lambda: group.ranks[0].loader.epoch == 1)
    for _ in range(20):
        group.tick(2)
        time.sleep(0.005)
    for rank in group.ranks:
        status = rank.segment.status
        assert status[Field.COMMITTED] == 1
        assert (status[Field.STALE], status[Field.REFUSED]) == (2, 0)
        assert status[Field.DROPPED_ROUND] == 3
    group.send(group.record(other, plan=3, sequence=4, epoch=1))
    group.tick_until(lambda: group.ranks[0].loader.epoch == 2)
    group.check_consistent()


def test_a_round_of_a_void_plan_that_comes_late_is_dropped(cluster):
    group = cluster()
    group.send(group.record(SWAP, plan=1, sequence=1, epoch=7, last=False))
    group.tick_until(lambda: group.ranks[0].segment.status[Field.DROPPED_ROUND] == 1)
    group.send(group.record(SWAP, plan=1, sequence=2, epoch=0))
    group.tick_until(lambda: group.ranks[0].segment.status[Field.DROPPED_ROUND] == 2)
    assert all(rank.segment.status[Field.COMMITTED] == 0 for rank in group.ranks)
