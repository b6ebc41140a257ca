"""Routing weights: how an expert's tokens divide among its replicas, in columns of a table.

The router takes one of an expert's columns at random, so a slot's share of its expert's tokens is
its share of the expert's columns. Columns move from replica to replica while the PAR falls.

Where a rank sends all of its tokens for an expert to one replica, a column is a rank that sends:
every expert with replicas has as many columns as there are ranks, and an even division is only the
start.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .layer import FAST, exchange_heat, find_highest, new_layer, peak, settle
from .scale import scale_heat

FIRST_COLUMNS = 16
"""Columns of a replica at the start, at most; finer shares come later, where they win something."""

ROUNDS = 8
"""Turns of moving columns off the peaks and of evening out all ranks."""

LEAST = 1e-5
"""PAR that a move of columns must win."""


@njit(**FAST)
def weigh_layer(tokens, index, placement, max_columns, by_source, columns):
    """Plan the routing columns of one layer; its PAR with them, never above that of the start.

    Args:
        tokens: float64[T, layers, E].
        index: of the layer.
        placement: int32[R, S].
        max_columns: columns that one expert may have, at least R.
        by_source: whether a column is a rank that sends. The start is an even division then, so
            far as whole ranks can be; otherwise it is uniform.
        columns: int16[R, S], filled; all 1 where uniform shares cannot be improved.

    Returns:
        PAR of the layer on `tokens`.
    """
    ranks, slots = placement.shape
    episodes, _, experts = tokens.shape
    scaled, idle = scale_heat(tokens, index, ranks)
    layer = new_layer(scaled, np.zeros((ranks, experts), np.int8), ranks, slots)
    settle(layer, placement)
    least = np.float32(LEAST * episodes)
    if by_source:
        return (weigh_sources(layer, columns, least) + idle) / episodes
    return (weigh(layer, max_columns, columns, least) + idle) / episodes


@njit(**FAST)
def weigh(layer, max_columns, columns, least):
    """Fill `columns` for the placement of `layer`, whose loads follow them; the sum of its peaks.

    Args:
        layer: settled; its loads are changed.
        max_columns: columns that one expert may have.
        columns: int16[R, S].
        least: what a move of columns must win.
    """
    placement = layer.placement
    ranks, slots = placement.shape
    columns[:] = 1
    best = peak(layer)
    chosen = columns.copy()
    totals = layer.counts.copy()
    for rank in range(ranks):
        for slot in range(slots):
            count = layer.counts[placement[rank, slot]]
            if count > 1:
                columns[rank, slot] = max_columns // count
                while columns[rank, slot] > FIRST_COLUMNS:
                    columns[rank, slot] //= 2
                totals[placement[rank, slot]] = count * columns[rank, slot]
    while ranks > 1:
        _divide(layer, columns, totals, least)
        if peak(layer) > best - least:
            break
        best = peak(layer)
        chosen[:] = columns
        if not _refine(layer, columns, totals, max_columns):
            break
    columns[:] = chosen
    return best


@njit(**FAST)
def weigh_sources(layer, columns, least):
    """`weigh` where the columns of an expert with replicas are the ranks that send to them."""
    even_columns(layer.placement, layer.counts, columns)
    totals = np.ones_like(layer.counts)
    for expert in range(len(totals)):
        if layer.counts[expert] > 1:
            totals[expert] = len(columns)
    _divide(layer, columns, totals, least)
    return peak(layer)


@njit(**FAST)
def even_columns(placement, counts, columns):
    """Divide the ranks that send evenly: the first replicas of an expert get what is left over.

    Args:
        placement: int32[R, S].
        counts: int[E], replicas.
        columns: int16[R, S], filled.
    """
    ranks, slots = placement.shape
    turn = np.zeros(len(counts), np.int64)
    for rank in range(ranks):
        for slot in range(slots):
            expert = placement[rank, slot]
            columns[rank, slot] = 1
            if counts[expert] > 1:
                count = counts[expert]
                columns[rank, slot] = ranks // count + (turn[expert] < ranks % count)
                turn[expert] += 1


@njit(**FAST)
def _divide(layer, columns, totals, least):
    """Move columns from replica to replica while that wins something; loads are by them then."""
    _share_loads(layer, columns, totals)
    replicas = np.argsort(layer.placement.ravel(), kind="mergesort")  # slots, expert after expert
    first = np.zeros(len(layer.counts) + 1, np.int64)  # where each expert begins
    first[1:] = layer.counts.cumsum()
    for _ in range(ROUNDS):
        _move_columns(layer, columns, totals, replicas, first, least)
        if not _even_out(layer, columns, totals, replicas, first):
            break
    _share_loads(layer, columns, totals)


@njit(**FAST)
def _share_loads(layer, columns, totals):
    """Loads and highest loads by the columns."""
    layer.loads[:] = 0
    for rank in range(len(columns)):
        for slot in range(columns.shape[1]):
            expert = layer.placement[rank, slot]
            share = np.float32(columns[rank, slot]) / totals[expert]
            for t in range(layer.loads.shape[1]):
                layer.loads[rank, t] += layer.heat[expert, t] * share
    find_highest(layer)


@njit(**FAST)
def _refine(layer, columns, totals, max_columns):
    """Double the columns of all experts that may have as many; whether there are any."""
    refined = False
    for rank in range(len(columns)):
        for slot in range(columns.shape[1]):
            expert = layer.placement[rank, slot]
            if layer.counts[expert] > 1 and 2 * totals[expert] <= max_columns:
                columns[rank, slot] *= 2
                refined = True
    for expert in range(len(totals)):
        if layer.counts[expert] > 1 and 2 * totals[expert] <= max_columns:
            totals[expert] *= 2
    return refined


@njit(**FAST)
def _move_columns(layer, columns, totals, replicas, first, least):
    """Move columns away from the ranks that are the peak while that wins `least`."""
    placement = layer.placement
    ranks, slots = placement.shape
    stuck = np.zeros(ranks, np.bool_)
    for _ in range(16 * ranks):
        margin = np.zeros(ranks, np.float32)
        for t in range(layer.heat.shape[1]):
            margin[layer.at[0, t]] += layer.top[0, t] - layer.top[1, t] + np.float32(1e-9)
        for rank in range(ranks):
            if stuck[rank]:
                margin[rank] = 0
        rank = int(margin.argmax())
        if margin[rank] <= 0:
            return
        best, from_slot, to, to_slot, amount = least, -1, -1, -1, 0
        for slot in range(slots):
            expert = placement[rank, slot]
            if layer.counts[expert] < 2:
                continue
            if _most_gain(layer, expert, rank, columns[rank, slot] // 2 / totals[expert]) <= best:
                continue
            for replica in replicas[first[expert] : first[expert + 1]]:
                other, other_slot = replica // slots, replica % slots
                if other == rank:
                    continue
                step = columns[rank, slot] // 2
                while step > 0:
                    gain = _shift_gain(layer, expert, rank, other, step / totals[expert])
                    if gain > best:
                        best, from_slot, amount = gain, slot, step
                        to, to_slot = other, other_slot
                    step //= 2
        stuck[rank] = to < 0
        if to < 0:
            continue
        expert = placement[rank, from_slot]
        _shift(layer, columns, expert, rank, from_slot, to, to_slot, amount, totals)
        stuck[to] = False


@njit(**FAST)
def _even_out(layer, columns, totals, replicas, first):
    """Move columns between replicas to even out mean loads, the PAR being no worse; if any moved.

    Where many ranks are the peak together no single move of columns lowers it: these do.
    """
    placement = layer.placement
    ranks, slots = placement.shape
    episodes = layer.heat.shape[1]
    load = np.zeros(ranks, np.float32)
    for rank in range(ranks):
        for t in range(episodes):
            load[rank] += layer.loads[rank, t]
    moved = False
    for rank in np.argsort(-load):
        for slot in range(slots):
            expert = placement[rank, slot]
            if layer.counts[expert] < 2:
                continue
            to, to_slot = -1, -1
            for replica in replicas[first[expert] : first[expert + 1]]:
                other = replica // slots
                if load[other] < (load[rank] if to < 0 else load[to]):
                    to, to_slot = other, replica % slots
            if to < 0:
                continue
            column = layer.mean[expert] * episodes / totals[expert]
            most = columns[rank, slot] - 1
            if column <= 0 or most < 1:
                continue
            amount = min(most, int(np.round((load[rank] - load[to]) / column / 2)))
            share = amount / totals[expert]
            if amount < 1 or _shift_gain(layer, expert, rank, to, share) < 0:
                continue
            _shift(layer, columns, expert, rank, slot, to, to_slot, amount, totals)
            load[rank] -= amount * column
            load[to] += amount * column
            moved = True
    return moved


@njit(**FAST)
def _shift(layer, columns, expert, rank, slot, other, other_slot, amount, totals):
    """Give `amount` columns of one replica to another."""
    columns[rank, slot] -= amount
    columns[other, other_slot] += amount
    share = np.float32(amount / totals[expert])
    exchange_heat(layer, rank, expert, share, other, expert, np.float32(0))


@njit(**FAST)
def _most_gain(layer, expert, rank, share):
    """What `_shift_gain` can be at most, whatever rank it goes to."""
    most = np.float32(0)
    for t in range(layer.heat.shape[1]):
        if layer.at[0, t] == np.int32(rank):
            margin = layer.top[0, t] - layer.top[1, t]
            most += min(margin, layer.heat[expert, t] * np.float32(share))
    return most


@njit(**FAST)
def _shift_gain(layer, expert, rank, other, share):
    """What it wins if `share` of the heat of `expert` goes from `rank` to `other`."""
    gain = np.float32(0)
    for t in range(layer.heat.shape[1]):
        shift = layer.heat[expert, t] * np.float32(share)
        here, there = layer.loads[rank, t] - shift, layer.loads[other, t] + shift
        high = here if here > there else there
        rest = layer.top[2, t]
        if (layer.at[1, t] != rank) & (layer.at[1, t] != other):
            rest = layer.top[1, t]
        if (layer.at[0, t] != rank) & (layer.at[0, t] != other):
            rest = layer.top[0, t]
        gain += layer.top[0, t] - (high if high > rest else rest)
    return gain
