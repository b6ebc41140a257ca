"""Follows an engine beside whoever plans for it, and tells a recorder what its ranks show."""

from __future__ import annotations

from collections import deque

from ..ipc.status import Field
from .group import Group
from .recorder import NoRecorder
from .step_heat import StepHeat

_MOST_WAITING = 256
"""Steps that wait for the placement that they ran under, so that it stands in their chunk."""


class Follower:
    """What a process that only reads can know: heat, placements and how rounds went.

    Plans are known to their planner alone. An epoch that is over before the boards are looked at
    stays unknown.

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
        self.steps = 0
        self.rounds = 0

    @property
    def lost(self) -> int:
        """Steps that were overwritten before they were read, or that a rank did not count."""
        return self._group.unmatched

    @property
    def unknown_epochs(self) -> int:
        """Epochs of recorded steps whose placement was never seen."""
        return len(self._seen - self._known)

    def look(self) -> None:
        """Read what has come since the last look; more often than rounds are committed."""
        self._waiting += self._group.read_heat()
        if self._group.ranks[0].status[Field.EPOCH] != self._epoch:
            self._read_boards()
        while self._waiting and self._is_ready(self._waiting[0]):
            self._record(self._waiting.popleft())
        self._recorder.lost(self._group.lost)
        ended = self._group.read_transfers()
        self.rounds += int((ended["rank"] == 0).sum())
        self._recorder.transfers(ended)

    def end(self) -> None:
        """Look a last time; steps whose placement has not been seen wait no longer."""
        self.look()
        while self._waiting:
            self._record(self._waiting.popleft())

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
