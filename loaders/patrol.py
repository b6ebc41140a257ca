"""The patrol: live experts looked at one by one while no round is under way, move they or not.

It finds weights that were written in a way we do not see, and memory that has gone bad, within
layers * slots * `every` steps in which nothing moves.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Beat(NamedTuple):
    """A live expert to be looked at: what stands in `slot` of `layer` must be `expert`."""

    layer: int
    slot: int
    expert: int


class Patrol:
    """Which expert of this rank comes next, and when.

    Args:
        layers, slots: of the rank.
        every: steps from one expert to the next; 0: never.
    """

    def __init__(self, layers: int, slots: int, every: int):
        self._slots = slots
        self._round = layers * slots
        self._every = every
        self._turn = 0
        self._due = every

    def next(self, step: int, placement: np.ndarray) -> Beat | None:
        """The expert to look at in this step, if one is due.

        Args:
            step: grows from call to call.
            placement: int [layers, slots] of this rank, as it is committed.
        """
        if not self._every or step < self._due:
            return None
        self._due = step + self._every
        layer, slot = divmod(self._turn % self._round, self._slots)
        self._turn += 1
        return Beat(layer, slot, int(placement[layer, slot]))
