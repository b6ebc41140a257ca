"""Synthetic heat: named scenarios of how an engine's tokens spread over experts, step by step.

A scenario says which share of a step's tokens each expert gets; `draw` makes counts of it as a
router would, noise included. Both depend on the seed and the step alone, so the processes of a
group need not talk to one another to agree on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numba import njit

from ..ipc.flags import FLAG_DECODE, FLAG_PREFILL


class Demand(NamedTuple):
    """What a step asks for.

    Attributes:
        share: float64 [layers, experts], each row sums to 1.
        scale: tokens of the step over those of a full one.
        flags: of `ipc/flags.py`.
    """

    share: np.ndarray
    scale: float = 1.0
    flags: int = FLAG_PREFILL | FLAG_DECODE


@dataclass(frozen=True)
class Sizes:
    """Of the model, and the seed of everything that is random."""

    layers: int
    experts: int
    seed: int = 0


Scenario = Callable[[int], Demand]
"""Called with the number of a step."""


def zipf_share(sizes: Sizes, exponent: float, which: int = 0) -> np.ndarray:
    """float64 [layers, experts]: Zipf's law; other experts are hot in each layer and `which`."""
    random = np.random.default_rng([sizes.seed, which, sizes.experts])
    weights = np.arange(1, sizes.experts + 1, dtype=np.float64) ** -exponent
    return random.permuted(np.tile(weights / weights.sum(), (sizes.layers, 1)), axis=1)


def _zipf(sizes: Sizes) -> Scenario:
    demand = Demand(zipf_share(sizes, 1.0))
    return lambda step: demand


DRIFT_STEPS = 3000


def _drift(sizes: Sizes) -> Scenario:
    cache: dict[int, np.ndarray] = {}

    def at(step: int) -> Demand:
        before, since = divmod(step, DRIFT_STEPS)
        for which in (before, before + 1):
            if which not in cache:
                cache[which] = zipf_share(sizes, 0.9, which)
                cache.pop(which - 2, None)
        part = since / DRIFT_STEPS
        return Demand((1 - part) * cache[before] + part * cache[before + 1])

    return at


ANTIPHASE_STEPS = 64


def _antiphase(sizes: Sizes) -> Scenario:
    base = zipf_share(sizes, 0.8)
    is_odd = np.argsort(np.argsort(-base, axis=1), axis=1) % 2 == 1

    def at(step: int) -> Demand:
        swing = 0.8 * np.sin(2 * np.pi * step / ANTIPHASE_STEPS)
        share = base * np.where(is_odd, 1 - swing, 1 + swing)
        return Demand(share / share.sum(1, keepdims=True))

    return at


BURST_EVERY, BURST_STEPS = 600, 60


def _burst(sizes: Sizes) -> Scenario:
    base = zipf_share(sizes, 0.4)

    def at(step: int) -> Demand:
        number, since = divmod(step, BURST_EVERY)
        if number == 0 or since >= BURST_STEPS:
            return Demand(base)
        random = np.random.default_rng([sizes.seed, 1, number])
        share = base.copy()
        hot = random.integers(sizes.experts, size=sizes.layers)
        share[np.arange(sizes.layers), hot] += 0.1
        return Demand(share / share.sum(1, keepdims=True))

    return at


PHASE_STEPS = 400


