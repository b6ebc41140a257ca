"""The audit: a reader of its own at every heat ring, who believes nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ...planners.group import Group


@dataclass
class Books:
    """What an audit has found.

    Attributes:
        read: records.
        lost: records that were overwritten before they were read.
        torn: records that do not add up, or whose step or epoch goes back.
        unaccounted: records that were written, and neither read nor lost.
    """

    read: int = 0
    lost: int = 0
    torn: int = 0
    unaccounted: int = 0


class Audit:
    """Reads the rings of one engine.

    Args:
        group: the engine, as the supervisor has it; nobody else reads through it.
        top_k: experts per token: what a record's layers sum to, over its tokens.
        books: to go on with.
    """

    def __init__(self, group: Group, top_k: int, books: Books):
        self._group = group
        self._top_k = top_k
        self._books = books
        self._first = [rank.heat.follow() for rank in group.ranks]
        self._read = [0] * len(group.ranks)
        self._last = [(0, 0)] * len(group.ranks)
        self._next = 0

    def look(self, seconds: float) -> None:
        """Read what there is, for about so long, the ranks by turns."""
        until = time.perf_counter() + seconds
        for _ in self._group.ranks:
            if time.perf_counter() > until:
                return
            self._read_rank(self._next)
            self._next = (self._next + 1) % len(self._group.ranks)

    def close(self) -> None:
        """The engine writes no more: read the rest, and do the sum."""
        for number, rank in enumerate(self._group.ranks):
            while self._read_rank(number):
                pass
            written = rank.heat.written - self._first[number]
            self._books.unaccounted += abs(written - self._read[number] - rank.heat.lost)

    def _read_rank(self, number: int) -> int:
        """Returns how many records were read or found to be lost."""
        ring, books = self._group.ranks[number].heat, self._books
        lost = ring.lost
        found = ring.read()
        count = len(found.steps)
        sums = found.heat.sum(2)
        books.torn += int((sums != (found.tokens * self._top_k)[:, None]).any(1).sum())
        for step, epoch in zip(found.steps.tolist(), found.epochs.tolist(), strict=True):
            last = self._last[number]
            books.torn += step <= last[0] or epoch < last[1]
            self._last[number] = step, epoch
        self._read[number] += count
        books.read += count
        books.lost += ring.lost - lost
        return count + ring.lost - lost
