import logging
import os
import subprocess
import sys
import types

import pytest

from flash_eplb.eplb import planner_watch
from flash_eplb.eplb.child import command_of
from flash_eplb.eplb.config import load_config
from flash_eplb.eplb.planner_watch import PlannerWatch
from flash_eplb.ipc.liveness import SegmentError
from flash_eplb.ipc.names import planner_name
from flash_eplb.ipc.segment import take_name


class World:
    """What the watch sees: the time, whether there is a planner (an error is raised), and what is
    said of its silence."""

    def __init__(self):
        self.now = 1000.0
        self.planner = False
        self.silent = ""
        self.looked = 0

    def owner_is_alive(self, name):
        self.looked += 1
        if isinstance(self.planner, Exception):
            raise self.planner
        return self.planner


@pytest.fixture
def world(environment, caplog):
    world = World()
    environment.setattr(planner_watch, "time", types.SimpleNamespace(monotonic=lambda: world.now))
    environment.setattr(planner_watch, "owner_is_alive", world.owner_is_alive)
    environment.setattr(planner_watch, "silent_planner", lambda session: world.silent)
    environment.setattr(logging.getLogger("flash_eplb"), "propagate", True)
    caplog.set_level(logging.INFO, logger="flash_eplb")
    return world


def said(caplog):
    """Levels and first words of what was logged since the last call."""
    lines = [f"{r.levelname}: {' '.join(r.getMessage().split()[:4])}" for r in caplog.records]
    caplog.clear()
    return lines


MISSING = ["WARNING: no planner serves session"]
SERVED = ["INFO: a planner serves session"]
SILENT = ["WARNING: the planner is silent"]
BACK = ["INFO: the planner of session"]


def looks(watch, world, seconds):
    """Look every half a second for so long."""
    end = world.now + seconds
    while world.now < end:
        watch.look()
        world.now += 0.5


def test_a_missing_planner_is_said_once_after_the_grace_period(world, caplog):
    watch = PlannerWatch(load_config(session="a"))
    looks(watch, world, 9.5)
    assert said(caplog) == []
    looks(watch, world, 3)
    assert [record.getMessage() for record in caplog.records] == [
        "no planner serves session 'a', experts stay where they are; "
        "start one with `EPLB_SESSION=a eplb planner`"
    ]
    assert said(caplog) == MISSING
    looks(watch, world, 100)
    assert said(caplog) == []


def test_it_is_said_again_after_a_planner_came_and_went(world, caplog):
    watch = PlannerWatch(load_config())
    looks(watch, world, 20)
    assert said(caplog) == MISSING
    for _ in range(2):
        world.planner = True
        looks(watch, world, 20)
        assert said(caplog) == SERVED
        world.planner = False
        looks(watch, world, 20)
        assert said(caplog) == MISSING


def test_a_planner_within_the_grace_period_is_no_reason_to_warn(world, caplog):
    watch = PlannerWatch(load_config())
    looks(watch, world, 5)
    world.planner = True
    looks(watch, world, 50)
    assert said(caplog) == SERVED


def test_a_planner_that_goes_within_the_grace_period_is_missed_at_once(world, caplog):
    watch = PlannerWatch(load_config())
    world.planner = True
    looks(watch, world, 2)
    world.planner = False
    looks(watch, world, 2)
    assert said(caplog) == SERVED + MISSING


def test_a_silent_planner_is_said_once_and_again_after_it_was_back(world, caplog):
    watch = PlannerWatch(load_config())
    world.planner = True
    looks(watch, world, 20)
    assert said(caplog) == SERVED
    for _ in range(2):
        world.silent = "planner is silent"
        looks(watch, world, 20)
        assert said(caplog) == SILENT
        world.silent = ""
        looks(watch, world, 20)
        assert said(caplog) == BACK


def test_a_clock_that_jumps_makes_no_planner_silent(world, caplog):
    watch = PlannerWatch(load_config())
    world.planner = True
    looks(watch, world, 4)
    world.silent = "planner is silent"
    looks(watch, world, 2)
    world.silent = ""
    looks(watch, world, 20)
    assert said(caplog) == SERVED


def test_a_silent_planner_that_was_killed_is_missing_and_not_back(world, caplog):
    watch = PlannerWatch(load_config())
    world.planner, world.silent = True, "planner is silent"
    looks(watch, world, 20)
    world.planner = False
    looks(watch, world, 20)
    assert said(caplog) == SERVED + SILENT + MISSING


def test_it_looks_every_two_seconds_only(world):
    watch = PlannerWatch(load_config())
    for _ in range(1000):
        watch.look()
    assert world.looked == 1
    world.now += 1.9
    watch.look()
    assert world.looked == 1
    world.now += 0.2
    watch.look()
    assert world.looked == 2


def test_another_users_planner_is_none_of_ours(world, caplog):
    world.planner = SegmentError("belongs to another user")
    watch = PlannerWatch(load_config())
    looks(watch, world, 20)
    assert said(caplog) == MISSING


