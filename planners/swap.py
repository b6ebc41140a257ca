"""The swap policy: exchanges experts of the busiest rank for others; replica counts stay.

Source: descent in the swap neighbourhood, the usual local search for the makespan of parallel
machines; what falls here is the mean peak over the episodes of a window.
"""

from __future__ import annotations

import heapq

import numpy as np
from numba import njit

from .check import amount, checked_heat, checked_placement, optional, shares, whole
from .par import episode_par
from .plan import Plan, make_plan

STEP = 1e-3
"""PAR that an exchange must win; smaller gains only cost moves."""


class Swap:
    """Takes today's placement and exchanges pairs of experts while the layer's PAR falls.

    Moves few slots, and needs no more redundancy than there is. An expert that is too hot for one
    rank stays too hot, for no replica is added.

    Args:
        ranks: EP ranks, at least 1.
        slots_per_rank: slots of each layer on each rank, at least 1.
        ranks_per_node: consecutive ranks that share a node, whose weights are taken first; None if
            distance is of no matter.
        max_moves: most slots that a plan writes, in all layers together; None for no limit. It
            cannot be 1: an exchange writes two.
        min_excess: PAR - 1 up to which a layer is left alone.
        min_gain: least PAR a layer's new placement must win.

    Raises:
        ValueError: an argument is out of range; it names the argument, value and range.
    """

    def __init__(
        self,
        ranks: int,
        slots_per_rank: int,
        ranks_per_node: int | None = None,
        *,
        max_moves: int | None = None,
        min_excess: float = 0.05,
        min_gain: float = 0.02,
    ) -> None:
        self.ranks = whole("ranks", ranks, 1)
        self.slots_per_rank = whole("slots_per_rank", slots_per_rank, 1)
        self.ranks_per_node = optional("ranks_per_node", ranks_per_node, 1)
        self.max_moves = optional("max_moves", max_moves, 0)
        if self.max_moves == 1:
            raise ValueError("max_moves is 1; swap moves two experts at once: give 2 or more")
        self.min_excess = amount("min_excess", min_excess)
        self.min_gain = amount("min_gain", min_gain)

    def plan(self, heat: np.ndarray, placement: np.ndarray) -> Plan:
        """The plan for the heat of one window: the layers that win most per move, while room lasts.

        Args:
            heat: tokens[episodes, layers, experts], finite and not negative, any real dtype.
            placement: int[layers, ranks, slots], today's placement.

        Raises:
            ValueError: heat or placement is unfit; it names the argument, value and what is
                allowed. A placement that loses or doubles an expert is a PlacementError.
        """
        heat = checked_heat(heat)
        placement = checked_placement(placement, heat, self.ranks, self.slots_per_rank)
        heat = shares(heat)
        before = episode_par(heat, placement).mean(axis=0)
        room = placement.size
        if self.max_moves is not None:
            room = min(room, self.max_moves)
        due = np.flatnonzero(before > 1.0 + self.min_excess)
        paths = [_Path(heat[:, layer], placement[layer], room) for layer in due]
        _go(paths, room)
        wanted, after = placement.copy(), before.copy()
        for layer, path in zip(due, paths, strict=True):
            found = path.placement()
            par = episode_par(heat[:, layer], found).mean()
            if before[layer] - par >= max(self.min_gain, STEP):
                wanted[layer], after[layer] = found, par
        return make_plan(
            placement,
            wanted,
            par_before=before,
            par_after=after,
            ranks_per_node=self.ranks_per_node,
        )


