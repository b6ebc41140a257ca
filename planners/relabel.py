"""The names of ranks: a placement from scratch is permuted so that much of it is at home."""

from __future__ import annotations

import numpy as np
from numba import njit

from .layer import FAST


@njit(**FAST)
def relabel(placement, today, experts):
    """Permute the ranks of int32[ranks, slots] so that much of it is at home, best pairs first.

    Args:
        placement: int32[ranks, slots].
        today: int32[ranks, slots], home of what it holds.
        experts: of the layer.
    """
    ranks, slots = placement.shape
    pairs, common = _overlaps(placement, today, experts)
    first = np.zeros(slots + 2, np.int64)  # of the pairs in order of what they share, most first
    for shared in common:
        first[slots - shared + 1] += 1
    for i in range(slots + 1):
        first[i + 1] += first[i]
    order = np.empty(len(common), np.int64)
    for i in range(len(common)):
        order[first[slots - common[i]]] = i
        first[slots - common[i]] += 1
    named = np.full(ranks, -1, np.int32)
    taken = np.zeros(ranks, np.bool_)
    for pair in order:
        rank, other = pairs[pair, 0], pairs[pair, 1]
        if named[rank] < 0 and not taken[other]:
            named[rank] = other
            taken[other] = True
    relabelled = np.empty_like(placement)
    free = 0
    for rank in range(ranks):
        if named[rank] < 0:
            while taken[free]:
                free += 1
            named[rank] = free
            taken[free] = True
        for slot in range(slots):
            relabelled[named[rank], slot] = placement[rank, slot]
    return relabelled


@njit(**FAST)
def _overlaps(placement, today, experts):
    """(rank, rank at home) pairs int32[n, 2] that share experts, and how many int64[n]."""
    ranks, slots = today.shape
    first = np.zeros(experts + 1, np.int64)
    for rank in range(ranks):
        for slot in range(slots):
            first[today[rank, slot] + 1] += 1
    most = 0
    for rank in range(ranks):
        for slot in range(slots):
            most += first[placement[rank, slot] + 1]
    for expert in range(experts):
        first[expert + 1] += first[expert]
    at = first[:-1].copy()
    holders = np.empty(ranks * slots, np.int32)
    for rank in range(ranks):
        for slot in range(slots):
            expert = today[rank, slot]
            holders[at[expert]] = rank
            at[expert] += 1
    pairs = np.empty((most, 2), np.int32)
    common = np.zeros(most, np.int64)
    place_of = np.full(ranks, -1, np.int64)  # of the pair of the rank at hand with each rank
    n = 0
    for rank in range(ranks):
        start = n
        for slot in range(slots):
            expert = placement[rank, slot]
            for i in range(first[expert], first[expert + 1]):
                other = holders[i]
                if place_of[other] < start:
                    place_of[other] = n
                    pairs[n, 0], pairs[n, 1] = rank, other
                    n += 1
                common[place_of[other]] += 1
    return pairs[:n], common[:n]
