"""What a worker tells of itself: the status block, the placement board and the step timings.

Owner: the worker writes, anyone reads. The status block's words are independent counters. The
board is a seqlock (odd while it is written), so that placement and epoch are read together.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numba import njit

from .atomics import (
    WORD,
    _load_acquire,
    _store_release,
    copy_in,
    copy_out,
    fence_acquire,
    fence_release,
    load_acquire,
    store_release,
)
from .segment import ALIGNMENT, aligned


class State(IntEnum):
    """What a loader is doing."""

    IDLE = 0
    STAGING = 1
    HELD = 2
    STOPPED = 3


def state_name(word: int) -> str:
    """The name of the state in `word`, in lower case; any other word by its number."""
    try:
        return State(word).name.lower()
    except ValueError:
        return f"unknown ({word})"


class Field(IntEnum):
    """Words of the status block. `*_ROUND` hold sequence numbers of the planner's generation."""

    STEP = 0
    EPOCH = 1
    STATE = 2
    GENERATION = 3
    COMMITTED_ROUND = 4
    DROPPED_ROUND = 5
    COMMITTED = 6
    ABORTED = 7
    REFUSED = 8
    STALE = 9
    MOVED_ROWS = 10
    RECEIVED_BYTES = 11
    MISMATCHES = 12
    HEAT_MERGED = 13
    HEAT_DROPPED = 14
    QUARANTINED_ROWS = 15
    DAMAGED = 16


class StatusBlock:
    """Counters over `body` (uint8, `SIZE` bytes)."""

    SIZE = 8 * 32

    def __init__(self, body: np.ndarray):
        self._words = body[: self.SIZE].view(WORD)
        self._plain = self._words.data

    def show(self, field: Field, value: int) -> None:
        """Writer: as `self[field] = value`, a tenth of the time; it orders nothing else."""
        self._plain[field] = value

    def __getitem__(self, field: Field) -> int:
        return load_acquire(self._words, int(field))

    def __setitem__(self, field: Field, value: int) -> None:
        # crash point: status.old
        store_release(self._words, int(field), value)
        # crash point: status.new

    def add(self, field: Field, amount: int = 1) -> None:
        """Writer: count `amount` more; it orders nothing else."""
        self._plain[field] += amount

    def snapshot(self) -> dict[str, int]:
        """All fields by name, in lower case."""
        return {field.name.lower(): self[field] for field in Field}


_CELLS = ALIGNMENT // 8
"""First word of the cells, int16 each."""


@njit(cache=True)
def _write_board(words, epoch, placement):
    sequence = words[0]
    # crash point: board.begin
    _store_release(words, 0, sequence + 1)
    # crash point: board.odd
    fence_release()
    words[1] = epoch
    # crash point: board.epoch
    copy_in(words, _CELLS, placement)
    # crash point: board.cells
    _store_release(words, 0, sequence + 2)
    # crash point: board.even


@njit(cache=True, nogil=True)
def _read_board(words, out):
    before = _load_acquire(words, 0)
    epoch = words[1]
    copy_out(words, _CELLS, out)
    fence_acquire()
    return before, _load_acquire(words, 0), epoch


class Board:
    """Committed placement and its epoch over `body` (uint8, `size(cells)` bytes).

    A planner that starts anew reads here where the experts really are.
    """

    def __init__(self, body: np.ndarray, shape: tuple[int, int, int]):
        self._shape = shape
        self._words = body[: self.size(int(np.prod(shape)))].view(WORD)

    @staticmethod
    def size(cells: int) -> int:
        """Bytes of a board of `cells` slots."""
        return ALIGNMENT + aligned(2 * cells)

    def write(self, epoch: int, placement: np.ndarray) -> None:
        """Writer: show `placement` (int [layers, ranks, slots]) as of `epoch`.

        Raises:
            ValueError: it has another shape; nothing is written.
        """
        if placement.shape != self._shape:
            raise ValueError(f"placement has shape {placement.shape}; the board is {self._shape}")
        _write_board(self._words, epoch, placement.astype(np.int16, order="C"))

    def read(self) -> tuple[int, np.ndarray] | None:
        """(epoch, int32 [layers, ranks, slots]); None if it is being written or never was.

        Both as they stand there: whoever relies on them checks them.
        """
        out = np.empty(self._shape, np.int16)
        before, after, epoch = _read_board(self._words, out)
        if before != after or before == 0 or before % 2:
            return None
        return int(epoch), out.astype(np.int32)


class StepTimings:
    """The latest `CAPACITY` steps: nanoseconds in our `step()` and between two of its calls.

    Read for statistics only; a sample that is being overwritten may mix two steps.
    """

    CAPACITY = 4096
    SIZE = ALIGNMENT + 2 * 8 * CAPACITY

    def __init__(self, body: np.ndarray):
        self._count = body[:8].view(WORD)
        self._samples = body[ALIGNMENT : self.SIZE].view(WORD).reshape(self.CAPACITY, 2)
        self._plain = body[: self.SIZE].view(WORD).data

    def add(self, spent: int, period: int) -> None:
        """Writer: one more step."""
        words = self._plain
        count = words[0]
        cell = ALIGNMENT // 8 + 2 * (count % self.CAPACITY)
        words[cell] = spent
        words[cell + 1] = period
        words[0] = count + 1

    def read(self) -> np.ndarray:
        """int64 [steps, 2]: spent and period of the latest steps, in no order."""
        return self._samples[: min(max(0, int(self._count[0])), self.CAPACITY)].copy()
