import asyncio
import logging
import os
import re
import resource
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_engine import FakeEngine
from planner_runs import OTHER, PACE, SKEWED, planning, run, until

from flash_eplb.ipc.limits import LimitError
from flash_eplb.ipc.liveness import SegmentInUseError, owner_is_alive
from flash_eplb.ipc.names import bell_name, lock_name, planner_name, rank_name
from flash_eplb.ipc.session import segment_names, session_lock
from flash_eplb.ipc.status import Field, State
from flash_eplb.planners import engine_loop
from flash_eplb.planners.flashlb import FlashLB
from flash_eplb.planners.group import Group
from flash_eplb.planners.planner import Planner


def test_a_planner_that_comes_late_finds_the_bell_full_and_serves(session, engine, caplog):
    for _ in range(300):
        engine.step(SKEWED)
    attach = Group.attach

    def attach_beside_a_busy_engine(session):
        group = attach(session)
        engine.step(SKEWED)  # over the oldest record that the planner would read
        return group

    async def scenario():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Group, "attach", attach_beside_a_busy_engine)
            async with planning(session):
                await until(engine, lambda: engine.epoch >= 1)

    with caplog.at_level(logging.WARNING, "flash_eplb.planner"):
        run(scenario())
    assert "overwritten before they were read" not in caplog.text


@pytest.mark.parametrize(
    ("put", "why"),
    [
        (lambda path: None, "No such file or directory"),
        (lambda path: open(path, "w").close(), "it is no FIFO"),
        (os.mkdir, "it is no FIFO"),
        (lambda path: os.symlink("/dev/null", path), "it is no FIFO"),
        (lambda path: os.mkfifo(path, 0o644), "its mode is 0644"),
    ],
)
def test_an_engine_whose_bell_is_lost_is_served_and_that_is_said_once(
    session, engine, caplog, put, why
):
    path = "/dev/shm" + bell_name(session)
    os.unlink(path)
    put(path)

    async def scenario():
        async with planning(session):
            await until(engine, lambda: engine.epoch >= 1)

    with caplog.at_level(logging.WARNING, "flash_eplb.planner"):
        run(scenario())
    if os.path.isdir(path):
        os.rmdir(path)
    elif os.path.lexists(path):
        os.unlink(path)
    (said,) = [text for text in caplog.messages if "doorbell" in text]
    assert said.startswith(f"doorbell {bell_name(session)} cannot be opened: {why}")
    assert said.endswith("; plans come up to a second later; restart the engine to have it back")


def test_a_rank_that_is_missing_is_named(session, engine, caplog, monkeypatch):
    monkeypatch.setattr("flash_eplb.planners.planner._LOOK_FOR_ENGINE", 0.001)
    os.unlink("/dev/shm" + rank_name(session, 1))

    async def scenario():
        async with planning(session):
            while not caplog.messages:
                await asyncio.sleep(0.01)

    with caplog.at_level(logging.WARNING, "flash_eplb.planner"):
        run(scenario())
    assert caplog.messages == [
        f"cannot serve the engine of session {session!r}: EP rank 1 has no shared memory "
        f"{rank_name(session, 1)}: it is still starting, or the name was removed; then restart "
        "the engine"
    ]


def test_a_refused_plan_is_given_up_and_a_later_one_sent(session, engine, caplog):
    async def scenario():
        async with planning(session):
            engine.refuse = True
            await until(engine, lambda: "given up" in caplog.text)
            engine.refuse = False
            await until(engine, lambda: engine.epoch >= 1)

    with caplog.at_level(logging.INFO, "flash_eplb.planner"):
        run(scenario())


def test_an_engine_that_refuses_every_plan_is_spoken_of_less_and_less_often(
    session, engine, caplog
):
    async def scenario():
        async with planning(session):
            engine.refuse = True
            await until(engine, lambda: "the last 8 plans" in caplog.text)
            engine.refuse = False
            await until(engine, lambda: engine.epoch >= 1)
            await until(engine, lambda: " committed" in caplog.text)

    with caplog.at_level(logging.INFO, "flash_eplb.planner"):
        run(scenario())
    given_up = [text for text in caplog.messages if "given up: a rank refused" in text]
    assert [text.split()[1] for text in given_up] == ["1", "2", "3", "4", "8"]
    sent = [text for text in caplog.messages if "moves in" in text]
    assert [text.split()[1] for text in sent][:5] == ["1:", "2:", "3:", "4:", "8:"]
    said = [text for text in caplog.messages if "the last" in text]
    assert said[0] == (
        "the last 4 plans were all given up, so the planner runs and balances nothing, or little; "
        "this is said again when there are 8"
    )
    assert len(said) == 2


def test_a_policy_that_fails_costs_only_its_plan(session, engine, caplog):
    class Failing(FlashLB):
        calls = 0

        def plan(self, heat, placement, **options):
            Failing.calls += 1
            if Failing.calls == 1:
                raise ZeroDivisionError("bug")
            return super().plan(heat, placement, **options)

    async def scenario():
        async with planning(session, Failing):
            await until(engine, lambda: engine.epoch >= 1)

    with caplog.at_level(logging.ERROR, "flash_eplb.planner"):
        run(scenario())
    assert "the policy failed" in caplog.text


