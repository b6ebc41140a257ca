"""Placement from scratch: the heaviest replicas first, each where its heat meets the load least."""

from __future__ import annotations

import numpy as np
from numba import njit

from .layer import FAST

BAND = 64
"""Ranks compared for each replica; with more ranks, bands of them take turns."""

FULL = np.float32(1e30)
"""Cost of a rank that cannot take the expert."""


@njit(**FAST)
def place(heat, counts, ranks, slots):
    """(int32[ranks, slots] with `counts` replicas of each expert, never two on a rank; its PAR).

    Each replica goes to the rank with a free slot, not holding the expert, whose load over the
    episodes has the smallest inner product with it. If only ranks that hold the expert have a free
    slot, a rank without it hands one of its experts over to such a rank and takes this one.

    Args:
        heat: float32[experts, episodes].
        counts: int32[experts], from 1 to ranks each, ranks * slots in all.
        ranks, slots: shape of the placement.
    """
    experts, episodes = heat.shape
    placement = np.full((ranks, slots), -1, np.int32)
    filled = np.zeros(ranks, np.int32)
    held = np.zeros((ranks, experts), np.int8)
    rows = -(-episodes // 4) * 4  # four at a time; the last ones may be empty
    loads = np.zeros((rows, ranks), np.float32)
    closed = np.zeros(ranks, np.float32)  # FULL if there is no free slot, or the expert is there
    cost = np.empty(ranks, np.float32)
    unit = np.zeros((experts, rows), np.float32)
    weight = np.zeros(experts, np.float32)
    for expert in range(experts):
        share = np.float32(1) / counts[expert]
        for t in range(episodes):
            unit[expert, t] = heat[expert, t] * share
            weight[expert] += unit[expert, t]
    bands = -(-ranks // BAND)
    band = 0
    for expert in np.argsort(-weight):
        for _ in range(counts[expert]):
            rank = -1
            for _ in range(bands):
                band = (band + 1) % bands
                first, end = band * ranks // bands, (band + 1) * ranks // bands
                rank = _best_of(loads, unit[expert], closed, cost, first, end)
                if rank >= 0:
                    break
            if rank < 0:
                rank = _hand_over(placement, filled, closed, held, loads, unit, expert)
            placement[rank, filled[rank]] = expert
            filled[rank] += 1
            closed[rank] = FULL
            held[rank, expert] = 1
            for t in range(episodes):
                loads[t, rank] += unit[expert, t]
        for rank in range(ranks):
            if filled[rank] < slots:
                closed[rank] = 0
    total = np.float32(0)
    for t in range(episodes):
        total += loads[t].max()
    return placement, total


@njit(**FAST)
def _best_of(loads, unit, closed, cost, first, end):
    """The rank from `first` to `end` with the least inner product of load and unit; -1 if closed.

    `cost` is room to work in, float32[ranks].
    """
    for rank in range(first, end):
        cost[rank] = closed[rank]
    for t in range(0, len(unit), 4):
        a, b, c, d = unit[t], unit[t + 1], unit[t + 2], unit[t + 3]
        for rank in range(first, end):
            low = loads[t, rank] * a + loads[t + 1, rank] * b
            cost[rank] += low + loads[t + 2, rank] * c + loads[t + 3, rank] * d
    least = FULL
    for rank in range(first, end):  # in two passes, which the compiler vectorises
        least = cost[rank] if cost[rank] < least else least
    for rank in range(first, end):
        if cost[rank] == least and least < FULL:
            return rank
    return -1


@njit(**FAST)
def _hand_over(placement, filled, closed, held, loads, unit, expert):
    """Free a slot on a rank without `expert`, that with the least load; the rank.

    One of its experts goes to a rank with a free slot. There always is one to go: the rank is
    full, the other is not, so it holds an expert more that the other does not, besides `expert`.
    """
    slots = placement.shape[1]
    taker = 0
    while filled[taker] == slots:
        taker += 1
    giver, least = -1, np.float32(0)
    for rank in range(len(placement)):
        load = loads[:, rank].sum()
        if not held[rank, expert] and (giver < 0 or load < least):
            giver, least = rank, load
    chosen = -1
    for slot in range(slots):
        if not held[taker, placement[giver, slot]]:
            chosen = slot  # the last one is the lightest
    leaving = placement[giver, chosen]
    for t in range(len(loads)):
        loads[t, giver] -= unit[leaving, t]
        loads[t, taker] += unit[leaving, t]
    placement[taker, filled[taker]] = leaving
    held[taker, leaving], held[giver, leaving] = 1, 0
    filled[taker] += 1
    if filled[taker] == slots:
        closed[taker] = FULL
    filled[giver] -= 1
    placement[giver, chosen] = placement[giver, filled[giver]]
    placement[giver, filled[giver]] = -1
    return giver
