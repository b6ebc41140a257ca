"""Seconds of recording: the runs of a recording one after the other, without the time between."""

from __future__ import annotations

import numpy as np


class Clock:
    """Where in a recording an instant lies.

    Each run has a monotonic clock that may be another boot's; so a run begins where the one before
    it ended.
    """

    def __init__(self) -> None:
        self._runs: dict[int, tuple[int, float]] = {}
        self.end = 0.0

    def see(self, run: int, time_ns: int) -> float:
        """Seconds at which a step was recorded; steps come in order, and seconds never fall."""
        first, offset = self._runs.setdefault(run, (time_ns, self.end))
        self.end = max(self.end, offset + (time_ns - first) / 1e9)
        return self.end

    def seconds(self, runs: np.ndarray, times_ns: np.ndarray) -> np.ndarray:
        """float64: when that was; nan for what came before the first step of its run.

        Args:
            runs: int64, the run of each instant.
            times_ns: int64, its monotonic clock.
        """
        found = np.full(len(runs), np.nan)
        for run, (first, offset) in self._runs.items():
            own = (runs == run) & (times_ns >= first)
            found[own] = offset + (times_ns[own] - first) / 1e9
        return found
