"""What candidates for an exchange are likely to win: the harm that more heat does to a rank."""

from __future__ import annotations

import numpy as np
from numba import njit

from .layer import FAST, HARM_LEVELS, width


@njit(**FAST)
def measure_all(layer, level, bins):
    """`measure_rank` for every rank."""
    for rank in range(len(layer.placement)):
        measure_rank(layer, rank, level, bins)


@njit(**FAST)
def measure_rank(layer, rank, level, bins):
    """Set harm[rank, i]: what i * level more heat on `rank` in every episode would cost.

    And head[rank, q], its room under the peak in each stretch of episodes, added up. `bins` is
    room to work in, float32[2, HARM_LEVELS].
    """
    episodes = layer.loads.shape[1]
    stretches = layer.head.shape[1]
    long = width(episodes, stretches)
    per_level = np.float32(1) / level
    bins[:] = 0
    for q in range(stretches):
        total = np.float32(0)
        for t in range(q * long, min((q + 1) * long, episodes)):
            room = layer.top[0, t] - layer.loads[rank, t]
            total += room
            at = room * per_level
            if at < HARM_LEVELS - 1:
                bins[0, int(at) + 1] += 1
                bins[1, int(at) + 1] += room
        layer.head[rank, q] = total
    count = total = np.float32(0)
    for i in range(HARM_LEVELS):
        count += bins[0, i]
        total += bins[1, i]
        layer.harm[rank, i] = level * i * count - total


@njit(**FAST)
def harm_of(layer, rank, more, per_level):
    """Cost of `more` heat on `rank` in every episode, between two levels of its harm."""
    at = more * per_level
    i = min(int(at), HARM_LEVELS - 2)
    low, high = layer.harm[rank, i], layer.harm[rank, i + 1]
    return low + (at - i) * (high - low)


@njit(**FAST)
def overflow(layer, rank, expert, share, other_expert, other_share):
    """Heat above the room of `rank`, over all stretches, if it takes the one for the other."""
    total = np.float32(0)
    for q in range(layer.head.shape[1]):
        over = layer.coarse[expert, q] * share - layer.coarse[other_expert, q] * other_share
        over -= layer.head[rank, q]
        total += over if over > 0 else np.float32(0)
    return total


@njit(**FAST)
def enter(gains, steps, filled, gain, first, second, third):
    """Keep the best candidates in order; the number kept."""
    if filled < len(gains):
        filled += 1
    i = filled - 1
    while i > 0 and gains[i - 1] < gain:
        gains[i] = gains[i - 1]
        for k in range(3):
            steps[i, k] = steps[i - 1, k]
        i -= 1
    gains[i] = gain
    steps[i, 0], steps[i, 1], steps[i, 2] = first, second, third
    return filled
