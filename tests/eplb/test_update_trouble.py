"""Updates of the weights that fail, hang or reach some ranks only, and what they may leave."""

import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from moving import error_of

from flash_eplb.eplb import weight_update
from flash_eplb.ipc.status import Field
from flash_eplb.loaders import stager as stager_module


def test_experts_that_cannot_change_slots_on_one_rank_stay_on_all(moving, monkeypatch, caplog):
    group = moving()
    for experts in ([1, 2, 3], [0, 2, 3], [0, 1, 2]):
        wanted = group.placement.copy()
        wanted[:, 0] = experts
        group.send(wanted)
        group.step_until(lambda want=experts: (np.sort(group.placement[:, 0]) == want).all())
    before = group.placement.copy()

    def tables(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(group.engines[0], "tables", tables)
    errors = group.run(lambda rank: error_of(group.workers[rank].begin_update))
    for error in errors:
        assert error.startswith("experts cannot go back to where vLLM writes weights: EP rank 0: ")
        assert error.endswith("MemoryError: no room")
    assert "EP rank 0 has failed, so all ranks give up what they were at" in caplog.text
    assert "cannot be balanced" not in caplog.text  # they are, after this update
    assert not any(worker.is_updating for worker in group.workers)
    assert np.array_equal(group.placement, before)
    group.check(is_new=False)
    monkeypatch.undo()
    group.step(20)
    group.move()
    group.check(is_new=False)
    group.update()
    group.check(is_new=True)


def test_a_stager_that_hangs_does_not_hang_the_update(moving, monkeypatch):
    group = moving(staging_rows=2, transfer_timeout=2)
    hangs, release, stage = threading.Event(), threading.Event(), stager_module.Stager._stage

    def hang(self, errand):
        if self._rank == 1 and errand.identity:
            hangs.set()
            release.wait(60)
        return stage(self, errand)

    group.move()
    monkeypatch.setattr(stager_module.Stager, "_stage", hang)
    wanted = group.placement.copy()
    wanted[0] = wanted[0, ::-1]
    group.send(wanted)
    group.step_until(hangs.is_set)
    monkeypatch.setattr(stager_module.Stager, "_stage", stage)
    group.update()
    assert np.array_equal(group.placement, group.initial)
    assert group.segments[1].status[Field.QUARANTINED_ROWS] == 1  # it still hangs
    release.set()
    group.step_until(lambda: group.segments[1].status[Field.QUARANTINED_ROWS] == 0)
    group.move()
    group.check(is_new=True)


def test_a_rank_that_is_not_updated_refuses_it_to_the_others(moving, monkeypatch):
    monkeypatch.setattr(weight_update, "PATIENCE", 0.2)
    group = moving()
    group.move()
    before = group.placement.copy()
    with pytest.raises(RuntimeError, match=r"EP rank 0 .* EP ranks \[1\] .*pause generation"):
        group.workers[0].begin_update()
    group.step(10)
    assert np.array_equal(group.placement, before)
    group.update()
    group.check(is_new=True)


def test_a_rank_whose_write_took_long_is_waited_for_as_long_again(moving, monkeypatch):
    group = moving()
    group.move()
    group.run(lambda rank: group.workers[rank].begin_update())
    monkeypatch.setattr(weight_update, "PATIENCE", 0.1)

    def end(rank):
        group.write(rank)
        time.sleep(0.5 * rank)
        group.workers[rank].end_update(60.0)

    group.run(end)
    assert not any(worker.is_updating for worker in group.workers)
    group.move()
    group.check(is_new=True)


def test_a_rank_whose_write_has_failed_is_not_waited_for(moving):
    """Nor is it at the next failure; and what has failed before keeps no later update from its
    end."""
    group = moving()
    group.move()
    for _ in range(2):
        group.run(lambda rank: group.workers[rank].begin_update())
        assert group.workers[1].give_up_update("reload_weights has failed")
        group.write(0)
        begun = time.monotonic()
        words = (
            "EP rank 0 waits no longer: reload_weights has failed on EP rank 1; no expert moves "
            "until weights have been updated on all of them"
        )
        with pytest.raises(RuntimeError, match=words):
            group.workers[0].end_update()
        assert time.monotonic() - begun < weight_update.PATIENCE / 3
        group.step(4)
    group.update()
    assert not any(worker.give_up_update("finish_weight_update") for worker in group.workers)
    group.move()
    group.check(is_new=True)
    group.update()
    group.check(is_new=True)


def test_a_rank_that_comes_late_to_the_end_does_not_wait_for_one_that_has_gone(moving, monkeypatch):
    group = moving()
    group.run(lambda rank: group.workers[rank].begin_update())
    monkeypatch.setattr(weight_update, "PATIENCE", 0.2)
    with pytest.raises(
        RuntimeError, match=r"EP rank 0 has waited 0.2 s for EP ranks \[1\] in vain"
    ):
        group.workers[0].end_update()
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=r"EP rank 1 waits no longer: EP rank 0 has waited 0.2"):
        group.workers[1].end_update(60.0)
    assert time.monotonic() - begun < 20
    monkeypatch.undo()
    group.update()
    group.move()
    group.check(is_new=True)


