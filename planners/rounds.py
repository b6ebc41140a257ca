"""The round of each write, and the rank that sends its expert."""

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
    free = np.zeros(ranks, np.int64)
    for layer in layers:
        new = slot_of(placement[layer], experts)
        giver, taker = bonds(before[layer], placement[layer], new)
        units, sizes, cyclic = units_of(before[layer], placement[layer], giver, taker, new)
        for atomic in (True, False):
            start = 0
            for i in range(len(sizes)):
                unit = units[start : start + sizes[i]]
                start += sizes[i]
                if cyclic[i] == atomic:
                    used = _book(unit, atomic, slots, rows, used, free, round_of[layer])
    return round_of


@njit(nogil=True, cache=True)
def units_of(before, placement, giver, taker, new):
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
def _book(unit, atomic, slots, rows, used, free, round_of):
    """Enter a unit's writes into the first rounds with rows to spare.

    `used` [rounds, ranks] are the rows in use, `free` [ranks] the first round with one to spare.
    """
    turn = 0
    booked = 0
    while booked < len(unit):
        for write in unit if atomic else unit[booked : booked + 1]:
            turn = max(turn, free[write // slots])
        while turn >= len(used):
            used = np.concatenate((used, np.zeros_like(used)))
        fits = booked
        while fits < len(unit) and used[turn, unit[fits] // slots] < rows:
            fits += 1
        if fits == len(unit) or not atomic:
            for write in unit[booked:fits]:
                rank = write // slots
                round_of[rank, write % slots] = turn
                used[turn, rank] += 1
                while free[rank] < len(used) and used[free[rank], rank] == rows:
                    free[rank] += 1
            booked = fits
        turn += 1
    return used


@njit(nogil=True, cache=True)
def spread_sources(current, writes, experts, near, sent):
    """The holder that each write of a round takes its expert from, so that sends are even.

    A rank that holds the expert copies it from itself and sends nothing. Any other takes it from
    its own node where a holder is, else from all holders alike. Among these choices the busiest
    rank sends as few rows as possible, so does the next, and so on; where that leaves a choice,
    the rank sends that has sent least in earlier rounds. Rows are counted, not bytes: the experts
    of one model are of one size.

    This is an optimal semi-matching: Harvey, Ladner, Lovasz and Tamir, "Semi-matchings for
    bipartite graphs and load balancing", Journal of Algorithms 59 (2006): a greedy start, then
    cost-reducing paths until there are none.

    Args:
        current: int32[layers, ranks, slots], the placement that the round starts from.
        writes: int64[n, (layer, rank, slot)], the slots that receive.
        experts: int32[n], what they receive; each stands in `current`.
        near: consecutive ranks that share a node; the last node may have fewer.
        sent: int64[ranks], rows sent in earlier rounds; those of this one are added.

    Returns:
        int32[n, (rank, slot)].
    """
    holders, counts = _nearest_holders(current, writes, experts, near)
    unit = sent.max() + 1
    cost = sent.copy()  # a row sent now outweighs all that were sent before
    chosen = np.zeros(len(writes), np.int32)
    for i in np.argsort(counts, kind="mergesort"):
        for k in range(1, counts[i]):
            if cost[holders[i, k, 0]] < cost[holders[i, chosen[i], 0]]:
                chosen[i] = k
        sender = holders[i, chosen[i], 0]
        cost[sender] += unit if sender != writes[i, 1] else 0
    _even_out(holders, counts, chosen, cost, unit)
    sent += (cost - sent) // unit
    sources = np.empty((len(writes), 2), np.int32)
    for i in range(len(writes)):
        sources[i] = holders[i, chosen[i]]
    return sources


@njit(nogil=True, cache=True)
def _nearest_holders(current, writes, experts, near):
    """(rank, slot)[n, ranks, 2] of each write's nearest holders, and how many they are."""
    _, ranks, slots = current.shape
    holders = np.empty((len(writes), ranks, 2), np.int32)
    counts = np.zeros(len(writes), np.int32)
    first = after = np.empty(0, np.int32)  # slot of each expert, then a linked list
    listed = -1
    for i in range(len(writes)):
        layer, target, _ = writes[i]
        if layer != listed:
            first, after = _list_holders(current[layer])
            listed = layer
        nearest = 2
        at = first[experts[i]]
        while at >= 0:
            rank = at // slots
            distance = 0 if rank == target else 1 if rank // near == target // near else 2
            if distance < nearest:
                nearest, counts[i] = distance, 0
            if distance == nearest:
                holders[i, counts[i]] = rank, at % slots
                counts[i] += 1
            at = after[at]
    return holders, counts


@njit(nogil=True, cache=True)
def _list_holders(placement):
    """(first[E], after[R * S]): the first slot, rank * S + slot, that holds each expert of
    int32[R, S], and the next one after each slot; or -1."""
    ranks, slots = placement.shape
    first = np.full(placement.max() + 1, -1, np.int32)
    after = np.empty(ranks * slots, np.int32)
    for at in range(ranks * slots - 1, -1, -1):
        expert = placement[at // slots, at % slots]
        after[at] = first[expert]
        first[expert] = at
    return first, after


@njit(nogil=True, cache=True)
def _even_out(holders, counts, chosen, cost, unit):
    """Change `chosen` and `cost` until no sender can pass a row on and win by it.

    A path leads from the busiest rank by a row that it sends to another rank that could send it.
    Where none wins, what it reaches stays closed: no rank that is less busy could win there either.
    """
    ranks = len(cost)
    via = np.full(ranks, -1, np.int64)  # row * ranks + choice that leads to a rank; -1: open
    queue = np.empty(ranks, np.int64)
    first, after = _rows_by_sender(holders, chosen, ranks)
    while True:
        busiest = np.where(via < 0, cost, -1).argmax()
        if via[busiest] >= 0 or cost[busiest] < unit:  # the others send nothing
            return
        reached = _reach(busiest, holders, counts, first, after, via, queue)
        idlest = reached[cost[reached].argmin()]
        if cost[idlest] + unit >= cost[busiest]:
            continue
        cost[busiest] -= unit
        cost[idlest] += unit
        rank = idlest
        while rank != busiest:
            i, k = divmod(via[rank], ranks)
            rank = holders[i, chosen[i], 0]
            chosen[i] = k
        via[reached] = -1
        first, after = _rows_by_sender(holders, chosen, ranks)


@njit(nogil=True, cache=True)
def _rows_by_sender(holders, chosen, ranks):
    """(first[ranks], after[n]): the first row that each rank sends, the next after each; or -1."""
    first = np.full(ranks, -1, np.int64)
    after = np.empty(len(chosen), np.int64)
    for i in range(len(chosen)):
        sender = holders[i, chosen[i], 0]
        after[i] = first[sender]
        first[sender] = i
    return first, after


@njit(nogil=True, cache=True)
def _reach(start, holders, counts, first, after, via, queue):
    """The open ranks that a path from `start` reaches, `start` among them; enters them in `via`."""
    via[start] = 0
    queue[0] = start
    head, tail = 0, 1
    while head < tail:
        i = first[queue[head]]
        head += 1
        while i >= 0:
            for k in range(counts[i]):
                rank = holders[i, k, 0]
                if via[rank] < 0:
                    via[rank] = i * len(via) + k
                    queue[tail] = rank
                    tail += 1
            i = after[i]
    return queue[:tail]
