"""The slots of arriving experts, chosen so that a plan runs at one row per rank.

In each layer, as many experts leave a rank as arrive on it. An expert that stays on no rank is
*bound*: we choose one rank that gives it up and one that takes it, and the giver may be overwritten
no earlier than the round in which the taker receives. Bound experts are the edges of a graph on the
ranks. We split it into simple cycles and paths, and let the expert that arrives by one edge
overwrite the expert that leaves by the next. A cycle is carried out at once, with one write on each
rank it visits; a path from its end to its start, one write at a time; all other writes at any time.
So one staging row per rank always suffices.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def slot_of(placement, experts):
    """slot[ranks, experts] of each expert on each rank, -1 where it is not there."""
    slots = np.full((placement.shape[0], experts), -1, np.int32)
    for rank in range(placement.shape[0]):
        for slot in range(placement.shape[1]):
            slots[rank, placement[rank, slot]] = slot
    return slots


@njit(nogil=True, cache=True)
def bonds(before, after, new):
    """(giver, taker)[experts] of each expert that stays on no rank, -1 for the others.

    Args:
        before, after: int32[ranks, slots].
        new: `slot_of` after.
    """
    ranks, experts = new.shape
    giver = np.full(experts, -1, np.int32)
    taker = np.full(experts, -1, np.int32)
    stays = np.zeros(experts, np.bool_)
    for rank in range(ranks - 1, -1, -1):
        for expert in before[rank]:
            giver[expert] = rank
            stays[expert] |= new[rank, expert] >= 0
        for expert in after[rank]:
            taker[expert] = rank
    for expert in range(experts):
        if stays[expert]:
            giver[expert] = taker[expert] = -1
    return giver, taker


@njit(nogil=True, cache=True)
def align_layers(before, placement, experts):
    """Re-slot `placement` [layers, ranks, slots] in place."""
    for layer in range(len(before)):
        if (before[layer] == placement[layer]).all():
            continue
        wanted = placement[layer].copy()
        old, new = slot_of(before[layer], experts), slot_of(wanted, experts)
        giver, taker = bonds(before[layer], wanted, new)
        heir = np.full(old.shape, -1, np.int32)
        _pair_cycles(giver, taker, heir)
        _pair_free(before[layer], wanted, old, new, heir)
        for rank in range(old.shape[0]):
            for slot in range(before.shape[2]):
                leaving = before[layer, rank, slot]
                stays = new[rank, leaving] >= 0
                placement[layer, rank, slot] = leaving if stays else heir[rank, leaving]


@njit(nogil=True, cache=True)
def _pair_cycles(giver, taker, heir):
    """Set heir[rank, leaving] = arriving where one bound edge of a simple cycle meets the next.

    A walk along unused edges cuts off a cycle whenever it comes back to a rank on its trail. An
    edge the walk backs out of leads to a rank with no unused edge left, so it lies on no further
    cycle: such edges form an acyclic graph, which any pairing of their ends splits into paths.
    """
    ranks, experts = heir.shape
    unused = np.full(ranks, -1, np.int32)  # first edge out of each rank, then a linked list
    after = np.full(experts, -1, np.int32)
    for expert in range(experts):
        if giver[expert] >= 0:
            after[expert] = unused[giver[expert]]
            unused[giver[expert]] = expert
    seat = np.full(ranks, -1, np.int32)
    trail = np.empty(ranks, np.int32)
    for start in range(ranks):
        rank, depth = start, 0
        seat[rank] = 0
        while unused[rank] >= 0 or depth > 0:
            edge = unused[rank]
            if edge < 0:
                seat[rank] = -1
                depth -= 1
                rank = giver[trail[depth]]
                continue
            unused[rank] = after[edge]
            trail[depth] = edge
            depth += 1
            rank = taker[edge]
            if seat[rank] < 0:
                seat[rank] = depth
            else:
                depth = _cut_cycle(trail, seat, depth, taker, heir)
        seat[start] = -1


@njit(nogil=True, cache=True)
def _cut_cycle(trail, seat, depth, taker, heir):
    """Pair the edges of the cycle that the last edge of the trail closes; the trail's new depth."""
    base = seat[taker[trail[depth - 1]]]
    for k in range(base, depth):
        rank = taker[trail[k]]
        onward = trail[k + 1] if k + 1 < depth else trail[base]
        heir[rank, onward] = trail[k]
        if k + 1 < depth:
            seat[rank] = -1
    return base


@njit(nogil=True, cache=True)
def _pair_free(before, wanted, old, new, heir):
    """Pair the other arrivals with the other leavings of their rank, in slot order."""
    for rank in range(before.shape[0]):
        settled = np.zeros(old.shape[1], np.bool_)
        for leaving in before[rank]:
            if heir[rank, leaving] >= 0:
                settled[heir[rank, leaving]] = True
        slot = 0
        for arriving in wanted[rank]:
            if old[rank, arriving] >= 0 or settled[arriving]:
                continue
            while new[rank, before[rank, slot]] >= 0 or heir[rank, before[rank, slot]] >= 0:
                slot += 1
            heir[rank, before[rank, slot]] = arriving