class _Path:
    """One layer's exchanges, and how far along them the plan goes.

    Args:
        heat: float64[episodes, experts].
        placement: int32[ranks, slots], where the path starts.
        room: slots written at which it ends.
    """

    def __init__(self, heat: np.ndarray, placement: np.ndarray, room: int) -> None:
        self._heat = _as_par(heat, len(placement))
        self._start = placement
        self._room = room
        self._exchanges, self._writes, self._pars = self._exchange(placement.size)[1:]
        self._at = 0

    def _exchange(self, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        placement = self._start.copy()
        return placement, *_exchange_all(self._heat, placement, self._room, most)

    def placement(self) -> np.ndarray:
        """int32[ranks, slots], as far as the plan goes."""
        return self._exchange(self._exchanges[self._at])[0]

    def ahead(self, room: int) -> tuple[float, int]:
        """(PAR won per slot, point) of the best stretch ahead that writes at most `room` slots.

        (0.0, 0) if there is none.
        """
        writes = self._writes[self._at + 1 :] - self._writes[self._at]
        won = self._pars[self._at] - self._pars[self._at + 1 :]
        rates = np.where(writes <= room, won / np.maximum(writes, 1), 0.0)
        if not rates.any():
            return 0.0, 0
        best = int(rates.argmax())
        return float(rates[best]), self._at + 1 + best

    def go(self, point: int) -> int:
        """Go on to `point`; the slots that this writes."""
        writes = self._writes[point] - self._writes[self._at]
        self._at = point
        return int(writes)


def _go(paths: list[_Path], room: int) -> None:
    """Go along the paths, always where a slot wins most, until `room` slots are written."""
    heap = [(-path.ahead(room)[0], number) for number, path in enumerate(paths)]
    heapq.heapify(heap)
    while heap:
        rate, number = heapq.heappop(heap)
        now, point = paths[number].ahead(room)
        if -now == rate < 0:
            room -= paths[number].go(point)
            now = paths[number].ahead(room)[0]
        if now > 0:
            heapq.heappush(heap, (-now, number))


def _as_par(heat: np.ndarray, ranks: int) -> np.ndarray:
    """Heat float64[experts, busy episodes], scaled so that the sum of the peaks is their PAR.

    An episode without tokens has no peak and is left out.
    """
    total = heat.sum(axis=1)
    busy = total > 0
    return np.ascontiguousarray((heat[busy] * (ranks / (total[busy] * len(heat)))[:, None]).T)


@njit(nogil=True, cache=True)
def _exchange_all(heat, placement, room, most):
    """Make up to `most` exchanges in place, until none wins or `room` slots are written.

    Returns:
        (exchanges, slots written, PAR)[points] at the start and wherever PAR has fallen by `STEP`.
    """
    home = _held(placement, len(heat))
    held = home.copy()
    units = _units(heat, placement)
    loads = np.zeros((len(placement), units.shape[1]))
    for rank in range(len(placement)):
        _sum_load(rank, placement, units, loads)
    points = np.zeros((3, most + 1))
    last = -1
    writes = 0
    for exchanges in range(most + 1):
        par, often = _peaks(loads)
        if last < 0 or par < points[2, last] - STEP:
            last += 1
            points[0, last], points[1, last], points[2, last] = exchanges, writes, par
        if exchanges == most or writes >= room:
            break
        one, slot, other, other_slot = _next_exchange(often, placement, held, units, loads)
        if one < 0:
            break
        leaving, arriving = placement[one, slot], placement[other, other_slot]
        writes += _writes(home, one, leaving, other, arriving)
        placement[one, slot], placement[other, other_slot] = arriving, leaving
        held[one, leaving] = held[other, arriving] = False
        held[one, arriving] = held[other, leaving] = True
        _sum_load(one, placement, units, loads)
        _sum_load(other, placement, units, loads)
    points = points[:, : last + 1]
    return points[0].astype(np.int64), points[1].astype(np.int64), points[2]


@njit(nogil=True, cache=True)
def _peaks(loads):
    """(PAR, episodes[ranks] in which a rank is the peak)."""
    ranks, episodes = loads.shape
    often = np.zeros(ranks, np.int64)
    par = 0.0
    for t in range(episodes):
        rank = loads[:, t].argmax()
        par += loads[rank, t]
        often[rank] += 1
    return par, often


@njit(nogil=True, cache=True)
def _next_exchange(often, placement, held, units, loads):
    """(rank, its slot, other rank, its slot) of the next exchange; rank -1 if none wins `STEP`.

    It is the best of the rank that is the peak most often, or the next one that has any.
    """
    while often.max() > 0:
        rank = often.argmax()
        often[rank] = 0
        slot, other, other_slot = _best_exchange(rank, placement, held, units, loads)
        if slot >= 0:
            return rank, slot, other, other_slot
    return -1, -1, -1, -1


@njit(nogil=True, cache=True)
def _best_exchange(rank, placement, held, units, loads):
    """(slot, other rank, its slot) of the exchange that wins most; slot -1 if none wins `STEP`.

    It wins what it takes off the higher load of the two ranks, as far as that is above the mean. To
    count only what comes off PAR would stop where two ranks are equally busy.
    """
    ranks, slots = placement.shape
    best, most = (-1, -1, -1), STEP
    mean = loads.sum(axis=0) / ranks
    for other in range(ranks):
        if other == rank:
            continue
        now = 0.0
        for t in range(len(mean)):
            now += max(loads[rank, t], loads[other, t], mean[t]) - mean[t]
        if now <= most:
            continue
        for slot in range(slots):
            leaving = placement[rank, slot]
            if held[other, leaving]:
                continue
            for other_slot in range(slots):
                arriving = placement[other, other_slot]
                if held[rank, arriving]:
                    continue
                won = now
                for t in range(len(mean)):
                    shift = units[leaving, t] - units[arriving, t]
                    high = max(loads[rank, t] - shift, loads[other, t] + shift)
                    won -= max(0.0, high - mean[t])
                    if won <= most:
                        break
                if won > most:
                    best, most = (slot, other, other_slot), won
    return best


@njit(nogil=True, cache=True)
def _writes(home, rank, leaving, other, arriving):
    """Slots that the exchange adds to those written: an expert that comes home takes one back."""
    written = int(home[rank, leaving]) + int(home[other, arriving])
    return written - int(home[rank, arriving]) - int(home[other, leaving])


@njit(nogil=True, cache=True)
def _held(placement, experts):
    """bool[ranks, experts], where a rank holds an expert."""
    held = np.zeros((len(placement), experts), np.bool_)
    for rank in range(len(placement)):
        for expert in placement[rank]:
            held[rank, expert] = True
    return held


@njit(nogil=True, cache=True)
def _units(heat, placement):
    """Heat float64[experts, episodes] of one replica of each expert."""
    counts = np.zeros(len(heat))
    for expert in placement.flat:
        counts[expert] += 1
    return heat / counts.reshape(-1, 1)


@njit(nogil=True, cache=True)
def _sum_load(rank, placement, units, loads):
    """Set loads[rank] [episodes] to what its experts receive."""
    loads[rank] = 0
    for expert in placement[rank]:
        loads[rank] += units[expert]


def warmup() -> None:
    """Compile, or load from the cache, every kernel of this policy."""
    heat = np.array([[[9, 8, 1, 1]], [[8, 9, 2, 1]]])
    placement = np.array([[[0, 1], [2, 3]]])
    Swap(2, 2).plan(heat, placement)
