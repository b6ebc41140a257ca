"""What FlashLB plans from, and what it finds for a layer."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Window(NamedTuple):
    """What a plan is made from.

    Attributes:
        seen: float64[T, layers, E], the window.
        tokens: float64[T, layers, E], what the plan is made for; see `forecast`.
        noise: float64[layers], standard error of PAR on `tokens` where chance is a large part of
            them, or may be for all that a short window tells; else 0.
        past: float64[M, layers, E], what came before it.
        worth: float32[M], weight of each of these, an episode of the window having weight 1.
        alike: bool[layers], whether the past of a layer counts.
        kept: bool[layers], whether a layer has the placement of its last plan.
        settled: bool[layers], those of `kept` that have a promise.
        waiting: bool[layers], those that have waited for a plan for long.
        anew: whether settled layers are placed from scratch, too.
        today: int32[layers, R, S].
        columns: int16[layers, R, S], the routing columns of today.
        first_price: PAR that a move must win in a layer without a promise.
    """

    seen: np.ndarray
    tokens: np.ndarray
    noise: np.ndarray
    past: np.ndarray
    worth: np.ndarray
    alike: np.ndarray
    kept: np.ndarray
    settled: np.ndarray
    waiting: np.ndarray
    anew: bool
    today: np.ndarray
    columns: np.ndarray
    first_price: float

    def alone(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of the window, and weights that are 1 in sum."""
        count = len(self.tokens)
        return self.tokens, np.full(count, 1 / max(1, count), np.float32)

    def with_past(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of the past and the window, and weights that are 1 in sum."""
        weights = np.concatenate([self.worth, np.ones(len(self.tokens), np.float32)])
        return np.concatenate([self.past, self.tokens]), weights / weights.sum()


class Offer(NamedTuple):
    """A better placement int32[R, S] of one layer, and columns int16[R, S] that go with it.

    Its PAR on the window, what that gains, the moves it takes, and the PAR it can promise.
    """

    layer: int
    placement: np.ndarray
    columns: np.ndarray
    par: float
    gain: float
    moves: int
    promise: float
