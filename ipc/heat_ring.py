"""The heat ring: one record per step, from a worker to any number of readers.

Owner: the worker is the only writer; readers map it read-only and keep their cursor to themselves.
The writer never waits and overwrites the oldest record. A slot is a seqlock: its sequence word is
odd while record i is written (2i+1) and 2i+2 once it stands. A reader takes a record only if the
word read 2i+2 before and after the copy, and counts it as lost otherwise, so a record is never
torn and a loss is never silent. A writer that dies in a record leaves the head where it was.

    word 0            head: records written so far
    from byte 64 on   slots: 8 words (sequence, step, time, tokens, flags, epoch, -, -), then
                      int32[layers, columns]
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from .atomics import WORD, _load_acquire, _store_release, fence_acquire, fence_release
from .segment import ALIGNMENT, aligned

FLAG_DUMMY = 1
"""The step was a dummy: it kept the ranks together and its heat is zero."""

_SLOT_WORDS = 8
_STEP, _TIME, _TOKENS, _FLAGS, _EPOCH = 1, 2, 3, 4, 5


class HeatRecords(NamedTuple):
    """Records read at once; the first axis is the record, oldest first.

    `heat` is int32 [records, layers, columns], the other fields int64 [records]; `times` are
    nanoseconds of the monotonic clock.
    """

    steps: np.ndarray
    times: np.ndarray
    tokens: np.ndarray
    flags: np.ndarray
    epochs: np.ndarray
    heat: np.ndarray


@njit(cache=True, nogil=True)
def _begin(words, slot, index, step, time, tokens, flags, epoch):
    _store_release(words, slot, 2 * index + 1)
    fence_release()
    words[slot + 1] = step
    words[slot + 2] = time
    words[slot + 3] = tokens
    words[slot + 4] = flags
    words[slot + 5] = epoch


@njit(cache=True, nogil=True)
def _move_counts(counts, payload, start):
    """Copy `counts` to `payload` from `start` on and set them to zero, in one pass."""
    for layer in range(counts.shape[0]):
        for column in range(counts.shape[1]):
            payload[start + layer, column] = counts[layer, column]
            counts[layer, column] = 0


@njit(cache=True, nogil=True)
def _end(words, slot, index):
    _store_release(words, slot, 2 * index + 2)
    _store_release(words, 0, index + 1)


@njit(cache=True, nogil=True)
def _read(words, slot_words, slots, payloads, cursor, meta, heat):
    """Copy records from `cursor` on; returns (records, lost, cursor)."""
    head = _load_acquire(words, 0)
    found = 0
    lost = 0
    if head - cursor > slots:
        lost = head - slots - cursor
        cursor = head - slots
    while cursor < head and found < meta.shape[0]:
        place = cursor % slots
        word = 8 + place * slot_words
        whole = False
        if _load_acquire(words, word) == 2 * cursor + 2:
            for field in range(5):
                meta[found, field] = words[word + 1 + field]
            heat[found] = payloads[place]
            fence_acquire()
            whole = _load_acquire(words, word) == 2 * cursor + 2
        if whole:
            found += 1
        else:
            lost += 1
        cursor += 1
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
        self.slots = slots
        self.lost = 0
        slot_bytes = _slot_bytes(layers, columns)
        self._slot_words = slot_bytes // 8
        self._words = body.view(WORD)
        area = body[ALIGNMENT : ALIGNMENT + slots * slot_bytes].reshape(slots, slot_bytes)
        counts = area[:, 8 * _SLOT_WORDS : 8 * _SLOT_WORDS + 4 * layers * columns].view("<i4")
        self._payloads = counts.reshape(slots, layers, columns)
        self._index = int(self._words[0])
        self._cursor = 0
        self._shape = (layers, columns)

    @staticmethod
    def size(layers: int, columns: int, slots: int) -> int:
        """Bytes of a ring."""
        return ALIGNMENT + slots * _slot_bytes(layers, columns)

    def push(
        self, step: int, time: int, tokens: int, flags: int, epoch: int, counts: list[np.ndarray]
    ) -> None:
        """Write one record and set `counts` (int32 [layers of a model, columns] each) to zero."""
        index = self._index
        place = index % self.slots
        slot = 8 + place * self._slot_words
        _begin(self._words, slot, index, step, time, tokens, flags, epoch)
        start = 0
        for model in counts:
            _move_counts(model, self._payloads[place], start)
            start += model.shape[0]
        _end(self._words, slot, index)
        self._index = index + 1

    def follow(self) -> None:
        """Reader: start at the oldest record that still stands; what is gone is not lost to it."""
        self._cursor = max(0, int(self._words[0]) - self.slots)

    def read(self, most: int = 64) -> HeatRecords:
        """Reader: up to `most` records since the last call; `lost` counts the overwritten ones."""
        meta = np.empty((most, 5), np.int64)
        heat = np.empty((most, *self._shape), np.int32)
        found, lost, self._cursor = _read(
            self._words, self._slot_words, self.slots, self._payloads, self._cursor, meta, heat
        )
        self.lost += lost
        steps, times, tokens, flags, epochs = meta[:found].T
        return HeatRecords(steps, times, tokens, flags, epochs, heat[:found])


def _slot_bytes(layers: int, columns: int) -> int:
    return 8 * _SLOT_WORDS + aligned(4 * layers * columns)
