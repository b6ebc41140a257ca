"""The placement of one layer: replica counts, largest-first placement, and search by exact PAR.

Heat is float32[experts, episodes] here, episodes contiguous, and scaled by `scale_heat` so that
the PAR of a placement is the sum over episodes of the highest load of any rank.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .swaps import held_by, improve, layer_par, loads_of, moved, units_of

MARGIN = 1.3
"""A replica changes its expert if the new one's replicas are this many times as heavy."""

SWAPS_LEAVE = 0.6
"""Share of the excess of a fresh placement that swaps leave at best; measured: 0.65 to 0.9."""


def scale_heat(heat: np.ndarray, ranks: int) -> np.ndarray:
    """Scale tokens[episodes, experts] to float32[experts, busy episodes] as the search reads it.

    Episodes without tokens say nothing about a placement and are left out.
    """
    total = heat.sum(axis=1, dtype=np.float64)
    busy = total > 0
    scale = ranks / (total[busy] * len(heat))
    return np.ascontiguousarray((heat[busy] * scale[:, None]).T, dtype=np.float32)


@njit(nogil=True, cache=True)
def search_layer(heat, before, z, price, most_moves):
    """A placement int32[ranks, slots] with a low PAR plus price per moved slot.

    The better of two candidates, both improved by swaps: today's placement, with more replicas of
    its heaviest experts unless the moves are better spent on swaps; and one from scratch, its ranks
    relabelled to resemble today's.

    Args:
        heat: float32[experts, episodes], scaled.
        before: int32[ranks, slots], today's placement.
        z: standard deviations over the mean at which an expert's heat is reckoned.
        price: PAR that one moved slot must win.
        most_moves: slots that may receive another expert.
    """
    ranks, slots = before.shape
    home = held_by(before, len(heat))
    weights = _weights(heat, z)
    warm = recount(heat, before, weights, most_moves)
    improve(heat, warm, home, price, most_moves)
    worth = _worth(heat, warm, home, price)
    if worth >= layer_par(heat, before) or moved(warm, home) > most_moves - 2:
        swapped = before.copy()
        improve(heat, swapped, home, price, most_moves)
        if _worth(heat, swapped, home, price) < worth:
            warm, worth = swapped, _worth(heat, swapped, home, price)
    fresh = relabel(place(heat, replica_counts(weights, ranks * slots, ranks), ranks, slots), home)
    even = heat.sum() / ranks
    hope = even + SWAPS_LEAVE * (layer_par(heat, fresh) - even)
    if worth <= hope + price * moved(fresh, home):
        return warm
    improve(heat, fresh, home, price, ranks * slots)
    if moved(fresh, home) > most_moves or worth <= _worth(heat, fresh, home, price):
        return warm
    return fresh


@njit(nogil=True, cache=True)
def _worth(heat, placement, home, price):
    return layer_par(heat, placement) + price * moved(placement, home)


@njit(nogil=True, cache=True)
def _weights(heat, z):
    weights = np.empty(len(heat))
    for expert in range(len(heat)):
        weights[expert] = heat[expert].mean() + z * heat[expert].std()
    return weights


@njit(nogil=True, cache=True)
def replica_counts(weights, slots, ranks):
    """Replicas int32[experts] that fill `slots`, each next one where a replica weighs most.

    An expert gets at least one and at most `ranks`; needs experts <= slots <= experts * ranks.
    """
    counts = np.ones(len(weights), np.int32)
    for _ in range(slots - len(weights)):
        counts[_heaviest(weights, counts, counts == ranks)] += 1
    return counts


@njit(nogil=True, cache=True)
def _heaviest(weights, counts, closed):
    """The expert, of those not closed, whose replicas weigh most; -1 if all are closed."""
    best = -1
    for expert in range(len(weights)):
        if not closed[expert] and (
            best < 0 or weights[expert] * counts[best] > weights[best] * counts[expert]
        ):
            best = expert
    return best


@njit(nogil=True, cache=True)
def place(heat, counts, ranks, slots):
    """Place `counts` replicas, heaviest first, where their heat meets the load least.

    Each goes to the rank with a free slot, not holding the expert, whose load over the episodes
    has the smallest inner product with it. If only ranks that hold the expert have a free slot,
    another rank hands one of its experts over to such a rank and takes this one: it always can,
    for it is full, holds neither this expert nor fewer others than the rank with the free slot.
    """
    experts, episodes = heat.shape
    placement = np.full((ranks, slots), -1, np.int32)
    filled = np.zeros(ranks, np.int32)
    held = np.zeros((ranks, experts), np.bool_)
    load = np.zeros((ranks, episodes), np.float32)
    unit = np.empty((experts, episodes), np.float32)
    for expert in range(experts):
        unit[expert] = heat[expert] / np.float32(counts[expert])
    weight = np.array([row.sum() for row in unit])
    for expert in np.argsort(-weight, kind="mergesort"):
        for _ in range(counts[expert]):
            free, full = -1, -1
            free_cost = full_cost = np.float32(0)
            for rank in range(ranks):
                if held[rank, expert]:
                    continue
                cost = _dot(load, rank, unit, expert)
                if filled[rank] < slots and (free < 0 or cost < free_cost):
                    free, free_cost = rank, cost
                if filled[rank] == slots and (full < 0 or cost < full_cost):
                    full, full_cost = rank, cost
            if free < 0:
                free = _hand_over(placement, filled, held, load, unit, full)
            placement[free, filled[free]] = expert
            filled[free] += 1
            held[free, expert] = True
            load[free] += unit[expert]
    return placement


