"""The placement of one layer: from scratch, from today's placement, or the better of the two."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from .counts import least_threshold, replica_counts
from .improve import improve
from .layer import (
    FAST,
    INLINE,
    excess,
    merged,
    moved,
    new_layer,
    peak,
    replace,
    settle,
    shortened,
    swap,
)
from .place import place
from .relabel import relabel
from .routing import LEAST, weigh, weigh_sources
from .scale import peaks_of, scale_heat, without_bursts
from .swaps import even_out

SCORED = 8
"""Stretches of episodes on which vectors of replica counts are compared."""


CAUTION = 0.004
"""PAR that a slack of 2 must win over one of 1: heavier replicas suffer more when heat changes."""

COARSE = 0.6
"""Load of a rank that a replica may be before slacks above the first are tried in any case: few
experts on a rank even each other out only if their replicas fit together."""

TELLING = 8
"""Episodes that show how heat changes; with fewer there is as much more caution."""

STRONGEST = 24
"""Kicks differ by the number of exchanges, up to this many."""

WEIGHTED_STRONGEST = 4
"""The same where routing is planned: there small steps lead on where `improve` does not."""

SHARES = (0.75, 0.5, 0.25, 0.125)
"""How much of the excess of mean loads remains after each step that evens out many ranks."""

RACE = 3
"""Sweeps by which placements from scratch are compared."""


class Effort(NamedTuple):
    """How long a search looks.

    Attributes:
        deviations: standard deviations over its mean at which an expert's heat is reckoned;
            one family of replica counts for each.
        slacks: see `counts.replica_counts`; one vector of each family for each.
        heavy: share of the ranks that an expert must need so that slacks above the first are tried.
        starts: vectors of counts, the best of all, that are placed and improved.
        rows, checks, partners, sweeps, least, fraction: of `improve.improve`.
        episodes: most episodes to search on; more of them are merged.
        kicks: times that the best placement is disturbed and improved again.
    """

    deviations: np.ndarray
    slacks: np.ndarray
    heavy: float
    starts: int
    rows: int
    checks: int
    partners: int
    sweeps: int
    least: float
    fraction: float
    episodes: int
    kicks: int


class Terms(NamedTuple):
    """What a layer's new placement is worth.

    Attributes:
        price: PAR that one moved slot must win.
        far_price: the same in a placement from scratch.
        most_moves: slots that may receive another expert.
        scratch: whether to look for placements from scratch.
        today: whether to look for placements near today's.
        max_columns: routing columns of an expert that may be planned; 0 for uniform routing.
        by_source: whether a column is a rank that sends; see `weigh_layer`.
    """

    price: float
    far_price: float
    most_moves: int
    scratch: bool
    today: bool
    max_columns: int
    by_source: bool


@njit(**FAST)
def measure(heat, placement, layers):
    """PAR of placements on the tokens of `layers`, and its standard error.

    Args:
        heat: float64[T, layers, E], tokens.
        placement: int32[n, R, S].
        layers: int64[n].

    Returns:
        float64[2, n].
    """
    par = np.empty((2, len(layers)))
    for i in range(len(layers)):
        scaled, _ = scale_heat(heat, layers[i], placement.shape[1])
        total = squares = 0.0
        for peak_load in peaks_of(scaled, placement[i]):
            ratio = max(peak_load, 1.0)  # 1 in episodes without tokens
            total += ratio
            squares += ratio * ratio
        mean = total / len(heat)
        par[0, i] = mean
        par[1, i] = np.sqrt(max(0.0, squares / len(heat) - mean * mean) / len(heat))
    return par


@njit(**FAST)
def search_layers(heat, weights, placement, layers, effort, terms):
    """The best placement of each of `layers`; one that is not better stays as it is.

    Args:
        heat: float64[T, layers, E], tokens.
        weights: float32[T], of the episodes, 1 in sum.
        placement: int32[layers, R, S], today's.
        layers: int64[n].
        effort: Effort.
        terms: Terms.

    Returns:
        (placements int32[n, R, S], slots of each that receive another expert int64[n]).
    """
    experts = heat.shape[2]
    _, ranks, slots = placement.shape
    found = np.empty((len(layers), ranks, slots), np.int32)
    moves = np.zeros(len(layers), np.int64)
    home = np.empty((ranks, experts), np.int8)
    for i in range(len(layers)):
        today = placement[layers[i]]
        found[i] = today
        home[:] = 0
        for rank in range(ranks):
            for expert in today[rank]:
                home[rank, expert] = 1
        scaled, _ = scale_heat(heat, layers[i], ranks)
        heat_now = shortened(without_bursts(scaled, weights), effort.episodes)
        layer = new_layer(heat_now, home, ranks, slots)
        _search(layer, today, effort, terms, found[i])
        for rank in range(ranks):
            for expert in found[i, rank]:
                moves[i] += 1 - home[rank, expert]
    return found, moves


@njit(**INLINE)
def _search(layer, today, effort, terms, found):
    settle(layer, today)
    best = _worth(layer, terms, terms.price)
    if terms.today:
        best = from_today(layer, effort, terms, best, found)
    if terms.scratch:
        from_scratch(layer, today, effort, terms, best, found)
    if effort.kicks > 0 and len(today) > 1:
        kick(layer, effort, terms, found)


@njit(**INLINE)
def from_today(layer, effort, terms, best, found):
    """Improve the placement that `layer` has, today's; what `found` is worth then.

    The price of a move falls in steps, so that those which win most come first.
    """
    left = excess(layer)
    for divisor in (1, 4, 16):
        price = max(terms.price, left / max(1, terms.most_moves) / divisor)
        price = price if divisor < 16 else terms.price
        _improve(layer, effort, price, terms.most_moves, effort.sweeps)
    best = _keep_better(layer, terms, terms.price, best, found)
    for share in SHARES:
        even_out(layer, np.float32(0), terms.most_moves - moved(layer), share)
        _improve(layer, effort, terms.price, terms.most_moves, effort.sweeps)
        best = _keep_better(layer, terms, terms.far_price, best, found)
    return best


@njit(**INLINE)
def _improve(layer, effort, price, most_moves, sweeps):
    improve(
        layer,
        np.float32(price),
        most_moves,
        effort.rows,
        effort.checks,
        effort.partners,
        sweeps,
        np.float32(effort.least),
        np.float32(effort.fraction),
    )


@njit(**FAST)
def _worth(layer, terms, price):
    """PAR of the layer's placement, with planned routing if there is to be, plus price of moves."""
    if not terms.max_columns:
        return peak(layer) + price * moved(layer)
    columns = np.empty(layer.placement.shape, np.int16)
    least = np.float32(LEAST)
    if terms.by_source:
        par = weigh_sources(layer, columns, least)
    else:
        par = weigh(layer, terms.max_columns, columns, least)
    settle(layer, layer.placement)  # its loads have followed the columns
    return par + price * moved(layer)


