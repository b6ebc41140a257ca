"""Placement from scratch: the heaviest replicas first, each where its heat meets the load least."""

from __future__ import annotations

import numpy as np
from numba import njit

from .layer import FAST

BAND = 64
"""Ranks compared for each replica; of more ranks, those of the band that bears least."""

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
    placement = np.full((ranks, slots), -1, np.int32)
    filled = np.zeros(ranks, np.int32)
    bands = -(-ranks // BAND)
    wide = -(-ranks // bands)
    rows = -(-heat.shape[1] // 4) * 4  # four at a time; the last ones may be empty
    loads = np.zeros((bands, rows, wide), np.float32)
    cost = np.empty((bands, wide), np.float32)  # of the expert at hand, on each rank
    closed = np.zeros((bands, wide), np.float32)  # FULL if there is no free slot
    for rank in range(ranks, bands * wide):
        closed[rank // wide, rank % wide] = FULL
    unit, weight = _units(heat, counts, rows)
    borne = np.zeros(bands, np.float32)  # heat per rank of each band
    priced = np.full(bands, -1)  # the expert whose cost is known there
    tried = np.empty(bands, np.bool_)
    for expert in np.argsort(weight):
        for _ in range(counts[expert]):
            rank = -1
            tried[:] = False
            for _ in range(bands):
                band = _least_of_others(borne, tried)
                tried[band] = True
                if priced[band] != expert:
                    priced[band] = expert
                    for i in range(wide):
                        cost[band, i] = closed[band, i]
                    for t in range(0, rows, 4):
                        a, b = unit[expert, t], unit[expert, t + 1]
                        c, d = unit[expert, t + 2], unit[expert, t + 3]
                        for i in range(wide):
                            low = loads[band, t, i] * a + loads[band, t + 1, i] * b
                            high = loads[band, t + 2, i] * c + loads[band, t + 3, i] * d
                            cost[band, i] += low + high
                least = FULL
                for i in range(wide):
                    least = cost[band, i] if cost[band, i] < least else least
                if least < FULL:
                    i = 0
                    while cost[band, i] != least:
                        i += 1
                    rank = band * wide + i
                    break
            if rank < 0:
                rank = _hand_over(placement, filled, closed, loads, unit, expert)
            band, i = rank // wide, rank % wide
            placement[rank, filled[rank]] = expert
            filled[rank] += 1
            cost[band, i] = FULL
            borne[band] -= weight[expert] / min(wide, ranks - band * wide)
            for t in range(rows):
                loads[band, t, i] += unit[expert, t]
            if filled[rank] == slots:
                closed[band, i] = FULL
    return placement, _peaks(loads)


@njit(**FAST)
def _least_of_others(values, left_out):
    """Where the least of those is that are not left out; -1 if all are."""
    least = -1
    for i in range(len(values)):
        if not left_out[i] and (least < 0 or values[i] < values[least]):
            least = i
    return least


@njit(**FAST)
def _units(heat, counts, rows):
    """(float32[experts, rows], heat of one replica; float32[experts], minus its sum)."""
    experts, episodes = heat.shape
    unit = np.zeros((experts, rows), np.float32)
    weight = np.empty(experts, np.float32)
    for expert in range(experts):
        share = np.float32(1) / counts[expert]
        total = np.float32(0)
        for t in range(episodes):
            unit[expert, t] = heat[expert, t] * share
            total += unit[expert, t]
        weight[expert] = -total
    return unit, weight


@njit(**FAST)
def _peaks(loads):
    """The highest loads of all episodes, added up."""
    bands, rows, wide = loads.shape
    total = np.float32(0)
    for t in range(rows):
        high = np.float32(0)
        for band in range(bands):
            for i in range(wide):
                high = loads[band, t, i] if loads[band, t, i] > high else high
        total += high
    return total


@njit(**FAST)
def _hand_over(placement, filled, closed, loads, unit, expert):
    """Free a slot on a rank without `expert`, that with the least load; the rank.

    One of its experts goes to a rank with a free slot. There always is one to go: the rank is
    full, the other is not, so it holds an expert more that the other does not, besides `expert`.
    """
    ranks, slots = placement.shape
    wide = loads.shape[2]
    taker = 0
    while filled[taker] == slots:
        taker += 1
    giver, least = -1, np.float32(0)
    for rank in range(ranks):
        load = loads[rank // wide, :, rank % wide].sum()
        if (giver < 0 or load < least) and not _holds(placement[rank], expert):
            giver, least = rank, load
    chosen = slots - 1  # the last one is the lightest
    while _holds(placement[taker], placement[giver, chosen]):
        chosen -= 1
    leaving = placement[giver, chosen]
    for t in range(loads.shape[1]):
        loads[giver // wide, t, giver % wide] -= unit[leaving, t]
        loads[taker // wide, t, taker % wide] += unit[leaving, t]
    placement[taker, filled[taker]] = leaving
    filled[taker] += 1
    if filled[taker] == slots:
        closed[taker // wide, taker % wide] = FULL
    filled[giver] -= 1
    placement[giver, chosen] = placement[giver, filled[giver]]
    placement[giver, filled[giver]] = -1
    return giver


@njit(**FAST)
def _holds(experts, expert):
    return (experts == expert).any()
