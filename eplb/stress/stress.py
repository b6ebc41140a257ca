"""A stress from start to end: the fleet, the faults in turn, the audit, and the verdicts."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ...ipc.session import segment_names
from ...ipc.status import Field
from ..config import Config
from .faults import FAULTS
from .figures import Planned, Rank
from .fleet import Fleet, FleetError
from .measure import Clock, Meter, Sample
from .setup import Setup
from .trial import Trial, TrialError

SAMPLE_SECONDS = 0.5
_TICK = 0.02
_AUDIT_SECONDS = 0.01
_RANDOM_PAUSE = (2.0, 8.0)


@dataclass
class FaultRecord:
    """One fault that was made to happen.

    Attributes:
        name: of it.
        seconds: from its begin until balancing had resumed.
        trouble: what did not hold; empty if all did.
    """

    name: str
    seconds: float = 0.0
    trouble: str = ""


@dataclass
class Outcome:
    """All that a stress has seen.

    Attributes:
        samples: twice a second, with whether a fault was under way.
        faults: in the order in which they happened.
        books: of the audit; see `audit.Books`.
        commits, checked, wrong, compared, differ: slots compared with the placement after each
            commit of each rank, and tokens with those of a run on one process.
        moves, aborted, refused, damaged: by the ranks' counters.
        steps: of all engines.
        longest_stall: seconds in which some rank made no step though nobody kept it from it.
        lost: records that the planner did not read in time, but for those of faults.
        behind, most_behind: steps that the planner had not read: at the end, and at most.
        shares: cores used; see `measure.Clock`.
        plans: of all planners.
        planning_seconds, longest_planning: of the last one.
        agree: whether all boards show the same valid placement at the end.
        left: names that were left in shared memory.
        trouble: what ended the stress before its time.
        interrupted: whether Ctrl-C did.
    """

    samples: list[tuple[Sample, bool]] = field(default_factory=list)
    faults: list[FaultRecord] = field(default_factory=list)
    read: int = 0
    overwritten: int = 0
    torn: int = 0
    unaccounted: int = 0
    commits: int = 0
    checked: int = 0
    wrong: int = 0
    compared: int = 0
    differ: int = 0
    moves: int = 0
    aborted: int = 0
    refused: int = 0
    damaged: int = 0
    steps: int = 0
    longest_stall: float = 0.0
    lost: int = 0
    behind: int = 0
    most_behind: int = 0
    shares: dict[str, float] = field(default_factory=dict)
    plans: int = 0
    planning_seconds: float = 0.0
    longest_planning: float = 0.0
    agree: bool = False
    left: list[str] = field(default_factory=list)
    trouble: str = ""
    interrupted: bool = False


Show = Callable[[Outcome, str], None]
"""Called with each sample, and what is going on in words."""


class Stress:
    """Runs one.

    Args:
        setup: its folder is there.
        config: the balancer's settings.
        settings: the same as environment variables for the processes.
        faults: names, in turn; with `at_random` what is drawn from.
        at_random: draw faults until the time is over.
        seconds, steps: how long it goes on when all are there; `steps`, if not 0. Faults in turn
            come to their end before.
        patience: seconds within which balancing must resume after a fault.
        show: told of what happens.
    """

    def __init__(
        self,
        setup: Setup,
        config: Config,
        settings: dict[str, str],
        faults: list[str],
        at_random: bool,
        seconds: float,
        steps: int,
        patience: float,
        show: Show,
    ):
        self._setup = setup
        self._seconds = seconds
        self._steps = steps
        self._show = show
        self._fleet = Fleet(setup, settings)
        self._trial = Trial(self._fleet, config, patience, setup.seed)
        self._chance = random.Random(setup.seed)
        self._faults = list(faults)
        self._at_random = at_random
        self._running: Iterator[None] | None = None
        self._outcome = Outcome()
        self._progress = (0, time.perf_counter())
        self._begin = self._rest_until = 0.0
        self._first = 0

    def stop(self) -> None:
        """End soon; safe to call from a signal handler."""
        self._fleet.stopping = True

    def run(self) -> Outcome:
        """Start everything, let it run, end everything; nothing is left whatever happens."""
        outcome = self._outcome
        try:
            self._show(outcome, "compiling the planner's kernels: a minute or two the first time")
            self._fleet.start_planner()
            self._fleet.await_planner()
            self._show(outcome, "starting the engine")
            self._trial.start_engine()
            for _ in self._trial.until(self._fleet.planner_is_serving, "no planner came"):
                self._read()
            self._loop()
            self._end()
        except KeyboardInterrupt:
            outcome.interrupted = True
        except (FleetError, TrialError) as error:
            outcome.trouble = str(error)
            self._count()
        finally:
            self._fleet.close()
            outcome.left = segment_names(self._setup.session)
        return outcome

    def _loop(self) -> None:
        self._begin = time.perf_counter()
        self._first = self._all_steps()
        self._progress = (0, self._begin)
        meter, clock = Meter(self._fleet), Clock(self._fleet)
        sampled = self._begin
        try:
            while not self._is_over():
                self._fleet.heed()
                self._fleet.check()
                self._advance()
                self._watch()
                now = time.perf_counter()
                if now - sampled >= SAMPLE_SECONDS:
                    sampled = now
                    self._take(meter.sample())
                    self._outcome.shares = clock.shares()
                self._read()
        except KeyboardInterrupt:
            self._outcome.interrupted = True
        self._take(meter.sample())
        self._outcome.shares = clock.shares()

    def _read(self) -> None:
        assert self._trial.audit is not None
        self._trial.audit.look(_AUDIT_SECONDS)
        time.sleep(_TICK)

    def _is_over(self) -> bool:
        if self._running is not None or (self._faults and not self._at_random):
            return False
        if self._steps:
            return self._all_steps() - self._first >= self._steps
        return time.perf_counter() - self._begin >= self._seconds

    def _all_steps(self) -> int:
        return self._trial.past_steps + self._fleet.steps()

    def _advance(self) -> None:
        """The fault under way goes on, or the next one begins."""
        faults = self._outcome.faults
        if self._running is None:
            if self._faults and time.perf_counter() >= self._rest_until and self._has_begun():
                name = self._chance.choice(self._faults) if self._at_random else self._faults.pop(0)
                faults.append(FaultRecord(name, time.perf_counter()))
                self._running = self._one(name)
            return
        try:
            next(self._running)
            return
        except StopIteration:
            pass
        except TrialError as error:
            faults[-1].trouble = str(error)
            self._trial.restore()
        self._running = None
        faults[-1].seconds = time.perf_counter() - faults[-1].seconds
        rest = self._chance.uniform(*_RANDOM_PAUSE) if self._at_random else SAMPLE_SECONDS
        self._rest_until = time.perf_counter() + rest

    def _has_begun(self) -> bool:
        """Whether balancing has, so that a fault meets something."""
        return self._fleet.epoch() > 0 or (
            bool(self._outcome.samples) and not self._trial.is_worth_a_plan()
        )

    def _one(self, name: str) -> Iterator[None]:
        make, _ = FAULTS[name]
        yield from make(self._trial)
        yield from self._trial.resumes()

    def _watch(self) -> None:
        """How long the slowest rank stands still, where nobody keeps it from stepping."""
        step, now = self._fleet.slowest(), time.perf_counter()
        stall = 0.0 if self._trial.stopped else now - self._progress[1]
        if step != self._progress[0] or self._trial.stopped:
            self._progress = (step, now)
        self._outcome.longest_stall = max(self._outcome.longest_stall, stall)
        if stall > self._trial.patience:
            raise FleetError(f"the ranks hang: no step for {stall:.0f} s")

    def _take(self, sample: Sample | None) -> None:
        if sample is None:
            return
        self._trial.excess = float(sample.par.mean()) - 1
        self._trial.samples += 1
        self._outcome.samples.append((sample, self._running is not None))
        self._count()
        running = self._outcome.faults[-1].name if self._running is not None else ""
        self._show(self._outcome, running)

    def _count(self) -> None:
        """What the counters say so far."""
        outcome, trial, figures = self._outcome, self._trial, self._fleet.figures
        books = trial.books
        outcome.read, outcome.overwritten = books.read, books.lost
        outcome.torn, outcome.unaccounted = books.torn, books.unaccounted
        ranks = figures.ranks.sum(0) + trial.past_words
        outcome.checked, outcome.wrong = int(ranks[Rank.CHECKED]), int(ranks[Rank.WRONG])
        outcome.compared, outcome.differ = int(ranks[Rank.COMPARED]), int(ranks[Rank.DIFFER])
        outcome.commits = trial.total(Field.COMMITTED) // self._setup.ranks
        outcome.moves = trial.total(Field.MOVED_ROWS)
        outcome.aborted = trial.total(Field.ABORTED) // self._setup.ranks
        outcome.refused = trial.total(Field.REFUSED)
        outcome.damaged = trial.total(Field.DAMAGED)
        outcome.steps = self._all_steps()
        outcome.lost = max(0, trial.told(Planned.LOST) + trial.lost_before - trial.excused)
        outcome.most_behind = trial.told(Planned.MOST_BEHIND)
        outcome.plans = trial.plans_before + trial.told(Planned.PLANS)
        outcome.planning_seconds = trial.told(Planned.PLANNING_NS) * 1e-9
        outcome.longest_planning = trial.told(Planned.LONGEST_PLANNING_NS) * 1e-9

    def _end(self) -> None:
        outcome, fleet = self._outcome, self._fleet
        self._show(outcome, "ending")
        outcome.behind = max(0, fleet.steps() - self._trial.told(Planned.STEP))
        fleet.end_engine()
        assert fleet.group is not None
        outcome.agree = fleet.group.committed() is not None
        self._count()
        self._trial.leave_engine()
        self._count()
        fleet.end_planner()