def test_weights_that_were_changed_unseen_are_not_moved_back(moving):
    group = moving()
    group.move()
    group.engines[0].weights[1][0][2, 3] += 1  # expert 3, which belongs on rank 1
    errors = group.run(lambda rank: error_of(group.workers[rank].begin_update))
    for error in errors:
        assert "flash_eplb has moved experts and has stopped since" in error
        assert "weights are not those of the start" in error
        assert "restart the engine" in error
    assert "restart the engine" in error_of(group.workers[0].begin_update)


def test_replicas_that_differ_after_an_update_stop_balancing(moving, caplog):
    group = moving()

    def one(rank):
        group.workers[rank].begin_update()
        group.write(rank)
        group.engines[rank].weights[1][0][1, 3] += rank  # rank 1's replica of expert 0
        group.workers[rank].end_update()

    group.run(one)
    for rank in range(2):
        stopped = group.workers[rank]._loader.stopped
        assert stopped.startswith("after an update of the weights, layer 1 expert 0")
    group.step(4)
    # experts are where the engine writes, so it may write again
    group.update()


def test_rows_that_differ_since_an_update_and_would_stay_behind_stop_balancing(moving):
    group = moving()
    group.update()
    group.move()
    group.scales[1][2] = 3
    group.update()
    for worker in group.workers:
        assert worker._loader.stopped == "after an update of the weights, EP rank 1: scales"
    group.check(is_new=True)
    group.update()  # experts are where the engine writes, so it may write again
    assert np.array_equal(group.placement, group.initial)


def test_weights_that_an_update_puts_into_other_memory_stop_balancing_though_no_digest_is_taken(
    moving,
):
    """Experts would move in memory that nobody reads, and the tables would follow them."""
    group = moving(verify=False)
    group.move()
    group.engines[1].replaced = lambda layer: "w2_weight" * layer
    group.update()
    for worker in group.workers:
        assert worker._loader.stopped == (
            "after an update of the weights, EP rank 1: layer 1: w2_weight is in other memory than "
            "at the start, so what we move is no longer what the engine computes with"
        )
    assert np.array_equal(group.placement, group.initial)


def test_a_rank_that_cannot_look_after_an_update_stops_balancing_on_all(moving):
    group = moving()
    group.workers[1]._unsupported = lambda: 1 // 0
    group.update()
    for worker in group.workers:
        assert "EP rank 1: ZeroDivisionError" in worker._loader.stopped


def test_an_update_that_failed_half_way_is_begun_again(moving):
    group = moving()
    group.move()
    group.run(lambda rank: group.workers[rank].begin_update())
    group.step(6)
    group.update()
    group.check(is_new=True)
    group.move()
    group.check(is_new=True)
