"""A group of loaders in one thread, where steps, votes, transfers and planners move as a seed says.

Everything random comes out of one seed, so a seed that fails does so again. After the faults end,
`settle` wants a fresh plan to be committed within a bounded number of steps.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from simulated_parts import Votes
from simulated_rank import Choice, LoaderDriver, ObservedLoader, SimulatedRank

from flash_eplb.ipc.placement import PlacementError, check_placement
from flash_eplb.ipc.round import Round, decode_round, encode_round, round_identity
from flash_eplb.ipc.shape import GroupShape, ModelShape
from flash_eplb.ipc.status import Field, State
from flash_eplb.planners.delivery import Delivery, Progress
from flash_eplb.planners.group import Group
from flash_eplb.planners.plan import PlannedRound, make_plan

LAYERS = 2
WIDTH = 5


@dataclass(frozen=True)
class Faults:
    """How often a planner dies, a stager fails, hangs, or goes on after that; an ordinary event
    weighs about one half."""

    die: float = 0.0
    fail: float = 0.0
    hang: float = 0.0
    wake: float = 0.05


@dataclass
class Written:
    """A record that a planner has made, and the ranks whose queues have got it."""

    round: Round
    ranks: set[int] = field(default_factory=set)


class SimulatedPlanner:
    """One planner's life: it takes over the queues one by one, then sends plan after plan, each
    record to one queue after the other. Its plans and rounds are numbered from one."""

    def __init__(self, simulation: Simulation):
        self._simulation = simulation
        self.generation = simulation.dice.getrandbits(40) + 1
        self._foreign = simulation.shuffled_ranks()
        self._rounds: deque[Round] = deque()
        self._record = b""
        self._missing: list[SimulatedRank] = []
        self._end_epoch = 0
        self._first_sequence = 1
        self.plan = 0
        self.sequence = 1

    def choices(self) -> list[Choice]:
        if self._foreign:
            return [Choice(0.5, "take over", -1, self._take_over)]
        if self._missing:
            return [Choice(0.5, "write", -1, self._write)]
        found = []
        if self._rounds and not any(rank.segment.plans.is_full() for rank in self._ranks):
            found.append(Choice(0.5, "begin record", -1, self._begin_record))
        found.append(Choice(0.3 if self._is_over() else 0.01, "plan", -1, self._make_plan))
        return found

    @property
    def _ranks(self) -> list[SimulatedRank]:
        return self._simulation.ranks

    @property
    def is_halfway(self) -> bool:
        """Whether some queues have its latest record and others have not."""
        return 0 < len(self._missing) < len(self._ranks)

    def finish(self) -> None:
        """Take over, and write what has been begun."""
        while self._foreign:
            self._take_over()
        while self._missing:
            self._write()

    def _is_over(self) -> bool:
        """Whether its plan is committed, or lost."""
        statuses = [rank.segment.status for rank in self._ranks]
        if not self._rounds and min(status[Field.EPOCH] for status in statuses) >= self._end_epoch:
            return True
        return any(
            status[Field.GENERATION] == self.generation
            and status[Field.DROPPED_ROUND] >= self._first_sequence
            for status in statuses
        )

    def _take_over(self) -> None:
        self._foreign.pop().segment.plans.take_over(self.generation)

    def _make_plan(self) -> None:
        """Supersede what is under way, as a planner does that has waited for too long."""
        board = self._simulation.group.committed()
        if board is None:
            return
        parts = self._simulation.random_plan(board[1])
        self.plan += 1
        self._first_sequence = self.sequence
        self._rounds = deque(
            self._round(part, number, len(parts), board[0]) for number, part in enumerate(parts)
        )
        self.sequence += len(parts)
        self._end_epoch = board[0] + len(parts)

    def _round(self, part: PlannedRound, number: int, count: int, epoch: int) -> Round:
        layers, ranks, slots = part.placement.shape
        columns = b"" if part.columns is None else part.columns.tobytes()
        return Round(
            generation=self.generation,
            plan=self.plan,
            sequence=self.sequence + number,
            last=number == count - 1,
            epoch=epoch + number,
            layers=layers,
            ranks=ranks,
            slots=slots,
            moves=part.moves.tobytes(),
            columns=columns,
        )

    def _begin_record(self) -> None:
        self._record = encode_round(self._rounds.popleft())
        self._missing = self._simulation.shuffled_ranks()

    def _write(self) -> None:
        self._missing.pop().segment.plans.put(self._record)

    def deliver(self, rounds: list[PlannedRound], epoch: int) -> Delivery:
        """Go on with the planner's own `Delivery`, of a plan that supersedes the others."""
        self._rounds.clear()
        self.plan += 1
        numbers = (self.generation, self.plan, self.sequence, epoch, 10**6)
        self.sequence += len(rounds)
        return Delivery(self._simulation.group, rounds, *numbers)


