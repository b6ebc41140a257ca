"""Where a rank sends all of its tokens for an expert to one replica: how many ranks send to each.

Such a placement is as good as the division of the ranks that goes with it, so both are measured
together; an even division among the replicas of an expert may be far from even among ranks.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .routing import even_share, weigh_layer


def planned_senders(tokens: np.ndarray, placement: np.ndarray, layers: np.ndarray) -> np.ndarray:
    """The best division that is found, int16[n, R, S], for placements of some layers.

    Args:
        tokens: float64[T, layers, E].
        placement: int32[n, R, S].
        layers: int[n], of the placements.
    """
    columns = np.empty(placement.shape, np.int16)
    for number, layer in enumerate(layers):
        weigh_layer(tokens, layer, placement[number], 1, True, columns[number])
    return columns


@njit(cache=True, nogil=True)
def even_senders(placement):
    """The division that an engine makes by itself, int16[layers, R, S], of a valid placement."""
    layers, ranks, slots = placement.shape
    columns = np.ones(placement.shape, np.int16)
    for layer in range(layers):
        counts = np.bincount(placement[layer].ravel())
        turn = np.zeros(len(counts), np.int64)
        for rank in range(ranks):
            for slot in range(slots):
                expert = placement[layer, rank, slot]
                if counts[expert] > 1:
                    columns[layer, rank, slot] = even_share(ranks, counts[expert], turn[expert])
                    turn[expert] += 1
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
    ratios = np.ones((episodes, len(layers)))
    load = np.empty(ranks)
    for number, layer in enumerate(layers):
        totals = np.zeros(experts)
        for rank in range(ranks):
            for slot in range(slots):
                totals[placement[number, rank, slot]] += columns[number, rank, slot]
        for t in range(episodes):
            load[:] = 0
            for rank in range(ranks):
                for slot in range(slots):
                    expert = placement[number, rank, slot]
                    share = columns[number, rank, slot] / totals[expert]
                    load[rank] += tokens[t, layer, expert] * share
            mean = load.mean()
            if mean > 0:
                ratios[t, number] = load.max() / mean
    return ratios