@njit(**FAST)
def _keep_better(layer, terms, price, best, found):
    """Take the layer's placement if it is worth more than `best`; what `found` is worth then."""
    if moved(layer) <= terms.most_moves:
        worth = _worth(layer, terms, price)
        if worth < best:
            found[:] = layer.placement
            return worth
    return best


@njit(**INLINE)
def from_scratch(layer, today, effort, terms, best, found):
    """Place the best vectors of replica counts anew; what `found` is worth then.

    Each gets a few sweeps of improvement; the one that is best then gets the rest.
    """
    ranks, slots = layer.placement.shape
    first = np.empty((ranks, slots), np.int32)
    lowest = np.inf
    vectors, cautions = _best_vectors(layer, effort)
    race = effort.sweeps if len(vectors) == 1 else min(RACE, effort.sweeps)
    for i in range(len(vectors)):
        placement = place(layer.coarse, vectors[i], ranks, slots)[0]
        if terms.max_columns or len(vectors) == 1:
            placement = relabel(placement, today, len(layer.counts))
        settle(layer, placement)
        if terms.max_columns:  # what is best with planned routing need not be so with uniform
            best = _keep_better(layer, terms, terms.far_price, best, found)
        _improve(layer, effort, 0.0, ranks * slots, race)
        if len(vectors) == 1:
            return _keep_better(layer, terms, terms.far_price, best, found)
        if peak(layer) + cautions[i] < lowest:
            lowest = peak(layer) + cautions[i]
            first[:] = layer.placement
        if terms.max_columns:
            best = _keep_better(layer, terms, terms.far_price, best, found)
    settle(layer, relabel(first, today, len(layer.counts)))
    _improve(layer, effort, 0.0, ranks * slots, effort.sweeps - RACE)
    return _keep_better(layer, terms, terms.far_price, best, found)


