"""Step through one end of a segment, instruction by instruction, while the other end is at work.

    python tests/ipc/single_steps.py SESSION TIMES writers|readers

Writers: a process that is killed leaves the memory as it is after its last instruction. Here it is
stopped after every one, within the kernels and copies too, and a survivor looks at the memory as it
is then. For each of `TIMES` goes prints, in JSON, the states that were seen, one after the other.

Readers: between two instructions the writer overwrites, at random, what is being read. Prints how
many records and boards were found whole; the process fails if one was torn.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # who forks has no other threads
from crash_scenarios import Heat, check_records, placement_of, record_of, step_of
from forks import SHAPE, fork, kill

from flash_eplb.ipc.rank_segment import RankAreas, RankSegment
from flash_eplb.ipc.status import Field, StatusBlock, StepTimings

FIRST = SHAPE.ring_slots + 2
NOT_PERMITTED = 77
OVERTAKING = (0.006, 0.0, 0.02, 0.01)
"""How likely it is that a writer comes between two instructions of a reader of heat."""

OF_BOARDS = 10
"""How much likelier between two of a reader of the board, which has fewer of them."""

_TRACEME, _CONT, _SINGLESTEP = 0, 7, 9
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def trace(request: int, pid: int) -> None:
    if _libc.ptrace(request, pid, None, None):
        raise OSError(ctypes.get_errno(), "the child cannot be stepped")


def go_through(actions: list[Callable[[], None]]) -> None:
    """In the child: stop, and again after each of `actions`."""
    if _libc.ptrace(_TRACEME, 0, None, None):
        os._exit(NOT_PERMITTED)
    os.kill(os.getpid(), signal.SIGSTOP)
    for action in actions:
        action()
        os.kill(os.getpid(), signal.SIGSTOP)


def begin(actions: list[Callable[[], None]]) -> int:
    """A child that has stopped before the first of `actions`."""
    pid = fork(functools.partial(go_through, actions), seconds=3600)
    status = os.waitpid(pid, 0)[1]
    if not os.WIFSTOPPED(status):
        sys.exit(os.waitstatus_to_exitcode(status))
    return pid


def steps(pid: int) -> Iterator[None]:
    """One by one the instructions of child `pid` until it stops itself."""
    while True:
        trace(_SINGLESTEP, pid)
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSTOPPED(status), f"the child ended with {os.waitstatus_to_exitcode(status)}"
        if os.WSTOPSIG(status) != signal.SIGTRAP:
            return
        yield


def run_on(pid: int) -> None:
    """Let child `pid` go on until it stops itself."""
    trace(_CONT, pid)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSTOPPED(status), f"the child ended with {os.waitstatus_to_exitcode(status)}"


class Both:
    """A segment and what a worker and a planner do to it, go by go."""

    def __init__(self, session: str):
        self.segment = RankSegment.create(session, SHAPE, 0, 1)
        for number in range(1, FIRST):  # compiles, and fills the ring
            self.go(number)()
            self.state()
            self.segment.plans.get()

    def go(self, number: int) -> Callable[[], None]:
        """A call that does it all once."""
        write, plans, record = step_of(self.segment, number), self.segment.plans, record_of(number)

        def act() -> None:
            write()
            plans.take_over(number)
            plans.put(record)

        return act

    def content(self) -> bytes:
        """What of the segment may change, which is all but the step timings."""
        every = self.segment.segment.body
        return every[: StatusBlock.SIZE].tobytes() + every[StepTimings.SIZE :].tobytes()

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
        shown = [heat.head, heat.numbers[-1], board and board[0]]
        return [*shown, *counters, areas.plans.generation, rounds]

    def states(self, pid: int) -> list[list[int | None]]:
        """Let the child make one go; the states that it passes through."""
        seen, before = [self.state()], b""
        for _ in steps(pid):
            content = self.content()
            if content != before and (found := self.state()) != seen[-1]:
                seen.append(found)
            before = content
        self.segment.plans.get()
        return seen


def step_writers(both: Both, times: int) -> None:
    pid = begin([both.go(FIRST + number) for number in range(times)])
    for _ in range(times):
        print(json.dumps(both.states(pid)), flush=True)
    kill(pid)


class Reader:
    """What a child reads of a segment, and looks at afterwards."""

    def __init__(self, both: Both):
        self.areas = RankAreas(both.segment.segment.body, SHAPE)
        self.whole = [0, 0]

    def read(self) -> None:
        self.areas.heat.follow()
        self.records = self.areas.heat.read(SHAPE.ring_slots)

    def read_board(self) -> None:
        self.board = self.areas.board.read()

    def look(self) -> None:
        check_records(self.records)
        self.whole[0] += len(self.records.steps)
        if self.board is not None:
            assert (self.board[1] == placement_of(self.board[0])).all(), "a mixed board"
            self.whole[1] += 1

    def tell(self) -> None:
        print(json.dumps(self.whole), flush=True)


def step_readers(both: Both, times: int) -> None:
    rng = random.Random(seed := random.getrandbits(32))
    print("seed", seed, file=sys.stderr, flush=True)
    reader, number = Reader(both), FIRST
    pid = begin([*[reader.read, reader.read_board, reader.look] * times, reader.tell])
    for time in range(times):
        for factor in (1, OF_BOARDS):
            chance = factor * OVERTAKING[time % len(OVERTAKING)]
            for _ in steps(pid):
                if rng.random() < chance:
                    step_of(both.segment, number)()
                    number += 1
        run_on(pid)
    run_on(pid)
    kill(pid)


def main(session: str, times: int, which: str) -> None:
    both = Both(session)
    try:
        {"writers": step_writers, "readers": step_readers}[which](both, times)
    finally:
        both.segment.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