@pytest.mark.parametrize("agree", [True, False])
def test_ranks_that_have_stopped_get_no_plan_and_one_error_says_so(session, engine, caplog, agree):
    engine.ranks[1].status[Field.STATE] = State.STOPPED
    if not agree:  # they have committed different numbers of rounds
        engine.ranks[1].board.write(1, engine.placement)

    async def scenario():
        async with planning(session):
            await until(engine, lambda: engine.steps >= 200)

    with caplog.at_level(logging.ERROR, "flash_eplb.planner"):
        run(scenario())
    assert caplog.text.count("EP ranks [1] have stopped balancing") == 1
    assert engine.epoch == 0


def test_ranks_that_hold_their_experts_get_no_plan_and_one_line_says_so(session, engine, caplog):
    """They would drop it: an update of the weights is under way, or one has failed."""
    for rank in engine.ranks:
        rank.status[Field.STATE] = State.HELD
    engine.refuse = True

    async def scenario():
        async with planning(session):
            await until(engine, lambda: engine.steps >= 200)
            engine.refuse = False
            for rank in engine.ranks:
                rank.status[Field.STATE] = State.IDLE
            await until(engine, lambda: engine.epoch >= 1)

    with caplog.at_level(logging.INFO, "flash_eplb.planner"):
        run(scenario())
    assert "given up" not in caplog.text
    assert caplog.text.count("EP ranks [0, 1] hold their experts while weights are written") == 1


def test_ranks_that_stop_before_they_have_begun_a_plan_are_not_waited_for(
    session, engine, caplog, monkeypatch
):
    monkeypatch.setattr(engine, "_serve", lambda: None)

    async def scenario():
        async with planning(session, pace=replace(PACE, timeout_steps=10**7)):
            await until(engine, engine.ranks[0].plans.has_record)
            for rank in engine.ranks:
                rank.status[Field.STATE] = State.STOPPED
            await until(engine, lambda: "EP ranks [0, 1] have stopped balancing" in caplog.text)

    with caplog.at_level(logging.WARNING, "flash_eplb.planner"):
        run(scenario(), timeout=20.0)
    assert caplog.messages[0] == "plan 1 given up: a rank has stopped balancing; its log says why"


def test_an_engine_that_cannot_be_served_is_complained_about_once(session, caplog, monkeypatch):
    monkeypatch.setattr("flash_eplb.planners.planner._LOOK_FOR_ENGINE", 0.001)
    engine = FakeEngine(session)
    engine.ranks[1].segment.bytes[8] += 1  # the layout of another version

    async def scenario():
        async with planning(session):
            while "cannot serve the engine" not in caplog.text:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)

    with caplog.at_level(logging.WARNING, "flash_eplb.planner"):
        run(scenario())
    assert caplog.text.count("cannot serve the engine of session") == 1
    assert "run the same flash_eplb in the workers and the planner" in caplog.text
    engine.close()


def test_too_few_files_for_the_ranks_end_it_with_the_numbers(session, engine):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def scenario():
        used = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 8, before[1]))
        try:
            await Planner(session, FlashLB, PACE).run()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)

    with pytest.raises(LimitError, match=r"the planner opens 10 files and may open \d \("):
        run(scenario())
    assert not owner_is_alive(planner_name(session))


def test_an_engine_that_dies_as_it_is_found_is_left_again(session, monkeypatch):
    engine = FakeEngine(session)
    attach = Group.attach

    def attach_to_the_dying(session):
        group = attach(session)
        engine.close()
        return group

    monkeypatch.setattr(Group, "attach", attach_to_the_dying)

    async def scenario():
        planner = Planner(session, FlashLB, PACE, exit_with_engine=True)
        await planner.run()

    run(scenario())
    assert segment_names(session) == []


def test_rounds_do_without_the_rows_that_hang_on_a_rank(session, engine, caplog):
    status = engine.ranks[1].status
    status[Field.QUARANTINED_ROWS] = engine.shape.staging_rows

    async def scenario():
        async with planning(session):
            await until(engine, lambda: engine.steps >= 200)
            assert engine.epoch == 0
            status[Field.QUARANTINED_ROWS] = engine.shape.staging_rows - 1
            await until(engine, lambda: engine.epoch >= 2)

    with caplog.at_level(logging.WARNING, "flash_eplb.planner"):
        run(scenario())
    assert engine.most_rows == 1
    assert caplog.text.count("staging rows are all left to transfers that hang") == 1


def test_it_says_what_to_look_at_when_no_engine_comes(session, engine, caplog, monkeypatch):
    monkeypatch.setattr("flash_eplb.planners.planner._LOOK_FOR_ENGINE", 0.001)

    async def scenario():
        async with planning(f"{session}-x"):
            while "VLLM_PLUGINS" not in caplog.text:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)

    with caplog.at_level(logging.WARNING, "flash_eplb.planner"):
        run(scenario())
    assert caplog.text.count("still no engine") == 1
    assert "it appears with its first request, has it had one? If so, does vLLM" in caplog.text
    assert re.search(rf"engines run in: .*{session!r}", caplog.text)


