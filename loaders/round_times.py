"""Notes when the round under way passes its points, and logs it at its end."""

from __future__ import annotations

import time

from ..ipc.round import Round
from ..ipc.round_log import RoundLog, Transfer
from .errand import Result


class RoundTimes:
    """The points in time of one round after the other, on the main thread.

    Args:
        log: where each round goes when it ends.
    """

    def __init__(self, log: RoundLog):
        self._log = log
        self._started = (0, 0)
        self._begun = self._committing = 0
        self._ended: Transfer | None = None

    def start(self, step: int) -> None:
        """All ranks have voted to start a round; its transfer has not begun."""
        self._started = step, time.monotonic_ns()
        self._begun = self._committing = 0

    def begin(self) -> None:
        """Its transfer is handed to the stager."""
        self._begun = time.monotonic_ns()

    def commit(self) -> None:
        """Its commit begins."""
        self._committing = time.monotonic_ns()

    def end(self, round_: Round, step: int, result: Result | None, rows: int) -> None:
        """It is over: committed if its commit has begun, else aborted. `write` logs it.

        Args:
            round_: which it was.
            step: of the vote that ended it.
            result: the stager's; None if there is none.
            rows: slots that were written here.
        """
        now, committed = time.monotonic_ns(), self._committing > 0
        self.write()
        self._ended = Transfer(
            round_.generation,
            round_.plan,
            round_.sequence,
            *self._started,
            self._begun,
            result.staged_ns if result else 0,
            step,
            self._committing or now,
            now,
            rows,
            result.received_bytes if result and committed else 0,
            int(committed),
        )

    def write(self) -> None:
        """Log the round that is over, if there is one that is not logged."""
        if self._ended is not None:
            self._log.add(self._ended)
            self._ended = None
