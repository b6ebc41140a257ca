"""An engine without torch, whose experts are one word each: rows, stager and routing columns.

A rank's live rows stand in `Figures.rows`, where the other ranks' stagers read them. The word of an
expert tells layer and expert, so a wrong row, like a wrong bit, is seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...loaders.errand import Errand, Result, my_rows
from .figures import Figures, Order, Rank

TRANSFER_STEPS = 2
"""Steps that a transfer takes at least."""


def contents(layers: int, experts: int) -> np.ndarray:
    """int64 [layers, experts]: the word of each expert."""
    numbers = np.arange(1, layers * experts + 1, dtype=np.uint64)
    return (numbers * np.uint64(0x9E3779B97F4A7C15)).view(np.int64).reshape(layers, experts)


class Columns:
    """Routing columns of every slot, as the commits bring them: int16 [layers, ranks, slots]."""

    def __init__(self, shape: tuple[int, ...]):
        self.committed = np.ones(shape, np.int16)
        self._coming: tuple[np.ndarray, np.ndarray | None] | None = None

    def promise(self, layers: np.ndarray, columns: np.ndarray | None) -> None:
        """Those of `layers` once the round under way is committed; None is one for each slot."""
        self._coming = layers, columns

    def commit(self) -> None:
        """The round is committed."""
        if self._coming is not None:
            layers, columns = self._coming
            self.committed[layers] = 1 if columns is None else columns
            self._coming = None


class RowEngine:
    """Implements `loaders/engine.Engine` as far as a loader without weight updates asks."""

    counts_own_slots = False
    routes_by_source = False

    def __init__(self, placement: np.ndarray):
        self.placement = placement
        self.weights: list[Any] = []
        self.buffer: list[Any] = []
        self.communicators: list[Any] = []
        self.loads: list[Any] = []
        self.columns = Columns(placement.shape)

    def replaced(self, layer: int) -> str:
        """See `Engine`: nobody replaces them."""
        return ""

    def tables(
        self, layers: np.ndarray, placement: np.ndarray, columns: np.ndarray | None
    ) -> tuple[list[Any], list[Any]]:
        """See `Engine`; what changes here are the columns alone."""
        self.columns.promise(layers, columns)
        return [], []


@dataclass(frozen=True)
class RowResult(Result):
    """A result whose commit writes words."""

    write: Callable[[], None] = field(default=lambda: None)

    def commit(self) -> None:
        """See `Result`."""
        self.write()


class RowStager:
    """Stands for `loaders/stager.Stager` without a thread: `advance` is called once per step."""

    def __init__(self, figures: Figures, rank: int, content: np.ndarray):
        self._figures = figures
        self._rank = rank
        self._content = content
        self._wait = 0
        self.result: Result | None = None
        self.busy = False
        self.waits = False
        self._errand = Errand(0, np.zeros(0), 0)

    def begin(self, errand: Errand) -> None:
        """See `Stager`."""
        assert not self.busy
        self.busy, self.result = True, None
        self._errand, self._wait = errand, TRANSFER_STEPS

    def leave(self) -> None:
        """See `Stager`; there are no connections."""

    def close(self) -> None:
        """See `Stager`."""

    def advance(self) -> None:
        """One more step has passed; the transfer may be through."""
        if not self.busy:
            return
        self._wait -= 1
        if self._wait > 0 or not self._sources_are_there():
            return
        self.result = self._look() if self._errand.beat is not None else self._stage()
        self.busy = False

    def _sources_are_there(self) -> bool:
        """A sender takes part when it has begun the same round: not before its last commit."""
        moves, told = self._errand.moves, self._figures.ranks[:, Rank.EPOCH]
        mine = my_rows(moves, self._rank) if len(moves) else []
        return all(told[moves[n]["source_rank"]] >= told[self._rank] for n in mine)

    def _look(self) -> Result:
        beat = self._errand.beat
        assert beat is not None
        found = self._figures.rows[self._rank, beat.layer, beat.slot]
        changed = bool(found != self._content[beat.layer, beat.expert])
        return Result(0, "a live expert has changed" if changed else "", changed, changed)

    def _stage(self) -> Result:
        errand, rows = self._errand, self._figures.rows
        if not errand.identity:
            return Result(0)
        mine = errand.moves[my_rows(errand.moves, self._rank)]
        expected = self._content[mine["layer"], mine["expert"]]
        arrived = rows[mine["source_rank"], mine["layer"], mine["source_slot"]]
        if (arrived != expected).any():
            return Result(errand.identity, "a source row is another", True, True)
        self._flip(arrived)
        if (arrived != expected).any():
            return Result(errand.identity, "a row arrived damaged", True)
        assert errand.tables is not None
        errand.tables()

        def write() -> None:
            rows[self._rank, mine["layer"], mine["slot"]] = arrived

        now = time.monotonic_ns()
        return RowResult(errand.identity, received_bytes=8 * len(mine), staged_ns=now, write=write)

    def _flip(self, arrived: np.ndarray) -> None:
        """Turn a bit of the first word around, if the supervisor has asked this rank for it."""
        told, order = self._figures.ranks[self._rank], self._figures.order
        due = order[Order.FLIP_RANK] == self._rank + 1
        if due and len(arrived) and told[Rank.FLIPPED] < order[Order.FLIPS]:
            arrived[0] ^= 1 << 17
            told[Rank.FLIPPED] = order[Order.FLIPS]
