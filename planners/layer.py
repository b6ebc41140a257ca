"""One layer under search: heat, placement and loads, and what an exchange of experts would win.

Heat is scaled so that the PAR of a placement is the sum over episodes of the highest load of any
rank (`heat.scaled_heat`). All gains are differences of that sum.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

FAST = {"nogil": True, "cache": True, "fastmath": True, "error_model": "numpy"}
"""How kernels of the search are compiled; heat is finite, so fastmath changes only rounding."""

INLINE = {**FAST, "inline": "always"}
"""The same for small ones, for a call that hands over a whole layer takes longer than they do; and
for large ones with one caller, into which LLVM would link them to optimise all of it once more."""


class Layer(NamedTuple):
    """The arrays of one layer's search; E experts, T episodes, R ranks, S slots.

    Attributes:
        heat: float32[E, T], scaled.
        by_episode: float32[T, E], the same.
        coarse: float32[E, Q], heat summed over Q stretches of episodes.
        mean: float32[E], heat of an average episode.
        counts: int32[E], replicas of each expert.
        share: float32[E], 1 / counts.
        placement: int32[R, S].
        held: int8[R, E], 1 where a rank holds an expert.
        home: int8[R, E], 1 where a rank holds it today.
        loads: float32[R, T].
        top: float32[3, T], the three highest loads of each episode.
        at: int32[3, T], the ranks that bear them.
        harm: float32[R, 5], see `estimate.measure_rank`.
    """

    heat: np.ndarray
    by_episode: np.ndarray
    coarse: np.ndarray
    mean: np.ndarray
    counts: np.ndarray
    share: np.ndarray
    placement: np.ndarray
    held: np.ndarray
    home: np.ndarray
    loads: np.ndarray
    top: np.ndarray
    at: np.ndarray
    harm: np.ndarray


STRETCHES = 16
"""Stretches of episodes in `coarse`."""

BLOCK = 8
"""Rows that are transposed at once."""

SCALAR = 10
"""Times that an episode takes longer in `highest_of` than in `find_highest`."""


@njit(**FAST)
def new_layer(by_episode, home, ranks, slots):
    """A layer without a placement: `settle` gives it one.

    Args:
        by_episode: float32[T, E], scaled.
        home: int8[R, E], 1 where a rank holds an expert today.
        ranks, slots: shape of the placement.
    """
    episodes, experts = by_episode.shape
    heat = transposed(by_episode)
    coarse = merged(by_episode, STRETCHES)
    mean = np.empty(experts, np.float32)
    for expert in range(experts):
        mean[expert] = coarse[expert].sum() / episodes
    return Layer(
        heat,
        by_episode,
        coarse,
        mean,
        np.empty(experts, np.int32),
        np.empty(experts, np.float32),
        np.empty((ranks, slots), np.int32),
        np.empty((ranks, experts), np.int8),
        home,
        np.empty((ranks, episodes), np.float32),
        np.empty((3, episodes), np.float32),
        np.empty((3, episodes), np.int32),
        np.empty((ranks, 5), np.float32),
    )


@njit(**FAST)
def merged(by_episode, most):
    """float32[E, Q], float32[T, E] summed over Q <= `most` stretches of episodes."""
    return transposed(shortened(by_episode, most))


@njit(**FAST)
def shortened(by_episode, most):
    """float32[Q, E], float32[T, E] summed over Q <= `most` stretches; itself if T is no more."""
    episodes, experts = by_episode.shape
    if episodes <= most:
        return by_episode
    long = -(-episodes // most)
    short = np.zeros((-(-episodes // long), experts), np.float32)
    for t in range(episodes):
        q = t // long
        for expert in range(experts):
            short[q, expert] += by_episode[t, expert]
    return short


@njit(**FAST)
def transposed(values):
    """A copy of float32[m, n] as [n, m], made in blocks that stay in the cache."""
    rows, columns = values.shape
    out = np.empty((columns, rows), np.float32)
    whole = rows - rows % BLOCK
    for block in range(0, whole, BLOCK):
        first = np.uintp(block)
        for i in range(columns):
            column = np.uintp(i)
            for row in range(BLOCK):
                out[column, first + np.uintp(row)] = values[first + np.uintp(row), column]
    for row in range(whole, rows):
        out[:, row] = values[row]
    return out


@njit(**FAST)
def settle(layer, placement):
    """Begin from `placement` (int32[R, S], valid)."""
    layer.placement[:] = placement
    layer.counts[:] = 0
    layer.held[:] = 0
    for rank in range(len(placement)):
        for expert in placement[rank]:
            layer.counts[expert] += 1
            layer.held[rank, expert] = 1
    for expert in range(len(layer.counts)):
        layer.share[expert] = np.float32(1) / layer.counts[expert]
    sum_loads(layer)


@njit(**FAST)
def sum_loads(layer):
    """Loads and highest loads from the placement."""
    layer.loads[:] = 0
    for rank in range(len(layer.placement)):
        for expert in layer.placement[rank]:
            for t in range(layer.loads.shape[1]):
                layer.loads[rank, t] += layer.heat[expert, t] * layer.share[expert]
    find_highest(layer)


@njit(**FAST)
def find_highest(layer):
    """The three highest loads of all episodes; the compiler vectorises it over the episodes.

    Two ranks at once: what takes time is to write them down.
    """
    loads, top, at = layer.loads, layer.top, layer.at
    ranks, episodes = loads.shape
    top[:] = -1
    at[:] = -1
    for rank in range(0, ranks - 1, 2):
        here, there = np.int32(rank), np.int32(rank + 1)
        for t in range(episodes):
            high = top[0, t], top[1, t], top[2, t], at[0, t], at[1, t], at[2, t]
            high = _entered(loads[rank, t], here, high)
            high = _entered(loads[rank + 1, t], there, high)
            top[0, t], top[1, t], top[2, t], at[0, t], at[1, t], at[2, t] = high
    if ranks % 2:
        for t in range(episodes):
            high = top[0, t], top[1, t], top[2, t], at[0, t], at[1, t], at[2, t]
            high = _entered(loads[ranks - 1, t], np.int32(ranks - 1), high)
            top[0, t], top[1, t], top[2, t], at[0, t], at[1, t], at[2, t] = high


@njit(**INLINE)
def _entered(load, here, high):
    """The three highest loads and their ranks, with the `load` of the rank `here` among them."""
    first, second, third, at_first, at_second, at_third = high
    one, two, three = load > first, load > second, load > third
    return (
        load if one else first,
        first if one else (load if two else second),
        second if two else (load if three else third),
        here if one else at_first,
        at_first if one else (here if two else at_second),
        at_second if two else (here if three else at_third),
    )


@njit(**FAST)
def highest_of(layer, t):
    """The three highest loads of episode `t`."""
    loads = layer.loads
    first = second = third = np.float32(-1)
    at_first = at_second = at_third = -1
    for rank in range(len(loads)):
        load = loads[rank, t]
        if load <= third:
            continue
        if load > first:
            third, at_third, second, at_second = second, at_second, first, at_first
            first, at_first = load, rank
        elif load > second:
            third, at_third, second, at_second = second, at_second, load, rank
        else:
            third, at_third = load, rank
    layer.top[0, t], layer.top[1, t], layer.top[2, t] = first, second, third
    layer.at[0, t], layer.at[1, t], layer.at[2, t] = at_first, at_second, at_third


@njit(**FAST)
def peak(layer):
    """PAR of the layer's placement on its heat, without episodes that have none."""
    return layer.top[0].sum()


