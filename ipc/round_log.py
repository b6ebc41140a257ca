"""The round log: how the latest rounds went on this rank, for whoever draws a time line.

Owner: the worker writes one record when a round ends; readers map it read-only and keep their
cursor to themselves. It is a heat ring whose counts are a `TRANSFER`: the protocol, and what a
writer that dies leaves, are those of `heat_ring.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .heat_ring import HeatRing


class Transfer(NamedTuple):
    """How a round went on one rank. Times are nanoseconds of the monotonic clock, 0: never.

    Attributes:
        generation, plan, sequence: of the round; generation 0 is no planner's: experts that went
            back to where the engine's loader writes them.
        start_step, start_ns: of the vote that started it.
        begin_ns: when its transfer was handed to the stager.
        staged_ns: when the stager had its rows staged and proved.
        end_step: of the vote that committed or aborted it.
        commit_ns, end_ns: when its commit began and ended, on a device when it had been issued; of
            an abort both are when it was logged.
        rows: slots written here, 0 if it was aborted.
        received_bytes: from other ranks, 0 if it was aborted.
        committed: 1, or 0 if it was aborted.
    """

    generation: int
    plan: int
    sequence: int
    start_step: int
    start_ns: int
    begin_ns: int
    staged_ns: int
    end_step: int
    commit_ns: int
    end_ns: int
    rows: int
    received_bytes: int
    committed: int


TRANSFER = np.dtype([(name, "<i8") for name in Transfer._fields])
"""A `Transfer` as it lies in the log, field by field."""

_CELLS = TRANSFER.itemsize // 4


class RoundLog:
    """The log over `body` (uint8, `SIZE` bytes, zero at first)."""

    CAPACITY = 128
    SIZE = HeatRing.size(1, _CELLS, CAPACITY)

    def __init__(self, body: np.ndarray):
        self._ring = HeatRing(body, 1, _CELLS, self.CAPACITY)

    def add(self, transfer: Transfer) -> None:
        """Writer: one more round has ended."""
        cells = np.array(transfer, "<i8").view(np.int32).reshape(1, _CELLS)
        # crash point: log.before
        self._ring.push(transfer.end_step, transfer.end_ns, 0, 0, 0, cells)
        # crash point: log.after

    def follow(self) -> None:
        """Reader: start at the oldest record that still stands."""
        self._ring.follow()

    def read(self) -> np.ndarray:
        """Reader: `TRANSFER` records since the last call, oldest first, as they stand there."""
        return self._ring.read(self.CAPACITY).heat.reshape(-1).view(TRANSFER)

    @property
    def lost(self) -> int:
        """Reader: records that were overwritten before they could be read."""
        return self._ring.lost
