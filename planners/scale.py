"""Heat as the search reads it: scaled so that loads are PAR, bursts counted in part."""

from __future__ import annotations

import numpy as np
from numba import njit

from .layer import FAST, transposed

BURST = 4.0
"""Mean deviations over its mean from which an expert's heat counts as a burst."""

BURST_SHARE = 0.4
"""Share of a burst that is planned for: it seldom comes again, yet experts that burst once do."""

SAFE = 1e-290
"""Sums of tokens between this and its inverse can be divided by without a thought."""

FEWEST = 8
"""Episodes from which on one can tell a burst."""


@njit(**FAST)
def scale_heat(heat, layer, ranks):
    """Heat of one layer, each episode scaled to `ranks` in sum: peak loads are PAR then.

    Args:
        heat: float64[T, layers, E], tokens.
        layer: index.
        ranks: EP ranks.

    Returns:
        (float32[T, E], zero in episodes without tokens; how many of these there are).
    """
    episodes, _, experts = heat.shape
    scaled = np.zeros((episodes, experts), np.float32)
    idle = 0
    for t in range(episodes):
        tokens = heat[t, layer]
        total = 0.0
        for expert in range(experts):
            total += tokens[expert]
        if SAFE < total < 1 / SAFE:
            factor = ranks / total
            for expert in range(experts):
                scaled[t, expert] = tokens[expert] * factor
            continue
        most = tokens.max()
        if most <= 0:
            idle += 1
            continue
        scale = min(1.0 / most, 1e300)  # the sum of the tokens themselves may overflow
        total = 0.0
        for expert in range(experts):
            scaled[t, expert] = tokens[expert] * scale
            total += scaled[t, expert]
        for expert in range(experts):
            scaled[t, expert] *= np.float32(ranks / total)
    return scaled, idle


@njit(**FAST)
def without_bursts(scaled, weights):
    """float32[T, E], `scaled` with bursts counted BURST_SHARE; the sum of episode t is weights[t].

    A burst is what exceeds the mean by BURST mean deviations, both taken without what exceeds
    twice the plain mean. Sums are in units of those of `scaled`.
    """
    episodes, experts = scaled.shape
    heat = scaled.copy()
    limit = _burst_limits(scaled)
    for t in range(episodes):
        before = after = np.float32(0)
        for expert in range(experts):
            over = scaled[t, expert] - limit[expert]
            over = over if over > 0 else np.float32(0)
            heat[t, expert] = scaled[t, expert] - np.float32(1 - BURST_SHARE) * over
            before += scaled[t, expert]
            after += heat[t, expert]
        scale = weights[t] * (before / after if after > 0 else np.float32(1))
        for expert in range(experts):
            heat[t, expert] *= scale
    return heat


@njit(**FAST)
def _burst_limits(scaled):
    """float32[E], the heat from which on an expert bursts."""
    episodes, experts = scaled.shape
    limit = np.full(experts, np.inf, np.float32)
    if episodes < FEWEST:
        return limit
    cap = np.zeros(experts, np.float32)
    mean = np.zeros(experts, np.float32)
    deviation = np.zeros(experts, np.float32)
    for t in range(episodes):
        for expert in range(experts):
            cap[expert] += scaled[t, expert]
    for expert in range(experts):
        cap[expert] *= np.float32(2 / episodes)
    for t in range(episodes):
        for expert in range(experts):
            heat = scaled[t, expert]
            mean[expert] += heat if heat < cap[expert] else cap[expert]
    for expert in range(experts):
        mean[expert] *= np.float32(1 / episodes)
    for t in range(episodes):
        for expert in range(experts):
            heat = scaled[t, expert]
            deviation[expert] += abs((heat if heat < cap[expert] else cap[expert]) - mean[expert])
    for expert in range(experts):
        limit[expert] = mean[expert] + np.float32(BURST / episodes) * deviation[expert]
    return limit


@njit(**FAST)
def peaks_of(scaled, placement):
    """float32[T], the highest load of any rank in each episode of float32[T, E]."""
    episodes, experts = scaled.shape
    ranks, slots = placement.shape
    share = np.zeros(experts, np.float32)
    for rank in range(ranks):
        for slot in range(slots):
            share[placement[rank, slot]] += 1
    for expert in range(experts):
        share[expert] = 1 / share[expert]
    heat = transposed(scaled)
    load, peaks = np.empty(episodes, np.float32), np.zeros(episodes, np.float32)
    for rank in range(ranks):
        load[:] = 0
        for expert in placement[rank]:
            for t in range(episodes):
                load[t] += heat[expert, t] * share[expert]
        for t in range(episodes):
            peaks[t] = load[t] if load[t] > peaks[t] else peaks[t]
    return peaks
