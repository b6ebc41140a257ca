"""Plans that a limit of moves cuts: where each layer is going, and how far it comes at once."""

from __future__ import annotations

import numpy as np
from numba import njit

from .rounds import units_of
from .scale import peaks_of, scale_heat
from .slots import bonds, slot_of
from .window import Offer

TRIES = 16
"""Moves that are looked at again before one of them is chosen, those that won most before."""

LEAST = 1e-5
"""Share of the PAR that a part of the way must win."""


class Going:
    """The offers that are carried out in parts, one call after the other.

    One of which a call takes nothing, for others win more, is forgotten and searched anew. What
    has cost balance comes first, so that it is not left half-way.
    """

    def __init__(self) -> None:
        self._offers: dict[int, Offer] = {}
        self._paid: set[int] = set()

    def keep(self, kept: np.ndarray) -> None:
        """Forget the layers that are not `kept`, bool[layers]."""
        self._offers = {
            layer: offer
            for layer, offer in self._offers.items()
            if layer < len(kept) and kept[layer]
        }

    def __contains__(self, layer: int) -> bool:
        return layer in self._offers

    def offers(self) -> list[Offer]:
        """What is on its way, as it was when it began."""
        return list(self._offers.values())

    def has_paid(self, layer: int) -> bool:
        """Whether a layer on its way has had a part that cost balance: back would win at once."""
        return layer in self._offers and layer in self._paid

    def forget(self) -> None:
        """No layer is on its way any more."""
        self._offers = {}

    def drop(self, layer: int) -> None:
        """A layer is not on its way any more."""
        del self._offers[layer]

    def remember(self, offers: list[Offer], taken: dict[int, Offer]) -> None:
        """Of `offers` those that are `taken` in part are on their way, and no others."""
        now = {layer for layer, part in taken.items() if part.gain <= 0}
        self._paid = now | {layer for layer in self._paid if layer in self._offers}
        self._offers = {
            offer.layer: offer
            for offer in offers
            if offer.layer in taken and taken[offer.layer] is not offer
        }


def moves_between(today: np.ndarray, wanted: np.ndarray) -> int:
    """Slots of `wanted` int32[R, S] whose expert `today` does not hold on that rank."""
    pairs = zip(today.tolist(), wanted.tolist(), strict=True)
    return sum(len(set(new) - set(old)) for old, new in pairs)


@njit(cache=True, nogil=True)
def part_of_the_way(heat, layer, today, wanted, room, costly):
    """The placement between two that `room` moves lead to: what wins most per move comes first.

    What must move together (see `slots`) stays together, so it is valid. Where the first moves
    cost balance, those that follow must win it back, unless it may be `costly`.

    Args:
        heat: float64[T, layers, E], tokens.
        layer: index.
        today: int32[R, S].
        wanted: int32[R, S], aligned to `today`.
        room: moves.
        costly: whether to go as far as `room` leads, better or not, if more such parts lead to
            the end: nothing that must move together takes more.

    Returns:
        int32[R, S]; `today` if no part is better.
    """
    experts = heat.shape[2]
    scaled, _ = scale_heat(heat, layer, len(today))
    new = slot_of(wanted, experts)
    giver, taker = bonds(today, wanted, new)
    units, sizes, cyclic = units_of(today, wanted, giver, taker, new)
    if costly and (sizes[cyclic] > room).any():
        return today.copy()
    first = np.zeros(len(sizes), np.int64)
    for i in range(1, len(sizes)):
        first[i] = first[i - 1] + sizes[i - 1]
    here = today.copy()
    now = least = peaks_of(scaled, here).sum()
    reached = today.copy()
    gains = np.full(len(sizes), np.inf)  # per move, as they were when they were last looked at
    while room > 0:
        chosen, length, best = -1, 0, -np.inf
        tries = TRIES
        for i in np.argsort(-gains):
            if gains[i] <= best or tries == 0:
                break
            take = min(sizes[i], room)
            if take == 0 or (cyclic[i] and take < sizes[i]):
                continue
            tries -= gains[i] < np.inf
            _write(here, wanted, units, first[i], take)
            gains[i] = (now - peaks_of(scaled, here).sum()) / take
            _write(here, today, units, first[i], take)
            if gains[i] > best:
                chosen, length, best = i, take, gains[i]
        if chosen < 0:
            break
        _write(here, wanted, units, first[chosen], length)
        first[chosen] += length
        sizes[chosen] -= length
        room -= length
        now = peaks_of(scaled, here).sum()
        if costly or now < least * (1 - LEAST):
            least = now
            reached[:] = here
    return reached


@njit(cache=True, nogil=True)
def _write(here, there, units, first, count):
    """Copy `count` slots, numbered in `units` from `first` on, of `there` to `here`."""
    slots = here.shape[1]
    for write in units[first : first + count]:
        here[write // slots, write % slots] = there[write // slots, write % slots]