class Simulation:
    """The group, its planner, and the schedule.

    Args:
        session: names the segments.
        seed: of everything.
        faults: how often they come.
        loader: what each rank runs.
        driver: moves a rank, see `LoaderDriver`.
        rows: staging rows; None: at random.
    """

    def __init__(
        self,
        session: str,
        seed: int,
        faults: Faults,
        loader: type[ObservedLoader] = ObservedLoader,
        driver: Callable[[SimulatedRank], Any] = LoaderDriver,
        rows: int | None = None,
    ):
        dice = self.dice = random.Random(seed)
        self.session = session
        self.faults = faults
        self.driver = driver
        self.may_stop = False
        self.vote_steps = dice.randint(1, 3)
        self.timeout_steps = dice.randint(3, 12) * self.vote_steps
        self.patrol_steps = dice.choice([0, 1, 7])
        self.shape = self._random_shape(rows or dice.randint(1, 3))
        self.content = np.arange(LAYERS * self.shape.experts * WIDTH, dtype=np.int32).reshape(
            LAYERS, self.shape.experts, WIDTH
        )
        physical = np.arange(self.shape.columns, dtype=np.int32) % self.shape.experts
        first = np.tile(physical, (LAYERS, 1)).reshape(LAYERS, self.shape.ranks, self.shape.slots)
        self.placements = [first]
        """By epoch, worked out from the records that were committed."""
        self.columns: dict[int, int] = {}
        self.history: list[tuple[int, int, str, int | str]] = []
        """What each rank did, or must still do: passes, step, what, and to which round."""
        self.trace: list[str] = []
        self.seen: Counter[str] = Counter()
        self.records: dict[int, Written] = {}
        self.staged: dict[int, set[int]] = {}
        self._numbers: dict[tuple[int, int], bytes] = {}
        self.votes = Votes(self.shape.ranks)
        self.ranks: list[SimulatedRank] = []
        for number in range(self.shape.ranks):
            self.ranks.append(SimulatedRank(self, number, loader))
        self.group = Group([rank.segment for rank in self.ranks])
        self.planner = SimulatedPlanner(self)

    def _random_shape(self, rows: int) -> GroupShape:
        ranks, slots = self.dice.randint(2, 4), self.dice.randint(2, 3)
        return GroupShape(
            models=(ModelShape("simulated", LAYERS),),
            experts=max(slots + 1, ranks * slots - self.dice.randint(0, 2)),
            ranks=ranks,
            slots=slots,
            counting=(0,),
            row_bytes=(WIDTH * 4,) * LAYERS,
            staging_rows=rows,
            ring_slots=8,
        )

    def run(self, events: int) -> None:
        """Let `events` random events happen."""
        for _ in range(events):
            self.happen(self._choices())

    def happen(self, choices: list[Choice]) -> None:
        weights = [choice.weight for choice in choices]
        choice = self.dice.choices(choices, weights)[0]
        self.trace.append(f"{choice.name} {choice.rank}")
        choice.action()

    def _choices(self) -> list[Choice]:
        found = self.planner.choices()
        found.append(Choice(self.faults.die, "die", -1, self.replace_planner))
        for rank in self.ranks:
            found.extend(rank.choices())
        return found

    def replace_planner(self) -> None:
        """The planner dies where it stands; a successor comes."""
        self.seen["halfway"] += self.planner.is_halfway
        self.planner = SimulatedPlanner(self)

    def know(self, record: bytes) -> Written:
        """What is known of a record; whether another has had its number, with other moves."""
        identity = round_identity(record)
        if identity not in self.records:
            round_ = decode_round(record)
            self.records[identity] = Written(round_)
            kept = self._numbers.setdefault((round_.plan, round_.sequence), round_.moves)
            self.seen["number reused"] += kept != round_.moves
        return self.records[identity]

    def shuffled_ranks(self) -> list[SimulatedRank]:
        return self.dice.sample(self.ranks, len(self.ranks))

    def random_plan(self, before: np.ndarray) -> list[PlannedRound]:
        """Rounds to another placement, within the rows that are not in quarantine."""
        while not (plan := make_plan(before, self._random_placement(before))):
            pass
        if self.dice.random() < 0.3:
            columns = [self.dice.randint(1, 4) for _ in range(before.size)]
            plan = replace(plan, columns=np.array(columns, np.int16).reshape(before.shape))
        return plan.rounds(max(1, self.group.free_rows()))

    def _random_placement(self, before: np.ndarray) -> np.ndarray:
        """Some experts change places, others get a replica more."""
        wanted = before.copy()
        for _ in range(self.dice.randint(1, 8)):
            trial = wanted.copy()
            layer = trial[self.dice.randrange(LAYERS)].reshape(-1)
            a, b = self.dice.sample(range(len(layer)), 2)
            layer[b], layer[a] = layer[a], self.dice.choice([layer[a], layer[b]])
            with contextlib.suppress(PlacementError):
                check_placement(trial, self.shape.experts)
                wanted = trial
        return wanted

    def settle(self) -> None:
        """No more faults: what is under way ends, and then a fresh plan is committed. Now and then
        those that hang still do when it starts, if there are rows and stagers without them."""
        self.planner.finish()
        self._rest()
        if self.dice.random() < 0.5 or self._is_blocked():
            self._wake()
        hanging = any(stager.is_hung for rank in self.ranks for stager in rank.stagers)
        self._deliver()
        if hanging:
            self.seen["plan beside a hanging one"] += 1
            self._wake()
            self._rest()
            self._deliver()
        self.check_end()

    def _rest(self) -> None:
        """Until nothing has happened for three votes."""
        for _ in range(50):
            before = len(self.history)
            self.advance(3 * self.vote_steps)
            states = [rank.segment.status[Field.STATE] for rank in self.ranks]
            if len(self.history) == before and State.STAGING not in states:
                return
        raise AssertionError("the group does not come to rest")

    def _is_blocked(self) -> bool:
        return self.group.free_rows() == 0 or any(rank.pool.busy for rank in self.ranks)

    def _wake(self) -> None:
        for rank in self.ranks:
            for stager in rank.stagers:
                stager.wake()

    def _deliver(self) -> None:
        """The planner's `Delivery` has a plan committed; a round takes three votes."""
        board = self.group.committed()
        assert board is not None, "the boards differ"
        rounds = self.random_plan(board[1])
        delivery = self.planner.deliver(rounds, board[0])
        for _ in range((3 * len(rounds) + 1) * self.vote_steps + 1):
            if (progress := delivery.advance()) is not Progress.UNDER_WAY:
                break
            self.advance(1)
            if self.dice.random() < 0.1:
                self._wake()
        assert progress is Progress.DONE, delivery.reason or "a plan is not committed in time"
        assert np.array_equal(self.placements[-1], rounds[-1].placement)

    def advance(self, steps: int) -> None:
        """Let every rank come to the step of the fastest and `steps` further, stagers at once."""
        target = max(rank.steps for rank in self.ranks) + steps
        while (slowest := min(rank.steps for rank in self.ranks)) < target:
            for rank in self.shuffled_ranks():
                choices = rank.choices()
                while staging := [choice for choice in choices if choice.name == "stage"]:
                    self.happen(staging)
                    choices = rank.choices()
                if rank.steps == slowest:
                    self.happen([choice for choice in choices if choice.name == "step"])

    def check_end(self) -> None:
        """All ranks have done the same, and nothing is left of what went wrong."""
        for rank in self.ranks:
            rank.check()
            assert rank.log == self.history, f"rank {rank.number} has not done what others did"
            assert not any(stager.is_hung for stager in rank.stagers)
            status = rank.segment.status
            assert status[Field.QUARANTINED_ROWS] == 0, f"rank {rank.number}: rows are lost"
            assert status[Field.EPOCH] == len(self.placements) - 1

    def close(self) -> None:
        for rank in self.ranks:
            rank.loader.close()
            rank.segment.close()
