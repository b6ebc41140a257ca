"""What a stress measures while it runs: PAR, speed, and who uses the processors."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import numpy as np

from .figures import Figures, Planned, Rank
from .fleet import Fleet
from .rank import first_placement

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Sample:
    """Of the time since the sample before.

    Attributes:
        seconds: since the start.
        steps_per_second: of the engine.
        par: float [layers], of the tokens that were sent to the ranks.
        unmoved: float [layers], of the same tokens under the placement of the start.
        epoch: rounds committed.
        behind: steps that the planner has not read.
    """

    seconds: float
    steps_per_second: float
    par: np.ndarray
    unmoved: np.ndarray
    epoch: int
    behind: int


class Meter:
    """Makes samples of what the ranks tell."""

    def __init__(self, fleet: Fleet):
        self._fleet = fleet
        figures, setup = fleet.figures, fleet.setup
        self._first = first_placement(setup)
        flat = self._first.reshape(setup.layers, -1)
        self._counts = np.stack([np.bincount(row, minlength=setup.experts) for row in flat])
        self._begin = self._last = time.perf_counter()
        self._steps = fleet.steps()
        self._tokens, self._loads = _sums(figures)

    def sample(self) -> Sample | None:
        """Since the last call; None if no token was sent meanwhile, or the engine is another."""
        figures, now, steps = self._fleet.figures, time.perf_counter(), self._fleet.steps()
        tokens, loads = _sums(figures)
        sent, arrived = tokens - self._tokens, loads - self._loads
        passed, made = now - self._last, steps - self._steps
        self._tokens, self._loads, self._last, self._steps = tokens, loads, now, steps
        if made <= 0 or not sent.any(1).all():
            return None
        share = np.take_along_axis(
            sent / self._counts, self._first.reshape(len(sent), -1).astype(np.int64), axis=1
        )
        unmoved = share.reshape(self._first.shape).sum(2)
        return Sample(
            now - self._begin,
            made / passed,
            _par(arrived),
            _par(unmoved),
            self._fleet.epoch(),
            max(0, steps - int(figures.planned[Planned.STEP])),
        )


def _sums(figures: Figures) -> tuple[np.ndarray, np.ndarray]:
    return figures.tokens.sum(0), figures.loads.sum(0)


def _par(loads: np.ndarray) -> np.ndarray:
    """float [layers] of loads [layers, ranks]."""
    return loads.max(1) / loads.mean(1)


class Clock:
    """Processor time of the fleet since the start, by what it is used for."""

    def __init__(self, fleet: Fleet):
        self._fleet = fleet
        self._begin = time.perf_counter()
        self._last: dict[int, float] = {}
        self._used = dict.fromkeys(("loop", "planning", "ranks", "supervisor"), 0.0)
        self._add()
        self._used = dict.fromkeys(self._used, 0.0)

    def shares(self) -> dict[str, float]:
        """Cores used: by the planner's loop, its other threads, the ranks, and this process."""
        self._add()
        seconds = max(1e-9, time.perf_counter() - self._begin)
        return {name: used / seconds for name, used in self._used.items()}

    def _add(self) -> None:
        planner = self._fleet.planner
        loop = planner.pid if planner else 0
        of_planner = _threads(loop) if planner else {}
        of_ranks = {int(pid) for pid in self._fleet.figures.ranks[:, Rank.PID]} - {0}
        threads = {
            **{thread: ("planning", used) for thread, used in of_planner.items()},
            **{t: ("ranks", used) for pid in of_ranks for t, used in _threads(pid).items()},
            os.getpid(): ("supervisor", time.process_time()),
        }
        for thread, (name, used) in threads.items():
            name = "loop" if thread == loop else name
            self._used[name] += max(0.0, used - self._last.get(thread, 0.0))
            self._last[thread] = used


def _threads(pid: int) -> dict[int, float]:
    """Seconds of processor time, by thread."""
    used = {}
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/stat") as file:
                words = file.read().rsplit(")", 1)[1].split()
            used[int(thread)] = (int(words[11]) + int(words[12])) / _TICKS
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        pass
    return used
