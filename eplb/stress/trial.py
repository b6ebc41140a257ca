"""What a fault may do and must see: the fleet, the audit and waiting with an end."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Generator

import numpy as np

from ...ipc.status import Field
from ..config import Config
from .audit import Audit, Books
from .figures import WORDS, Order, Planned, Rank
from .fleet import Fleet

Waiting = Generator[None, None, None]
"""Yields while it waits, so that the supervisor can go on looking."""

EXCESS_WORTH_A_PLAN = 0.1
_SAMPLES = 3  # of which the last is all of what came after a shuffle


class TrialError(RuntimeError):
    """What must hold did not; the text says what."""


class Trial:
    """A stress, as its faults see it.

    Args:
        fleet: the processes.
        config: the balancer's settings.
        patience: seconds within which balancing must resume.
        seed: of what the faults choose.

    Attributes:
        books: of all engines so far.
        past, past_words, past_steps: of the engines before this one: status words, words of
            `figures.Rank`, and steps.
        stopped: whether a fault keeps ranks from stepping just now.
        excess: PAR - 1 as it was measured last.
        samples: how often it was measured.
        plans_before: of the planners before this one.
        lost_before: records that they did not read in time.
        excused: those of them, and of this one's, that a fault kept it from reading.
        chance: for what the faults choose.
    """

    def __init__(self, fleet: Fleet, config: Config, patience: float, seed: int):
        self.fleet = fleet
        self.config = config
        self.patience = patience
        self.books = Books()
        self.stopped = False
        self.excess = 0.0
        self.samples = 0
        self.lost_before = self.plans_before = self.excused = 0
        self.chance = random.Random(seed)
        self.audit: Audit | None = None
        self.past = dict.fromkeys(Field, 0)
        self.past_words = np.zeros(WORDS, np.int64)
        self.past_steps = 0

    def start_engine(self) -> None:
        """Start an engine and its audit."""
        self.past_words += self.fleet.figures.ranks.sum(0)
        self.past_steps += self.fleet.steps()
        self.lost_before += self.told(Planned.LOST)
        self.fleet.start_engine()
        assert self.fleet.group is not None
        self.audit = Audit(self.fleet.group, self.fleet.setup.top_k, self.books)

    def leave_engine(self) -> None:
        """The engine of now steps no more: close its books before its segments go."""
        if self.audit is not None and self.fleet.group is not None:
            self.audit.close()
            for field in Field:
                self.past[field] += self.fleet.total(field)
            self.audit = None
        self.fleet.leave_engine()

    def restore(self) -> None:
        """After a fault that did not hold: all is there again that the next one relies on."""
        order = self.fleet.figures.order
        order[Order.SLOW_RANK] = order[Order.FLIP_RANK] = order[Order.JUMP_NS] = 0
        if self.fleet.is_losing:
            self.fleet.stop_ranks()
            self.leave_engine()
            self.start_engine()
        if self.fleet.planner is None:
            self.fleet.start_planner()
        self.stopped = False

    def kill_planner(self) -> None:
        """SIGKILL, wherever it is."""
        self.lost_before += self.told(Planned.LOST)
        self.plans_before += self.told(Planned.PLANS)
        self.fleet.kill_planner()

    def total(self, field: Field) -> int:
        """A status word over all ranks of all engines so far."""
        now = self.fleet.total(field) if self.audit is not None else 0
        return self.past[field] + now

    def pause(self, seconds: float) -> Waiting:
        """Let time pass."""
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            yield

    def until(self, done: Callable[[], bool], what: str) -> Waiting:
        """Wait until `done`; TrialError that says `what` when patience ends."""
        deadline = time.perf_counter() + self.patience
        while not done():
            self.fleet.heed()
            if time.perf_counter() > deadline:
                raise TrialError(f"{what} within {self.patience:.0f} s")
            yield

    def steps_on(self, steps: int) -> Waiting:
        """Inference goes on: so many more steps on every rank."""
        target = self.fleet.slowest() + steps
        yield from self.until(
            lambda: self.fleet.slowest() >= target, f"the ranks did not make {steps} steps"
        )

    def freeze(self, pid: int, done: Callable[[], bool], what: str) -> Waiting:
        """Stop a process until `done`, and let it go on whatever happens."""
        os.kill(pid, signal.SIGSTOP)
        try:
            yield from self.until(done, what)
        finally:
            os.kill(pid, signal.SIGCONT)

    def shuffle(self) -> None:
        """Let other experts be hot, so that there is something to win."""
        self.fleet.figures.order[Order.SHUFFLES] += 1

    def told(self, word: Planned) -> int:
        """A word of the planner."""
        return int(self.fleet.figures.planned[word])

    def resumes(self) -> Waiting:
        """Balancing resumes: steps, then heat at the planner, then a commit, if one is worth it."""
        fleet, config = self.fleet, self.config
        stopped = fleet.figures.ranks[:, Rank.STOPPED]
        yield from self.steps_on(2 * config.vote_steps)
        if stopped.any():
            raise TrialError(f"EP ranks {np.flatnonzero(stopped).tolist()} have stopped balancing")
        yield from self.until(self._planner_serves, "no planner found the engine")
        step = fleet.steps()
        yield from self.until(
            lambda: self.told(Planned.STEP) >= step, "the planner took no new heat"
        )
        epoch = fleet.epoch()
        yield from self.wins(lambda: fleet.epoch() > epoch, "no plan was committed")

    def wins(self, done: Callable[[], bool], what: str) -> Waiting:
        """Let other experts be hot and wait until `done`, which a plan brings about; or until it is
        clear that nothing is worth a plan. TrialError that says `what` when patience ends."""
        config, begin, samples = self.config, self.fleet.steps(), self.samples
        window = config.episode_steps * max(config.min_episodes, config.plan_interval)
        self.shuffle()

        def is_quiet() -> bool:
            waited = self.fleet.steps() > begin + 4 * window
            return waited and self.samples >= samples + _SAMPLES and not self.is_worth_a_plan()

        yield from self.until(lambda: done() or is_quiet(), what)

    def _planner_serves(self) -> bool:
        return self.fleet.planner_is_serving()

    def is_worth_a_plan(self) -> bool:
        """Whether a policy that moves anything has reason to."""
        return self.config.policy != "static" and self.excess > EXCESS_WORTH_A_PLAN
