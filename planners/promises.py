"""What each layer's last plan promised, and which layers are due for another."""

from __future__ import annotations

import numpy as np

from .forecast import DOUBT
from .window import Offer, Window

PATIENCE = 8
"""Calls in a row in which a layer is due and stays as it is: then it does so for good."""

OPTIMISM = 3.0
"""Times the excess on the window of a plan that the next window may show without surprise."""


class Promises:
    """The PAR that each layer can be expected to keep; nan where nothing is promised.

    Args:
        min_excess: PAR - 1 up to which a layer is left alone.
        floor: PAR - 1 above which a layer is looked at whatever was promised.
        tolerance: PAR above its promise at which a layer is due; up to three times as much where
            the PAR of episodes varies.
    """

    def __init__(self, min_excess: float, floor: float, tolerance: float):
        self._min_excess, self._floor, self._tolerance = min_excess, floor, tolerance
        self._promised = np.empty(0)
        self._untried = np.empty(0, np.bool_)
        self._waits = np.empty(0, np.int64)

    def keep(self, kept: np.ndarray) -> None:
        """Forget the layers that are not `kept`, bool[layers]; all of them if there are others."""
        if len(self._promised) != len(kept):
            self._promised = np.full(len(kept), np.nan)
            self._untried = np.zeros(len(kept), np.bool_)
            self._waits = np.zeros(len(kept), np.int64)
        self._promised[~kept] = np.nan
        self._waits[~kept] = 0

    @property
    def made(self) -> np.ndarray:
        """Which layers have a promise, bool[layers]."""
        return ~np.isnan(self._promised)

    @property
    def waiting(self) -> np.ndarray:
        """Which layers have been due in PATIENCE calls without a plan, bool[layers]."""
        return self._waits >= PATIENCE

    def due(self, window: Window, before: np.ndarray, error: np.ndarray) -> np.ndarray:
        """The layers above the floor, and those with an excess and without a promise kept.

        What was promised from the window of the plan itself is too good to be kept: what the next
        window shows takes its place, unless that is far worse.

        Args:
            window: what is planned from.
            before: float64[layers], PAR of today.
            error: float64[layers], its standard error.
        """
        slack = self._tolerance + np.minimum(2 * error, 2 * self._tolerance)
        first = self._untried & (before <= hoped(self._promised) + slack)
        self._promised[first] = np.maximum(self._promised, before)[first]
        self._untried[:] = False
        kept = before <= self._promised + slack
        kept &= before <= 1 + self._floor + DOUBT * window.noise
        is_due = (before > 1 + self._min_excess) & ~kept
        self._waits = (self._waits + 1) * is_due
        return np.flatnonzero(is_due)

    def settle(self, layer: int, par: float) -> None:
        """A layer whose plan was carried out in part stays at `par`: the rest is not worth it."""
        self._promised[layer] = par

    def remember(self, offers: list[Offer], taken: dict[int, Offer], every_layer: bool) -> None:
        """Remember what the picked layers can be expected to keep.

        Of an offer that was taken in part, nothing is promised until the rest has followed.
        """
        for offer in offers:
            if offer.layer not in taken:
                continue
            whole = taken[offer.layer] is offer
            self._waits[offer.layer] = 0
            self._promised[offer.layer] = offer.promise if whole else np.nan
            self._untried[offer.layer] = every_layer and whole


def hoped(par):
    """The most that a placement with `par` on its own window may show on the next one."""
    return 1 + OPTIMISM * (par - 1)