class Hanging:
    """A policy that does not return from its first plan."""

    def __init__(self, ranks, slots):
        pass

    def plan(self, heat, placement):
        while True:
            time.sleep(0.05)


def test_a_policy_that_hangs_is_named_and_does_not_hold_up_the_end(
    session, engine, caplog, monkeypatch
):
    monkeypatch.setattr(engine_loop, "LONG_PLAN", 0.2)
    words = "the policy has been planning for 0 s; no other plan is made until it returns"
    caplog.set_level(logging.WARNING)
    ended = []

    async def scenario():
        async with planning(session, Hanging):
            await until(engine, lambda: words in caplog.text)
            await until(engine, lambda: not engine.steps % 200)
            ended.append(time.monotonic())
        ended.append(time.monotonic())

    run(scenario())
    assert caplog.text.count(words) == 1
    assert ended[1] - ended[0] < 10


def test_a_plan_for_which_no_thread_can_be_started_costs_only_itself(session, engine, caplog):
    start, refused = threading.Thread.start, []

    def start_from_the_third_on(thread):
        if thread.name == "eplb-plan" and len(refused) < 2:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    async def scenario():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(threading.Thread, "start", start_from_the_third_on)
            async with planning(session):
                await until(engine, lambda: engine.epoch >= 1)

    with caplog.at_level(logging.WARNING, "flash_eplb.planner"):
        run(scenario())
    assert len(refused) == 2
    assert caplog.messages == [
        "nothing is planned until a thread can be started (can't start new thread): raise "
        "`ulimit -u`, or the limit of processes of the container"
    ]


def test_a_plan_that_outlasts_the_planner_is_no_error(session, engine, caplog):
    threads, let_go = [], threading.Event()

    class Late(FlashLB):
        def plan(self, heat, placement, **options):
            threads.append(threading.current_thread())
            let_go.wait(30)
            return placement

    async def scenario():
        async with planning(session, Late):
            await until(engine, lambda: threads)

    run(scenario())
    let_go.set()
    threads[0].join(30)
    assert not caplog.messages


def test_rows_that_vanish_before_a_plan_begins_are_no_fault_of_the_policy(
    session, engine, caplog, monkeypatch
):
    asked = iter([4, 0] * 3)
    monkeypatch.setattr(Group, "free_rows", lambda _: next(asked, 4))

    async def scenario():
        async with planning(session):
            await until(engine, lambda: engine.epoch >= 1)

    run(scenario())
    assert next(asked, None) is None
    assert "refused" not in caplog.text


def test_a_lock_that_is_stuck_when_the_engine_dies_does_not_end_the_planner(
    session, caplog, monkeypatch
):
    monkeypatch.setattr("flash_eplb.planners.planner._CLEANING_SECONDS", 0.1)
    first = FakeEngine(session)

    async def scenario():
        async with planning(session):
            await until(first, lambda: first.epoch >= 1)
            with session_lock(session):  # as a process of the session that is stopped
                for rank in first.ranks:  # as if killed: the locks are free, the names stay
                    os.close(rank.segment._lock_fd)
                    rank.segment._lock_fd = None
                while "stays until another starts" not in caplog.text:
                    await asyncio.sleep(0.01)
            second = FakeEngine(session)
            await until(second, lambda: second.epoch >= 1)
            second.close()

    with caplog.at_level(logging.WARNING, "flash_eplb.planner"):
        run(scenario(), timeout=30.0)
    first.bell.close()
    assert caplog.messages == [
        f"what the engine left stays until another starts: the lock of session {session!r} "
        f"(/dev/shm{lock_name(session)}) was held for 0 s; is a process of this session stopped?"
    ]


def test_a_planner_whose_name_was_removed_makes_room_for_another(session, engine):
    async def scenario():
        first = asyncio.create_task(Planner(session, FlashLB, PACE).run())
        await until(engine, lambda: engine.epoch >= 1)
        os.unlink("/dev/shm" + planner_name(session))
        async with planning(session):
            with pytest.raises(SegmentInUseError, match=r"has taken over .* removed from outside"):
                await first
            epoch = engine.epoch
            await until(engine, lambda: engine.epoch > epoch, OTHER)

    run(scenario(), timeout=30.0)


def test_a_planner_whose_worker_was_killed_waits_for_no_engine(session, caplog):
    caplog.set_level(logging.INFO, "flash_eplb.planner")

    async def scenario():
        living = Planner(session, FlashLB, PACE, exit_with_engine=True, parent=os.getppid())
        task = asyncio.create_task(living.run())
        await asyncio.sleep(1.0)
        assert not task.done()
        living.stop()
        await task
        assert "is dead" not in caplog.text
        await Planner(session, FlashLB, PACE, exit_with_engine=True, parent=os.getpid()).run()

    run(scenario(), timeout=10.0)
    assert "the worker that started this planner is dead" in caplog.text
