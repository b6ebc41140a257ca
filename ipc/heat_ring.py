"""The heat ring: one record per step, from a worker to any number of readers.

Owner: the worker is the only writer; readers map it read-only and keep their cursor to themselves.
The writer never waits and overwrites the oldest record. A slot is a seqlock: its sequence word is
odd while record i is written (2i+1) and 2i+2 once it stands. A reader takes a record only if the
word read 2i+2 before and after the copy, and counts it as lost otherwise, so a record is never
torn and a loss is never silent. A writer that dies in a record leaves the head where it was.

    word 0            head: records written so far
    from byte 64 on   slots: 8 words (sequence, step, time, tokens, flags, epoch, span, bits), then
                      uint16[layers, columns] if `bits` says so, else int32[layers, columns]

Counts of a step seldom need more than 16 bits. Half the bytes take little more than half the time
to write, and leave more of the cache to the engine.
"""

from __future__ import annotations

from typing import NamedTuple

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
    narrow_in,
    widen_out,
)
from .segment import ALIGNMENT, aligned

_AT_ONCE = 2**21
"""Bytes that are read at once; the allocator takes larger blocks afresh from the kernel."""

OVERTAKEN_SHARE = 4
"""A reader that is overtaken gives up a fourth of the ring at once: it would be overtaken again at
each record of it, and copy them all in vain."""

_SLOT_WORDS = 8
_FIRST = ALIGNMENT // 8
_STEP, _TIME, _TOKENS, _FLAGS, _EPOCH, _SPAN, _BITS = 1, 2, 3, 4, 5, 6, 7
_FIELDS = 6


class HeatRecords(NamedTuple):
    """Records read at once; the first axis is the record, oldest first.

    `heat` is int32 [records, layers, columns], the other fields int64 [records]; `times` are
    nanoseconds of the monotonic clock, `spans` the steps up to `steps` that a record sums up.
    """

    steps: np.ndarray
    times: np.ndarray
    tokens: np.ndarray
    flags: np.ndarray
    epochs: np.ndarray
    spans: np.ndarray
    heat: np.ndarray


@njit(cache=True)
def _push(words, slot, index, step, time, tokens, flags, epoch, span, counts):
    """Write record `index` to the slot whose first word is `slot`."""
    # crash point: ring.begin
    _store_release(words, slot, 2 * index + 1)
    # crash point: ring.odd
    fence_release()
    words[slot + _STEP] = step
    words[slot + _TIME] = time
    words[slot + _TOKENS] = tokens
    # crash point: ring.fields
    words[slot + _FLAGS] = flags
    words[slot + _EPOCH] = epoch
    words[slot + _SPAN] = span
    # crash point: ring.named
    bits = 16
    if narrow_in(words, slot + _SLOT_WORDS, counts) >> 16:
        # crash point: ring.narrowed
        bits = 32
        copy_in(words, slot + _SLOT_WORDS, counts)
    # crash point: ring.copied
    words[slot + _BITS] = bits
    _store_release(words, slot, 2 * index + 2)
    # crash point: ring.even
    _store_release(words, 0, index + 1)
    # crash point: ring.head


