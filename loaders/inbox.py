"""The inbox: rounds that came from a planner and wait for their turn, the oldest first.

Rounds of a planner that no longer owns the queue, of a plan that lost one of its rounds, or of a
plan that a newer one has superseded are dropped; what cannot be right is refused. Both are counted,
and the planner is told by sequence number. While it is held all rounds of planners are dropped, and
what waits are rounds of ours, that bring experts back to where the engine's loader writes them.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from ..ipc.plan_queue import PlanQueue
from ..ipc.round import Round, RoundError, decode_round, round_identity
from ..ipc.status import Field, StatusBlock

log = logging.getLogger("flash_eplb.loader")
T = TypeVar("T")

HOME = 0
"""Generation of the rounds that bring experts back; no planner has it."""


class Pending(NamedTuple):
    """A round that was read from the queue: its identity and what it says."""

    identity: int
    round: Round


class Inbox:
    """What waits for one rank's loader.

    Args:
        plans: where it comes from.
        status: where drops and refusals are counted.
        rank: EP rank, for the log.
    """

    def __init__(self, plans: PlanQueue, status: StatusBlock, rank: int):
        self._plans = plans
        self._status = status
        self._rank = rank
        self._waiting: deque[Pending] = deque()
        self._home: deque[Pending] = deque()
        self.is_held = False
        self._drops_said = False
        self._void = (0, 0)
        self._complaints: set[str] = set()

    def hold(self, home: list[bytes]) -> None:
        """Let no round of a planner wait until `release`, but those of `home`, in order."""
        self.is_held, self._drops_said = True, False
        self._home = deque(Pending(round_identity(one), decode_round(one)) for one in home)

    def release(self) -> None:
        """Rounds of planners wait again."""
        self.is_held = False

    @property
    def has_home(self) -> bool:
        """Whether a round waits that `hold` was given."""
        return bool(self._home)

    def drop_home(self) -> None:
        """One of the rounds that `hold` was given has failed, on which the others rely."""
        self._home.clear()

    @property
    def head(self) -> Pending | None:
        """The oldest round of the planner that owns the queue, while others are dropped; where it
        is held, the next one that brings experts back."""
        if self.is_held:
            self._drop_all()
            return self._home[0] if self._home else None
        while self._waiting:
            if self._waiting[0].round.generation == self._plans.generation:
                return self._waiting[0]
            self.drop_plan(self._waiting[0].round)
        return None

    def has_record(self) -> bool:
        """Whether `collect` has something to do."""
        return self._plans.has_record()

    def collect(self) -> None:
        """Take all records from the queue; refuse what is no round."""
        while self._plans.has_record():
            try:
                record = self._plans.get()
                round_ = decode_round(record)
            except RoundError as error:
                self._complain(str(error))
                continue
            if round_.generation != self._plans.generation:
                self._status.add(Field.STALE)
                continue
            self._follow(round_.generation)
            while self._waiting and _is_older(self._waiting[0].round, round_):
                self._drop(self._waiting.popleft())
            pending = Pending(round_identity(record), round_)
            if _plan(round_) == self._void:
                self._drop(pending)
            else:
                self._waiting.append(pending)

    def take(self, identity: int) -> None:
        """The round is started: it waits no longer, if it still did."""
        for waiting in (self._waiting, self._home):
            if waiting and waiting[0].identity == identity:
                waiting.popleft()

    def drop_plan(self, round_: Round) -> None:
        """Drop what is left of the plan of `round_`, and what still comes of it.

        Commits of another plan may bring its epochs about, but not the placements it relies on.
        """
        self._void = _plan(round_)
        while self._waiting and _plan(self._waiting[0].round) == self._void:
            self._drop(self._waiting.popleft())

    def choose(self, epoch: int, check: Callable[[Pending], T]) -> T | None:
        """What `check` gives of the head; None if nothing waits.

        Args:
            epoch: that the head must be for, or it is dropped with its plan.
            check: raises RoundError if a round must not be carried out, which is refused.
        """
        while (head := self.head) is not None:
            if head.round.epoch != epoch:
                self.drop_plan(head.round)
                continue
            try:
                return check(head)
            except RoundError as error:
                self.tell(Field.DROPPED_ROUND, self._waiting.popleft().round)
                self._complain(str(error))
        return None

    def tell(self, field: Field, round_: Round) -> None:
        """Let the planner know, if it is its round."""
        if round_.generation == self._status[Field.GENERATION] != HOME:
            self._status[field] = round_.sequence

    def _follow(self, generation: int) -> None:
        """Speak of this planner's rounds from now on; its sequence numbers start at one."""
        if self._status[Field.GENERATION] != generation:
            self._status[Field.GENERATION] = 0
            self._status[Field.COMMITTED_ROUND] = self._status[Field.DROPPED_ROUND] = 0
            self._status[Field.GENERATION] = generation

    def _drop_all(self) -> None:
        if self._waiting and not self._drops_said:
            self._drops_said = True
            log.warning(
                "EP rank %d drops the planner's rounds until the engine has written or read "
                "weights",
                self._rank,
            )
        while self._waiting:
            self._drop(self._waiting.popleft())

    def _drop(self, pending: Pending) -> None:
        self._status.add(Field.STALE)
        self.tell(Field.DROPPED_ROUND, pending.round)

    def _complain(self, reason: str) -> None:
        """Count a bad round; log it once per reason."""
        self._status.add(Field.REFUSED)
        if reason not in self._complaints and len(self._complaints) < 100:
            self._complaints.add(reason)
            log.error("EP rank %d refuses a plan: %s; nothing was touched", self._rank, reason)


def _plan(round_: Round) -> tuple[int, int]:
    return round_.generation, round_.plan


def _is_older(waiting: Round, new: Round) -> bool:
    """Whether `new` belongs to a later plan, or another planner, than `waiting`."""
    return waiting.generation != new.generation or waiting.plan < new.plan
