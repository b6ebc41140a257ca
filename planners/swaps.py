"""Swaps of two experts between two ranks: those that lower the peak, and those that even out.

The estimate of a swap is what it wins in the episodes whose peak the rank is, no more than the
margin over the next rank, less the harm that the heat it gives away does on the other rank.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from .estimate import enter, harm_of, overflow
from .layer import FAST, swap, swap_gain

SLIGHT = 0.5
"""Share of the mean margin below which a peak does not count in an estimate."""

PARTNERS = 8
"""Ranks with little load that one with much is evened out with."""

EVEN_ENOUGH = 1e-7
"""Square of the difference from the mean load, as a share of it, that is not worth a swap."""


class Desk(NamedTuple):
    """Room to work in for `swap_one`, made once.

    Attributes:
        slots: int32[3, R * S], rank, slot and expert of the slots that a rank may swap with.
        units: float32[T, R * S], heat of each of these where the rank is the peak.
        relief: float32[R * S], what each wins there.
        peaks: int32[T], the episodes of which the rank is the peak.
        hopes: float32[S], the most that each slot of the rank can win.
        gains: float32[checks], estimates of the best candidates.
        steps: int32[checks, 3], what they are.
    """

    slots: np.ndarray
    units: np.ndarray
    relief: np.ndarray
    peaks: np.ndarray
    hopes: np.ndarray
    gains: np.ndarray
    steps: np.ndarray


@njit(**FAST)
def new_desk(layer, partners, checks):
    """A desk for swaps of any rank of `layer` with `partners` others."""
    ranks, slots = layer.placement.shape
    episodes = layer.heat.shape[1]
    n = min(partners, ranks) * slots
    return Desk(
        np.empty((3, n), np.int32),
        np.empty((episodes, n), np.float32),
        np.empty(n, np.float32),
        np.empty(episodes, np.int32),
        np.empty(slots, np.float32),
        np.empty(checks, np.float32),
        np.empty((checks, 3), np.int32),
    )


@njit(**FAST)
def _lay_out(layer, rank, others, desk):
    """Fill the desk for swaps of `rank` with `others`: (slots, episodes) that were found."""
    n = peaks = 0
    margins = np.float32(0)
    for t in range(layer.heat.shape[1]):
        desk.peaks[peaks] = t
        if layer.at[0, t] == rank:
            peaks += 1
            margins += layer.top[0, t] - layer.top[1, t]
    bar = np.float32(SLIGHT) * margins / max(1, peaks)
    kept = 0
    for i in range(peaks):
        t = desk.peaks[i]
        desk.peaks[kept] = t
        kept += layer.top[0, t] - layer.top[1, t] >= bar
    peaks = kept
    for other in others:
        if other == rank:
            continue
        for slot in range(layer.placement.shape[1]):
            expert = layer.placement[other, slot]
            desk.slots[0, n], desk.slots[1, n], desk.slots[2, n] = other, slot, expert
            n += 1 - layer.held[rank, expert]
    for i in range(peaks):
        for j in range(n):
            expert = desk.slots[2, j]
            desk.units[i, j] = layer.by_episode[desk.peaks[i], expert] * layer.share[expert]
    for slot in range(len(desk.hopes)):
        expert = layer.placement[rank, slot]
        hope = np.float32(0)
        for i in range(peaks):
            t = desk.peaks[i]
            unit = layer.heat[expert, t] * layer.share[expert]
            hope += min(unit, layer.top[0, t] - layer.top[1, t])
        desk.hopes[slot] = hope
    return n, peaks


@njit(**FAST)
def swap_one(layer, rank, others, level, price, room, desk, least):
    """Carry out the best swap between `rank` and `others`: (the other rank or -1, moves spent)."""
    placement, held, home, share = layer.placement, layer.held, layer.home, layer.share
    gains, steps = desk.gains, desk.steps
    per_level = np.float32(1) / level
    n, peaks = _lay_out(layer, rank, others, desk)
    filled, bar = 0, np.float32(least)
    for _ in range(min(placement.shape[1], 2 * len(gains))):
        slot = desk.hopes.argmax()
        if desk.hopes[slot] <= bar:
            break
        desk.hopes[slot] = -1
        a = placement[rank, slot]
        _relieve(layer, a, n, peaks, desk)
        unit = layer.mean[a] * share[a]
        for j in range(n):
            gain = desk.relief[j]
            if gain <= bar:
                continue
            other, b = desk.slots[0, j], desk.slots[2, j]
            moves = home[rank, a] - home[other, a] + home[other, b] - home[rank, b]
            gain -= price * moves
            if gain <= bar or moves > room or held[other, a]:
                continue
            shift = unit - layer.mean[b] * share[b]
            harm = harm_of(layer, other if shift > 0 else rank, abs(shift), per_level)
            if gain - harm <= bar:
                continue
            over = overflow(layer, other, a, share[a], b, share[b])
            gain -= harm if harm > over else over
            if gain > bar:
                filled = enter(gains, steps, filled, gain, slot, other, desk.slots[1, j])
                if filled == len(gains):
                    bar = gains[filled - 1]
    best, chosen, spent = np.float32(least), -1, 0
    for i in range(filled):
        slot, other, other_slot = steps[i]
        a, b = placement[rank, slot], placement[other, other_slot]
        moves = home[rank, a] + home[other, b] - home[other, a] - home[rank, b]
        gain = swap_gain(layer, rank, a, other, b) - price * moves
        if gain > best:
            best, chosen, spent = gain, i, moves
    if chosen < 0:
        return -1, 0
    slot, other, other_slot = steps[chosen]
    swap(layer, rank, slot, other, other_slot)
    return other, spent


@njit(**FAST)
def _relieve(layer, expert, n, peaks, desk):
    """Set relief[j]: what it wins at the peaks of its rank if `expert` makes way for slot j's."""
    relief = desk.relief
    for j in range(n):
        relief[j] = 0
    for i in range(peaks):
        t = desk.peaks[i]
        heat = layer.heat[expert, t] * layer.share[expert]
        margin = layer.top[0, t] - layer.top[1, t]
        for j in range(n):
            less = heat - desk.units[i, j]
            relief[j] += less if less < margin else margin


