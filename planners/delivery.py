"""Delivery: one plan's rounds into all queues, and how far they have come."""

from __future__ import annotations

from enum import Enum

import numpy as np

from ..ipc.round import Round, encode_round
from ..ipc.status import Field, StatusBlock
from .group import Group
from .plan import PlannedRound


class Progress(Enum):
    """How a delivery stands."""

    UNDER_WAY = "under way"
    DONE = "committed"
    FAILED = "failed"


class Delivery:
    """Sends `rounds` to all ranks, a few ahead, until they are committed or one was dropped.

    Args:
        group: the ranks.
        rounds: of one plan, in order.
        generation: of this planner; `plan` and `sequence` count within it.
        plan: number of the plan.
        sequence: number of its first round.
        epoch: rounds committed so far.
        timeout_steps: steps without progress after which the plan is given up.
    """

    def __init__(
        self,
        group: Group,
        rounds: list[PlannedRound],
        generation: int,
        plan: int,
        sequence: int,
        epoch: int,
        timeout_steps: int,
    ):
        self._group = group
        self._rounds = rounds
        self._generation = generation
        self._plan = plan
        self._first = sequence
        self._epoch = epoch
        self._timeout_steps = timeout_steps
        self._sent = 0
        self._told = 0
        self._refused = self._sum(Field.REFUSED)
        self._last_progress = (0, self._newest_step())
        self.reason = ""

    @property
    def next_sequence(self) -> int:
        """Sequence number for the round after this plan."""
        return self._first + len(self._rounds)

    def placements(self) -> list[tuple[int, np.ndarray]]:
        """(epoch, placement) of each round that was committed since the last call."""
        newest = max(self._own(rank.status, Field.COMMITTED_ROUND) for rank in self._group.ranks)
        told, self._told = self._told, max(self._told, newest - self._first + 1)
        first = self._epoch + told + 1
        return [(first + n, r.placement) for n, r in enumerate(self._rounds[told : self._told])]

    def advance(self) -> Progress:
        """Send what fits, look at the ranks' status; FAILED comes with `reason`."""
        committed = min(self._own(rank.status, Field.COMMITTED_ROUND) for rank in self._group.ranks)
        dropped = max(self._own(rank.status, Field.DROPPED_ROUND) for rank in self._group.ranks)
        if committed >= self.next_sequence - 1:
            return Progress.DONE
        if dropped >= self._first or self._sum(Field.REFUSED) > self._refused:
            self.reason = "a rank refused or dropped a round; its log says why"
            return Progress.FAILED
        if self._group.stopped():
            self.reason = "a rank has stopped balancing; its log says why"
            return Progress.FAILED
        if self._is_stuck(committed):
            self.reason = f"no progress for {self._timeout_steps} steps"
            return Progress.FAILED
        while self._sent < len(self._rounds) and not self._is_full():
            self._send(self._sent)
            self._sent += 1
        return Progress.UNDER_WAY

    def _send(self, number: int) -> None:
        shape = self._group.shape
        record = encode_round(
            Round(
                generation=self._generation,
                plan=self._plan,
                sequence=self._first + number,
                last=number == len(self._rounds) - 1,
                epoch=self._epoch + number,
                layers=shape.layers,
                ranks=shape.ranks,
                slots=shape.slots,
                moves=self._rounds[number].moves.tobytes(),
                columns=_bytes(self._rounds[number].columns, "<i2"),
                rerouted=_bytes(self._rounds[number].rerouted, "<i4"),
            )
        )
        for rank in self._group.ranks:
            rank.plans.put(record)

    def _is_full(self) -> bool:
        return any(rank.plans.is_full() for rank in self._group.ranks)

    def _own(self, status: StatusBlock, field: Field) -> int:
        """The field, if it speaks of this planner's rounds; else -1."""
        return status[field] if status[Field.GENERATION] == self._generation else -1

    def _sum(self, field: Field) -> int:
        return sum(rank.status[field] for rank in self._group.ranks)

    def _newest_step(self) -> int:
        return max(rank.status[Field.STEP] for rank in self._group.ranks)

    def _is_stuck(self, committed: int) -> bool:
        step = self._newest_step()
        if committed != self._last_progress[0]:
            self._last_progress = (committed, step)
        return step - self._last_progress[1] > self._timeout_steps


def _bytes(numbers: np.ndarray | None, kind: str) -> bytes:
    return b"" if numbers is None else numbers.astype(kind).tobytes()