def _phase_switch(sizes: Sizes) -> Scenario:
    prefill = Demand(zipf_share(sizes, 0.7), 1.0, FLAG_PREFILL)
    decode = Demand(zipf_share(sizes, 1.1, 1), 0.125, FLAG_DECODE)
    return lambda step: (prefill, decode)[step // PHASE_STEPS % 2]


def _decode(sizes: Sizes) -> Scenario:
    demand = Demand(zipf_share(sizes, 0.8), 1 / 64, FLAG_DECODE)
    return lambda step: demand


def _balanced(sizes: Sizes) -> Scenario:
    share = np.full((sizes.layers, sizes.experts), 1 / sizes.experts)
    return lambda step: Demand(share)


class Adversarial:
    """Zipf, but at every new placement the hottest experts become those that share a rank with what
    is hottest already: what was hot on other ranks changes places with them."""

    def __init__(self, sizes: Sizes):
        self._share = zipf_share(sizes, 1.0)
        self._epoch = -1

    def __call__(self, step: int) -> Demand:
        """The demand under the placement that was told last."""
        return Demand(self._share)

    def placed(self, epoch: int, placement: np.ndarray) -> None:
        """From now on the experts are where `placement` (int [layers, ranks, slots]) has them."""
        if epoch == self._epoch:
            return
        self._epoch = epoch
        for layer, ranks in enumerate(placement):
            share = self._share[layer]
            loads = (share / np.bincount(ranks.ravel(), minlength=len(share)))[ranks].sum(1)
            victims = np.unique(ranks[loads.argmax()])
            hottest = np.argsort(-share, kind="stable")[: len(victims)]
            arriving = np.setdiff1d(hottest, victims)
            leaving = np.setdiff1d(victims, hottest)
            share[arriving], share[leaving] = share[leaving], share[arriving]


SCENARIOS: dict[str, tuple[Callable[[Sizes], Scenario], str]] = {
    "zipf": (_zipf, "Zipf's law with exponent 1; nothing changes"),
    "drift": (
        _drift,
        f"Zipf 0.9; other experts become hot within {DRIFT_STEPS} steps, again and again",
    ),
    "antiphase": (
        _antiphase,
        f"every second expert is hot while the others rest, {ANTIPHASE_STEPS} steps in all",
    ),
    "burst": (
        _burst,
        f"Zipf 0.4; every {BURST_EVERY} steps one expert of a layer is hot for {BURST_STEPS}",
    ),
    "phase-switch": (
        _phase_switch,
        f"{PHASE_STEPS} steps of prefill and as many of decode, which like other experts",
    ),
    "decode": (_decode, "Zipf 0.8 with a 64th of the tokens: most of what is seen is noise"),
    "balanced": (_balanced, "all experts alike: there is nothing to win, and nothing should move"),
    "adversarial": (Adversarial, "at each commit the hottest experts move to the busiest rank"),
}
"""Makers and what they make, by name."""

_BANK = 1 << 16


class Noise:
    """Random numbers in stock, because the generator is slower than all else here.

    Attributes:
        uniform: float32 [n] in [0, 1).
        normal: float32 [n].
    """

    def __init__(self, seed: int):
        random = np.random.default_rng([seed, 77])
        self.uniform = random.random(_BANK, np.float32)
        self.normal = random.standard_normal(_BANK, np.float32)


@njit(cache=True)
def _even_out(counts, share, left, tokens, start):  # type: ignore[no-untyped-def]
    """Add `left` tokens to a layer's counts, by share, or take -`left` away, by count; evenly
    spaced picks from `start` (in [0, 1)) on, so that no expert is favoured."""
    count = abs(left)
    if not count:
        return
    done = 0
    total = 0.0
    for expert in range(len(counts)):
        there = counts[expert]
        total += share[expert] if left > 0 else there / (tokens - left)
        while done < count and (done + start) / count < total and (left > 0 or there > 0):
            there += 1 if left > 0 else -1
            done += 1
        counts[expert] = there
    expert = 0
    while done < count:  # rounding has left one out
        if (left > 0 and share[expert] > 0) or (left < 0 and counts[expert] > 0):
            counts[expert] += 1 if left > 0 else -1
            done += 1
        expert = (expert + 1) % len(counts)


@njit(cache=True)
def draw(share, tokens, uniform, normal, first, counts):  # type: ignore[no-untyped-def]
    """Write a step's tokens of each expert into `counts` (int64 [layers, experts]).

    Each row sums to `tokens` exactly, as it does where every token goes to a fixed number of
    experts. Up to that the counts are Poisson's (a normal one's from 8 on).

    Args:
        share: float64 [layers, experts].
        tokens: times the experts per token.
        uniform, normal: of `Noise`.
        first: where to begin in them.
        counts: the result.
    """
    layers, experts = share.shape
    mask = len(uniform) - 1
    at = first
    for layer in range(layers):
        left = tokens
        for expert in range(experts):
            at = (at + 1) & mask
            mean = share[layer, expert] * tokens
            if mean >= 8.0:
                count = max(0, int(mean + np.sqrt(mean) * normal[at] + uniform[at]))
            else:
                count = 0
                chance = np.exp(-mean)
                below = chance
                while uniform[at] > below and count < 64:
                    count += 1
                    chance *= mean / count
                    below += chance
            counts[layer, expert] = count
            left -= count
        at = (at + 1) & mask
        _even_out(counts[layer], share[layer], left, tokens, uniform[at])
    return at


@njit(cache=True)
def spread(counts, experts, low, high, uniform, first, out):
    """Divide each expert's tokens among its slots: `out` int32 [layers, slots] of all ranks.

    Args:
        counts: int64 [layers, experts].
        experts: int32 [layers, slots], which expert a slot holds.
        low, high: float64 [layers, slots], the part of its expert's tokens that a slot gets:
            from `low` to `high`; the parts of an expert make up 0 to 1.
        uniform: of `Noise`; so that rounding favours no slot.
        first: where to begin in it.
        out: the result; an expert's slots sum to its count.
    """
    mask = len(uniform) - 1
    for layer in range(experts.shape[0]):
        for slot in range(experts.shape[1]):
            expert = experts[layer, slot]
            count = counts[layer, expert]
            if high[layer, slot] - low[layer, slot] == 1.0:
                out[layer, slot] = count
            else:
                shift = uniform[(first + layer * 31 + expert) & mask]
                out[layer, slot] = np.int64(count * high[layer, slot] + shift) - np.int64(
                    count * low[layer, slot] + shift
                )


def parts(placement: np.ndarray, columns: np.ndarray, experts: int) -> tuple[np.ndarray, ...]:
    """What `spread` takes: (experts, low, high), each [layers, ranks * slots].

    Args:
        placement: int [layers, ranks, slots].
        columns: int, the same shape: routing columns of each slot.
        experts: logical experts per layer.
    """
    layers = len(placement)
    held = placement.reshape(layers, -1).astype(np.int32)
    wide = columns.reshape(layers, -1).astype(np.int64)
    low, high = np.zeros(held.shape), np.ones(held.shape)
    for layer in range(layers):
        order = np.argsort(held[layer], kind="stable")
        sums = np.cumsum(wide[layer][order])
        before = sums - wide[layer][order]
        totals = np.bincount(held[layer], wide[layer], minlength=experts)
        starts = (np.cumsum(totals) - totals)[held[layer][order]]
        total = totals[held[layer][order]]
        low[layer, order] = (before - starts) / total
        high[layer, order] = (sums - starts) / total
    return held, low, high


def warmup() -> None:
    """Compile, or load from the cache, the kernels."""
    noise, counts = Noise(0), np.zeros((1, 2), np.int64)
    draw(np.full((1, 2), 0.5), 4, noise.uniform, noise.normal, 0, counts)
    placed = parts(np.array([[[0], [1]]]), np.ones((1, 2, 1), np.int16), 2)
    spread(counts, *placed, noise.uniform, 0, np.zeros((1, 2), np.int32))