@njit(**INLINE)
def kick(layer, effort, terms, found):
    """Disturb `found` and improve it again, `effort.kicks` times."""
    settle(layer, found)
    best = _worth(layer, terms, terms.price)  # whatever price it was found at
    state = np.uint64(88172645463325252)
    for number in range(effort.kicks):
        settle(layer, found)
        for _ in range(1 + number % (WEIGHTED_STRONGEST if terms.max_columns else STRONGEST)):
            state = _next(state)
            _disturb(layer, np.int64(state >> np.uint64(1)))
        if terms.max_columns:
            best = _keep_better(layer, terms, terms.price, best, found)
        _improve(layer, effort, terms.price, terms.most_moves, effort.sweeps)
        best = _keep_better(layer, terms, terms.price, best, found)


@njit(**FAST)
def _next(state):
    """The next number of a xorshift generator (Marsaglia 2003): the same draws every time."""
    state ^= state << np.uint64(13)
    state ^= state >> np.uint64(7)
    return state ^ (state << np.uint64(17))


@njit(**FAST)
def _disturb(layer, draw):
    """Swap two experts, or replace a replica, as `draw` says; nothing if that is not valid."""
    ranks, slots = layer.placement.shape
    rank = layer.at[0, draw % layer.at.shape[1]] if draw // 2**41 % 2 else draw // 2**42 % ranks
    other = (rank + 1 + draw // 64 % (ranks - 1)) % ranks
    slot, other_slot = draw // 2**16 % slots, draw // 2**25 % slots
    a, b = layer.placement[rank, slot], layer.placement[other, other_slot]
    if layer.held[other, a]:
        return
    if draw // 2**40 % 2 and layer.counts[b] > 1:
        replace(layer, other, other_slot, a)
    elif not layer.held[rank, b]:
        swap(layer, rank, slot, other, other_slot)


@njit(**FAST)
def _best_vectors(layer, effort):
    """The `effort.starts` best vectors of replica counts: (int32[n, E], PAR that each must win)."""
    ranks, slots = layer.placement.shape
    vectors, cautions = _count_vectors(layer, effort)
    if len(vectors) == 1:
        return vectors, cautions
    heat = merged(layer.by_episode, SCORED)
    scores = cautions.copy()
    for i in range(len(vectors)):
        scores[i] += place(heat, vectors[i], ranks, slots)[1]
    order = np.argsort(scores)[: effort.starts]
    return vectors[order], cautions[order]


@njit(**FAST)
def _count_vectors(layer, effort):
    """All different vectors of replica counts: (int32[n, E], PAR that each must win).

    Where no expert needs many replicas, and none is much of a rank's load, another slack changes
    little.
    """
    ranks, slots = layer.placement.shape
    experts, episodes = layer.heat.shape
    weights = np.empty(experts, np.float32)
    spread = np.empty(experts, np.float32)
    for expert in range(experts):
        squares = np.float32(0)
        for t in range(episodes):
            squares += (layer.heat[expert, t] - layer.mean[expert]) ** 2
        spread[expert] = np.sqrt(squares / episodes)
    caution = np.float32(CAUTION * max(1.0, TELLING / episodes))
    most = len(effort.deviations) * len(effort.slacks)
    vectors = np.empty((most, experts), np.int32)
    cautions = np.empty(most, np.float32)
    n, is_heavy = 0, False
    for deviation in effort.deviations:
        for expert in range(experts):
            weights[expert] = layer.mean[expert] + np.float32(deviation) * spread[expert]
        threshold = least_threshold(weights, ranks * slots, ranks)
        for slack in effort.slacks:
            if n > 0 and not is_heavy:
                break
            counts = replica_counts(weights, ranks * slots, ranks, threshold, np.float32(slack))
            known = False
            for i in range(n):
                known |= _are_equal(vectors[i], counts)
            if not known:
                vectors[n] = counts
                cautions[n] = caution * (slack - 1)
                n += 1
                if n == 1:
                    is_heavy = counts.max() >= effort.heavy * ranks
                    heaviest = (layer.mean / counts).max()
                    is_heavy |= heaviest >= COARSE * layer.mean.sum() / ranks
    return vectors[:n], cautions[:n]


@njit(**FAST)
def _are_equal(one, other):
    different = 0
    for i in range(len(one)):
        different += one[i] != other[i]
    return different == 0
