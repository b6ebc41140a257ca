import functools
import gc
import os
import sys
import threading
import time
import weakref
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "loaders"))
from cluster import FakeEngine

from flash_eplb.eplb.config import Config
from flash_eplb.eplb.group import Group, UnsupportedError
from flash_eplb.eplb.reference import reference_digests
from flash_eplb.eplb.worker import Worker
from flash_eplb.ipc.flags import FLAG_DECODE, FLAG_PREFILL
from flash_eplb.ipc.names import rank_name
from flash_eplb.ipc.rank_segment import RankSegment
from flash_eplb.ipc.segment import take_name
from flash_eplb.ipc.session import segment_names
from flash_eplb.ipc.status import Field

SIZES = (2, 4, 2, 3)  # layers, experts, ranks, slots


class ThreadGroup(Group):
    """A group whose ranks are threads: `gather` meets at a barrier."""

    meeting: threading.Barrier
    table: list

    def gather(self, item):
        self.table[self.rank] = item
        self.meeting.wait(20)
        items = list(self.table)
        self.meeting.wait(20)
        return items


class Workers:
    """Two workers in threads; `run` calls an action on each and returns the results.

    `unsupported(rank)` is asked after updates, `scales(rank)` at the start, too.
    """

    def __init__(
        self, session: str, configs=None, unsupported=lambda rank: "", scales=lambda rank: {}
    ):
        store = dist.HashStore()
        meeting, table = threading.Barrier(2), [None, None]
        self.engines = [FakeEngine(*SIZES, rank) for rank in range(2)]
        self.workers: list[Worker] = [None, None]  # type: ignore[list-item]
        configs = configs or [{}, {}]

        def make(rank):
            votes = dist.ProcessGroupGloo(
                dist.PrefixStore("votes", store), rank, 2, timedelta(seconds=20)
            )
            group = ThreadGroup(rank, 2, votes, store, (0,))
            group.meeting, group.table = meeting, table
            config = Config(session=session, **{"vote_steps": 2, **configs[rank]})
            ask = [functools.partial(question, rank) for question in (unsupported, scales)]
            self.workers[rank] = Worker(config, group, self.engines[rank], [("m", 2)], 4, *ask)

        self.run(make)

    def run(self, action):
        results = [None, None]

        def one(rank):
            try:
                results[rank] = action(rank)
            except BaseException as error:
                results[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    def step(self, times: int = 1) -> None:
        def one(rank):
            for _ in range(times):
                self.workers[rank].forward(3)
                self.engines[rank].loads[0] += 1
                self.workers[rank].step(is_dummy=False)

        self.run(one)

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


@pytest.fixture
def workers(session):
    made = []

    def make(**options):
        made.append(Workers(session, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_each_step_writes_one_record_with_its_heat(workers, session):
    group = workers()
    group.step(5)
    reader = RankSegment.open(rank_name(session, 1))
    records = reader.heat.read()
    assert records.steps.tolist() == [1, 2, 3, 4, 5]
    assert records.tokens.tolist() == [3] * 5
    assert not records.heat[0].any()  # what profiling had counted before the first step
    assert (records.heat[1:] == 1).all()
    assert reader.status[Field.STEP] == 5
    assert len(reader.timings.read()) == 5
    assert (group.engines[0].loads[0] == 0).all()


@pytest.mark.parametrize(("episode", "ring", "bells"), [(16, 256, 2), (16, 8, 8), (4096, 8, 8)])
def test_the_planner_is_woken_before_the_ring_is_overrun(workers, episode, ring, bells):
    group = workers(configs=[{"episode_steps": episode, "ring_steps": ring}] * 2)
    group.step(32)
    assert group.workers[0]._bell.drain() == bells


def test_a_dummy_step_counts_as_a_step_and_its_heat_does_not(workers, session):
    group = workers()
    group.step()
    group.run(lambda rank: group.workers[rank].step(is_dummy=True))
    records = RankSegment.open(rank_name(session, 0)).heat.read()
    assert records.flags.tolist() == [0, 1]
    assert not records.heat[1].any()
    assert not group.workers[0]._loader.mismatch


def test_replicas_that_differ_are_refused_on_all_ranks_and_nothing_is_left(
    workers, session, caplog
):
    group = workers()
    group.engines[1].weights[1][0][1, 3] += 1  # rank 1's replica of expert 0
    group.step(3)
    for worker in group.workers:
        assert "layer 1 expert 0" in worker.refused
        assert "rank 1 slot 1" in worker.refused
    assert segment_names(session) == []
    assert (group.engines[0].loads[0] == 0).all()


def test_settings_that_differ_are_refused_by_name(workers):
    group = workers(configs=[{}, {"staging_rows": 3}])
    group.step()
    for worker in group.workers:
        assert "EP rank 1 and EP rank 0 differ" in worker.refused
    group = workers(configs=[{}, {"episode_steps": 5}])
    group.step()
    assert "EPLB_EPISODE_STEPS=5 and 16" in group.workers[0].refused


def test_a_transport_that_cannot_serve_here_is_a_reason_and_no_failure(workers, session, caplog):
    group = workers(configs=[{"transport": "nccl"}] * 2)
    group.step()
    for worker in group.workers:
        assert worker.refused.startswith("EP rank 0: EPLB_TRANSPORT=nccl: it moves what lies on")
    assert "Traceback" not in caplog.text
    assert segment_names(session) == []


def test_an_engine_that_lives_in_the_session_is_named_by_pid(workers, session):
    living = take_name(session, rank_name(session, 1), b"", 0, 1)
    group = workers()
    group.step()
    for worker in group.workers:
        assert "EP rank 1: session" in worker.refused
        assert f"the living process {living.pid}" in worker.refused
        assert "EPLB_SESSION" in worker.refused
    living.close()
    assert segment_names(session) == []


def test_too_little_shared_memory_is_refused_for_the_whole_group(workers, session, monkeypatch):
    monkeypatch.setattr("flash_eplb.ipc.limits.free_bytes", lambda: 100_000)
    group = workers()
    group.step()
    for worker in group.workers:
        assert "EP rank 0: 2 ranks need " in worker.refused
        assert "/dev/shm has 98 KiB free; enlarge it (docker run" in worker.refused
    assert segment_names(session) == []


def test_what_dead_ranks_left_does_not_count_as_taken(workers, session, monkeypatch):
    left = f"/dev/shm{rank_name(session, 5)}"
    os.close(os.open(left, os.O_CREAT, 0o600))
    monkeypatch.setattr(
        "flash_eplb.ipc.limits.free_bytes", lambda: 0 if os.path.exists(left) else 10**9
    )
    group = workers()
    group.step()
    assert not group.workers[0].refused


def test_a_rank_that_is_late_is_not_taken_for_dead_though_its_name_is_gone(
    workers, session, monkeypatch
):
    monkeypatch.setattr("flash_eplb.loaders.vote._LOOK_SECONDS", 0.02)
    group = workers()
    group.step(3)
    for name in segment_names(session):
        os.unlink(f"/dev/shm{name}")
    tick = group.workers[1]._loader.tick
    group.workers[1]._loader.tick = lambda: time.sleep(0.2) or tick()
    group.step(4)
    assert [worker._loader.stopped for worker in group.workers] == ["", ""]
    group.workers[1].close()
    assert group.workers[0]._why_silent(1) == "is dead"


def test_a_worker_that_is_closed_holds_no_segment_open(workers):
    group = workers()
    group.step()
    peers = [peer for worker in group.workers for peer in worker._peers]
    assert len(peers) == 4
    group.close()
    assert all(peer.segment._probe_fd is None for peer in peers)
    assert all(peer.segment._lock_fd is None for peer in peers)


def test_a_worker_that_is_closed_keeps_no_weights_and_leaves_the_session_to_another(
    workers, session
):
    group = workers()
    group.step()
    group.close()
    kept = [weakref.ref(engine) for engine in group.engines]
    group.engines.clear()
    group.workers.clear()
    deadline = time.monotonic() + 10
    while any(engine() for engine in kept):  # the stagers' threads end by themselves
        assert time.monotonic() < deadline
        time.sleep(0.05)
        gc.collect()
    another = workers()
    another.step()
    assert [worker.refused for worker in another.workers] == ["", ""]


def test_the_phase_of_a_step_is_recorded(workers, session):
    group = workers()
    for phase in (FLAG_PREFILL, FLAG_DECODE):
        group.run(lambda rank: group.workers[rank].forward(3))
        group.run(lambda rank, phase=phase: group.workers[rank].step(False, phase))
    records = RankSegment.open(rank_name(session, 0)).heat.read()
    assert records.flags.tolist() == [FLAG_PREFILL, FLAG_DECODE]


def test_hosts_that_differ_are_refused_by_name(workers, monkeypatch):
    boots = iter(["one", "two"])
    monkeypatch.setattr("flash_eplb.eplb.settings._boot_id", lambda: next(boots))
    group = workers()
    group.step()
    assert "several hosts is not supported" in group.workers[0].refused


def test_a_host_that_does_not_tell_its_boot_is_told_by_its_shared_memory(workers, monkeypatch):
    monkeypatch.setattr("flash_eplb.eplb.settings._BOOT_ID", "/proc/none/boot_id")
    group = workers()
    group.step()
    assert not group.workers[0].refused


def test_a_skipped_step_stops_balancing_on_all_ranks_and_names_the_rank(workers):
    group = workers()
    group.step(2)

    def skip(rank):
        for number in range(8):
            group.workers[rank].forward(3)
            if not (rank == 1 and number == 3):
                group.workers[rank].step(is_dummy=False)

    group.run(skip)
    for worker in group.workers:
        assert "EP rank 1 has run a forward pass without the step" in worker._loader.stopped
    # the skipped step was made up for, so both still count the same steps
    assert group.workers[0]._step == group.workers[1]._step == 10


def test_weights_that_the_engine_has_put_elsewhere_stop_balancing(workers):
    group = workers(configs=[{"patrol_steps": 1}] * 2)
    group.engines[1].replaced = lambda layer: "w13_weight"
    for _ in range(200):
        group.step()
        time.sleep(0.001)
        if group.workers[0].has_stopped:
            break
    assert all(worker.has_stopped for worker in group.workers)


def test_a_step_of_no_forward_pass_is_not_counted_and_stops_balancing(workers):
    group = workers()
    group.step(2)
    group.workers[0].step(is_dummy=False)
    group.step(6)
    assert group.workers[0]._step == group.workers[1]._step == 8
    assert all("EP rank 0" in worker._loader.stopped for worker in group.workers)


def test_reference_digests_need_replicas_that_agree():
    placement = np.array([[[0, 1], [1, 2]]])
    found = np.array([[[7, 8], [8, 9]]])
    assert reference_digests(found, placement, 3).tolist() == [[7, 8, 9]]
    found[0, 1, 0] = 5
    with pytest.raises(UnsupportedError, match="layer 0 expert 1: the replica on rank 1 slot 0"):
        reference_digests(found, placement, 3)
