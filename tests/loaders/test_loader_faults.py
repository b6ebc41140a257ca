"""Weights that are not what they should be, transfers that hang, and errors of our own."""

import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from cluster import SWAP, swap

from flash_eplb.ipc.placement import MOVE
from flash_eplb.ipc.status import Field, State
from flash_eplb.loaders import stager as stager_module
from flash_eplb.loaders import transport as transport_module
from flash_eplb.loaders import vote as vote_module
from flash_eplb.loaders.stager_pool import MOST_HUNG
from flash_eplb.loaders.transport import PeerToPeer


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


def test_experts_of_the_layer_that_somebody_else_has_written_stop_balancing_too(cluster, caplog):
    """As when the same checkpoint is read again, by the placement of the start."""
    group = cluster()
    group.send(group.record(SWAP))
    group.tick_until(lambda: group.ranks[0].loader.epoch == 1)
    weights = group.ranks[0].engine.weights[1]
    for tensor in weights:
        tensor[0] = tensor[1].clone()
    with caplog.at_level("WARNING", "flash_eplb.loader"):
        group.send(group.record(swap(1, (3, 0, 0), (0, 1, 0)), plan=2, sequence=2))
        group.tick_until(lambda: bool(group.ranks[1].loader.stopped))
    assert "EP rank 0 holds an expert whose weights are not those" in group.ranks[1].loader.stopped
    assert "at its source" in caplog.text


def test_a_vote_that_some_have_given_up_is_not_acted_on_by_the_rank_that_was_late(
    cluster, monkeypatch
):
    """All have staged the round, and the vote that says so would commit it (or just has)."""
    monkeypatch.setattr(vote_module, "_LOOK_SECONDS", 0.02)
    group = cluster(vote_steps=1)
    group.send(group.record(SWAP))
    group.tick_until(lambda: all(rank.loader._is_staged() for rank in group.ranks))
    for rank in group.ranks:
        rank.loader._vote._patience = 0.2
    *others, late = (threading.Thread(target=rank.tick_on, args=(3,)) for rank in group.ranks)
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    late.start()
    late.join()
    for rank in group.ranks:
        assert "vote " in rank.loader.stopped
        assert "closed" in rank.loader.stopped
        assert rank.segment.status[Field.STATE] == State.STOPPED
    assert len({rank.loader.epoch for rank in group.ranks}) == 1
    group.check_consistent()


def test_whatever_a_stager_fails_by_the_vote_hears_of_it_and_its_thread_goes_on(
    cluster, monkeypatch, caplog
):
    """A panic in a library written in Rust is no `Exception`."""

    class PanicException(BaseException):
        pass

    def panic(self, *_):
        monkeypatch.undo()
        raise PanicException("called unwrap on a None value")

    group = cluster()
    monkeypatch.setattr(stager_module.Stager, "_source", panic)
    group.send(group.record(SWAP))
    group.tick_until(lambda: group.ranks[0].segment.status[Field.ABORTED] == 1)
    assert "staging failed: PanicException: called unwrap on a None value" in caplog.text
    group.tick_until(lambda: not any(rank.stagers.quarantined for rank in group.ranks))
    group.send(group.record(SWAP, plan=2, sequence=2))
    group.tick_until(lambda: group.ranks[0].loader.epoch == 1)
    group.check_consistent()


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
    group.tick()  # a round that is committed is logged a step later
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


def test_the_rank_that_failed_first_is_named_on_all_ranks(cluster, monkeypatch, caplog):
    """The others fail after it, because it has closed its connections."""
    group, exchange, failures = cluster(), PeerToPeer.exchange, [1]

    def fail(self, *arguments):
        if self._rank == 0 and failures:
            failures.pop()
            raise OSError("no buffer space")
        return exchange(self, *arguments)

    monkeypatch.setattr(PeerToPeer, "exchange", fail)
    group.send(group.record(SWAP))
    group.tick_until(lambda: group.ranks[0].segment.status[Field.STATE] == State.STAGING)
    deadline = time.monotonic() + 10
    while any(rank.stagers.busy for rank in group.ranks) and time.monotonic() < deadline:
        time.sleep(0.001)
    group.tick_until(lambda: caplog.text.count("aborted after") == 3)
    assert caplog.text.count("EP rank 1: staging failed") == 1
    assert caplog.text.count("steps: EP rank 0 failed") == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_the_rank_that_hangs_is_named_and_not_one_that_waits_for_it(
    cluster, monkeypatch, caplog, rank
):
    group = cluster(timeout_steps=60)
    release = hanging(monkeypatch, rank)
    group.send(group.record(SWAP))
    group.tick_until(lambda: caplog.text.count("aborted after") == 3)
    release.set()
    assert caplog.text.count(f"steps: EP rank {rank} failed") == 3


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
    number = 99
    while not group.ranks[0].loader.epoch:  # 30 steps may be few for fresh connections
        assert number < 120
        group.send(group.record(SWAP, plan=number, sequence=number))
        group.tick(50)
        number += 1
    group.tick_until(lambda: [rank.loader.epoch for rank in group.ranks] == [1, 1, 1])
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


def test_a_stager_that_cannot_be_replaced_stops_balancing_and_not_the_step(
    cluster, monkeypatch, caplog
):
    group = cluster(timeout_steps=40)
    release = hanging(monkeypatch, rank=1)

    def no_thread():
        raise RuntimeError("can't start new thread")

    group.ranks[1].stagers._make = no_thread
    group.send(group.record(SWAP))
    group.tick_until(lambda: all(rank.loader.stopped for rank in group.ranks))
    assert all("EP rank 1 has stopped" in rank.loader.stopped for rank in group.ranks)
    assert "can't start new thread" in caplog.text
    release.set()
    group.check_consistent()


def test_after_first_connections_that_failed_the_next_round_fails_at_once(cluster, monkeypatch):
    make, failures = transport_module._GROUPS["gloo"], [1]

    def flaky(store, rank, ranks, timeout):
        made = make(store, rank, ranks, timeout)
        if rank == 1 and failures:
            failures.pop()
            raise RuntimeError("no route to host")
        return made

    monkeypatch.setitem(transport_module._GROUPS, "gloo", flaky)
    group = cluster(transfer_timeout=5.0)
    group.send(group.record(SWAP))
    begun = time.monotonic()
    group.tick_until(lambda: group.ranks[0].segment.status[Field.ABORTED] == 1)
    assert "the next round opens others" in group.ranks[1].stagers.result.error
    assert time.monotonic() - begun < 4
    group.send(group.record(SWAP, plan=2, sequence=2))
    group.tick_until(lambda: group.ranks[0].loader.epoch == 1)
    group.check_consistent()


def test_a_loader_that_has_stopped_says_so_whatever_is_asked_of_it(cluster):
    group = cluster()
    group.ranks[1].loader.mismatch = True
    group.tick_until(lambda: all(rank.loader.stopped for rank in group.ranks))
    loader, status = group.ranks[0].loader, group.ranks[0].segment.status
    epoch = loader.epoch
    loader.hold()
    assert status[Field.STATE] == State.STOPPED
    loader.release()
    assert status[Field.STATE] == State.STOPPED
    assert loader.epoch == epoch


def test_rounds_that_an_update_drops_are_mentioned_once(cluster, caplog):
    group = cluster()
    for rank in group.ranks:
        rank.loader.hold()
    for number in (1, 2):
        group.send(group.record(SWAP, plan=number, sequence=number))
        group.tick(20)
    said = caplog.text.count("EP rank 1 drops the planner's rounds until the engine has")
    assert said == 1
    assert group.ranks[0].segment.status[Field.DROPPED_ROUND] == 2
