"""The group's heat of a step out of the records of its ranks."""

from __future__ import annotations

import functools
import operator
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..ipc.flags import FLAG_DECODE, FLAG_DUMMY, FLAG_PREFILL
from ..ipc.heat_ring import HeatRecords
from ..ipc.shape import GroupShape


class StepHeat(NamedTuple):
    """The group's heat in the `span` steps up to `step`: int64 [layers, P], under one epoch.

    `time` is when the latest rank recorded it, in nanoseconds of the monotonic clock; `tokens` are
    those of the batches that were counted, `flags` those of their steps.
    """

    step: int
    epoch: int
    heat: np.ndarray
    span: int = 1
    time: int = 0
    tokens: int = 0
    flags: int = 0


class Part(NamedTuple):
    """One rank's share of a `StepHeat`: its record, or several of them added up."""

    step: int
    flags: int
    epoch: int
    span: int
    heat: np.ndarray
    time: int = 0
    tokens: int = 0

    @property
    def start(self) -> int:
        """The step before its first one."""
        return self.step - self.span

    def followed_by(self, later: Part) -> Part:
        """Both as one; it is a dummy only if both are."""
        dummy = self.flags & later.flags & FLAG_DUMMY
        return later._replace(
            flags=(self.flags | later.flags) & ~FLAG_DUMMY | dummy,
            span=self.span + later.span,
            heat=np.add(self.heat, later.heat, dtype=np.int64),
            tokens=self.tokens + later.tokens,
        )


class StepMatcher:
    """Finds the records of all ranks that cover the same steps.

    A rank that was behind its device records several steps as one; the other ranks' records of
    the same steps are added up then.

    Args:
        ranks: whose records have to match.
        most: records kept of a rank while another one is silent.

    Attributes:
        unmatched: steps left out because a rank lost them, or counted them under another epoch.
    """

    def __init__(self, ranks: int, most: int):
        self._waiting: list[deque[Part]] = [deque(maxlen=most) for _ in range(ranks)]
        self._ends: list[int] = []
        self._done = self._matched = -1
        self.unmatched = 0

    def add(self, rank: int, records: HeatRecords) -> None:
        """Take the next records of `rank`."""
        columns = (records.steps, records.flags, records.epochs, records.spans)
        others = (records.times.tolist(), records.tokens.tolist())
        cells = (*(column.tolist() for column in columns), records.heat, *others)
        for fields in zip(*cells, strict=True):
            self._waiting[rank].append(Part(*fields))
        if len(records.steps):
            if not self._ends:
                self._matched = int(records.steps[0])
                self._ends = [self._matched] * len(self._waiting)
            self._ends[rank] = int(records.steps[-1])

    def behind(self) -> tuple[int, int]:
        """(the rank whose records end first, the steps that others have recorded since)."""
        if not self._ends:
            return 0, 0
        oldest = min(self._ends)
        return self._ends.index(oldest), max(self._ends) - oldest

    def unfit(self) -> int:
        """Steps that all ranks have recorded since the last of which their records fit together."""
        return min(self._ends) - self._matched if self._ends else 0

    def take(self) -> Iterator[list[Part]]:
        """One part per rank, all of the same steps and epoch; oldest first."""
        while (end := self._common_end()) is not None:
            groups = [_taken_up_to(end, waiting) for waiting in self._waiting]
            start = max(group[0].start for group in groups)
            parts = [_joined(start, group) for group in groups]
            whole = [part for part in parts if part is not None]
            matched = len(whole) == len(parts) and len({part.epoch for part in whole}) == 1
            if self._done >= 0:
                self.unmatched += (start if matched else end) - self._done
            self._done = end
            if matched:
                self._matched = end
                yield whole

    def _common_end(self) -> int | None:
        """The first step with which a record of every rank ends; None if it is yet to come."""
        end = 0
        while True:
            ends = [found for w in self._waiting if (found := _first_end(end, w)) is not None]
            if len(ends) < len(self._waiting):
                return None
            end = max(ends)
            if min(ends) == end:
                return end


def group_heat(parts: list[Part], shape: GroupShape, phase: str) -> StepHeat | None:
    """The heat of the steps that `parts` cover; None if none of it counts.

    Args:
        parts: of the ranks that count.
        shape: of the group; its `layout` tells how the ranks' heat is put together.
        phase: "all", "prefill" (steps that run prompt tokens) or "decode" (the others). Where each
            rank counts its own batch, the ranks in that phase count; where it counts what arrived
            from all batches, all do if the step has the phase.
    """
    if shape.counts_own_slots:
        flags = functools.reduce(operator.or_, (part.flags for part in parts))
        if all(part.flags & FLAG_DUMMY for part in parts) or not _is_in(phase, flags):
            return None
        heat = np.concatenate([part.heat for part in parts], axis=1, dtype=np.int64)
        return _of_group([parts[rank] for rank in shape.counting], heat)
    chosen = [part for part in parts if not part.flags & FLAG_DUMMY and _is_in(phase, part.flags)]
    if not chosen:
        return None
    heat = chosen[0].heat.astype(np.int64)
    for part in chosen[1:]:  # a fifth of the time of np.add.reduce, which stacks them first
        heat += part.heat
    return _of_group(chosen, heat)


def _of_group(counted: list[Part], heat: np.ndarray) -> StepHeat:
    """`heat` with what is known of the batches that it counts."""
    first = counted[0]
    return StepHeat(
        first.step,
        first.epoch,
        heat,
        first.span,
        time=max(part.time for part in counted),
        tokens=sum(part.tokens for part in counted if not part.flags & FLAG_DUMMY),
        flags=functools.reduce(operator.or_, (part.flags for part in counted)) & ~FLAG_DUMMY,
    )


def _is_in(phase: str, flags: int) -> bool:
    if phase == "prefill":
        return bool(flags & FLAG_PREFILL)
    if phase == "decode":
        return bool(flags & FLAG_DECODE) and not flags & FLAG_PREFILL
    return True


def _first_end(least: int, waiting: deque[Part]) -> int | None:
    return next((part.step for part in waiting if part.step >= least), None)


def _taken_up_to(end: int, waiting: deque[Part]) -> list[Part]:
    taken = []
    while waiting and waiting[0].step <= end:
        taken.append(waiting.popleft())
    return taken


def _joined(start: int, group: list[Part]) -> Part | None:
    """The parts after `start` as one; None if a step is missing or their epochs differ."""
    joined: Part | None = None
    for part in group:
        if part.step <= start:
            continue
        if part.start != (start if joined is None else joined.step):
            return None
        if joined is not None and part.epoch != joined.epoch:
            return None
        joined = part if joined is None else joined.followed_by(part)
    return joined
