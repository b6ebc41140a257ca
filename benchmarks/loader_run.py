"""The driver of a cell: it forks the ranks, sends them the plans, and cleans up behind them."""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from flash_eplb.ipc.liveness import SegmentError
from flash_eplb.ipc.session import sweep
from flash_eplb.ipc.status import Field
from flash_eplb.planners.delivery import Delivery, Progress
from flash_eplb.planners.group import Group

from .loader_cells import Cell, Scenario
from .loader_rank import READY, SENT_AT, STOP, Contender, Rank, Sample, run

CONTEXT = mp.get_context("fork")
GENERATION = 1
LONGEST = 120.0  # seconds that anything of a cell may take
POLL = 0.002
KILL_WITH_PARENT = 1  # PR_SET_PDEATHSIG
Makers = dict[str, Callable[[Rank], Contender]]


class RankError(Exception):
    """A rank failed, or does not come; it says why."""


@dataclass
class Result:
    """A cell's figures.

    Attributes:
        samples: by contender, [ranks][plans], the plans that warm up included.
        staging: by contender, bytes on the rank that holds most.
        faults: why a contender was left out, by its name.
    """

    scenario: Scenario
    samples: dict[str, list[list[Sample]]] = field(default_factory=dict)
    staging: dict[str, int] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)

    @property
    def cell(self) -> Cell:
        """The sizes."""
        return self.scenario.cell


def measure(cell: Cell, makers: Makers, ours: str, number: int) -> Result:
    """All contenders over one cell; `ours` is the one that the driver sends plans to.

    Raises:
        RankError: ours failed.
    """
    scenario = Scenario(cell)
    with _ranks(scenario, makers, f"bench-loader-{os.getpid()}-{number}") as ranks:
        received = ranks.send_plans() if cell.plans else []
        answers = ranks.answers()
    result = Result(scenario, faults=answers[0]["faults"])
    if ours in result.faults:
        raise RankError(f"{cell.name}: {ours}: {result.faults[ours]}")
    for name in makers:
        result.samples[name] = [answer["samples"][name] for answer in answers]
        result.staging[name] = max(answer["staging"].get(name, 0) for answer in answers)
    for rank, samples in enumerate(result.samples[ours]):
        for sample, plan in zip(samples, received, strict=False):
            sample.received = plan[rank]
    return result


class Ranks:
    """The ranks' processes, seen from the driver's."""

    def __init__(self, scenario: Scenario, makers: Makers, session: str):
        self._scenario, self._makers, self._session = scenario, makers, session
        self.words: Any = CONTEXT.RawArray("q", READY + scenario.cell.ranks)
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []

    def start(self) -> None:
        """Fork them."""
        for rank in range(self._scenario.cell.ranks):
            ours, theirs = CONTEXT.Pipe(duplex=False)
            what = (rank, theirs, self._scenario, self._makers, self.words, self._session)
            process = CONTEXT.Process(target=_serve, args=what, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def send_plans(self) -> list[list[int]]:
        """Each plan when all ranks are ready for it; bytes that it brought, [plans][ranks]."""
        group = self._attached()
        try:
            for rank in group.ranks:
                rank.plans.take_over(GENERATION)
            sequence, received = 1, []
            for number in range(len(self._scenario.plans)):
                delivery = self._send(group, number, sequence)
                sequence = delivery.next_sequence
                received.append([rank.status[Field.RECEIVED_BYTES] for rank in group.ranks])
        finally:
            group.close()
        before = [[0] * len(received[0]), *received]
        return [
            [now - then for now, then in zip(*both, strict=True)]
            for both in zip(received, before, strict=False)
        ]

    def _attached(self) -> Group:
        deadline = time.monotonic() + LONGEST
        while True:
            try:
                return Group.attach(self._session)
            except SegmentError:
                self._look(deadline, "to start")
                time.sleep(0.02)

    def _send(self, group: Group, number: int, sequence: int) -> Delivery:
        deadline = time.monotonic() + LONGEST
        while min(self.words[READY:]) <= number:
            self._look(deadline, f"to be ready for plan {number}")
            time.sleep(POLL)
        board = group.committed()
        assert board is not None
        rounds = self._scenario.rounds[number]
        delivery = Delivery(group, rounds, GENERATION, number + 1, sequence, board[0], 10**7)
        self.words[SENT_AT] = time.monotonic_ns()
        while (progress := delivery.advance()) is Progress.UNDER_WAY:
            self._look(deadline, f"to commit plan {number}")
            time.sleep(POLL)
        if progress is not Progress.DONE:
            raise RankError(f"plan {number}: {delivery.reason}")
        return delivery

    def _look(self, deadline: float, what: str) -> None:
        for rank, pipe in enumerate(self._pipes):
            if pipe.poll():
                faults = self._receive(rank)["faults"]
                raise RankError(f"rank {rank} ended early: {faults}")
        if time.monotonic() > deadline:
            raise RankError(f"the ranks took more than {LONGEST:.0f} s {what}")

    def answers(self) -> list[dict[str, Any]]:
        """What each rank measured."""
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(LONGEST):
                raise RankError(f"rank {rank} does not answer")
        return [self._receive(rank) for rank in range(len(self._pipes))]

    def _receive(self, rank: int) -> dict[str, Any]:
        try:
            error, answer = self._pipes[rank].recv()
        except EOFError:
            raise RankError(f"rank {rank}'s process is gone") from None
        if error:
            raise RankError(f"rank {rank}: {error}")
        return answer

    def close(self) -> None:
        """Let the ranks end by themselves, or else end them; nothing of the session stays."""
        self.words[STOP] = 1
        deadline = time.monotonic() + 5
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()
        sweep(self._session, 1.0)


@contextmanager
def _ranks(scenario: Scenario, makers: Makers, session: str) -> Iterator[Ranks]:
    ranks = Ranks(scenario, makers, session)
    try:
        ranks.start()
        yield ranks
    finally:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        ranks.close()
        signal.signal(signal.SIGINT, before)


def _serve(
    rank: int, pipe: Connection, scenario: Scenario, makers: Makers, words: Any, session: str
) -> None:
    """A rank's process: one answer (error, what), then its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(KILL_WITH_PARENT, signal.SIGKILL)
    try:
        answer = (None, run(Rank(scenario, rank, words, session), makers))
    except BaseException:
        answer = (traceback.format_exc(), {})
    with suppress(OSError):
        pipe.send(answer)
    pipe.close()
