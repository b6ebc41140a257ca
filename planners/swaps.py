"""Swaps of two experts between two ranks: those that lower the peak, and those that even out.

The estimate of a swap is what it wins in the episodes whose peak the rank is, no more than the
margin over the next rank, less the harm that the heat it gives away does on the other rank.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from .layer import FAST, INLINE, swap, swap_gain

SLIGHT = 0.5
"""Share of the mean margin below which a peak does not count in an estimate."""

PARTNERS = 8
"""Ranks with little load that one with much is evened out with."""

EVEN_ENOUGH = 1e-7
"""Square of the difference from the mean load, as a share of it, that is not worth a swap."""

MOST_PEAKS = 6
"""Episodes, those with most margin, that an estimate looks at."""

LANES = 16
"""Parts of a slot's estimates; of each part only the best is checked."""

NOTHING = np.float32(-1e30)
"""Worth of what is no swap."""


class Desk(NamedTuple):
    """Room to work in for `swap_one`, made once; n slots of other ranks may be swapped with.

    Estimates are made for m slots of the rank, and n is rounded up to whole LANES there.

    Attributes:
        slots: int32[3, n], rank, slot and expert of each.
        mean: float32[n], its heat in an average episode.
        harm: float32[4, n], the two lines of the harm to its rank.
        units: float32[MOST_PEAKS, n], its heat in each of `peaks`.
        worth: float32[m, n], what it is likely to win in place of a slot of the rank.
        best: float32[m, LANES], the most of every LANES-th of these.
        tops: float32[m], the most of all of a row.
        peaks: int32[MOST_PEAKS], episodes of which the rank is the peak.
        margins: float32[MOST_PEAKS], how far it is above the next rank there.
        hopes: float32[S], the most that each slot of the rank can win.
        rows: int32[m], those slots of the rank.
    """

    slots: np.ndarray
    mean: np.ndarray
    harm: np.ndarray
    units: np.ndarray
    worth: np.ndarray
    best: np.ndarray
    tops: np.ndarray
    peaks: np.ndarray
    margins: np.ndarray
    hopes: np.ndarray
    rows: np.ndarray