@njit(nogil=True, cache=True)
def _hand_over(placement, filled, held, load, unit, full):
    """Move the lightest expert that can go from rank `full` to a rank with a free slot; `full`."""
    ranks, slots = placement.shape
    for rank in range(ranks):
        if filled[rank] == slots:
            continue
        for slot in range(slots - 1, -1, -1):
            expert = placement[full, slot]
            if held[rank, expert]:
                continue
            placement[full, slot] = placement[full, slots - 1]
            filled[full] -= 1
            held[full, expert] = False
            load[full] -= unit[expert]
            placement[rank, filled[rank]] = expert
            filled[rank] += 1
            held[rank, expert] = True
            load[rank] += unit[expert]
            return full
    return -1


@njit(nogil=True, cache=True)
def recount(heat, placement, weights, most_moves):
    """Give slots of the least needed replicas to the heaviest experts; the changed placement.

    The expert with the heaviest replicas takes a slot, on the rank whose load over the episodes
    has the smallest inner product with it, from an expert whose replicas would then still be
    lighter by the factor MARGIN; until there is none, at most `most_moves` times.
    """
    placement = placement.copy()
    ranks = len(placement)
    held = held_by(placement, len(heat))
    counts = held.sum(axis=0)
    units = units_of(heat, placement)
    loads = loads_of(units, placement)
    closed = counts == ranks
    for _ in range(most_moves):
        hot = _heaviest(weights, counts, closed)
        if hot < 0:
            break
        rank, slot = _spare_slot(hot, placement, held, counts, units, loads, weights)
        if rank < 0:
            closed[hot] = True
            continue
        donor = placement[rank, slot]
        placement[rank, slot] = hot
        held[rank, donor], held[rank, hot] = 0, 1
        loads[rank] += units[hot] - units[donor]
        counts[donor] -= 1
        counts[hot] += 1
        for expert in np.array([donor, hot]):
            unit = heat[expert] / np.float32(counts[expert])
            for other in range(ranks):
                if held[other, expert]:
                    loads[other] += unit - units[expert]
            units[expert] = unit
        closed[hot] = counts[hot] == ranks
    return placement


@njit(nogil=True, cache=True)
def _spare_slot(hot, placement, held, counts, units, loads, weights):
    """(rank, slot) whose expert makes way for `hot` as `recount` says; (-1, -1) if none does."""
    best = (np.float32(0), -1, -1)
    for rank in range(len(placement)):
        if held[rank, hot]:
            continue
        load = _dot(loads, rank, units, hot)
        for slot in range(placement.shape[1]):
            donor = placement[rank, slot]
            left = counts[donor] - 1
            if left and weights[hot] * left > MARGIN * weights[donor] * counts[hot]:
                cost = load - _dot(units, donor, units, hot)
                if best[1] < 0 or cost < best[0]:
                    best = (cost, rank, slot)
    return best[1], best[2]


@njit(nogil=True, cache=True)
def relabel(placement, home):
    """Permute the ranks of int32[ranks, slots] so that much of it is at home, best pairs first."""
    ranks, slots = placement.shape
    overlap = np.zeros((ranks, ranks), np.int32)
    for rank in range(ranks):
        for expert in placement[rank]:
            for other in range(ranks):
                overlap[rank, other] += home[other, expert]
    named = np.full(ranks, -1, np.int32)
    taken = np.zeros(ranks, np.bool_)
    for common in range(slots, -1, -1):
        for rank in range(ranks):
            for other in range(ranks):
                if overlap[rank, other] == common and named[rank] < 0 and not taken[other]:
                    named[rank] = other
                    taken[other] = True
    relabelled = np.empty_like(placement)
    relabelled[named] = placement
    return relabelled


@njit(nogil=True, cache=True, fastmath=True)
def _dot(left, row, right, other):
    """Inner product over the episodes of a row of each float32[rows, episodes]."""
    total = np.float32(0)
    for t in range(left.shape[1]):
        total += left[row, t] * right[other, t]
    return total
