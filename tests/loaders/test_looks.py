"""Looks at live experts: what they find, those that hang or fail, and rounds beside them."""

import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from cluster import SWAP, swap

from flash_eplb.ipc.status import Field
from flash_eplb.loaders import stager as stager_module
from flash_eplb.loaders.stager_pool import MOST_HUNG


@pytest.mark.parametrize("patrol", [0, 1])
def test_weights_that_lie_elsewhere_now_stop_balancing(cluster, caplog, patrol):
    """No digest tells: what was handed out at the start is as it was, but nobody uses it."""
    group = cluster(patrol_steps=patrol)
    group.ranks[2].engine.replaced = lambda layer: "w2_weight" if layer == 1 else ""
    with caplog.at_level("WARNING", "flash_eplb.loader"):
        if not patrol:
            group.send(group.record(SWAP))
        group.tick_until(lambda: bool(group.ranks[0].loader.stopped))
    assert all("EP rank 2 holds an expert whose" in rank.loader.stopped for rank in group.ranks)
    assert "layer 1: w2_weight is in other memory than at the start" in caplog.text
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


def hang_a_look(group, monkeypatch):
    """Let one look of rank 1 wait for the event that is returned."""
    release, look = threading.Event(), stager_module.Stager._look

    def hang(self, beat):
        if self._rank == 1:
            release.wait(60)
        return look(self, beat)

    monkeypatch.setattr(stager_module.Stager, "_look", hang)
    group.tick_until(lambda: group.ranks[1].stagers.busy)
    monkeypatch.setattr(stager_module.Stager, "_look", look)
    return release


def test_a_look_that_hangs_holds_up_no_plan_for_ever(cluster, monkeypatch, caplog):
    group = cluster(timeout_steps=60, patrol_steps=1)
    release = hang_a_look(group, monkeypatch)
    for number in range(1, 4):  # the connections that the look holds may cost one of them
        group.send(group.record(SWAP, plan=number, sequence=number))
        group.tick(200)
        if group.ranks[0].loader.epoch:
            break
        group.tick_until(lambda: not group.ranks[0].stagers.busy)
    assert [rank.loader.epoch for rank in group.ranks] == [1, 1, 1]
    assert "EP rank 1: its stager has been busy for 60 steps without a round" in caplog.text
    group.check_consistent()
    release.set()


def test_nobody_waits_for_the_connections_that_a_look_holds_which_hangs(cluster, monkeypatch):
    """The peers' only row comes back with the first round, not after the transfer's timeout."""
    group = cluster(timeout_steps=60, patrol_steps=1, rows=1, transfer_timeout=30.0)
    release = hang_a_look(group, monkeypatch)
    group.tick_until(lambda: bool(group.ranks[1].stagers._hung))
    begun = time.monotonic()
    group.send(group.record(SWAP))
    group.tick_until(lambda: group.ranks[0].segment.status[Field.ABORTED] == 1)
    group.tick_until(lambda: group.ranks[0].segment.status[Field.QUARANTINED_ROWS] == 0, most=20000)
    group.send(group.record(SWAP, plan=2, sequence=2))
    group.tick_until(lambda: group.ranks[0].loader.epoch == 1)
    assert time.monotonic() - begun < 15
    group.check_consistent()
    release.set()


def test_looks_that_hang_one_after_the_other_are_said_to_hold_up_everything_once(
    cluster, monkeypatch, caplog
):
    group = cluster(timeout_steps=20, patrol_steps=1)
    release = threading.Event()
    monkeypatch.setattr(stager_module.Stager, "_look", lambda self, beat: release.wait(20))
    group.tick_until(lambda: "so many hang that no other is started" in caplog.text)
    group.tick(200)
    assert caplog.text.count("EP rank 1: its stager has been busy") == MOST_HUNG + 1
    release.set()
    group.tick_until(lambda: not any(rank.stagers.busy for rank in group.ranks))
    monkeypatch.undo()


def test_a_look_that_fails_cuts_no_connection(cluster, monkeypatch, caplog):
    group = cluster(patrol_steps=1)
    look, failures = stager_module.Stager._look, [1]

    def fail(self, beat):
        if self._rank == 1 and failures:
            failures.pop()
            raise MemoryError("out of memory")
        return look(self, beat)

    monkeypatch.setattr(stager_module.Stager, "_look", fail)
    group.tick_until(lambda: "a look at a live expert failed: MemoryError" in caplog.text)
    group.send(group.record(SWAP))
    group.tick_until(lambda: group.ranks[0].loader.epoch == 1)
    assert [rank.segment.status[Field.ABORTED] for rank in group.ranks] == [0, 0, 0]
