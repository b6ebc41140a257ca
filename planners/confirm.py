"""Whether an offer wins what it seems to win, or whether chance explains it."""

from __future__ import annotations

import math

import numpy as np

from .columns import divided_par
from .forecast import DOUBT, mostly_chance
from .offers import Finder
from .promises import hoped
from .search import Terms
from .window import Offer, Window

BEYOND_NOISE = 2.0
"""Standard errors above `min_gain` that a gain must be where counts are largely chance; twice as
many if the layer has no promise, for a planner that starts must not undo what is there."""

NEWEST = 8
"""Episodes, the newest, on which a plan can be confirmed if the heat has changed before them."""


class Confirmation:
    """Tries offers on heat that they were not made from.

    Args:
        finder: makes the plans that are tried.
        min_gain: PAR that a plan must win.
    """

    def __init__(self, finder: Finder, min_gain: float):
        self._finder, self._min_gain = finder, min_gain

    def confirmed(self, window: Window, offers: list[Offer], terms: Terms) -> list[Offer]:
        """The offers that chance does not explain, with what they can promise."""
        clear = []
        for offer in offers:
            noise = window.noise[offer.layer]
            beyond = BEYOND_NOISE * noise * (1 if window.settled[offer.layer] else 2)
            if offer.gain >= self._min_gain + beyond:
                clear.append(offer._replace(promise=offer.par + DOUBT * noise))
        rest = clear
        if window.tokens is not window.seen:  # what is expected of chance is no window with halves
            asked = (window.noise == 0) | ~mostly_chance(window.seen)
            rest = [offer for offer in clear if asked[offer.layer]]
        seen = window._replace(tokens=window.seen)
        repeated = {offer.layer: offer for offer in self._repeated(seen, rest, terms)}
        left = {offer.layer for offer in rest} - repeated.keys()
        return [repeated.get(offer.layer, offer) for offer in clear if offer.layer not in left]

    def _repeated(self, window: Window, offers: list[Offer], terms: Terms) -> list[Offer]:
        """The offers of layers whose gain is not that of one half of the window only.

        A plan from the older half of the window must win min_gain on the newer half: by one
        standard error if it wins five times as much, else by three. Its PAR there is what may be
        expected. Where the heat has changed within the window, the older half is of the past: then
        the same is asked of the newest episodes alone, of fewer and fewer. A half in which a layer
        has no tokens tells nothing.
        """
        newest = len(window.tokens)
        older, newer = window.tokens[: newest // 2], window.tokens[newest // 2 :]
        tells = (older.sum(axis=(0, 2)) > 0) & (newer.sum(axis=(0, 2)) > 0)
        sure = {offer.layer: offer for offer in offers if not tells[offer.layer]}
        sure |= self._won(window, [offer for offer in offers if tells[offer.layer]], terms)
        while newest >= 4 * NEWEST:
            newest //= 2
            rest = [offer for offer in offers if offer.layer not in sure]
            part = window._replace(
                tokens=window.tokens[-newest:], alike=np.zeros_like(window.alike)
            )
            sure |= self._won(part, self._changed(window, rest, newest), terms)
        return [sure[offer.layer] for offer in offers if offer.layer in sure]

    def _won(self, window: Window, offers: list[Offer], terms: Terms) -> dict[int, Offer]:
        """By layer, the offers that plans from the older half of `window` confirm on the newer."""
        if not offers:
            return {}
        half = len(window.tokens) // 2
        layers = np.array([offer.layer for offer in offers], np.int64)
        found, _ = self._finder.find(window._replace(tokens=window.tokens[:half]), layers, terms)
        columns = self._finder.planned_columns(window.tokens[:half], found, layers)
        newer = window.tokens[half:, layers]
        ratios = _ratios(newer, found, columns)
        gains = _ratios(newer, window.today[layers], window.columns[layers]) - ratios
        error = gains.std(axis=0) / math.sqrt(len(gains))
        if len(gains) == 1:  # has no spread: what it seemed to win beyond that stands for it
            older = window.tokens[:half, layers]
            seemed = _ratios(older, window.today[layers], window.columns[layers])
            error = np.abs(seemed - _ratios(older, found, columns) - gains)[0]
        doubt = np.minimum(DOUBT * error, np.maximum(error, 4 * self._min_gain))
        sure = gains.mean(axis=0) - doubt >= self._min_gain
        unseen = ratios.mean(axis=0)
        return {
            offer.layer: offer._replace(
                promise=float(np.clip(unseen[i], offer.promise, hoped(offer.promise)))
            )
            for i, offer in enumerate(offers)
            if sure[i]
        }

    def _changed(self, window: Window, offers: list[Offer], newest: int) -> list[Offer]:
        """The offers of layers whose PAR in the `newest` episodes clearly differs from before."""
        if not offers:
            return []
        layers = np.array([offer.layer for offer in offers], np.int64)
        tokens = window.tokens[:, layers]
        ratios = _ratios(tokens, window.today[layers], window.columns[layers])
        before, now = ratios[:-newest], ratios[-newest:]
        error = np.sqrt(before.var(axis=0) / len(before) + now.var(axis=0) / len(now))
        apart = np.abs(now.mean(axis=0) - before.mean(axis=0))
        changed = apart > np.maximum(DOUBT * error, self._min_gain)
        return [offer for offer, is_so in zip(offers, changed, strict=True) if is_so]


def _ratios(tokens: np.ndarray, placement: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """PAR of each episode [T, n] of placements of all layers of `tokens`."""
    return divided_par(np.ascontiguousarray(tokens), placement, np.arange(len(placement)), columns)
