"""Where the division of an expert's tokens among its replicas is planned: routing columns.

Such a placement is as good as the columns that go with it, so both are measured together, and what
was planned for earlier heat may have to be divided anew although nothing moves. Where a rank sends
all of its tokens for an expert to one replica (`by_source`), a column is a rank that sends, and an
even division among the replicas of an expert may be far from even among ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numba import njit

from .forecast import DOUBT
from .par import slot_shares
from .routing import even_columns, weigh_layer
from .window import Window

ROUNDING = 1e-6
"""PAR by which two divisions may differ that are equally good."""


class Columns:
    """Plans and measures divisions.

    Args:
        most: columns that an expert may have.
        by_source: see `weigh_layer`.
        spread: calls a function with parts of an array of numbers, in threads.
    """

    def __init__(
        self,
        most: int,
        by_source: bool,
        spread: Callable[[Callable[[np.ndarray], None], np.ndarray], None],
    ):
        self._most, self._by_source, self._spread = most, by_source, spread

    def initial(self, placement: np.ndarray) -> np.ndarray:
        """The division that an engine makes by itself, int16[layers, R, S]."""
        return even_senders(placement) if self._by_source else np.ones(placement.shape, np.int16)

    def planned(self, tokens: np.ndarray, placement: np.ndarray, layers: np.ndarray) -> np.ndarray:
        """The best division that is found, int16[n, R, S], for placements of some layers.

        Args:
            tokens: float64[T, layers, E].
            placement: int32[n, R, S].
            layers: int[n], of the placements.
        """
        columns = np.empty(placement.shape, np.int16)

        def work(part: np.ndarray) -> None:
            for number in part:
                layer, here = layers[number], columns[number]
                weigh_layer(tokens, layer, placement[number], self._most, self._by_source, here)

        self._spread(work, np.arange(len(layers)))
        return columns

    def proved(self, tokens: np.ndarray, placement: np.ndarray, layers: np.ndarray) -> np.ndarray:
        """As `planned`, but an engine's own division where chance may explain what is won over it.

        A division from the older half of the episodes must win on the newer half, if there are
        halves.
        """
        columns = self.planned(tokens, placement, layers)
        half = len(tokens) // 2
        older, newer = tokens[:half], tokens[half:]
        if older.any() and newer.any():
            tried, even = self.planned(older, placement, layers), self.initial(placement)
            gains = divided_par(newer, placement, layers, even)
            gains -= divided_par(newer, placement, layers, tried)
            error = gains.std(axis=0) / math.sqrt(len(gains))
            chance = gains.mean(axis=0) <= DOUBT * error
            columns[chance] = even[chance]
        return columns

    def measure(
        self, tokens: np.ndarray, placement: np.ndarray, layers: np.ndarray, columns: np.ndarray
    ) -> np.ndarray:
        """(PAR, its standard error) [2, n] of placements of some layers with their columns."""
        par = np.empty((2, len(layers)))

        def work(part: np.ndarray) -> None:
            ratios = divided_par(tokens, placement[part], layers[part], columns[part])
            rows = np.ascontiguousarray(ratios.T)  # so that sums do not depend on their number
            par[:, part] = rows.mean(axis=1), rows.std(axis=1) / math.sqrt(len(tokens))

        self._spread(work, np.arange(len(layers)))
        return par

    def rerouted(
        self, window: Window, now: np.ndarray, min_excess: float, min_gain: float
    ) -> np.ndarray:
        """Layers to be given another division without a move; `window` has it from now on.

        That is those of which nobody knows the division that the engine has, for it has had a
        planner before or a plan was not carried out, those that it improves clearly, and those
        whose own has become worse than that of an engine by itself, which they get again.

        Args:
            window: with the columns of today.
            now: float64[layers], PAR with them.
            min_excess: PAR - 1 up to which a layer is left alone.
            min_gain: PAR.
        """
        ranks, slots = window.today.shape[1:]
        experts = window.seen.shape[2]
        if ranks == 1:
            return np.empty(0, np.int64)
        unknown = ~window.kept & (ranks * slots > experts)
        layers = np.flatnonzero(unknown | (now > 1 + min_excess))
        found = self.planned(window.seen, window.today[layers], layers)
        wins = self._wins(window, now, layers, found, min_gain)
        window.columns[layers[wins]] = found[wins]
        chosen = layers[wins | unknown[layers]]
        return np.union1d(chosen, self.give_up(window.seen, window.today, window.columns))

    def give_up(self, tokens: np.ndarray, placement: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Layers whose `columns` are worse than an engine's own, which they have from now on."""
        even = self.initial(placement)
        layers = np.flatnonzero((columns != even).any(axis=(1, 2)))
        here = placement[layers]
        planned, by_itself = (
            self.measure(tokens, here, layers, ways[layers])[0] for ways in (columns, even)
        )
        worse = layers[planned > by_itself + ROUNDING]
        columns[worse] = even[worse]
        return worse

    def _wins(
        self,
        window: Window,
        now: np.ndarray,
        layers: np.ndarray,
        found: np.ndarray,
        min_gain: float,
    ) -> np.ndarray:
        """Which of `layers` the divisions `found` improve by `min_gain`, bool[n].

        A division from the older half of the window must do so on the newer half, too, if there
        are halves.
        """
        today, columns = window.today[layers], window.columns[layers]
        gain = now[layers] - self.measure(window.seen, today, layers, found)[0]
        half = len(window.seen) // 2
        if not half:
            return gain >= min_gain
        older, newer = window.seen[:half], window.seen[half:]
        if not older.any() or not newer.any():
            return np.zeros(len(layers), np.bool_)
        tried = self.planned(older, today, layers)
        sure = self.measure(newer, today, layers, columns) - self.measure(
            newer, today, layers, tried
        )
        return (gain >= min_gain) & (sure[0] >= min_gain)


def follow(placement: np.ndarray, columns: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`columns` int16[R, S] of `placement` for `wanted`, the same experts in other slots of each
    rank."""
    found = np.empty_like(columns)
    ordered = np.take_along_axis(columns, np.argsort(placement, axis=1), axis=1)
    np.put_along_axis(found, np.argsort(wanted, axis=1), ordered, axis=1)
    return found


@njit(cache=True, nogil=True)
def even_senders(placement):
    """The division that an engine makes by itself, int16[layers, R, S], of a valid placement."""
    columns = np.empty(placement.shape, np.int16)
    for layer in range(len(placement)):
        even_columns(placement[layer], np.bincount(placement[layer].ravel()), columns[layer])
    return columns


@njit(cache=True, nogil=True)
def divided_par(tokens, placement, layers, columns):
    """PAR of each episode, float64[T, n], where slots share their expert by their columns.

    Args:
        tokens: float64[T, layers, E].
        placement: int32[n, R, S], of the layers int64[n].
        columns: int16[n, R, S].
    """
    episodes, _, experts = tokens.shape
    _, ranks, slots = placement.shape
    shares = slot_shares(placement, columns, experts)
    ratios = np.ones((episodes, len(layers)))
    load = np.empty(ranks)
    for number, layer in enumerate(layers):
        for t in range(episodes):
            load[:] = 0
            for rank in range(ranks):
                for slot in range(slots):
                    expert = placement[number, rank, slot]
                    load[rank] += tokens[t, layer, expert] * shares[number, rank, slot]
            mean = load.mean()
            if mean > 0:
                ratios[t, number] = load.max() / mean
    return ratios
