"""Local search on the placement of one layer, every step judged by its exact PAR.

Heat is scaled as in `search.scale_heat`: PAR is the sum over episodes of the highest load.
"""

from __future__ import annotations

import numpy as np
from numba import njit

STEP = 5e-4
"""PAR that each step must win on top of its price; smaller gains only cost time and moves."""


@njit(nogil=True, cache=True)
def improve(heat, placement, home, price, most_moves):
    """Swap experts of the rank that is most often the peak while PAR plus price of moves falls.

    A rank without a swap that gains is left alone until a swap of another rank changes its load.

    Args:
        heat: float32[experts, episodes], scaled.
        placement: int32[ranks, slots], valid; changed in place and valid again.
        home: int32[ranks, experts], 1 where an expert stands today.
        price: PAR that one moved slot must win.
        most_moves: slots that may differ from `home`; a placement that starts with more stays.
    """
    experts = len(heat)
    held = held_by(placement, experts)
    units = units_of(heat, placement)
    loads = loads_of(units, placement)
    ranks = len(placement)
    stuck = np.zeros(ranks, np.bool_)
    for _ in range(4 * placement.size):
        top, first, second = _top_three(loads)
        peaks = np.bincount(first, minlength=ranks) * ~stuck
        rank = peaks.argmax()
        if peaks[rank] == 0:
            return
        room = most_moves - moved(placement, home)
        gain, slot, other, other_slot = _best_swap(
            rank, placement, held, home, units, loads, top, first, second, price, room
        )
        stuck[rank] = True
        if gain > 0:
            leaving, arriving = placement[rank, slot], placement[other, other_slot]
            placement[rank, slot], placement[other, other_slot] = arriving, leaving
            held[rank, leaving] = held[other, arriving] = 0
            held[rank, arriving] = held[other, leaving] = 1
            for changed in (rank, other):
                stuck[changed] = False
                loads[changed] = 0
                for expert in placement[changed]:
                    loads[changed] += units[expert]


@njit(nogil=True, cache=True)
def _top_three(loads):
    """The three highest loads float32[3, episodes] and the ranks [episodes] of the first two."""
    ranks, episodes = loads.shape
    top = np.full((3, episodes), -1, np.float32)
    first = np.zeros(episodes, np.int64)
    second = np.zeros(episodes, np.int64)
    for rank in range(ranks):
        for t in range(episodes):
            load = loads[rank, t]
            if load > top[0, t]:
                top[2, t], top[1, t], top[0, t] = top[1, t], top[0, t], load
                second[t], first[t] = first[t], rank
            elif load > top[1, t]:
                top[2, t], top[1, t] = top[1, t], load
                second[t] = rank
            elif load > top[2, t]:
                top[2, t] = load
    return top, first, second


@njit(nogil=True, cache=True, fastmath=True)
def _best_swap(rank, placement, held, home, units, loads, top, first, second, price, room):
    """(gain over STEP, slot, other rank, its slot) of the best swap with `rank`; gain 0 if none.

    The search ends at the first rank with a swap that wins half of what `rank` alone can win.
    """
    ranks, slots = placement.shape
    found = (0.0, 0, 0, 0)
    peak = top[0].sum()
    enough = 0.5 * (peak - np.where(first == rank, top[1], top[0]).sum())
    rest = np.empty(len(first), np.float32)
    for other in range(ranks):
        if other == rank or found[0] > enough:
            continue
        for t in range(len(rest)):
            if first[t] != rank and first[t] != other:
                rest[t] = top[0, t]
            elif second[t] != rank and second[t] != other:
                rest[t] = top[1, t]
            else:
                rest[t] = top[2, t]
        if peak - rest.sum() + 2 * price < found[0] + STEP:
            continue
        relief = _relief(placement, rank, other, first, units)
        for slot in range(slots):
            leaving = placement[rank, slot]
            if held[other, leaving]:
                continue
            for other_slot in range(slots):
                arriving = placement[other, other_slot]
                if held[rank, arriving]:
                    continue
                bound = relief[0, slot] - relief[1, other_slot]
                if bound + 2 * price < found[0] + STEP:
                    continue
                moves = home[rank, leaving] + home[other, arriving]
                moves -= home[rank, arriving] + home[other, leaving]
                if moves > room:
                    continue
                after = np.float32(0)
                for t in range(len(rest)):
                    shift = units[leaving, t] - units[arriving, t]
                    high = max(loads[rank, t] - shift, loads[other, t] + shift)
                    after += max(high, rest[t])
                gain = peak - after - price * moves - STEP
                if gain > found[0]:
                    found = (gain, slot, other, other_slot)
    return found


@njit(nogil=True, cache=True, fastmath=True)
def _relief(placement, rank, other, first, units):
    """PAR float32[2, slots] that each expert of the two ranks adds where `rank` is the peak.

    Less what it adds where `other` is. The difference of two bounds what swapping them can win.
    """
    slots = placement.shape[1]
    sign = np.empty(len(first), np.float32)
    for t in range(len(first)):
        sign[t] = (first[t] == rank) - (first[t] == other)
    relief = np.zeros((2, slots), np.float32)
    for side in range(2):
        for slot in range(slots):
            expert = placement[other if side else rank, slot]
            for t in range(len(first)):
                relief[side, slot] += sign[t] * units[expert, t]
    return relief


@njit(nogil=True, cache=True)
def layer_par(heat, placement):
    """PAR of int32[ranks, slots] over the busy episodes; each idle one adds 1 / episodes."""
    return peak_of(loads_of(units_of(heat, placement), placement)).sum()


@njit(nogil=True, cache=True)
def held_by(placement, experts):
    """1 in int32[ranks, experts] where a rank holds an expert."""
    held = np.zeros((len(placement), experts), np.int32)
    for rank in range(len(placement)):
        for expert in placement[rank]:
            held[rank, expert] = 1
    return held


@njit(nogil=True, cache=True)
def moved(placement, home):
    """Slots whose expert was not on the rank."""
    moved = 0
    for rank in range(len(placement)):
        for expert in placement[rank]:
            moved += 1 - home[rank, expert]
    return moved


@njit(nogil=True, cache=True)
def units_of(heat, placement):
    """Heat float32[experts, episodes] of one replica of each expert."""
    counts = np.zeros(len(heat), np.float32)
    for expert in placement.flat:
        counts[expert] += np.float32(1)
    units = np.empty_like(heat)
    for expert in range(len(heat)):
        units[expert] = heat[expert] / counts[expert]
    return units


@njit(nogil=True, cache=True)
def loads_of(units, placement):
    """Load float32[ranks, episodes]."""
    loads = np.zeros((len(placement), units.shape[1]), np.float32)
    for rank in range(len(placement)):
        for expert in placement[rank]:
            loads[rank] += units[expert]
    return loads


@njit(nogil=True, cache=True)
def peak_of(loads):
    """The highest load float32[episodes] of any rank."""
    peak = loads[0].copy()
    for rank in range(1, len(loads)):
        for t in range(len(peak)):
            if loads[rank, t] > peak[t]:
                peak[t] = loads[rank, t]
    return peak
