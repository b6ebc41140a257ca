"""One stager at work, and those that hang: whose rows nobody may touch until they come back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..ipc.placement import MOVE
from .errand import Errand, Result, Tables, my_rows
from .patrol import Beat

if TYPE_CHECKING:
    from .stager import Stager

log = logging.getLogger("flash_eplb.loader")

MOST_HUNG = 8
"""Stagers that may hang before no other is started: each is a thread with connections."""


class _Hung(NamedTuple):
    stager: Stager
    rows: list[int]


class StagerPool:
    """Hands a round to a stager, and replaces a stager that does not come back.

    A receive that was aborted may still land, so its rows stay in quarantine until its stager ends;
    the rounds that follow get the other rows and connections of their own.

    Args:
        make: makes a stager with a thread and a transport of its own.
        rank: EP rank.
        rows: staging rows.
    """

    def __init__(self, make: Callable[[], Stager], rank: int, rows: int):
        self._make = make
        self._rank = rank
        self._free = list(range(rows))
        self._taken: list[int] = []
        self._hung: list[_Hung] = []
        self._stager = make()
        self._idle_since = 0  # the step up to which the stager was free, or had a round
        self._all_hang = False

    @property
    def busy(self) -> bool:
        """Whether the stager at work has something to do."""
        return self._stager.busy

    @property
    def waits(self) -> bool:
        """Whether the stager at work waits for other ranks."""
        return self._stager.waits

    @property
    def result(self) -> Result | None:
        """Of the latest errand of the stager at work."""
        return self._stager.result

    @property
    def rows(self) -> list[int]:
        """Staging rows of the latest errand, one for each move that arrives here."""
        return self._taken

    @property
    def quarantined(self) -> int:
        """Staging rows that hung stagers may still write to."""
        self._take_back()
        return sum(len(hung.rows) for hung in self._hung)

    def has_room(self, moves: np.ndarray) -> bool:
        """Whether there are rows for what arrives here."""
        self._take_back()
        return len(my_rows(moves, self._rank)) <= len(self._free)

    def connect(self, transport_epoch: int) -> None:
        """Open connections before the first plan needs them."""
        self.begin(0, np.zeros(0, MOVE), transport_epoch)

    def begin(
        self, identity: int, moves: np.ndarray, transport_epoch: int, tables: Tables | None = None
    ) -> None:
        """Hand over a round for which there is room. The stager at work must not be busy."""
        self._taken = self._free[: len(my_rows(moves, self._rank))]
        self._stager.begin(Errand(identity, moves, transport_epoch, tuple(self._taken), tables))

    def look(self, beat: Beat) -> None:
        """Look at a live expert; the answer's identity is 0. The stager must not be busy."""
        self._taken = []
        self._stager.begin(Errand(0, np.zeros(0, MOVE), 0, beat=beat))

    def give_up(self) -> bool:
        """The errand is of no more use: if its stager is still at it, another takes its place,
        unless too many hang; returns whether that is so."""
        if not self._stager.busy or len(self._hung) >= MOST_HUNG:
            return False
        self._hung.append(_Hung(self._stager, self._taken))
        self._free = [row for row in self._free if row not in self._taken]
        self._taken = []
        hung, self._stager = self._stager, self._make()
        hung.leave()
        return True

    def watch(self, step: int, most: int, has_round: bool) -> None:
        """Now and then: a look at an expert, or the first connections, must not hold up rounds for
        ever.

        Args:
            step: that has come.
            most: steps for which the stager may be busy without a round.
            has_round: whether one is under way, whose steps the ranks count.
        """
        busy = step - self._idle_since
        if not self._stager.busy or has_round:
            self._idle_since = step
        elif busy >= most:
            replaced = self.give_up()
            if replaced or not self._all_hang:
                log.warning(
                    "EP rank %d: its stager has been busy for %d steps without a round; %s",
                    self._rank,
                    busy,
                    "another one takes its place"
                    if replaced
                    else "so many hang that no other is started, and no expert moves until one "
                    "comes back",
                )
            self._all_hang = not replaced
            self._idle_since = step

    def _take_back(self) -> None:
        for hung in [hung for hung in self._hung if not hung.stager.busy]:
            self._hung.remove(hung)
            self._free = sorted([*self._free, *hung.rows])
            hung.stager.close()

    def close(self) -> None:
        """Let all threads end after what they are doing."""
        for stager in (self._stager, *(hung.stager for hung in self._hung)):
            stager.close()
