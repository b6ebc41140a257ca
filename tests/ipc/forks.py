"""Processes forked from a warm one, and what a process and a session hold.

Whoever forks here is single-threaded and compiled: a child begins within milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

import numpy as np

from flash_eplb.ipc.doorbell import Doorbell
from flash_eplb.ipc.liveness import SegmentError
from flash_eplb.ipc.names import bell_name, planner_name, rank_name
from flash_eplb.ipc.rank_segment import RankSegment
from flash_eplb.ipc.segment import take_name
from flash_eplb.ipc.session import segment_names
from flash_eplb.ipc.shape import GroupShape, ModelShape

SHAPE = GroupShape(
    models=(ModelShape("m", 2),),
    experts=8,
    ranks=2,
    slots=5,
    counting=(0, 1),
    row_bytes=(64, 64),
    staging_rows=4,
    ring_slots=8,
)
PLACEMENT = np.tile(np.arange(SHAPE.columns) % SHAPE.experts, (SHAPE.layers, 1)).reshape(
    SHAPE.layers, SHAPE.ranks, SHAPE.slots
)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True)


def adopt_grandchildren() -> None:
    """Grandchildren whose parent is killed become ours, so that `reap` waits for them, too."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def fork(action: Callable[[], object], seconds: int = 20) -> int:
    """Run `action` in a child that ends with it, with us, or after `seconds`; returns its pid."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(seconds)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    _run(action)


def _run(action: Callable[[], object]) -> NoReturn:
    try:
        action()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def kill(pid: int) -> None:
    """SIGKILL child `pid` and wait for its end."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def reap() -> None:
    """Wait for all children."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def wait_until(done: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    """Wait for `done`; AssertionError says that it was not `what`."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"not {what} within {seconds} s"
        time.sleep(0.0005)


class Engine:
    """The ipc side of an engine whose ranks are all in this process."""

    def __init__(self, session: str, generation: int, ranks: int = 2):
        self.ranks = [RankSegment.create(session, SHAPE, n, generation) for n in range(ranks)]
        self.bell = Doorbell.create(bell_name(session))
        for rank in self.ranks:
            rank.board.write(0, PLACEMENT)
            rank.publish()
        self.bell.ring()

    def close(self) -> None:
        self.bell.close()
        for rank in self.ranks:
            rank.close()


def leave(session: str, generation: int = 7) -> None:
    """Leave what a killed engine of two ranks and a killed planner leave."""

    def live_and_die() -> None:
        Engine(session, generation)
        take_name(session, planner_name(session), b"", 0, generation).publish()
        os.kill(os.getpid(), signal.SIGKILL)

    pid = fork(live_and_die)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status), "the leftovers could not be made"
    assert os.WTERMSIG(status) == signal.SIGKILL


def has_bell(session: str) -> bool:
    """Whether the session has a doorbell."""
    try:
        Doorbell.open(bell_name(session)).close()
    except SegmentError:
        return False
    return True


def left_over(session: str) -> list[str]:
    """Everything that bears a name of the session."""
    lock = f"/eplb.{session}.lock"
    names = segment_names(session) + [lock] * os.path.exists(f"/dev/shm{lock}")
    return names + [bell_name(session)] * has_bell(session)


def holdings() -> dict[str, int]:
    """How many descriptors, mapped segments, threads and children this process has."""
    with open("/proc/self/maps") as maps:
        mapped = sum("/dev/shm/eplb." in line for line in maps)
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mappings": mapped,
        "threads": len(os.listdir("/proc/self/task")),
        "children": sum(len(_children(task)) for task in os.listdir("/proc/self/task")),
    }


def _children(task: str) -> list[str]:
    with open(f"/proc/self/task/{task}/children") as file:
        return file.read().split()


def work_as_successor(session: str) -> None:
    """A new engine in the session, seen by one reader; AssertionError if anything is amiss."""
    engine = Engine(session, 77)
    mine = engine.ranks[0]
    found = RankSegment.open(rank_name(session, 0), writable=True)
    assert (found.generation, found.plans.generation, found.plans.has_record()) == (77, 0, False)
    mine.heat.push(1, 2, 3, 4, 5, np.full((2, 10), 9, np.int32))
    records = found.heat.read()
    assert records.steps.tolist() == [1]
    assert (records.heat == 9).all()
    found.plans.take_over(78)
    found.plans.put(b"round")
    assert (mine.plans.generation, mine.plans.get()) == (78, b"round")
    board = found.board.read()
    assert board is not None
    assert board[0] == 0
    assert (board[1] == PLACEMENT).all()
    assert found.owner_is_alive()
    bell = Doorbell.open(bell_name(session))
    assert bell.drain() == 1
    bell.close()
    found.close()
    engine.close()
    assert left_over(session) == []