@njit(**FAST)
def excess(layer):
    """What of `peak` a perfect balance would not have."""
    return peak(layer) - layer.mean.sum() / len(layer.loads) * layer.heat.shape[1]


@njit(**INLINE)
def swap_gain(layer, rank, expert, other, other_expert):
    """What it wins if `expert` on `rank` and `other_expert` on `other` change places."""
    heat, loads, top, at = layer.heat, layer.loads, layer.top, layer.at
    share, other_share = layer.share[expert], layer.share[other_expert]
    mine, theirs = np.int32(rank), np.int32(other)  # of the width of `at`, or half the speed
    gain = np.float32(0)
    for t in range(heat.shape[1]):
        shift = heat[expert, t] * share - heat[other_expert, t] * other_share
        here, there = loads[rank, t] - shift, loads[other, t] + shift
        first, second, third = top[0, t], top[1, t], top[2, t]  # at once: branches hold it up
        at_first, at_second = at[0, t], at[1, t]
        high = here if here > there else there
        rest = third if (at_second == mine) | (at_second == theirs) else second
        rest = rest if (at_first == mine) | (at_first == theirs) else first
        gain += first - (high if high > rest else rest)
    return gain


@njit(**FAST)
def swap(layer, rank, slot, other, other_slot):
    """Let the experts of two slots on different ranks change places."""
    expert, other_expert = layer.placement[rank, slot], layer.placement[other, other_slot]
    layer.placement[rank, slot], layer.placement[other, other_slot] = other_expert, expert
    layer.held[rank, expert] = layer.held[other, other_expert] = 0
    layer.held[rank, other_expert] = layer.held[other, expert] = 1
    share, other_share = layer.share[expert], layer.share[other_expert]
    exchange_heat(layer, rank, expert, share, other, other_expert, other_share)


