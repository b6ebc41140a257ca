"""What candidates for an exchange are likely to win: the harm that more heat does to a rank."""

from __future__ import annotations

import numpy as np
from numba import njit

from .layer import FAST, INLINE

NEAR, FAR, FARTHEST = 1 / 32, 1 / 8, 1 / 2
"""Amounts of heat for which the harm to a rank is measured, as shares of the heaviest replica."""


@njit(**FAST)
def measure_all(layer, heaviest):
    """`measure_rank` for every rank."""
    for rank in range(len(layer.placement)):
        measure_rank(layer.top, layer.loads, layer.harm, rank, heaviest)


@njit(**FAST)
def measure_rank(top, loads, harm, rank, heaviest):
    """Set harm[rank] from the loads; `heaviest` is the heat of a replica.

    What more heat in every episode costs is convex and piecewise linear. Two lines stand for it:
    harm[rank] has the slope of each and the heat at which it begins, and last the harm of FAR.
    """
    episodes = loads.shape[1]
    near, far = np.float32(NEAR) * heaviest, np.float32(FAR) * heaviest
    farthest = np.float32(FARTHEST) * heaviest
    one = two = three = np.float32(0)
    for t in range(episodes):
        room = top[0, t] - loads[rank, t]
        first, second, third = near - room, far - room, farthest - room
        one += first if first > 0 else np.float32(0)
        two += second if second > 0 else np.float32(0)
        three += third if third > 0 else np.float32(0)
    harm[rank, 0], harm[rank, 1] = _line(near, one, far, two)
    harm[rank, 2], harm[rank, 3] = _line(far, two, farthest, three)
    harm[rank, 4] = two


@njit(**INLINE)
def _line(x, y, other_x, other_y):
    """Slope and zero of the line through two points; 0, 0 if it is flat."""
    slope = (other_y - y) / (other_x - x)
    return slope, (x - y / slope if slope > 0 else np.float32(0))


@njit(**INLINE)
def harm_of(harm, rank, more):
    """Cost of `more` heat on `rank` in every episode, as the two lines of its harm have it."""
    low = harm[rank, 0] * (more - harm[rank, 1])
    high = harm[rank, 2] * (more - harm[rank, 3])
    high = high if high > low else low
    return high if high > 0 else np.float32(0)


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
