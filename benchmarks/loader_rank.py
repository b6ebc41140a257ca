"""One rank's process: it carries out every plan with every contender, and checks all slots."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from .loader_cells import Experts, Scenario

STOP, PORT, SENT_AT, READY = 0, 1, 2, 4  # words all processes see; from READY on one per rank
REST = 40  # steps at rest before a plan
MATMULS = 1
DEVICE = 0.002  # seconds that a step waits, as for a device
LONGEST = timedelta(seconds=60)


class Stopped(Exception):
    """The driver has told all ranks to end."""


@dataclass
class Sample:
    """What a plan cost one rank; times in microseconds, nan where there is no such figure.

    Attributes:
        stall: of the main thread, from the plan's arrival to its last commit.
        longest: the longest single stall.
        total: from the plan's arrival to its last commit.
        received: expert bytes that arrived here.
        wrong: slots that did not hold their expert's bytes afterwards.
        steps: in which the main thread was held up.
        idle: what as many steps at rest cost the main thread.
        cpu: processor time within `stall`.
        resting, moving: mean time of a step at rest, and while experts move.
        memcpy: of the rows of the plan's fullest round.
        rest: main-thread time of each step at rest.
        hot: the same of steps that follow one another at once, with nothing computed in between.
    """

    stall: float
    longest: float
    total: float
    received: int = 0
    wrong: int = 0
    steps: int = 1
    idle: float = 0.0
    cpu: float = np.nan
    resting: float = np.nan
    moving: float = np.nan
    memcpy: float = np.nan
    rest: list[float] = field(default_factory=list)
    hot: list[float] = field(default_factory=list)

    @property
    def above_rest(self) -> float:
        """The stall less what as many steps at rest cost."""
        return self.stall - self.idle


class Contender(Protocol):
    """One way of moving experts; its weights are its own.

    Attributes:
        staging: bytes of the most memory that it holds for experts on their way.
    """

    weights: list[list[torch.Tensor]]
    staging: int

    def move(self, number: int) -> Sample:
        """Carry out plan `number`; all ranks call it together."""


class Rank:
    """What the contenders of one rank share.

    Args:
        scenario: the plans.
        rank: of this process.
        words: shared by all processes of the run.
        session: that ours runs in.
    """

    def __init__(self, scenario: Scenario, rank: int, words: Any, session: str):
        torch.set_num_threads(1)
        self.scenario, self.rank, self.words, self.session = scenario, rank, words, session
        self.experts = Experts(scenario.cell)
        self.store = self._connect()
        dist.init_process_group(
            "gloo", timeout=LONGEST, world_size=self.size, rank=rank, store=self.store
        )
        self._control = self.new_group()
        self._flags = torch.zeros(1, dtype=torch.int64)
        self._matrices = [torch.rand(256, 256) for _ in range(3)]

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return self.scenario.cell.ranks

    def _connect(self) -> dist.Store:
        """Rank 0 keeps the store: it has a thread, and the driver must fork again."""
        host = "127.0.0.1"
        if self.rank == 0:
            store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=LONGEST)
            self.words[PORT] = store.port
            return store
        while not self.words[PORT]:
            time.sleep(0.005)
        return dist.TCPStore(host, self.words[PORT], is_master=False, timeout=LONGEST)

    def new_group(self) -> Any:
        """A gloo group of all ranks."""
        return dist.new_group(backend="gloo", timeout=LONGEST)

    def new_weights(self) -> list[list[torch.Tensor]]:
        """Of the scenario's first placement."""
        return self.experts.weights(self.scenario.start[:, self.rank])

    def compute(self) -> None:
        """A step: a millisecond of work, a wait, and what keeps the ranks in step."""
        left, right, out = self._matrices
        for _ in range(MATMULS):
            torch.mm(left, right, out=out)
        time.sleep(DEVICE)
        self.together(0)

    def rest(self, steps: int) -> float:
        """Mean microseconds of a step without any balancer."""
        began = time.monotonic_ns()
        for _ in range(steps):
            self.compute()
        return (time.monotonic_ns() - began) / 1e3 / steps

    def together(self, trouble: int) -> int:
        """The greatest `trouble` of all ranks; raises Stopped if the driver said so."""
        self._flags[0] = 1 << 60 if self.words[STOP] else trouble
        dist.all_reduce(self._flags, op=dist.ReduceOp.MAX, group=self._control)
        if self._flags[0] >= 1 << 60:
            raise Stopped
        return int(self._flags[0])


def run(rank: Rank, makers: dict[str, Callable[[Rank], Contender]]) -> dict[str, Any]:
    """Every plan by every contender, in turn: {samples, staging, faults}, each by name."""
    faults: dict[str, str] = {}
    contenders: dict[str, Contender] = {}
    for name, make in makers.items():
        _guard(rank, name, faults, lambda n=name, m=make: contenders.update({n: m(rank)}))
    samples: dict[str, list[Sample]] = {name: [] for name in makers}
    numbers = range(max(1, len(rank.scenario.plans)))
    for number in numbers:
        names = list(makers)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            if name not in faults:
                one = _one(rank, contenders[name], number, samples[name])
                _guard(rank, name, faults, one)
    staging = {name: contender.staging for name, contender in contenders.items()}
    rank.together(0)  # rank 0, which keeps the store, must not be the first to go
    return {"samples": samples, "staging": staging, "faults": faults}


def _one(
    rank: Rank, contender: Contender, number: int, samples: list[Sample]
) -> Callable[[], None]:
    def move() -> None:
        rank.together(0)
        sample = contender.move(number)
        if rank.scenario.plans:
            held = rank.scenario.plans[number].placement[:, rank.rank]
            sample.wrong = rank.experts.wrong(contender.weights, held)
        samples.append(sample)
        if sample.wrong:
            raise RuntimeError(f"after plan {number} {sample.wrong} slots hold other bytes")

    return move


def _guard(rank: Rank, name: str, faults: dict[str, str], action: Callable[[], None]) -> None:
    """Run `action`; if it fails on one rank, all leave the contender out."""
    why = ""
    try:
        action()
    except Stopped:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    if rank.together(int(bool(why))):
        reasons: list[Any] = [None] * rank.size
        dist.all_gather_object(reasons, why)
        faults[name] = next(reason for reason in reasons if reason)