@njit(**FAST)
def even_out(layer, price, room):
    """Swaps that bring the mean loads of two ranks together and make the PAR no worse; how many.

    Where many ranks are close to the peak no single swap wins much: these open the way to more.
    """
    placement, held, home = layer.placement, layer.held, layer.home
    ranks, slots = placement.shape
    episodes = layer.heat.shape[1]
    load = np.zeros(ranks, np.float32)
    for rank in range(ranks):
        for t in range(episodes):
            load[rank] += layer.loads[rank, t]
    order = np.argsort(-load)
    done = 0
    for i in range(ranks // 2):
        rank = order[i]
        for j in range(min(PARTNERS, ranks // 2)):
            other = order[ranks - 1 - j]
            gap = (load[rank] - load[other]) / episodes
            best, chosen, chosen_other = np.float32(EVEN_ENOUGH / episodes / episodes), -1, -1
            for slot in range(slots):
                a = placement[rank, slot]
                if held[other, a]:
                    continue
                unit = layer.mean[a] * layer.share[a]
                for other_slot in range(slots):
                    b = placement[other, other_slot]
                    shift = unit - layer.mean[b] * layer.share[b]
                    gain = shift * (gap - shift)
                    if gain > best and not held[rank, b]:
                        best, chosen, chosen_other = gain, slot, other_slot
            if chosen < 0:
                continue
            a, b = placement[rank, chosen], placement[other, chosen_other]
            moves = home[rank, a] + home[other, b] - home[other, a] - home[rank, b]
            if moves > room or swap_gain(layer, rank, a, other, b) < price * moves:
                continue
            shift = (layer.mean[a] * layer.share[a] - layer.mean[b] * layer.share[b]) * episodes
            swap(layer, rank, chosen, other, chosen_other)
            load[rank] -= shift
            load[other] += shift
            room -= moves
            done += 1
    return done
