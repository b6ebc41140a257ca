"""What the processes of a stress tell one another: words and sums in a file that all of them map.

Owner: the supervisor makes the file and removes it. Each word has one writer: the supervisor those
of `Order`, a rank's process those of its ranks, the planner's process those of `Planned`. All are
counters or levels that stand for themselves, so nothing here needs an order.
"""

from __future__ import annotations

import os
from enum import IntEnum
from pathlib import Path

import msgspec
import numpy as np


class Order(IntEnum):
    """What the supervisor wants."""

    END_STEP = 0
    """Step after which all ranks end; 0: not yet."""
    SHUFFLES = 1
    """How often other experts have become hot at once."""
    JUMP_NS = 2
    """Nanoseconds that every clock is off."""
    SLOW_RANK = 3
    """Rank that sleeps at each step, plus 1; 0: none."""
    SLOW_NS = 4
    """Nanoseconds that it sleeps."""
    FLIP_RANK = 5
    """Rank that a wrong bit arrives on, plus 1; 0: none."""
    FLIPS = 6
    """Wrong bits that have been asked for so far."""
    GO = 7
    """Whether all segments are there, so that they are published and the steps begin."""


class Rank(IntEnum):
    """What a rank tells."""

    PID = 0
    READY = 1
    """Whether its segment is there."""
    STEP = 2
    EPOCH = 3
    FLIPPED = 4
    """Wrong bits that it has let in."""
    CHECKED = 5
    """Commits after which all its slots were compared."""
    WRONG = 6
    """Slots that held another expert than the placement says."""
    COMPARED = 7
    """Tokens whose outputs were compared with those of a run on one process."""
    DIFFER = 8
    STOPPED = 9
    """Whether its loader has stopped balancing."""
    BEHIND_NS = 10
    """Nanoseconds by which its steps are behind the asked pace."""
    PORT = 11
    """Where the ranks meet; rank 0 tells it."""


class Planned(IntEnum):
    """What the planner's process tells of this run of it; all start at 0 with each."""

    PID = 0
    SERVING = 1
    STEPS = 2
    """Steps of heat that it has taken."""
    STEP = 3
    """The latest of them."""
    LOST = 4
    """Records that were overwritten before it read them."""
    MOST_BEHIND = 5
    """Steps that stood in the rings, unread, at most."""
    PLANS = 6
    PLANNING_NS = 7
    LONGEST_PLANNING_NS = 8


WORDS = 16


class Layout(msgspec.Struct, frozen=True):
    """Sizes of the arrays; `hosts` are the processes that run ranks."""

    hosts: int
    ranks: int
    layers: int
    experts: int
    slots: int


class Figures:
    """The arrays over one file; OSError where it has no room.

    Attributes:
        order: int64 [WORDS], see `Order`.
        ranks: int64 [ranks, WORDS], see `Rank`.
        planned: int64 [WORDS], see `Planned`.
        tokens: int64 [hosts, layers, experts], by logical expert, so far.
        loads: int64 [hosts, layers, ranks], tokens that were sent to each rank, so far.
        rows: int64 [ranks, layers, slots], the live rows of an engine whose rows are one word.
    """

    def __init__(self, path: Path, layout: Layout, create: bool = False):
        shapes = {
            "order": (WORDS,),
            "ranks": (layout.ranks, WORDS),
            "planned": (WORDS,),
            "tokens": (layout.hosts, layout.layers, layout.experts),
            "loads": (layout.hosts, layout.layers, layout.ranks),
            "rows": (layout.ranks, layout.layers, layout.slots),
        }
        sizes = [int(np.prod(shape)) for shape in shapes.values()]
        if create:
            _reserve(path, 8 * sum(sizes))
        words = np.memmap(path, np.int64, "r+", shape=(sum(sizes),))
        areas = np.split(np.asarray(words), np.cumsum(sizes)[:-1])
        for name, area in zip(shapes, areas, strict=True):
            setattr(self, name, area.reshape(shapes[name]))

    order: np.ndarray
    ranks: np.ndarray
    planned: np.ndarray
    tokens: np.ndarray
    loads: np.ndarray
    rows: np.ndarray


def _reserve(path: Path, size: int) -> None:
    """A file of `size` zeros whose pages are there: of one that is full a write would be SIGBUS."""
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
