"""Episodes from before the window: what they were, and how much each still counts."""

from __future__ import annotations

import numpy as np

MERGED = 4
"""Earlier episodes that are summed to one: older heat is needed less exactly."""

LEAST_WEIGHT = 0.25
"""Weight below which an episode is forgotten."""


FAR = 2.0
"""Times that the past may be further from the window than its halves are from one another."""

STIR = 0.05
"""Share of the tokens that may always go to other experts than in the past."""

LEAVING = 0.01
"""Share of the tokens by which the newer half may be further from the past than the older."""

AHEAD = 0.5
"""The same as a share of what separates the halves, where that is less: a single expert that
grows little by little moves few tokens, all of them away from the past."""


class Memory:
    """The heat of earlier windows, each episode of half the weight of one `half_life` later.

    Windows may overlap: episodes that two windows share are counted once.

    Args:
        half_life: in episodes; 0 remembers nothing.
    """

    def __init__(self, half_life: float):
        self._half_life = half_life
        self._past = np.empty((0, 0, 0))
        self._window = np.empty((0, 0, 0))

    def recall(self, window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What came before `window`, which is remembered from now on.

        Args:
            window: float64[episodes, layers, experts], oldest first.

        Returns:
            (tokens float64[n, layers, experts], weight of each float32[n]), an episode of the
            window having weight 1.
        """
        if not self._half_life:
            return window[:0], np.empty(0, np.float32)
        if self._window.shape[1:] != window.shape[1:]:
            self._past = self._window = window[:0]
        gone = self._window[: len(self._window) - _shared(self._window, window)]
        kept = int(np.ceil(self._half_life * -np.log2(LEAST_WEIGHT) / MERGED)) * MERGED
        self._past = np.concatenate([self._past, gone])[-kept:]
        self._window = window
        count = len(self._past) // MERGED
        if not count:
            return window[:0], np.empty(0, np.float32)
        recent = self._past[len(self._past) - count * MERGED :]
        tokens = recent.reshape(count, MERGED, *window.shape[1:]).sum(axis=1)
        age = MERGED * (np.arange(count, 0, -1) - 0.5)
        return tokens, (MERGED * 2.0 ** (-age / self._half_life)).astype(np.float32)

    def erase(self, layers: np.ndarray) -> None:
        """Forget what came before the window, of the layers of a mask bool[layers]."""
        if len(self._past):
            self._past[:, layers] = 0


def is_alike(past: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Whether the heat of each layer is still what it was, bool[layers].

    It is not if its mean over the window has moved away from that of the past by much more than
    within the window, or is on its way: then plans are better made without the past.

    Args:
        past: float64[n, layers, experts], of `Memory.recall`.
        window: float64[episodes, layers, experts].
    """
    if not len(past):
        return np.zeros(window.shape[1], np.bool_)
    before, now = _popularity(past), _popularity(window)
    half = len(window) // 2
    if not half:
        return _is_alike_alone(past, now)
    older, newer = _popularity(window[:half]), _popularity(window[half:])
    halves = _apart(older, newer)
    is_near = _apart(before, now) <= FAR * halves + STIR
    leaving = np.minimum(LEAVING, AHEAD * halves)
    return is_near & (_apart(before, newer) <= _apart(before, older) + leaving)


def _is_alike_alone(past: np.ndarray, now: np.ndarray) -> np.ndarray:
    """`is_alike` for the shares float64[layers, experts] of a window of a single episode.

    How heat varies, and where it goes, the past has to tell: by what one part of it mostly differs
    from the next, and by its halves, of which the newer must not be nearer to `now`.
    """
    near = _apart(_popularity(past), now)
    half = len(past) // 2
    if not half:
        return near <= STIR
    varies = np.median(np.abs(np.diff(shares(past), axis=0)).sum(axis=2) / 2, axis=0)
    older, newer = _popularity(past[:half]), _popularity(past[half:])
    leaving = np.minimum(LEAVING, AHEAD * _apart(older, newer))
    is_near = near <= FAR * varies + STIR
    return is_near & (_apart(older, now) <= _apart(newer, now) + leaving)


def is_other(past: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Whether the heat of each layer is another than it was, bool[layers], for good.

    It is if its mean has moved away from that of the past by more than its halves and chance
    explain, however few tokens the past has. To `is_alike` it looks the same again as soon as the
    past holds enough of what is new.

    Args:
        past: float64[n, layers, experts], of `Memory.recall`; without tokens where it is erased.
        window: float64[episodes, layers, experts], at least two episodes.
    """
    half = len(window) // 2
    halves = _apart(_popularity(window[:half]), _popularity(window[half:]))
    before, now = past.sum(axis=(0, 2)), window.sum(axis=(0, 2))
    few = np.sqrt(np.maximum(1, (now / np.maximum(before, 1) + 1) / 4))  # times the halves' error
    return _apart(_popularity(past), _popularity(window)) > FAR * few * halves + STIR


def shares(tokens: np.ndarray) -> np.ndarray:
    """Each expert's share of the tokens, float64[..., experts]; 0 where there are none."""
    return tokens / np.maximum(tokens.sum(axis=-1, keepdims=True), 1e-300)


def _popularity(heat: np.ndarray) -> np.ndarray:
    """Each expert's share of the tokens of all episodes, float64[layers, experts]."""
    return shares(heat.sum(axis=0))


def _apart(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Share of the tokens that goes elsewhere, float64[layers]."""
    return np.abs(one - other).sum(axis=1) / 2


def _shared(before: np.ndarray, window: np.ndarray) -> int:
    """How many of the last episodes of `before` are the first ones of `window`."""
    for count in range(min(len(before), len(window)), 0, -1):
        first = len(before) - count
        if np.array_equal(before[first], window[0]) and np.array_equal(
            before[first:], window[:count]
        ):
            return count
    return 0
