import random
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from cluster import GENERATION, Cluster

from flash_eplb.ipc.placement import MOVE
from flash_eplb.ipc.plan_queue import SLOTS
from flash_eplb.ipc.status import Field, State
from flash_eplb.loaders import stager as stager_module
from flash_eplb.loaders.stager_pool import MOST_HUNG
from flash_eplb.loaders.transport import PeerToPeer
from flash_eplb.planners.plan import make_plan


@pytest.fixture
def cluster(session):
    made = []

    def make(**sizes):
        made.append(Cluster(session, **sizes))
        return made[-1]

    yield make
    for one in made:
        one.close()


def swap(layer: int, first: tuple[int, int, int], second: tuple[int, int, int]) -> np.ndarray:
    """Two experts (expert, rank, slot) change places."""
    moves = [
        (layer, first[0], first[1], first[2], second[1], second[2]),
        (layer, second[0], second[1], second[2], first[1], first[2]),
    ]
    return np.array(moves, MOVE)


# 6 experts, 3 ranks x 3 slots: rank 0 holds 0 1 2, rank 1 holds 3 4 5, rank 2 holds 0 1 2
SWAP = swap(1, (0, 0, 0), (3, 1, 0))


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


def test_a_sender_that_reads_a_wrong_row_aborts_the_round_everywhere(cluster, monkeypatch, caplog):
    group = cluster()
    source, mistakes = stager_module.Stager._source, [1]

    def misread(self, move):
        if self._rank == 0 and mistakes:
            mistakes.pop()
            move = move.copy()
            move["source_slot"] += 1
        return source(self, move)

    monkeypatch.setattr(stager_module.Stager, "_source", misread)
    with caplog.at_level("WARNING", "flash_eplb.loader"):
        group.send(group.record(SWAP))
        group.tick_until(lambda: group.ranks[0].segment.status[Field.ABORTED] == 1)
    assert [rank.segment.status[Field.ABORTED] for rank in group.ranks] == [1, 1, 1]
    assert [rank.segment.status[Field.DAMAGED] for rank in group.ranks] == [1, 0, 0]
    assert [rank.loader.epoch for rank in group.ranks] == [0, 0, 0]
    assert "layer 1 expert 0 from rank 0 slot 0 to rank 1: digest" in caplog.text
    assert "at its source" in caplog.text
    group.check_consistent()
    # the receiver does not wait for its timeout: the next plan commits at once
    group.send(group.record(SWAP, plan=2, sequence=2))
    group.tick_until(lambda: group.ranks[0].loader.epoch == 1)
    group.check_consistent()


def test_weights_that_somebody_else_has_written_stop_balancing_on_all_ranks(cluster, caplog):
    group = cluster()
    group.ranks[0].engine.weights[1][0][0, 7] += 1  # rank 0's expert 0 of layer 1
    with caplog.at_level("WARNING", "flash_eplb.loader"):
        group.send(group.record(SWAP))
        group.tick_until(lambda: bool(group.ranks[2].loader.stopped))
    for rank in group.ranks:
        assert "EP rank 0 holds an expert whose weights are not those of the st" in (
            rank.loader.stopped
        )
        assert rank.segment.status[Field.STATE] == State.STOPPED
    assert [rank.segment.status[Field.DAMAGED] for rank in group.ranks] == [1, 0, 0]
    assert "layer 1 expert 0 from rank 0" in caplog.text
    group.tick(20)
    assert [rank.loader.epoch for rank in group.ranks] == [0, 0, 0]


def test_an_expert_that_changes_is_found_though_nothing_moves(cluster, caplog):
    group = cluster(patrol_steps=1)
    for _ in range(30):
        group.tick(2)
        time.sleep(0.001)
    assert not any(rank.loader.stopped for rank in group.ranks)
    group.ranks[1].engine.weights[2][0][2, 4] += 1  # rank 1's expert 5 of layer 2
    with caplog.at_level("WARNING", "flash_eplb.loader"):
        group.tick_until(lambda: bool(group.ranks[0].loader.stopped))
    assert all("EP rank 1 holds an expert whose" in rank.loader.stopped for rank in group.ranks)
    assert "a live expert has changed: layer 2 expert 5 in slot 2: digest" in caplog.text


def test_the_patrol_lets_rounds_pass_and_follows_them(cluster):
    group = cluster(patrol_steps=1, vote_steps=1)
    back = swap(1, (3, 0, 0), (0, 1, 0))
    for number in range(1, 9):
        group.send(group.record(back if number % 2 == 0 else SWAP, plan=number, sequence=number))
        group.tick_until(lambda number=number: group.ranks[0].loader.epoch == number)
        group.tick(20)
    group.check_consistent()
    assert not any(rank.loader.stopped for rank in group.ranks)


def test_a_bit_that_flips_on_its_way_aborts_and_the_next_plan_commits(cluster, monkeypatch, caplog):
    group = cluster(transfer_timeout=2.0)
    exchange = PeerToPeer.exchange
    flips = []

    def exchange_and_flip(self, moves, leaving, arriving):
        exchange(self, moves, leaving, arriving)
        if self._rank == 1 and arriving and group.ranks[1].loader.epoch == 1 and not flips:
            flips.append(1)
            arriving[0].views[0][3] ^= 4

    monkeypatch.setattr(PeerToPeer, "exchange", exchange_and_flip)
    group.send(group.record(SWAP))
    group.tick_until(lambda: group.ranks[0].loader.epoch == 1)
    back = swap(1, (3, 0, 0), (0, 1, 0))
    with caplog.at_level("WARNING", "flash_eplb.loader"):
        group.send(group.record(back, plan=2, sequence=2))
        group.tick_until(lambda: group.ranks[0].segment.status[Field.ABORTED] == 1)
    assert "on arrival" in caplog.text
    assert [rank.segment.status[Field.DAMAGED] for rank in group.ranks] == [0, 1, 0]
    group.check_consistent()
    group.send(group.record(back, plan=3, sequence=3))
    group.tick_until(lambda: group.ranks[0].loader.epoch == 2)
    group.check_consistent()
    for rank in group.ranks:
        _, aborted, committed = rank.segment.rounds.read()
        assert [aborted[n] for n in ("plan", "committed", "rows", "received_bytes")] == [2, 0, 0, 0]
        assert (aborted["staged_ns"] == 0) == (rank is group.ranks[1])
        assert 0 < aborted["begin_ns"] < aborted["commit_ns"] == aborted["end_ns"]
        assert [committed[n] for n in ("plan", "committed")] == [3, 1]
        assert aborted["end_ns"] < committed["start_ns"] < committed["staged_ns"]