@njit(**FAST)
def new_desk(layer, partners, rows):
    """A desk for swaps of up to `rows` slots of any rank of `layer` with `partners` others."""
    ranks, slots = layer.placement.shape
    n, m = min(partners, ranks) * slots, min(rows, slots)
    return Desk(
        np.empty((3, n), np.int32),
        np.empty(n, np.float32),
        np.empty((4, n), np.float32),
        np.empty((MOST_PEAKS, n), np.float32),
        np.full((m, -(-n // LANES) * LANES), NOTHING),
        np.empty((m, LANES), np.float32),
        np.empty(m, np.float32),
        np.empty(MOST_PEAKS, np.int32),
        np.empty(MOST_PEAKS, np.float32),
        np.empty(slots, np.float32),
        np.empty(m, np.int32),
    )


@njit(**INLINE)
def _find_peaks(layer, rank, desk):
    """Fill peaks and margins, most margin first: (how many, how much of all margin they leave)."""
    peaks, margins = desk.peaks, desk.margins
    kept = count = 0
    total = np.float32(0)
    for t in range(layer.heat.shape[1]):
        if layer.at[0, t] != rank:
            continue
        margin = layer.top[0, t] - layer.top[1, t]
        total += margin
        count += 1
        if kept == MOST_PEAKS and margin <= margins[kept - 1]:
            continue
        kept += kept < MOST_PEAKS
        i = kept - 1
        while i > 0 and margins[i - 1] < margin:
            margins[i], peaks[i] = margins[i - 1], peaks[i - 1]
            i -= 1
        margins[i], peaks[i] = margin, t
    while kept > 0 and margins[kept - 1] * count < np.float32(SLIGHT) * total:
        kept -= 1
    seen = np.float32(0)
    for i in range(kept):
        seen += margins[i]
    return kept, total / seen if seen > 0 else np.float32(1)


@njit(**FAST)
def lay_out(layer, others, desk):
    """Put the slots of the ranks `others` on the desk; how many these are."""
    for i in range(len(others)):
        _put(layer, others[i], i * layer.placement.shape[1], desk)
    return len(others) * layer.placement.shape[1]


@njit(**FAST)
def lay_out_again(layer, others, rank, other, desk):
    """The same after a swap of `rank` with `other`."""
    for i in range(len(others)):
        if others[i] == rank or others[i] == other:
            _put(layer, others[i], i * layer.placement.shape[1], desk)


@njit(**INLINE)
def _put(layer, other, first, desk):
    for slot in range(layer.placement.shape[1]):
        expert = layer.placement[other, slot]
        j = first + slot
        desk.slots[0, j], desk.slots[1, j], desk.slots[2, j] = other, slot, expert
        desk.mean[j] = layer.mean[expert] * layer.share[expert]
        for i in range(4):
            desk.harm[i, j] = layer.harm[other, i]


@njit(**INLINE)
def _look_at_peaks(layer, rank, n, peaks, desk):
    """Set the units of all slots on the desk, and what those of `rank` can win."""
    share, experts = layer.share, desk.slots[2]
    for i in range(peaks):
        t = desk.peaks[i]
        for j in range(n):
            desk.units[i, j] = layer.by_episode[t, experts[j]] * share[experts[j]]
    for slot in range(len(desk.hopes)):
        expert = layer.placement[rank, slot]
        hope = np.float32(0)
        for i in range(peaks):
            unit = layer.heat[expert, desk.peaks[i]] * share[expert]
            hope += unit if unit < desk.margins[i] else desk.margins[i]
        desk.hopes[slot] = hope


@njit(**FAST)
def swap_one(layer, rank, n, price, room, checks, desk, least):
    """Carry out the best swap of `rank` with a slot on the desk: (that rank or -1, moves spent).

    Of all estimates the `checks` best are checked by their exact gain.
    """
    placement, home, held = layer.placement, layer.home, layer.held
    least = np.float32(least)
    peaks, factor = _find_peaks(layer, rank, desk)
    _look_at_peaks(layer, rank, n, peaks, desk)
    rows = 0
    while rows < len(desk.rows):
        slot = desk.hopes.argmax()
        if desk.hopes[slot] * factor <= least:
            break
        desk.hopes[slot] = -1
        desk.rows[rows] = slot
        _weigh_slots(layer, rank, placement[rank, slot], n, peaks, factor, desk, rows)
        if price > 0 or room < 2:
            _charge_moves(layer, rank, placement[rank, slot], n, price, room, desk, rows)
        desk.tops[rows] = _find_best(desk, rows)
        rows += 1
    most, spent, chosen, chosen_slot = least, 0, -1, -1
    while checks > 0 and rows > 0:
        row = 0
        for i in range(1, rows):
            row = i if desk.tops[i] > desk.tops[row] else row
        if not desk.tops[row] > most:
            break
        j = _take_best(desk, row)
        slot, other = desk.rows[row], desk.slots[0, j]
        a, b = placement[rank, slot], desk.slots[2, j]
        if held[other, a] or held[rank, b]:  # that is all slots of the rank itself, too
            continue
        checks -= 1
        moves = home[rank, a] + home[other, b] - home[other, a] - home[rank, b]
        gain = swap_gain(layer, rank, a, other, b) - price * moves
        if gain > most:
            most, spent, chosen, chosen_slot = gain, moves, j, slot
    if chosen < 0:
        return -1, 0
    other = desk.slots[0, chosen]
    swap(layer, rank, chosen_slot, other, desk.slots[1, chosen])
    return other, spent


@njit(**INLINE)
def _weigh_slots(layer, rank, expert, n, peaks, factor, desk, row):
    """Set worth[row, j]: what it is likely to win if `expert` makes way for slot j's on `rank`."""
    worth, share = desk.worth[row], layer.share[expert]
    for j in range(n):
        worth[j] = 0
    for i in range(peaks):
        heat, margin = layer.heat[expert, desk.peaks[i]] * share, desk.margins[i]
        for j in range(n):
            less = heat - desk.units[i, j]
            worth[j] += less if less < margin else margin
    mean, harm = layer.mean[expert] * share, desk.harm
    slope, zero = layer.harm[rank, 0], layer.harm[rank, 1]
    next_slope, next_zero = layer.harm[rank, 2], layer.harm[rank, 3]
    for j in range(n):
        shift = mean - desk.mean[j]
        low, high = harm[0, j] * (shift - harm[1, j]), harm[2, j] * (shift - harm[3, j])
        there = high if high > low else low
        low, high = slope * (-shift - zero), next_slope * (-shift - next_zero)
        here = high if high > low else low
        cost = there if shift > 0 else here
        worth[j] = worth[j] * factor - (cost if cost > 0 else np.float32(0))


@njit(**INLINE)
def _charge_moves(layer, rank, expert, n, price, room, desk, row):
    """Take the price of the moves that a swap costs from what it is worth, if it has room."""
    home = layer.home
    for j in range(n):
        other, arriving = desk.slots[0, j], desk.slots[2, j]
        moves = home[rank, expert] - home[other, expert]
        moves += home[other, arriving] - home[rank, arriving]
        worth = desk.worth[row, j] - price * moves
        desk.worth[row, j] = worth if moves <= room else NOTHING


@njit(**INLINE)
def _find_best(desk, row):
    """Set best[row]; the most of it."""
    worth, best = desk.worth[row], desk.best[row]
    for lane in range(LANES):
        best[lane] = worth[lane]
    for block in range(LANES, len(worth), LANES):
        first = np.uintp(block)
        for lane in range(LANES):
            value = worth[first + np.uintp(lane)]
            best[lane] = value if value > best[lane] else best[lane]
    return _most(best)


@njit(**INLINE)
def _take_best(desk, row):
    """The place of the best estimate of a row, which does not count from now on."""
    worth, best, top = desk.worth[row], desk.best[row], desk.tops[row]
    lane = 0
    while lane < LANES - 1 and best[lane] != top:
        lane += 1
    j = lane
    while j < len(worth) - LANES and worth[j] != top:
        j += LANES
    best[lane] = NOTHING
    desk.tops[row] = _most(best)
    return j


@njit(**INLINE)
def _most(lanes):
    most = NOTHING
    for lane in range(LANES):
        most = lanes[lane] if lanes[lane] > most else most
    return most


@njit(**FAST)
def even_out(layer, price, room, share):
    """Swaps that bring the mean loads of two ranks together and make the PAR no worse; how many.

    Where many ranks are close to the peak no single swap wins much: these open the way to more.
    Ranks are relieved whose mean load exceeds that of all by more than `share` of what the highest
    does.
    """
    placement, home = layer.placement, layer.home
    ranks, slots = placement.shape
    load = np.zeros(ranks)  # float64, or by rounding two ranks that only trade loads get nearer
    units = np.empty((ranks, slots), np.float32)
    for rank in range(ranks):
        for slot in range(slots):
            expert = placement[rank, slot]
            units[rank, slot] = layer.mean[expert] * layer.share[expert] * layer.heat.shape[1]
            load[rank] += units[rank, slot]
    order = np.argsort(-load)
    level = load.sum() / ranks
    level += share * (load[order[0]] - level)
    worth = np.empty(slots, np.float32)
    done = 0
    for i in range(ranks // 2):
        rank = order[i]
        if load[rank] < level:
            break
        for j in range(min(PARTNERS, ranks // 2)):
            other = order[ranks - 1 - j]
            gap = np.float32(load[rank] - load[other])
            slot, other_slot = _nearest_half(layer, units, rank, other, gap, worth)
            if slot < 0:
                continue
            a, b = placement[rank, slot], placement[other, other_slot]
            moves = home[rank, a] + home[other, b] - home[other, a] - home[rank, b]
            if moves > room or swap_gain(layer, rank, a, other, b) < price * moves:
                continue
            mine, theirs = units[rank, slot], units[other, other_slot]
            units[rank, slot], units[other, other_slot] = theirs, mine
            shift = np.float64(mine) - theirs
            load[rank] -= shift
            load[other] += shift
            swap(layer, rank, slot, other, other_slot)
            room -= moves
            done += 1
    return done


@njit(**FAST)
def _nearest_half(layer, units, rank, other, gap, worth):
    """The slots of `rank` and `other` whose exchange leaves least of `gap`; -1 if none does.

    `worth` is room to work in, float32[S].
    """
    best, chosen, chosen_other = np.float32(EVEN_ENOUGH), -1, -1
    for slot in range(len(worth)):
        a, mine = layer.placement[rank, slot], units[rank, slot]
        most = np.float32(0)
        for other_slot in range(len(worth)):
            shift = mine - units[other, other_slot]
            worth[other_slot] = shift * (gap - shift)
            most = worth[other_slot] if worth[other_slot] > most else most
        if most <= best or layer.held[other, a]:
            continue
        for other_slot in range(len(worth)):
            b = layer.placement[other, other_slot]
            if worth[other_slot] > best and not layer.held[rank, b]:
                best, chosen, chosen_other = worth[other_slot], slot, other_slot
    return chosen, chosen_other