@njit(cache=True, nogil=True)
def _read(words, slot_words, slots, cursor, meta, heat):
    """Copy records from `cursor` on; returns (records, lost, cursor)."""
    head = _load_acquire(words, 0)
    found = 0
    lost = 0
    if head - cursor > slots:
        lost = head - slots - cursor
        cursor = head - slots
    while cursor < head and found < meta.shape[0]:
        slot = _FIRST + cursor % slots * slot_words
        ahead = cursor + 1
        if _load_acquire(words, slot) == 2 * cursor + 2:
            for field in range(_FIELDS):
                meta[found, field] = words[slot + _STEP + field]
            if words[slot + _BITS] == 16:
                widen_out(words, slot + _SLOT_WORDS, heat[found])
            else:
                copy_out(words, slot + _SLOT_WORDS, heat[found])
            fence_acquire()
            if _load_acquire(words, slot) == 2 * cursor + 2:
                found += 1
                cursor += 1
                continue
            # The writer came by, and will come by the next ones before they are copied.
            ahead = max(ahead, _load_acquire(words, 0) - slots + slots // OVERTAKEN_SHARE)
            ahead = min(head, ahead)
        lost += ahead - cursor
        cursor = ahead
    return found, lost, cursor


class HeatRing:
    """The ring over `body`; give the writer and every reader an object of their own.

    Args:
        body: uint8 view of `size(layers, columns, slots)` bytes, zero at first.
        layers: layers of a record.
        columns: physical experts of a record.
        slots: records that the ring holds.
    """

    def __init__(self, body: np.ndarray, layers: int, columns: int, slots: int):
        self.layers = layers
        self.columns = columns
        self.slots = slots
        self.lost = 0
        self._counts_bytes = 4 * layers * columns
        self._slot_words = self.slot_bytes(layers, columns) // 8
        self._words = body[: self.size(layers, columns, slots)].view(WORD)
        self._index = int(self._words[0])
        self._cursor = 0
        none = np.empty(0, np.int64)
        cells = np.empty((0, layers, columns), np.int32)
        self._nothing = HeatRecords(none, none, none, none, none, none, cells)

    @staticmethod
    def slot_bytes(layers: int, columns: int) -> int:
        """Bytes of one record in the ring."""
        return 8 * _SLOT_WORDS + aligned(4 * layers * columns)

    @staticmethod
    def size(layers: int, columns: int, slots: int) -> int:
        """Bytes of a ring."""
        return ALIGNMENT + slots * HeatRing.slot_bytes(layers, columns)

    def push(
        self,
        step: int,
        time: int,
        tokens: int,
        flags: int,
        epoch: int,
        counts: np.ndarray,
        span: int = 1,
    ) -> None:
        """Write one record.

        Args:
            step: number of the step, or of the latest of `span` steps.
            time: nanoseconds of the monotonic clock.
            tokens: of the forward passes.
            flags: of `flags.py`.
            epoch: rounds committed before the forward passes.
            counts: int32[layers, columns], contiguous.
            span: steps that `counts` sums up.

        Raises:
            ValueError: `counts` is not of the record's size or type.
        """
        is_whole = counts.nbytes == self._counts_bytes and counts.flags.c_contiguous
        if not is_whole or counts.dtype != np.int32:
            raise ValueError(
                f"counts are {counts.dtype}{list(counts.shape)}; a record holds contiguous "
                f"int32{[self.layers, self.columns]}"
            )
        index = self._index
        slot = _FIRST + index % self.slots * self._slot_words
        _push(self._words, slot, index, step, time, tokens, flags, epoch, span, counts)
        self._index = index + 1

    @property
    def written(self) -> int:
        """Records written so far."""
        return load_acquire(self._words, 0)

    def follow(self) -> int:
        """Reader: start at the oldest record that still stands; what is gone is not lost to it.

        Returns how many were written before that one.
        """
        self._cursor = max(0, int(self._words[0]) - self.slots)
        return self._cursor

    def read(self, most: int = 64) -> HeatRecords:
        """Reader: records since the last call.

        `most` at most, and of large ones as many as memory is at hand for without page faults.
        `lost` counts those that were overwritten before they could be read; where that befell all
        of these, none is returned although later ones may stand.
        """
        there = load_acquire(self._words, 0) - self._cursor
        if there < 0:  # no writer takes records back: what was read as the head was none
            self.follow()
            there = 0
        if not there:
            return self._nothing
        room = min(most, there, self.slots, max(1, _AT_ONCE // max(1, self._counts_bytes)))
        meta = np.empty((room, _FIELDS), np.int64)
        heat = np.empty((room, self.layers, self.columns), np.int32)
        found, lost, self._cursor = _read(
            self._words, self._slot_words, self.slots, self._cursor, meta, heat
        )
        self.lost += lost
        steps, times, tokens, flags, epochs, spans = meta[:found].T
        return HeatRecords(steps, times, tokens, flags, epochs, spans, heat[:found])
