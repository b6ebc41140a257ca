"""What FlashLB finds for a layer: a placement, the columns that go with it, what both win."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from .columns import Columns
from .efforts import effort_of
from .partway import moves_between, part_of_the_way
from .plan import align_all
from .search import Terms, measure, search_layers
from .window import Offer, Window

FAR = 3.0
"""Times the price of moves that a layer with a promise pays if all is placed anew, unless it has
waited for a plan for long."""

LONGEST = 64
"""Calls that a way may take on which balance is lost: the end of a longer one is too far off to be
relied on, and to look for all of it takes minutes where layers are large."""


class Finder:
    """Looks for offers.

    Args:
        ranks, slots: of a placement.
        effort, threads: of `FlashLB`.
        division: plans routing columns; None for uniform routing.
        min_gain: PAR that a plan must win.
    """

    def __init__(
        self,
        ranks: int,
        slots: int,
        effort: str,
        threads: int,
        division: Columns | None,
        min_gain: float,
    ):
        self._ranks, self._slots = ranks, slots
        self._effort, self._threads = effort, threads
        self._division, self._min_gain = division, min_gain

    def offers(
        self, window: Window, before: np.ndarray, layers: np.ndarray, terms: Terms
    ) -> list[Offer]:
        """For each of `layers` what pays for its moves, best gain per move first."""
        found, moves = self.find(window, layers, terms)
        columns = self._proved_columns(window, found, layers, terms)
        after, _ = self.measure(window.tokens, found, layers, columns)
        offers = []
        for i, layer in enumerate(layers.tolist()):
            gain = float(before[layer] - after[i])
            price = terms.price if window.settled[layer] else window.first_price
            if moves[i] and gain > price * moves[i]:
                par = float(after[i])
                offers.append(Offer(layer, found[i], columns[i], par, gain, int(moves[i]), par))
        return sorted(offers, key=lambda offer: -offer.gain / offer.moves)

    def part(
        self, window: Window, before: np.ndarray, offer: Offer, terms: Terms, room: int
    ) -> list[Offer]:
        """As much of an offer as fits into `room` moves; none if no part of it wins anything."""
        here = window.today[offer.layer]
        reached = self._on_the_way(window, offer, here, room)
        if (reached == here).all():
            return []
        parts = self._stops(window, before, offer, [reached], terms)
        return [part for part in parts if part.gain > 0]  # they were chosen for an even division

    def costly(
        self,
        window: Window,
        before: np.ndarray,
        offer: Offer,
        terms: Terms,
        room: int,
        most: float,
    ) -> list[Offer]:
        """The first `room` moves of an offer, though balance is lost until others follow.

        None if as many in each call do not lead to its end, or not in LONGEST calls, or if PAR
        rises by more than `most` on the way.
        """
        if offer.moves > LONGEST * room:
            return []
        here = window.today[offer.layer]
        stops: list[np.ndarray] = []
        while moves_between(here, offer.placement):
            there = self._on_the_way(window, offer, here, room, costly=True)
            if (there == here).all():
                return []
            stops.append(there)
            here = there
        parts = self._stops(window, before, offer, stops, terms)
        return parts[:1] if all(part.gain >= -most for part in parts) else []

    def near(
        self, window: Window, before: np.ndarray, offer: Offer, terms: Terms, room: int
    ) -> list[Offer]:
        """Another offer for that layer, of `room` moves; it must win its share of min_gain."""
        near = terms._replace(most_moves=room, scratch=False)
        least = 0.0 if window.anew else self._min_gain / offer.moves
        found = self.offers(window, before, np.array([offer.layer]), near)
        return [part for part in found if part.gain >= least * part.moves]

    def find(
        self, window: Window, layers: np.ndarray, terms: Terms
    ) -> tuple[np.ndarray, np.ndarray]:
        """Placements int32[n, ranks, slots] for `layers`, and the moves int64[n] they take."""
        found = np.empty((len(layers), self._ranks, self._slots), np.int32)
        moves = np.empty(len(layers), np.int64)
        far = window.settled & ~window.waiting & (not window.anew)
        kinds = np.column_stack([window.kept, window.settled, window.alike, far])[layers]
        rows: dict[tuple[bool, ...], list[int]] = {}
        for row, kind in enumerate(kinds.tolist()):
            rows.setdefault(tuple(kind), []).append(row)
        for (kept, settled, alike, is_far), mine in rows.items():
            heat, weights = window.with_past() if alike else window.alone()
            price = terms.price if settled else window.first_price
            far_price = price * (FAR if is_far else 1)
            search = partial(search_layers, heat, weights, window.today)
            effort = effort_of(self._effort, self._ranks * self._slots, len(heat))
            today = kept or not window.anew or not terms.scratch  # else it is new altogether
            rest = (effort, terms._replace(price=price, far_price=far_price, today=today))

            def work(part: np.ndarray, search=search, rest=rest) -> None:
                found[part], moves[part] = search(layers[part], *rest)

            spread(self._threads, work, np.array(mine))
        return found, moves

    def measure(
        self,
        tokens: np.ndarray,
        placement: np.ndarray,
        layers: np.ndarray | None = None,
        columns: np.ndarray | None = None,
    ) -> np.ndarray:
        """(PAR, its standard error) [2, n] of placement[i] on `layers`[i], all of them if None;
        with `columns`[i] where they are planned."""
        layers = np.arange(tokens.shape[1]) if layers is None else layers
        if self._division is not None and columns is not None:
            return self._division.measure(tokens, placement, layers, columns)
        par = np.empty((2, len(layers)))

        def work(part: np.ndarray) -> None:
            par[:, part] = measure(tokens, placement[part], layers[part])

        spread(self._threads, work, np.arange(len(layers)))
        return par

    def planned_columns(
        self, tokens: np.ndarray, placement: np.ndarray, layers: np.ndarray
    ) -> np.ndarray:
        """int16[n, R, S], with which placements of `layers` are measured."""
        if self._division is None:
            return np.ones(placement.shape, np.int16)
        return self._division.planned(tokens, placement, layers)

    def _on_the_way(
        self, window: Window, offer: Offer, here: np.ndarray, room: int, costly: bool = False
    ) -> np.ndarray:
        """int32[R, S], what `room` moves lead to from `here`; see `part_of_the_way`."""
        experts = window.tokens.shape[2]
        wanted = align_all(here[None], offer.placement[None], experts)[0]
        reached = part_of_the_way(window.tokens, offer.layer, here, wanted, room, costly)
        return align_all(here[None], reached[None], experts)[0]

    def _stops(
        self,
        window: Window,
        before: np.ndarray,
        offer: Offer,
        stops: list[np.ndarray],
        terms: Terms,
    ) -> list[Offer]:
        """What placements on the way to an offer are worth."""
        layers, placements = np.full(len(stops), offer.layer), np.array(stops)
        columns = self._proved_columns(window, placements, layers, terms)
        pars, _ = self.measure(window.tokens, placements, layers, columns)
        return [
            offer._replace(
                placement=placements[i],
                columns=columns[i],
                par=float(pars[i]),
                gain=float(before[offer.layer] - pars[i]),
                moves=moves_between(window.today[offer.layer], placements[i]),
            )
            for i in range(len(stops))
        ]

    def _proved_columns(
        self, window: Window, placement: np.ndarray, layers: np.ndarray, terms: Terms
    ) -> np.ndarray:
        """int16[n, R, S], that go with placements of `layers`: for the heat that was given, where
        they must not be worse than even ones, if that is possible at all."""
        if self._division is None:
            return np.ones(placement.shape, np.int16)
        heat = window.tokens if terms.by_source else window.seen
        return self._division.proved(heat, placement, layers)


def spread(threads: int, work: Callable[[np.ndarray], None], rows: np.ndarray) -> None:
    """Call `work` on parts of `rows`, in as many threads as there are; kernels free the GIL."""
    parts = [rows[i::threads] for i in range(min(threads, len(rows)))]
    if len(parts) < 2:
        for part in parts:
            work(part)
        return
    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(work, parts))