def hanging(monkeypatch, rank, errands=1):
    """Let the first errands of `rank` wait for the event that is returned."""
    release = threading.Event()
    stage, left = stager_module.Stager._stage, [errands]

    def hang(self, errand):
        if self._rank == rank and errand.identity and left[0]:
            left[0] -= 1
            release.wait(20)
        return stage(self, errand)

    monkeypatch.setattr(stager_module.Stager, "_stage", hang)
    return release


def test_a_stager_that_hangs_is_aborted_and_later_plans_commit_without_its_rows(
    cluster, monkeypatch, caplog
):
    group = cluster(timeout_steps=60)
    release = hanging(monkeypatch, rank=1)
    group.send(group.record(SWAP))
    group.tick_until(lambda: group.ranks[0].segment.status[Field.ABORTED] == 1)
    assert [rank.segment.status[Field.ABORTED] for rank in group.ranks] == [1, 1, 1]
    status = group.ranks[1].segment.status
    assert status[Field.QUARANTINED_ROWS] == 1
    assert "EP rank 1 failed; its transfer still runs here, 1 staging rows are left" in caplog.text
    hung = group.ranks[1].stagers._hung[0]
    group.send(group.record(SWAP, plan=2, sequence=2))
    group.tick_until(lambda: group.ranks[0].loader.epoch == 1)
    assert hung.stager.busy
    assert not set(hung.rows) & set(group.ranks[1].stagers.rows)
    group.check_consistent()
    release.set()
    group.tick_until(lambda: status[Field.QUARANTINED_ROWS] == 0)
    group.check_consistent()
    group.send(group.record(swap(1, (3, 0, 0), (0, 1, 0)), plan=3, sequence=3))
    group.tick_until(lambda: group.ranks[0].loader.epoch == 2)
    group.check_consistent()


def test_a_round_waits_for_the_rows_that_hang(cluster, monkeypatch):
    group = cluster(timeout_steps=60, rows=1)
    release = hanging(monkeypatch, rank=1)
    group.send(group.record(SWAP))
    group.tick_until(lambda: group.ranks[0].segment.status[Field.ABORTED] == 1)
    group.send(group.record(SWAP, plan=2, sequence=2))
    group.tick(50)
    assert group.ranks[1].segment.status[Field.QUARANTINED_ROWS] == 1
    assert [rank.loader.epoch for rank in group.ranks] == [0, 0, 0]
    release.set()
    group.tick_until(lambda: group.ranks[0].loader.epoch == 1)
    group.check_consistent()


def test_stagers_that_hang_one_after_the_other_are_replaced_up_to_a_number(cluster, monkeypatch):
    group = cluster(timeout_steps=30, rows=MOST_HUNG + 2)
    release = hanging(monkeypatch, rank=1, errands=99)  # it only sends, so it fills no row
    for number in range(1, MOST_HUNG + 3):
        moves = np.array([(1, 3, 1, 0, 0, 1)], MOVE)  # expert 3 from rank 1 to rank 0
        group.send(group.record(moves, plan=number, sequence=number))
        group.tick(50)
    assert len(group.ranks[1].stagers._hung) == MOST_HUNG
    assert group.ranks[1].stagers.busy
    assert group.ranks[0].loader.epoch == 0
    release.set()
    group.tick_until(lambda: not any(rank.stagers.busy for rank in group.ranks))
    monkeypatch.undo()
    group.send(group.record(SWAP, plan=99, sequence=99))
    group.tick_until(lambda: group.ranks[0].loader.epoch == 1)
    group.check_consistent()


def test_a_mismatch_on_one_rank_stops_all_before_any_commit(cluster, caplog):
    group = cluster()
    group.tick(3)
    group.ranks[1].loader.mismatch = True
    group.send(group.record(SWAP))
    with caplog.at_level("ERROR", "flash_eplb.loader"):
        group.tick_until(lambda: bool(group.ranks[0].loader.stopped))
    assert all("EP rank 1 has run a forward pass" in r.loader.stopped for r in group.ranks)
    assert all(r.segment.status[Field.STATE] == State.STOPPED for r in group.ranks)
    group.tick(50)
    assert all(rank.loader.epoch == 0 for rank in group.ranks)
    group.check_consistent()


def test_an_error_of_ours_on_one_rank_stops_all(cluster, monkeypatch, caplog):
    group = cluster()

    def fail(*_):
        raise KeyError("bug")

    monkeypatch.setattr(group.ranks[0].loader._inbox, "collect", fail)
    group.send(group.record(SWAP))
    group.tick_until(lambda: bool(group.ranks[2].loader.stopped))
    assert all("EP rank 0 has stopped" in rank.loader.stopped for rank in group.ranks)
    assert all(rank.loader.epoch == 0 for rank in group.ranks)


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
