"""The round of each write, and the rank that sends it."""

from __future__ import annotations

import numpy as np
from numba import njit

from .slots import bonds, slot_of


@njit(nogil=True, cache=True)
def schedule(before, placement, layers, rows):
    """round[layers, ranks, slots] of each write, -1 where nothing is written."""
    _, ranks, slots = before.shape
    experts = before.max() + 1 if before.size else 0
    round_of = np.full(before.shape, -1, np.int32)
    used = np.zeros((64, ranks), np.int32)
    for layer in layers:
        old = slot_of(before[layer], experts)
        new = slot_of(placement[layer], experts)
        giver, taker = bonds(old, new)
        units, sizes, cyclic = _units(before[layer], placement[layer], giver, taker, new)
        for atomic in (True, False):
            start = 0
            for i in range(len(sizes)):
                unit = units[start : start + sizes[i]]
                start += sizes[i]
                if cyclic[i] == atomic:
                    used = _book(unit, atomic, slots, rows, used, round_of[layer])
    return round_of


@njit(nogil=True, cache=True)
def _units(before, placement, giver, taker, new):
    """The writes as rank * slots + slot, unit after unit, with each unit's size and kind.

    A write waits for the write by which the expert it overwrites arrives elsewhere, if that expert
    is bound to it. Within a unit each write stands after the one it waits for.
    """
    ranks, slots = before.shape
    units = np.empty(ranks * slots, np.int32)
    sizes = np.empty(ranks * slots, np.int32)
    cyclic = np.empty(ranks * slots, np.bool_)
    done = before == placement
    filled = count = 0
    for cycles in (False, True):
        for rank in range(ranks):
            for slot in range(slots):
                arriving = placement[rank, slot]
                if done[rank, slot] or (taker[arriving] == rank and not cycles):
                    continue
                first = filled
                r, s = rank, slot
                while not done[r, s]:
                    done[r, s] = True
                    units[filled] = r * slots + s
                    filled += 1
                    leaving = before[r, s]
                    if giver[leaving] != r:
                        break
                    r = taker[leaving]
                    s = new[r, leaving]
                units[first:filled] = units[first:filled][::-1].copy()
                sizes[count], cyclic[count] = filled - first, cycles
                count += 1
    return units[:filled], sizes[:count], cyclic[:count]


@njit(nogil=True, cache=True)
def _book(unit, atomic, slots, rows, used, round_of):
    """Enter a unit's writes into the first rounds with rows to spare; `used` [rounds, ranks]."""
    turn = 0
    booked = 0
    while booked < len(unit):
        if turn == len(used):
            used = np.concatenate((used, np.zeros_like(used)))
        fits = booked
        while fits < len(unit) and used[turn, unit[fits] // slots] < rows:
            fits += 1
        if fits == len(unit) or not atomic:
            for write in unit[booked:fits]:
                used[turn, write // slots] += 1
                round_of[write // slots, write % slots] = turn
            booked = fits
        turn += 1
    return used


@njit(nogil=True, cache=True)
def spread_sources(current, writes, experts, near, sent):
    """(rank, slot) of a holder for each write: own node, then fewest sent now, then fewest ever."""
    _, ranks, slots = current.shape
    holders = np.full((len(writes), ranks), -1, np.int32)
    for i in range(len(writes)):
        for rank in range(ranks):
            for slot in range(slots):
                if current[writes[i, 0], rank, slot] == experts[i]:
                    holders[i, rank] = slot
    choices = np.array([(holders[i] >= 0).sum() for i in range(len(writes))])
    sources = np.empty((len(writes), 2), np.int32)
    sending = np.zeros(ranks, np.int64)
    for i in np.argsort(choices, kind="mergesort"):
        best = -1
        best_key = (False, 0, 0)
        for rank in range(ranks):
            key = (rank // near != writes[i, 1] // near, sending[rank], sent[rank])
            if holders[i, rank] >= 0 and (best < 0 or key < best_key):
                best, best_key = rank, key
        sending[best] += 1
        sent[best] += 1
        sources[i, 0], sources[i, 1] = best, holders[i, best]
    return sources
