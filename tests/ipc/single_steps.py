"""Step through the writers of a segment, instruction by instruction, and look after each one.

    python tests/ipc/single_steps.py SESSION TIMES

A process that is killed leaves the memory as it is after its last instruction. Here it is stopped
after every one, within the kernels and copies too, and its survivor looks at the memory as it is
then. For each of `TIMES` goes prints, in JSON, the states that were seen, one after the other.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # who forks has no other threads
from crash_scenarios import Heat, placement_of, record_of, write
from forks import SHAPE, fork, kill

from flash_eplb.ipc.rank_segment import RankAreas, RankSegment
from flash_eplb.ipc.status import Field

FIRST = SHAPE.ring_slots + 2
NOT_PERMITTED = 77
_TRACEME, _SINGLESTEP = 0, 9
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def go_through(actions: list[Callable[[], None]]) -> None:
    """In the child: stop, and again after each of `actions`."""
    if _libc.ptrace(_TRACEME, 0, None, None):
        os._exit(NOT_PERMITTED)
    os.kill(os.getpid(), signal.SIGSTOP)
    for action in actions:
        action()
        os.kill(os.getpid(), signal.SIGSTOP)


def steps(pid: int) -> Iterator[None]:
    """One by one the instructions of child `pid` until it stops itself."""
    while True:
        if _libc.ptrace(_SINGLESTEP, pid, None, None):
            raise OSError(ctypes.get_errno(), "the child cannot be stepped")
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSTOPPED(status), f"the child ended with {os.waitstatus_to_exitcode(status)}"
        if os.WSTOPSIG(status) != signal.SIGTRAP:
            return
        yield


class Both:
    """What a worker and a planner do to one segment, go by go; `state` is for the survivor."""

    def __init__(self, session: str):
        self.segment = RankSegment.create(session, SHAPE, 0, 1)

    def go(self, number: int) -> None:
        write(self.segment, number)
        self.segment.plans.take_over(number)
        self.segment.plans.put(record_of(number))

    def state(self) -> list[int | None]:
        """All that the segment tells; AssertionError if anything in it is torn."""
        areas = RankAreas(self.segment.segment.body.copy(), SHAPE)
        heat = Heat(areas)
        heat.take()
        board = areas.board.read()
        assert board is None or (board[1] == placement_of(board[0])).all(), "a mixed board"
        rounds = 0
        while areas.plans.has_record():
            number, _, _ = (record := areas.plans.get()).partition(b":")
            assert record == record_of(int(number)), "a torn round"
            rounds += 1
        status = areas.status
        counters = [status[Field.STEP], status[Field.COMMITTED]]
        return [heat.head, board and board[0], *counters, areas.plans.generation, rounds]

    def states(self, pid: int) -> list[list[int | None]]:
        """Let the child make one go; the states that it passes through."""
        seen, before = [self.state()], b""
        for _ in steps(pid):
            content = self.segment.segment.bytes.tobytes()
            if content != before and (found := self.state()) != seen[-1]:
                seen.append(found)
            before = content
        self.segment.plans.get()
        return seen


def main(session: str, times: int) -> None:
    both = Both(session)
    for number in range(1, FIRST):  # compiles, and fills the ring
        both.go(number)
        both.state()
        both.segment.plans.get()
    goes = [functools.partial(both.go, FIRST + number) for number in range(times)]
    pid = fork(functools.partial(go_through, goes), seconds=3600)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSTOPPED(status):
        for _ in goes:
            print(json.dumps(both.states(pid)), flush=True)
        kill(pid)
    both.segment.close()
    sys.exit(0 if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
