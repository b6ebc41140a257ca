"""Signs of life of real planners; their silence is that of a file whose time is set back."""

import asyncio
import os
import signal
import time

import pytest

from flash_eplb.ipc.liveness import SegmentInUseError
from flash_eplb.ipc.names import planner_name
from flash_eplb.ipc.segment import take_name
from flash_eplb.planners import life
from flash_eplb.planners.engine_loop import Pace
from flash_eplb.planners.flashlb import FlashLB
from flash_eplb.planners.life import show_life, silent_planner
from flash_eplb.planners.planner import Planner

PACE = Pace(episode_steps=2, window_episodes=8, min_episodes=4, plan_interval=4, timeout_steps=1000)

PLANNER = """
import asyncio, sys
from flash_eplb.planners import planner
from flash_eplb.planners.engine_loop import Pace

made = planner.Planner(sys.argv[1], None, Pace(2, 8, 4, 4, 1000))

async def serve():
    loop = asyncio.get_running_loop()
    loop.add_reader(0, made.stop)
    loop.call_later(0.1, lambda: print("ready", flush=True))
    await made.run()

asyncio.run(serve())
"""


@pytest.fixture
def planner(session):
    """A segment as a planner holds it; `planner(seconds)` lets it be silent for so long."""
    lock = take_name(session, planner_name(session), b"", 0, 1)
    lock.publish()

    def fall_silent(seconds):
        then = time.time() - seconds
        os.utime("/dev/shm" + planner_name(session), (then, then))

    yield fall_silent
    lock.close()


def test_a_planner_that_is_silent_is_named_with_what_to_do(session, planner):
    assert silent_planner(session) == ""
    planner(29)
    assert silent_planner(session) == ""
    planner(40)
    pid = os.getpid()
    assert silent_planner(session) == (
        f"planner (pid {pid}) has shown no life for 40 s: it is stopped or hangs; experts stay "
        f"where they are; `kill -CONT {pid}` lets a stopped one go on, `kill -KILL {pid}` makes "
        "room for another"
    )


def test_no_planner_is_not_silent_nor_is_one_that_cannot_be_read(session, planner):
    assert silent_planner(f"{session}x") == ""
    planner(40)
    os.chmod("/dev/shm" + planner_name(session), 0o644)
    assert silent_planner(session) == ""


def test_life_is_shown_again_and_again_until_cancelled(session, planner, monkeypatch):
    monkeypatch.setattr(life, "_EVERY", 0.01)

    async def shows():
        task = asyncio.create_task(show_life(session))
        for _ in range(2):
            planner(40)
            await asyncio.sleep(0.2)
            assert silent_planner(session) == ""
        task.cancel()
        await asyncio.sleep(0.1)
        planner(40)
        await asyncio.sleep(0.1)
        assert silent_planner(session)

    before = set(os.listdir("/proc/self/fd"))
    asyncio.run(shows())
    assert set(os.listdir("/proc/self/fd")) <= before


def test_a_second_planner_is_told_that_the_first_is_silent(session, planner):
    planner(40)
    words = f"session '{session}' is in use: the planner .* has shown no life for 40 s"
    with pytest.raises(SegmentInUseError, match=words):
        asyncio.run(Planner(session, FlashLB, PACE).run())


def test_a_stopped_planner_is_silent_and_one_that_goes_on_is_not(session, start, monkeypatch):
    monkeypatch.setattr(life, "LONGEST_SILENCE", 3.0)
    script = start(PLANNER, session)
    script.line()
    time.sleep(3.5)
    assert silent_planner(session) == ""
    os.kill(script.pid, signal.SIGSTOP)
    time.sleep(4)
    found = silent_planner(session)
    os.kill(script.pid, signal.SIGCONT)
    assert f"(pid {script.pid}) has shown no life for" in found
    time.sleep(1.5)
    assert silent_planner(session) == ""
