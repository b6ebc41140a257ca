"""The plan queue: rounds from the planner to one rank's loader.

Owner: the worker creates it. Producer: the planner whose generation stands in it, one at a time.
Consumer: the loader. A record is seen only once the head has moved past it, so a producer that
dies while writing leaves nothing. A new planner writes its generation first; the loader drops
records of other generations. An empty poll costs one load. A head that is not 0 to `SLOTS`
records ahead of the tail is no producer's work: the consumer drops what is there and goes on.

    word 0   head: records written          word 8    tail: records read (in its own cache line)
    word 16  generation of the producer
    from byte 192 on   slots: version, bytes, crc (uint32 each), -, then the record
"""

from __future__ import annotations

import struct
import zlib
from typing import NoReturn

import numpy as np

from .atomics import WORD, load_acquire, store_release
from .round import RoundError
from .segment import ALIGNMENT, aligned

RECORD_VERSION = 2
SLOTS = 4
"""Rounds that may wait; the planner keeps the others to itself."""

_HEAD, _TAIL, _GENERATION = 0, 8, 16
_LAST = 2**63 - 1
_FIRST = 3 * ALIGNMENT
_PREFIX = struct.Struct("<IIII")


class PlanQueue:
    """The queue over `body` (uint8, `size(limit)` bytes) for records of at most `limit` bytes."""

    def __init__(self, body: np.ndarray, limit: int):
        self.limit = limit
        self._words = body[: len(body) // 8 * 8].view(WORD)
        self._plain = self._words.data
        self._slot_bytes = aligned(_PREFIX.size + limit)
        self._slots = body[_FIRST : _FIRST + SLOTS * self._slot_bytes].reshape(SLOTS, -1)
        self._tail = int(self._words[_TAIL])

    @staticmethod
    def size(limit: int) -> int:
        """Bytes of a queue."""
        return _FIRST + SLOTS * aligned(_PREFIX.size + limit)

    @property
    def generation(self) -> int:
        """Generation of the planner that writes here; 0 before the first."""
        return load_acquire(self._words, _GENERATION)

    def take_over(self, generation: int) -> None:
        """Producer: from now on the records are this planner's."""
        # crash point: queue.take_over.old
        store_release(self._words, _GENERATION, generation)
        # crash point: queue.take_over.new

    def is_full(self) -> bool:
        """Producer: whether `put` would find no slot, or a head that cannot move on."""
        head = load_acquire(self._words, _HEAD)
        waiting = head - load_acquire(self._words, _TAIL)
        return head == _LAST or not 0 <= waiting < SLOTS

    def put(self, record: bytes) -> None:
        """Producer: append `record`; ask `is_full` before.

        Raises:
            ValueError: the queue is full, or the record is longer than `limit`.
        """
        self.append(record, zlib.crc32(record))

    def append(self, record: bytes, checksum: int) -> None:
        """Producer: as `put`, with a checksum that need not be right: a stress writes wrong ones.

        Raises:
            ValueError: as `put`.
        """
        if len(record) > self.limit or self.is_full():
            raise ValueError(f"no room for {len(record)} bytes (limit {self.limit})")
        head = load_acquire(self._words, _HEAD)
        slot = self._slots[head % SLOTS]
        prefix = _PREFIX.pack(RECORD_VERSION, len(record), checksum, 0)
        # crash point: queue.put.begin
        slot[: len(prefix) + len(record)] = np.frombuffer(prefix + record, np.uint8)
        # crash point: queue.put.slot
        store_release(self._words, _HEAD, head + 1)
        # crash point: queue.put.head

    def has_record(self) -> bool:
        """Consumer: whether a record waits; one plain load, `get` makes sure."""
        return self._plain[_HEAD] != self._tail

    def get(self) -> bytes:
        """Consumer: the oldest waiting record; it is taken even if it turns out to be damaged.

        Raises:
            RoundError: another version of records, a CRC that does not fit, or no record.
        """
        waiting = load_acquire(self._words, _HEAD) - self._tail
        if not 0 < waiting <= SLOTS:
            self._skip(waiting)
        # crash point: queue.get.begin
        slot = self._slots[self._tail % SLOTS]
        version, length, crc, _ = _PREFIX.unpack_from(slot)
        record = slot[_PREFIX.size :][:length].tobytes()
        # crash point: queue.get.slot
        self._tail += 1
        store_release(self._words, _TAIL, self._tail)
        # crash point: queue.get.tail
        if version != RECORD_VERSION:
            raise RoundError(
                f"record version {version}, this loader reads {RECORD_VERSION}; "
                "run the same flash_eplb in the workers and the planner"
            )
        if len(record) != length or zlib.crc32(record) != crc:
            raise RoundError("its checksum does not fit")
        return record

    def _skip(self, waiting: int) -> NoReturn:
        """Consumer: go on where the head stands, so that nobody asks for ever."""
        self._tail += waiting
        store_release(self._words, _TAIL, self._tail)
        raise RoundError(
            f"{waiting} records wait in a plan queue that holds {SLOTS}; they are dropped"
        )
