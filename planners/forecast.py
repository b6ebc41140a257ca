"""What the next window is likely to show, where the counts of an episode are largely chance.

With few tokens (decode) an expert's count in one episode says little: a placement that fits the
episodes fits noise. There the episodes are drawn towards their mean, by the share of their variance
that chance explains (James and Stein 1961), and the mean is carried to where the popularity of the
experts has drifted: the level of a random walk seen through noise, whose best estimate weighs the
episodes by their age (Muth 1960) and by what their tokens tell.
"""

from __future__ import annotations

import math

import numpy as np

from .memory import shares

LARGELY = 0.3
"""Share of the variance between episodes that chance must explain."""

MOSTLY = 0.5
"""Share of the variance from episode to episode that it must explain so that no more is asked."""

MUCH = 4.0
"""Times the variance between episodes that it may be: counts that vary less are not by chance."""

DOUBT = 3.0
"""Standard errors that chance is taken to explain."""

MUCH_BETTER = 0.5
"""Share of the variance of the level that must be left where episodes count by their tokens."""

FEWEST = 8
"""Episodes of a window that tell chance from change."""


def forecast(window: np.ndarray, past: np.ndarray, span: int) -> tuple[np.ndarray, np.ndarray]:
    """The episodes to plan for, and how uncertain the level of their shares is.

    Args:
        window: float64[T, layers, E], oldest first.
        past: float64[M, layers, E], sums of `span` earlier episodes each, oldest first; without
            tokens where it does not count.
        span: at least 1.

    Returns:
        (float64[T, layers, E]; float64[layers], the standard error of the shares of all experts
        together: by chance and by what else does not last from one episode to the next; 0 where
        chance is the lesser part). The episodes are those of the window where that is 0, or the
        window too short to tell chance from change.
    """
    errors = np.zeros(window.shape[1])
    tokens = window.sum(axis=2)
    chance = (1 / np.maximum(tokens, 1)).mean(axis=0)  # the variance of Poisson counts, as shares
    if len(window) < FEWEST:
        are_counts = (window % 1 == 0).all(axis=(0, 2)) & tokens.all(axis=0)
        return window, np.sqrt(chance / max(1, len(window))) * are_counts
    share = shares(window)
    spread = share.var(axis=0, ddof=1).sum(axis=1)
    by_chance = (chance > LARGELY * spread) & (chance < MUCH * spread) & tokens.all(axis=0)
    chosen = np.flatnonzero(by_chance)
    chosen = chosen[(window[:, chosen] % 1 == 0).all(axis=(0, 2))]  # what is no count has no chance
    expected = window.copy() if len(chosen) else window
    for layer in chosen:
        noise = chance[layer]
        if len(window) >= 2 * FEWEST:
            noise = max(noise, _steps(share[:, layer]).mean() / 2)
        spans, weights = _weights(share[:, layer], past[:, layer], span, noise)
        known = np.concatenate([past[:, layer], window[:, layer]])
        variance = 1 / np.maximum(known.sum(axis=1), 1) + (noise - chance[layer]) / spans
        weights = _by_tokens(shares(known), weights, spans, variance)
        level = weights @ shares(known)
        errors[layer] = math.sqrt((weights**2 * variance).sum())
        mean = window[:, layer].mean(axis=0)
        kept = max(0.0, 1 - chance[layer] / spread[layer])
        level *= tokens[:, layer].mean()
        ratio = np.divide(level, mean, out=np.ones_like(mean), where=mean > 0)
        expected[:, layer] = (mean + kept * (window[:, layer] - mean)) * ratio
    return expected, errors


def mostly_chance(window: np.ndarray) -> np.ndarray:
    """Whether chance explains most of what an episode differs by from the one before, bool[layers].

    What drifts, or changes once, has little part in that; what is by neither does not last.

    Args:
        window: float64[T, layers, E], oldest first, at least two episodes.
    """
    chance = (1 / np.maximum(window.sum(axis=2), 1)).mean(axis=0)
    return np.asarray(chance > MOSTLY * np.median(_steps(shares(window)), axis=0) / 2)


def _steps(share: np.ndarray) -> np.ndarray:
    """Squares of what shares [T, ..., E] change by from episode to episode, float64[T - 1, ...]."""
    return (np.diff(share, axis=0) ** 2).sum(axis=-1)


def _weights(
    share: np.ndarray, past: np.ndarray, span: int, noise: float
) -> tuple[np.ndarray, np.ndarray]:
    """Of the past and of the window's episodes: (how many each sums up; its weight, 1 in sum).

    How fast shares drift is what the halves of the window differ by, less what noise explains.

    Args:
        share: float64[T, E], of the window's episodes.
        past, span: as in `forecast`, of the layer.
        noise: the variance of one episode's shares that does not last, over all experts.
    """
    half = len(share) // 2
    apart = ((share[-half:].mean(axis=0) - share[:half].mean(axis=0)) ** 2).sum()
    by_noise = 2 * noise / half * _doubt(share.mean(axis=0))
    # two adjacent stretches of a random walk differ by 2/3 of what it does in one of them
    drift = max(0.0, apart - by_noise) * 1.5 / half
    spans = np.concatenate([np.full(len(past), span), np.ones(len(share))])
    age = spans[::-1].cumsum()[::-1] - spans / 2
    weights = spans * (1 - math.sqrt(drift / (drift + noise))) ** age
    weights[: len(past)] *= past.any(axis=1)
    return spans, weights / weights.sum()


def _by_tokens(
    share: np.ndarray, weights: np.ndarray, spans: np.ndarray, variance: np.ndarray
) -> np.ndarray:
    """Weights by which what has many tokens counts more, for it is known better.

    Only where that is much better than to count all alike, and not where such episodes (prefill)
    have other shares than those with few.

    Args:
        share: float64[n, E], of sums of episodes.
        weights: float64[n], by age and `spans` alone, 1 in sum.
        spans: float64[n], episodes in each sum.
        variance: float64[n], of the shares of each sum by what does not last, over all experts.
    """
    better = weights / spans / variance
    better /= better.sum()
    apart = (((better - weights) @ share) ** 2).sum()
    by_noise = ((better - weights) ** 2 * variance).sum() * _doubt(weights @ share)
    is_much = (better**2 * variance).sum() < MUCH_BETTER * (weights**2 * variance).sum()
    return better if is_much and apart <= by_noise else weights


def _doubt(share: np.ndarray) -> float:
    """Times the expected square of a difference of shares float64[E] that chance may explain."""
    return 1 + DOUBT * math.sqrt(2 * (share**2).sum())