def test_it_sees_a_real_planner(session, environment, caplog):
    environment.setattr(logging.getLogger("flash_eplb"), "propagate", True)
    caplog.set_level(logging.INFO, logger="flash_eplb")
    lock = take_name(session, planner_name(session), b"", 0, 1)
    PlannerWatch(load_config(session=session)).look()
    assert said(caplog) == SERVED
    lock.close()


@pytest.fixture
def spawned(world, environment):
    """Processes that stand in for planners: (command, process), and how they end."""
    made = []
    popen = subprocess.Popen

    def start(command, **options):
        code = "import sys; sys.stdin.read()"
        process = popen([sys.executable, "-S", "-c", code], stdin=subprocess.PIPE)
        made.append((command, options, process))
        return process

    environment.setattr(planner_watch.subprocess, "Popen", start)
    yield made
    for _, _, process in made:
        process.kill()
        process.wait()
        process.stdin.close()


def test_no_planner_is_started_unless_asked_for(world, spawned):
    watch = PlannerWatch(load_config(spawn_planner=False))
    looks(watch, world, 100)
    assert spawned == []
    watch.close()


def test_a_planner_is_started_at_once_and_only_one(world, spawned, caplog):
    watch = PlannerWatch(load_config(spawn_planner=True))
    watch.look()
    looks(watch, world, 100)
    ((command, options, process),) = spawned
    assert command == [
        *command_of("cli"),
        *("planner", "--exit-with-engine", "--parent", str(os.getpid())),
    ]
    assert options == {"stdin": subprocess.DEVNULL}
    assert os.getpriority(os.PRIO_PROCESS, process.pid) >= 10
    world.planner = True
    looks(watch, world, 10)
    assert len(spawned) == 1
    assert said(caplog) == SERVED
    watch.close()


def end(process, code):
    """Let the planner end as if with `code`."""
    process.kill()
    process.wait()
    process.returncode = code


def test_planners_that_end_at_once_are_replaced_ever_later(world, spawned, caplog):
    watch = PlannerWatch(load_config(spawn_planner=True))
    for number, pause in enumerate((10, 20, 40, 80, 160, 300, 300), 1):
        watch.look()
        assert len(spawned) == number
        end(spawned[-1][2], -9)
        looks(watch, world, pause - 0.5)
        assert len(spawned) == number
        assert [record.getMessage() for record in caplog.records] == [
            f"the planner ended with exit code -9; another is started in {pause - 2} s"
        ]
        caplog.clear()
        world.now += 2
    watch.close()


def test_a_planner_that_has_lived_is_replaced_at_once(world, spawned, caplog):
    watch = PlannerWatch(load_config(spawn_planner=True))
    watch.look()
    for number in range(1, 4):
        looks(watch, world, 70)
        assert len(spawned) == number
        end(spawned[-1][2], 1)
        looks(watch, world, 2.5)
        assert len(spawned) == number + 1
        assert said(caplog) == ["WARNING: the planner ended with"]
    watch.close()


def test_a_planner_that_can_use_nothing_is_not_started_again(world, spawned, caplog):
    watch = PlannerWatch(load_config(spawn_planner=True, session="a"))
    watch.look()
    end(spawned[0][2], 2)
    looks(watch, world, 1000)
    assert len(spawned) == 1
    (text,) = caplog.messages
    assert text.startswith("the planner ended with exit code 2: its settings, policy or files ")
    assert text.endswith("or start one with `EPLB_SESSION=a eplb planner`")
    assert said(caplog) == ["ERROR: the planner ended with"]
    world.planner = True  # somebody has started one
    looks(watch, world, 10)
    world.planner = False
    looks(watch, world, 100)
    assert said(caplog) == SERVED + MISSING
    watch.close()


def test_closing_ends_the_planner_that_was_started(world, spawned):
    watch = PlannerWatch(load_config(spawn_planner=True))
    watch.look()
    process = spawned[0][2]
    assert process.poll() is None
    watch.close()
    assert process.returncode == -15
    watch.close()


def test_closing_kills_a_planner_that_does_not_end(world, environment):
    code = "import signal; signal.signal(15, signal.SIG_IGN); print(flush=True); signal.pause()"
    popen = subprocess.Popen
    process = popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    environment.setattr(planner_watch.subprocess, "Popen", lambda *_, **__: process)
    watch = PlannerWatch(load_config(spawn_planner=True))
    watch.look()
    watch.close()
    assert process.returncode == -9
    process.stdout.close()


def test_a_planner_that_cannot_be_started_is_said_and_does_no_harm(world, environment, caplog):
    def fail(*arguments, **options):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    environment.setattr(planner_watch.subprocess, "Popen", fail)
    watch = PlannerWatch(load_config(spawn_planner=True))
    watch.look()
    assert said(caplog) == ["WARNING: the planner could not"]
    looks(watch, world, 9)
    assert said(caplog) == []
    watch.close()
