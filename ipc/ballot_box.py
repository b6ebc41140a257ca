"""The ballot box: how the ranks of one host vote without a system call.

It lies in rank 0's segment. Each rank writes its own two ballots there, by turns, and reads all.
A ballot counts once its number stands in it, which is stored last. The ballot of vote n is written
over by that of vote n + 2, which its rank casts only after it has read vote n + 1 in full; every
rank that has cast n + 1 has read n before. So nobody writes what another one still reads.

A rank that dies leaves its vote uncast; the others see which one it is. How a vote ends is settled
by one word, so that a rank that waits no longer and one that is only late come to the same end:

    2 n        votes 1 to n are complete: who has not acted on them does so
    2 n - 1    vote n is closed: nobody acts on it, nor on any after it; 1 to n - 1 are complete

It begins as 0 and grows by one compare-and-swap from 2 n - 2: to 2 n by whoever has found all
ballots of vote n and is about to act on it, to 2 n - 1 by whoever gives it up. Both obey what
stands there afterwards, their own or another's. That suffices, for a rank that is at vote n

- has seen vote n - 1 settled as complete, so that the word is 2 n - 2 at least;
- has not cast vote n + 1, so that this is not complete, and the word is 2 n + 1 at most; and that,
  which others may have reached, says that vote n is complete.

So of 2 n and 2 n - 1 one is reached first and the other never. Who gives up and finds 2 n reads all
ballots: the swap that it lost was made after they had been seen, and synchronizes with its own.

    per rank and turn: number, then the words of the ballot
    then: the word that settles
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .atomics import WORD, _compare_and_swap, _load_acquire, _store_release
from .segment import ALIGNMENT

WORDS = 9
"""Words of a ballot."""

COMPLETE = -1
CLOSED = -2
"""How a vote was settled, in place of a rank that has not cast it."""

_CELL = 2 * ALIGNMENT // 8  # words from one ballot to the next, in cache lines of their own


@njit(cache=True)
def _cast(box, cell, number, words):
    # crash point: box.cast.words
    for i in range(len(words)):
        box[cell + 1 + i] = words[i]
    # crash point: box.cast.number
    _store_release(box, cell, number)
    # crash point: box.cast.end


@njit(cache=True)
def _settle(box, ranks, number, word):
    """Settle vote `number` by `word` unless another rank has; whether it is complete."""
    undecided = 2 * number - 2
    # crash point: box.settle.begin
    found = _compare_and_swap(box, 2 * ranks * _CELL, undecided, word)
    # crash point: box.settle.end
    return (word if found == undecided else found) >= 2 * number


@njit(cache=True)
def _tally(box, ranks, number, lowest):
    """COMPLETE, with the lowest of each word in `lowest`, or CLOSED, or a rank that is missing."""
    for rank in range(ranks):
        cell = (2 * rank + number % 2) * _CELL
        if _load_acquire(box, cell) != number:
            return CLOSED if _load_acquire(box, 2 * ranks * _CELL) == 2 * number - 1 else rank
        for i in range(len(lowest)):
            word = box[cell + 1 + i]
            lowest[i] = word if rank == 0 else min(lowest[i], word)
    return COMPLETE if _settle(box, ranks, number, 2 * number) else CLOSED


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
        return (2 * ranks + 1) * _CELL * 8

    def cast(self, rank: int, number: int, words: list[int]) -> None:
        """Put `words` (`WORDS` integers) in as the vote of `rank` number `number`, from 1 on."""
        self._words[:] = words
        _cast(self._box, (2 * rank + number % 2) * _CELL, number, self._words)

    def tally(self, number: int) -> tuple[int, list[int]]:
        """How vote `number` stands, of which the caller has read all before.

        Returns:
            (COMPLETE, the minimum of each word): all ranks act on it. Or (CLOSED, []): none does.
            Or (a rank that has not cast it, []): that is still open.
        """
        found = int(_tally(self._box, self._ranks, number, self._lowest))
        return found, self._lowest.tolist() if found == COMPLETE else []

    def close(self, number: int) -> bool:
        """Give up vote `number` for all ranks; False if it is complete, and must be acted on."""
        return not _settle(self._box, self._ranks, number, 2 * number - 1)
