"""Follows an engine beside whoever plans for it, and tells a recorder what its ranks show."""

from __future__ import annotations

from collections import deque

import numpy as np

from ..ipc.status import Field
from .group import Group
from .recorder import NoRecorder
from .step_heat import StepHeat

_MOST_WAITING = 256
"""Steps that wait for the placement that they ran under, so that it stands in their chunk."""


class Follower:
    """What a process that only reads can know: heat, placements and how rounds went.

    Plans are known to their planner alone. An epoch that is over before the boards are looked at
    stays unknown. What was over before the first recorded step does not count.

    Args:
        group: the engine's ranks.
        recorder: told of all.

    Attributes:
        steps: that were recorded.
        rounds: that were seen to end, committed or aborted.
    """

    def __init__(self, group: Group, recorder: NoRecorder):
        self._group = group
        self._recorder = recorder
        self._epoch = -1
        self._known: set[int] = set()
        self._seen: set[int] = set()
        self._waiting: deque[StepHeat] = deque()
        self._first: int | None = None
        self._lost_before = 0
        self._ended: list[np.ndarray] = []
        self.steps = 0
        self.rounds = 0

    @property
    def lost(self) -> int:
        """Records of single ranks that were overwritten before they were read."""
        return 0 if self._first is None else self._group.lost - self._lost_before

    @property
    def unknown_epochs(self) -> int:
        """Epochs of recorded steps whose placement was never seen."""
        return len(self._seen - self._known)

    def look(self) -> None:
        """Read what has come since the last look; more often than rounds are committed."""
        came = list(self._group.read_heat())
        if came and self._first is None:
            self._begin(came[0])
        self._waiting += came
        self._recorder.lost(self.lost)  # before a step that closes its chunk
        if self._group.ranks[0].status[Field.EPOCH] != self._epoch:
            self._read_boards()
        while self._waiting and self._is_ready(self._waiting[0]):
            self._record(self._waiting.popleft())
        if len(ended := self._group.read_transfers()):
            self._ended.append(ended)
        if self._first is not None:
            for ended in self._ended:
                self._count(ended[ended["end_step"] >= self._first])
            self._ended.clear()

    def end(self) -> None:
        """Look a last time; steps whose placement has not been seen wait no longer."""
        self.look()
        while self._waiting:
            self._record(self._waiting.popleft())

    def _begin(self, step: StepHeat) -> None:
        """This is the first step; the records that lack after it were not lost before it."""
        self._first = step.step - step.span + 1
        self._lost_before = max(0, self._group.lost - self._group.unmatched)

    def _count(self, ended: np.ndarray) -> None:
        self.rounds += int((ended["rank"] == 0).sum())
        self._recorder.transfers(ended)

    def _is_ready(self, step: StepHeat) -> bool:
        """Whether its placement has been seen, or is waited for no longer."""
        return step.epoch <= self._epoch or len(self._waiting) > _MOST_WAITING

    def _record(self, step: StepHeat) -> None:
        self._seen.add(step.epoch)
        self.steps += step.span
        self._recorder.step(step)

    def _read_boards(self) -> None:
        """The ranks' boards, once they agree."""
        board = self._group.committed()
        if board is not None:
            self._epoch = board[0]
            self._known.add(board[0])
            self._recorder.placement(*board)
