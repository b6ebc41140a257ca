"""Local search on one layer: swaps and changes of replica counts, each checked by its exact gain.

An estimate sorts the candidates; the exact gain of the best few decides.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .estimate import enter, harm_of, measure_all, measure_rank
from .layer import FAST, excess, moved, replace, replace_gain
from .swaps import even_out, lay_out, lay_out_again, new_desk, swap_one

REPLACES = 2
"""Changes of replica counts before each sweep of swaps."""

REPLACES_CHECKED = 12
"""Changes of replica counts that are evaluated exactly, at most: they take longer than swaps."""

HOT = 16
"""Experts that are considered for one more replica: those it would relieve most."""

WORTHWHILE = 8
"""Least steps that a rank's margin over the next one must be worth; a swap wins part of it."""

_NONE = -(2**30)


@njit(**FAST)
def improve(layer, price, most_moves, rows, checks, partners, sweeps, least, fraction):
    """Sweep over the ranks until nothing gains.

    Args:
        layer: changed in place.
        price: PAR that one slot away from home must win.
        most_moves: slots that may be away from home; what has more at the start keeps them.
        rows: slots of a rank, those that can win most, for which candidates are sought.
        checks: candidates evaluated exactly at each step.
        partners: ranks, those with most room, that a rank may swap with.
        sweeps: most passes over the ranks.
        least: PAR that a step must win on top of its price.
        fraction: of the excess over a perfect balance, which it must win, too: where much is left
            small steps take time and change little.
    """
    ranks = len(layer.placement)
    heaviest = (layer.mean * layer.share).max()
    if ranks < 2 or heaviest <= 0:
        return
    stuck = np.zeros(ranks, np.bool_)
    room = most_moves - moved(layer)
    desk = new_desk(layer, partners, rows)
    swaps = 0
    even_out(layer, price, room, 0.0)
    room = most_moves - moved(layer)
    for _ in range(sweeps):
        enough = max(least, fraction * excess(layer))
        measure_all(layer, heaviest)
        steps = 0
        for _ in range(REPLACES if swaps == 0 else 0):
            spent = _replace_one(layer, price, room, enough)
            if spent == _NONE:
                break
            room -= spent
            steps += 1
            stuck[:] = False
            measure_all(layer, heaviest)
        others = np.argsort(layer.harm[:, 4])[:partners]
        n = lay_out(layer, others, desk)
        swaps = 0
        for rank in _by_margin(layer, WORTHWHILE * enough):
            if stuck[rank]:
                continue
            other, spent = swap_one(layer, rank, n, price, room, checks, desk, enough)
            stuck[rank] = other < 0
            if other >= 0:
                room -= spent
                swaps += 1
                stuck[other] = False
                for changed in (rank, other):
                    measure_rank(layer.top, layer.loads, layer.harm, changed, heaviest)
                lay_out_again(layer, others, rank, other, desk)
        if steps + swaps == 0:
            if even_out(layer, price, room, 0.0) == 0:
                return
            room = most_moves - moved(layer)


@njit(**FAST)
def _by_margin(layer, least):
    """The ranks with more than `least` margin over the next rank, the one with most first."""
    margin = np.zeros(len(layer.placement), np.float32)
    for t in range(layer.heat.shape[1]):
        margin[layer.at[0, t]] += layer.top[0, t] - layer.top[1, t]
    return np.argsort(-margin)[: (margin > least).sum()]


@njit(**FAST)
def _replace_one(layer, price, room, least):
    """Carry out the best replacement of a spare replica: the moves spent, or _NONE."""
    placement, held, home = layer.placement, layer.held, layer.home
    counts, mean, harm = layer.counts, layer.mean, layer.harm
    saved = _saved(layer)
    spare, unit, lost = _spare_slots(layer)
    gains = np.empty(REPLACES_CHECKED, np.float32)
    steps = np.empty((REPLACES_CHECKED, 3), np.int32)
    filled, bar = 0, np.float32(least)
    for b in _hottest(saved, bar):
        if saved[b] <= bar:
            break
        arriving = mean[b] / (counts[b] + 1)
        for i in range(len(spare)):
            gain = saved[b] - lost[i]
            if gain <= bar:
                continue
            rank, slot, a = spare[i]
            moves = home[rank, a] - home[rank, b]
            gain -= price * moves + harm_of(harm, rank, arriving - unit[i])
            if gain <= bar or moves > room or held[rank, b]:
                continue
            filled = enter(gains, steps, filled, gain, rank, slot, b)
            if filled == REPLACES_CHECKED:
                bar = gains[filled - 1]
    best, chosen, spent = np.float32(least), -1, _NONE
    for i in range(filled):
        rank, slot, b = steps[i]
        a = placement[rank, slot]
        moves = home[rank, a] - home[rank, b]
        gain = replace_gain(layer, rank, a, b) - price * moves
        if gain > best:
            best, chosen, spent = gain, i, moves
    if chosen >= 0:
        rank, slot, b = steps[chosen]
        replace(layer, rank, slot, b)
    return spent


@njit(**FAST)
def _spare_slots(layer):
    """Replicas of experts that have others: what they weigh, and what is lost without them.

    Returns:
        (rank, slot and expert int32[n, 3]; heat float32[n]; the harm of one replica less on the
        other ranks that hold the expert float32[n]).
    """
    placement, counts, mean = layer.placement, layer.counts, layer.mean
    ranks, slots = placement.shape
    spare = np.empty((ranks * slots, 3), np.int32)
    unit = np.empty(ranks * slots, np.float32)
    lost = np.empty(ranks * slots, np.float32)
    hurt = np.zeros(len(counts), np.float32)
    n = 0
    for rank in range(ranks):
        for slot in range(slots):
            a = placement[rank, slot]
            if counts[a] > 1:
                spare[n, 0], spare[n, 1], spare[n, 2] = rank, slot, a
                unit[n] = mean[a] * layer.share[a]
                lost[n] = harm_of(layer.harm, rank, unit[n] / (counts[a] - 1))
                hurt[a] += lost[n]
                n += 1
    for i in range(n):
        lost[i] = hurt[spare[i, 2]] - lost[i]
    return spare[:n], unit[:n], lost[:n]


@njit(**FAST)
def _hottest(saved, bar):
    """The experts, HOT at most, that save more than `bar`, the one that saves most first."""
    worth = np.flatnonzero(saved > bar)
    return worth[np.argsort(-saved[worth])[:HOT]]


@njit(**FAST)
def _saved(layer):
    """float32[E]: what one more replica of an expert wins on the ranks that are the peak.

    Where the next ranks hold the expert, too, they are relieved as well. Beyond the third nothing
    is known: the exact gain has to tell.
    """
    counts, top, at, held = layer.counts, layer.top, layer.at, layer.held
    saved = np.zeros(len(counts), np.float32)
    for t in range(layer.heat.shape[1]):
        second, third = at[1, t], at[2, t]
        for expert in layer.placement[at[0, t]]:
            if counts[expert] < len(layer.placement):
                less = layer.heat[expert, t] * layer.share[expert] / (counts[expert] + 1)
                margin = top[0, t] - top[1, t]
                if second >= 0 and held[second, expert]:
                    margin = top[0, t] - top[2, t]
                    if third >= 0 and held[third, expert]:
                        margin = less
                saved[expert] += less if less < margin else margin
    return saved
