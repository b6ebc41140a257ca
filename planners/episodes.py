"""Episodes: steps of physical heat summed up to logical heat, and a window of many of them."""

from __future__ import annotations

from collections import OrderedDict, deque

import numpy as np
from numba import njit

from .step_heat import StepHeat

_EPOCHS_KEPT = 256


@njit(cache=True, nogil=True)
def add_logical(total, heat, placement):
    """Add physical heat [layers, columns] to `total` [layers, experts] by `placement`."""
    for layer in range(heat.shape[0]):
        for column in range(heat.shape[1]):
            total[layer, placement[layer, column]] += heat[layer, column]


def rank_tokens(heat: np.ndarray, ranks: int) -> np.ndarray:
    """[layers, ranks], tokens of each rank's slots, from physical heat [layers, columns]."""
    tokens: np.ndarray = heat.reshape(len(heat), ranks, -1).sum(axis=2)
    return tokens


def step_par(heat: np.ndarray, ranks: int) -> np.ndarray:
    """Measured PAR per layer, max over mean of the ranks' tokens; 1.0 where there are none.

    Args:
        heat: [layers, columns], physical.
        ranks: EP ranks.
    """
    load = rank_tokens(heat, ranks)
    mean = load.mean(axis=1)
    return np.where(mean > 0, load.max(axis=1) / np.maximum(mean, 1e-9), 1.0)


class EpisodeWindow:
    """The latest episodes of logical heat, whatever placement their steps were counted under.

    Args:
        layers, experts, ranks: of the group.
        steps: of an episode.
        episodes: that the window holds.

    Attributes:
        count: episodes so far.
        empty: steps in a row that had tokens and no heat.
        unplaced: steps in a row of an epoch whose placement is unknown.
    """

    def __init__(self, layers: int, experts: int, ranks: int, steps: int, episodes: int):
        self._steps = steps
        self._ranks = ranks
        self._episodes: deque[np.ndarray] = deque(maxlen=episodes)
        self._pars: deque[float] = deque(maxlen=episodes)
        self._total = np.zeros((layers, experts), np.int64)
        self._physical = np.zeros(0)
        self._filled = 0
        self._placements: OrderedDict[int, np.ndarray] = OrderedDict()
        self.count = 0
        self.empty = 0
        self.unplaced = 0

    def __len__(self) -> int:
        return len(self._episodes)

    def learn(self, epoch: int, placement: np.ndarray) -> None:
        """From `epoch` on slots hold `placement` (int [layers, ranks, slots])."""
        self._placements[epoch] = placement.reshape(len(placement), -1)
        while len(self._placements) > _EPOCHS_KEPT:
            self._placements.popitem(last=False)

    def add(self, step: StepHeat) -> None:
        """Count one step; steps of an epoch whose placement is unknown are discarded."""
        placement = self._placements.get(step.epoch)
        if placement is None:
            self.unplaced += step.span
            return
        self.unplaced = 0
        if not step.heat.any():
            self.empty += step.span if step.tokens else 0
            return
        self.empty = 0
        add_logical(self._total, step.heat, placement)
        load = rank_tokens(step.heat, self._ranks)
        self._physical = self._physical + load if self._filled else load
        self._filled += step.span
        if self._filled >= self._steps:
            self._close_episode()

    def _close_episode(self) -> None:
        self._episodes.append(self._total.copy())
        self._pars.append(float(step_par(self._physical, self._ranks).mean()))
        self._total[:] = 0
        self._filled = 0
        self.count += 1

    def heat(self) -> np.ndarray:
        """int64 [episodes, layers, experts], oldest first."""
        return np.stack(self._episodes)

    def observed_par(self, episodes: int) -> float:
        """Mean PAR over layers that was measured in the latest `episodes` (nan if none)."""
        latest = list(self._pars)[-episodes:]
        return float(np.mean(latest)) if latest else float("nan")
