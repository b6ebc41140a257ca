"""How many replicas each expert gets: several vectors of counts, for placement to choose from."""

from __future__ import annotations

import numpy as np
from numba import njit

from .layer import FAST


@njit(**FAST)
def replica_counts(weights, slots, ranks, slack):
    """Replicas int32[E] that fill `slots`: each expert gets `weight / threshold`, rounded up.

    The threshold is `slack` times the least one that is possible, so that with slack 1 the
    heaviest replica weighs as little as it can. Slots that are left go to the heaviest replicas
    if slack is 1, else to the lightest experts: small replicas fit beside any other.

    An expert gets at least one and at most `ranks`; needs E <= slots <= E * ranks.
    """
    experts = len(weights)
    low, high = np.float32(0), weights.max() + np.float32(1e-30)
    for _ in range(24):
        middle = (low + high) / 2
        if _fill(weights, middle, ranks).sum() > slots:
            low = middle
        else:
            high = middle
    counts = _fill(weights, high * slack, ranks)
    left = slots - counts.sum()
    if slack <= 1:
        while left > 0:
            counts[_heaviest(weights, counts, ranks)] += 1
            left -= 1
        return counts
    order = np.argsort(weights)
    i = 0
    while left > 0:
        expert = order[i % experts]
        if counts[expert] < ranks:
            counts[expert] += 1
            left -= 1
        i += 1
    return counts


@njit(**FAST)
def _fill(weights, threshold, ranks):
    counts = np.ones(len(weights), np.int32)
    for expert in range(len(weights)):
        if weights[expert] > threshold:
            counts[expert] = min(np.float32(ranks), np.ceil(weights[expert] / threshold))
    return counts


@njit(**FAST)
def _heaviest(weights, counts, ranks):
    best = -1
    for expert in range(len(weights)):
        if counts[expert] < ranks and (
            best < 0 or weights[expert] * counts[best] > weights[best] * counts[expert]
        ):
            best = expert
    return best
