"""How many replicas each expert gets: several vectors of counts, for placement to choose from."""

from __future__ import annotations

import numpy as np
from numba import njit

from .layer import FAST

HALVINGS = 24
"""Of the interval in which the least threshold lies: as many as float32 has digits."""


@njit(**FAST)
def least_threshold(weights, slots, ranks):
    """The least weight of the heaviest replica that is possible, or a little more.

    Args:
        weights: float32[E].
        slots: to be filled, from E to E * ranks.
        ranks: most replicas of an expert.
    """
    low, high = np.float32(0), weights.max() + np.float32(1e-30)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if middle <= low or middle >= high:
            break
        needed = np.float32(0)
        per_limit = np.float32(1) / middle
        for expert in range(len(weights)):
            needed += _replicas(weights[expert], per_limit, ranks)
        if needed > slots:
            low = middle
        else:
            high = middle
    return high


@njit(**FAST)
def replica_counts(weights, slots, ranks, threshold, slack):
    """Replicas int32[E] that fill `slots`: each expert gets `weight / limit`, rounded up.

    The limit is `slack` times the least threshold, so that with slack 1 the heaviest replica
    weighs as little as it can. Slots that are left go to the heaviest replicas if slack is 1, else
    to the lightest experts: small replicas fit beside any other.

    An expert gets at least one and at most `ranks`; needs E <= slots <= E * ranks.

    Args:
        weights: float32[E].
        slots: to be filled.
        ranks: most replicas of an expert.
        threshold: `least_threshold` of the same.
        slack: at least 1.
    """
    experts = len(weights)
    counts = np.empty(experts, np.int32)
    per_limit = np.float32(1) / (threshold * slack)
    left = slots
    for expert in range(experts):
        counts[expert] = _replicas(weights[expert], per_limit, ranks)
        left -= counts[expert]
    if left == 0:
        return counts
    if slack <= 1:
        for _ in range(left):
            counts[_heaviest(weights, counts, ranks)] += 1
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
def _replicas(weight, per_limit, ranks):
    """Replicas, a float32, none of which weighs more than 1 / `per_limit`."""
    count = np.ceil(weight * per_limit)
    count = count if count > 1 else np.float32(1)
    return count if count < ranks else np.float32(ranks)


@njit(**FAST)
def _heaviest(weights, counts, ranks):
    best = -1
    for expert in range(len(weights)):
        if counts[expert] < ranks and (
            best < 0 or weights[expert] * counts[best] > weights[best] * counts[expert]
        ):
            best = expert
    return best