@njit(**INLINE)
def exchange_heat(layer, rank, expert, share, other, other_expert, other_share):
    """Let `rank` bear `share` less of the heat of `expert` and `other_share` more of that of
    `other_expert`, and `other` the reverse; the highest loads follow."""
    heat, loads, top, at = layer.heat, layer.loads, layer.top, layer.at
    mine, theirs = np.int32(rank), np.int32(other)
    changed = 0
    for t in range(heat.shape[1]):
        shift = heat[expert, t] * share - heat[other_expert, t] * other_share
        loads[rank, t] -= shift
        loads[other, t] += shift
        changed += _is_touched(loads, top, at, t, mine, theirs)
    if changed * SCALAR > heat.shape[1]:
        find_highest(layer)
    else:
        for t in range(heat.shape[1]):
            if _is_touched(loads, top, at, t, mine, theirs):
                highest_of(layer, t)


@njit(**INLINE)
def _is_touched(loads, top, at, t, rank, other):
    """Whether a change of two ranks' loads may have changed the three highest of episode `t`."""
    among = (at[0, t] == rank) | (at[1, t] == rank) | (at[2, t] == rank)
    among |= (at[0, t] == other) | (at[1, t] == other) | (at[2, t] == other)
    return among | (loads[rank, t] > top[2, t]) | (loads[other, t] > top[2, t])


@njit(**FAST)
def replace_gain(layer, rank, leaving, arriving):
    """What it wins if a replica of `leaving` on `rank` gives way to one more of `arriving`."""
    heat, loads = layer.heat, layer.loads
    ranks, episodes = loads.shape
    rise, fall, own = _new_shares(layer, leaving, arriving)
    high = np.full(episodes, -1, np.float32)
    for other in range(ranks):
        more = rise if layer.held[other, leaving] else np.float32(0)
        less = fall if layer.held[other, arriving] else np.float32(0)
        if other == rank:
            more, less = -layer.share[leaving], -own
        for t in range(episodes):
            load = loads[other, t] + heat[leaving, t] * more - heat[arriving, t] * less
            high[t] = load if load > high[t] else high[t]
    gain = np.float32(0)
    for t in range(episodes):
        gain += layer.top[0, t] - high[t]
    return gain


@njit(**FAST)
def replace(layer, rank, slot, arriving):
    """Let a replica of an expert that has others give way to one more of `arriving`."""
    heat, loads = layer.heat, layer.loads
    leaving = layer.placement[rank, slot]
    rise, fall, own = _new_shares(layer, leaving, arriving)
    for other in range(len(loads)):
        more = rise if layer.held[other, leaving] else np.float32(0)
        less = fall if layer.held[other, arriving] else np.float32(0)
        if other == rank:
            more, less = -layer.share[leaving], -own
        if more != 0 or less != 0:
            for t in range(loads.shape[1]):
                loads[other, t] += heat[leaving, t] * more - heat[arriving, t] * less
    layer.placement[rank, slot] = arriving
    layer.held[rank, leaving], layer.held[rank, arriving] = 0, 1
    layer.counts[leaving] -= 1
    layer.counts[arriving] += 1
    for expert in (leaving, arriving):
        layer.share[expert] = np.float32(1) / layer.counts[expert]
    find_highest(layer)


@njit(**FAST)
def _new_shares(layer, leaving, arriving):
    """How much the share of `leaving` rises and of `arriving` falls, and the latter's new one."""
    rise = np.float32(1) / (layer.counts[leaving] - 1) - layer.share[leaving]
    own = np.float32(1) / (layer.counts[arriving] + 1)
    return np.float32(rise), np.float32(layer.share[arriving] - own), np.float32(own)


@njit(**FAST)
def moved(layer):
    """Slots whose expert is not on the rank today."""
    count = 0
    for rank in range(len(layer.placement)):
        for expert in layer.placement[rank]:
            count += 1 - layer.home[rank, expert]
    return count
