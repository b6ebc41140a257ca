"""The ballot box: how the ranks of one host vote without a system call.

It lies in rank 0's segment. Each rank writes its own two ballots there, by turns, and reads all.
A ballot counts once its number stands in it, which is stored last. The ballot of vote n is written
over by that of vote n + 2, which its rank casts only after it has read vote n + 1 in full; every
rank that has cast n + 1 has read n before. So nobody writes what another one still reads.

A rank that dies leaves its vote uncast; the others see which one it is.

    per rank and turn: number, then the words of the ballot
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .atomics import WORD, _load_acquire, _store_release
from .segment import ALIGNMENT

WORDS = 9
"""Words of a ballot."""

_CELL = 2 * ALIGNMENT // 8  # words from one ballot to the next, in cache lines of their own


@njit(cache=True)
def _cast(box, cell, number, words):
    for i in range(len(words)):
        box[cell + 1 + i] = words[i]
    _store_release(box, cell, number)


@njit(cache=True)
def _tally(box, ranks, number, lowest):
    """The rank whose vote is missing, or -1 and the lowest of each word in `lowest`."""
    for rank in range(ranks):
        cell = (2 * rank + number % 2) * _CELL
        if _load_acquire(box, cell) != number:
            return rank
        for i in range(len(lowest)):
            word = box[cell + 1 + i]
            lowest[i] = word if rank == 0 else min(lowest[i], word)
    return -1


class BallotBox:
    """The box over `body` (uint8, `size(ranks)` bytes), as one rank uses it."""

    def __init__(self, body: np.ndarray, ranks: int):
        self._ranks = ranks
        self._box = body[: self.size(ranks)].view(WORD)
        self._words = np.zeros(WORDS, np.int64)
        self._lowest = np.zeros(WORDS, np.int64)

    @staticmethod
    def size(ranks: int) -> int:
        """Bytes of the box of a group."""
        return ranks * 2 * _CELL * 8

    def cast(self, rank: int, number: int, words: list[int]) -> None:
        """Put `words` (`WORDS` integers) in as the vote of `rank` number `number`, from 1 on."""
        self._words[:] = words
        _cast(self._box, (2 * rank + number % 2) * _CELL, number, self._words)

    def tally(self, number: int) -> tuple[int, list[int]]:
        """(-1, the minimum of each word) of vote `number`, or (a rank that has not cast it, [])."""
        missing = int(_tally(self._box, self._ranks, number, self._lowest))
        return missing, self._lowest.tolist() if missing < 0 else []
