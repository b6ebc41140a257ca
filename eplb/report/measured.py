"""What is read out of a recording for a report: sums over time columns, episodes, plans, rounds."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...planners.episodes import add_logical
from ...planners.recording import RecordedStep, Recording, RecordingError
from .clock import Clock
from .rounds import rounds_of

COLUMNS = 240
"""Parts that a recording is cut into, each of as many steps: so wide is a heat map at most."""

MOST_GAPS = 100
"""Gaps that are looked for: as many as may be a hundredth of a recording each."""

EPISODE_STEPS = 16

Watched = Callable[[Iterable[RecordedStep], int], Iterable[RecordedStep]]
"""Passes on that many steps, and shows how far they are."""


@dataclass(frozen=True)
class Measured:
    """A recording's figures. Times are seconds of recording (`Clock`).

    Attributes:
        edges: float64 [columns + 1], where the columns begin and end.
        heat: int64 [columns, layers, experts], tokens by logical expert.
        load: int64 [columns, layers, ranks], tokens that the ranks got.
        gaps: float64 [n, 2], from when to when long times without steps lasted.
        missing: float64 [n, 2], when how many steps were not recorded that lie between others.
        ends: float64 [episodes], when the episodes ended.
        par: float64 [episodes, layers], measured; nan where a layer had no tokens.
        steps, tokens, runs: recorded in all.
        unplaced: steps whose heat is left out, for their placement was never seen.
        plans: "plans" with `seconds` of planning, and as more fields `sent`, when it was sent,
            `ended` and `committed`; `ended` is nan where the outcome is not known.
        rounds: `rounds.ROUND`.
        episode_steps: of an episode.
        clock: that gave the times.
    """

    edges: np.ndarray
    heat: np.ndarray
    load: np.ndarray
    gaps: np.ndarray
    missing: np.ndarray
    ends: np.ndarray
    par: np.ndarray
    steps: int
    tokens: int
    runs: int
    unplaced: int
    plans: np.ndarray
    rounds: np.ndarray
    episode_steps: int
    clock: Clock

    @property
    def first_commit(self) -> float:
        """Seconds at which the first round or plan was committed; infinite if none was."""
        plans = self.plans[self.plans["committed"]]["ended"]
        rounds = self.rounds[self.rounds["committed"]]["end"]
        return min([*plans[~np.isnan(plans)].tolist(), *rounds.tolist()], default=float("inf"))

    def mean_par(self, since: float, until: float) -> float:
        """Mean over layers and the episodes that ended in [since, until); nan if there are none."""
        chosen = self.par[(self.ends >= since) & (self.ends < until)]
        return float(np.nanmean(chosen)) if (~np.isnan(chosen)).any() else float("nan")

    def cells(self, edges: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`values` [n, ...] of the parts between `edges` [n + 1], cut where gaps begin and end.

        Returns:
            (float64 [m + 1], float64 [m, ...]); nan where there were no steps.
        """
        inner = self.gaps.clip(edges[0], edges[-1])
        cut = np.unique(np.concatenate([edges, inner.ravel()]))
        middle = (cut[1:] + cut[:-1]) / 2
        source = np.searchsorted(edges, middle, "right") - 1
        found = values[source].astype(float)
        found[((middle[:, None] > inner[:, 0]) & (middle[:, None] < inner[:, 1])).any(axis=1)] = (
            np.nan
        )
        return cut, found


class _Sums:
    """Adds up steps."""

    def __init__(self, recording: Recording, columns: int, episode_steps: int):
        shape = recording.layers, recording.ranks
        self.heat = np.zeros((columns, recording.layers, recording.experts), np.int64)
        self.load = np.zeros((columns, *shape), np.int64)
        self.missing: list[tuple[float, int]] = []
        self.gaps: list[tuple[float, float, float]] = []
        self.edges = np.full(columns + 1, np.nan)
        self.ends: list[float] = []
        self.par: list[np.ndarray] = []
        self.clock = Clock()
        self.steps = self.tokens = self.unplaced = 0
        self._ranks = recording.ranks
        self._episode_steps = episode_steps
        self._episode = np.zeros(shape, np.int64)
        self._filled = 0
        self._before: tuple[int, int] | None = None
        self.runs: set[int] = set()

    def add(self, column: int, step: RecordedStep) -> None:
        """Count `step`, in its column and its episode."""
        before, seconds = self.clock.end, self.clock.see(step.run, step.time_ns)
        heapq.heappush(self.gaps, (seconds - before, before, seconds))
        if len(self.gaps) > MOST_GAPS:
            heapq.heappop(self.gaps)
        if np.isnan(self.edges[column]):
            self.edges[column] = seconds
        self._count(seconds, step)
        load = step.heat.reshape(len(step.heat), self._ranks, -1).sum(axis=2, dtype=np.int64)
        self.load[column] += load
        if step.placement is None:
            self.unplaced += step.span
        else:
            placement = step.placement.reshape(len(step.placement), -1)
            add_logical(self.heat[column], step.heat, placement)
        self._episode += load
        self._filled += step.span
        if self._filled >= self._episode_steps:
            self._close_episode(seconds)

    def _count(self, seconds: float, step: RecordedStep) -> None:
        self.steps += step.span
        self.tokens += step.tokens
        if step.run not in self.runs:
            self.runs.add(step.run)
            self._episode[:] = self._filled = 0
        elif self._before is not None:
            missing = step.step - step.span - self._before[1]
            if missing > 0:
                self.missing.append((seconds, missing))
        self._before = step.run, step.step

    def _close_episode(self, seconds: float) -> None:
        mean = self._episode.mean(axis=1)
        with np.errstate(invalid="ignore"):
            self.par.append(self._episode.max(axis=1) / np.where(mean > 0, mean, np.nan))
        self.ends.append(seconds)
        self._episode[:] = self._filled = 0


def measure(recording: Recording, watched: Watched) -> Measured:
    """Read the whole recording once.

    Args:
        recording: to be read.
        watched: sees each step pass.

    Raises:
        RecordingError: a chunk is damaged, or no step is in it.
    """
    count = len(recording)
    if not count:
        raise RecordingError("the recording holds no step; there is nothing to report")
    columns = min(COLUMNS, count)
    settings: dict[str, Any] = recording.header.get("settings") or {}
    episode_steps = int(settings.get("episode_steps") or EPISODE_STEPS)
    sums = _Sums(recording, columns, episode_steps)
    for number, step in enumerate(watched(recording.steps(), count)):
        sums.add(number * columns // count, step)
    return Measured(
        edges=_rising(sums.edges, sums.clock.end),
        heat=sums.heat,
        load=sums.load,
        gaps=_long(sums.gaps, sums.clock.end, count),
        missing=np.array(sums.missing, float).reshape(-1, 2),
        ends=np.array(sums.ends),
        par=np.array(sums.par).reshape(-1, recording.layers),
        steps=sums.steps,
        tokens=sums.tokens,
        runs=len(sums.runs),
        unplaced=sums.unplaced,
        plans=_plans(recording, sums.clock),
        rounds=rounds_of(recording, sums.clock),
        episode_steps=episode_steps,
        clock=sums.clock,
    )


def _long(gaps: list[tuple[float, float, float]], end: float, count: int) -> np.ndarray:
    """Those of a hundredth of the recording, and of ten mean steps, in the order of time."""
    least = max(end / 100, 10 * end / count)
    long = sorted((begin, until) for length, begin, until in gaps if length > least)
    return np.array(long, float).reshape(-1, 2)


def _rising(edges: np.ndarray, end: float) -> np.ndarray:
    """`edges` that end at `end` and rise everywhere, if by a nanosecond."""
    edges[-1] = max(end, edges[-2])
    least = 1e-9 * np.arange(len(edges))
    return np.maximum.accumulate(edges - least) + least


def _plans(recording: Recording, clock: Clock) -> np.ndarray:
    """The table of plans with `sent`, `ended` and `committed`."""
    sent, outcomes = recording.table("plans"), recording.table("outcomes")
    more = [("sent", "<f8"), ("ended", "<f8"), ("committed", "?")]
    plans = np.zeros(len(sent), np.dtype(sent.dtype.descr + more))
    for name in sent.dtype.names or ():
        plans[name] = sent[name]
    plans["sent"] = clock.seconds(sent["run"], sent["sent_ns"])
    plans["ended"] = np.nan
    known = zip(outcomes["run"].tolist(), outcomes["plan"].tolist(), strict=True)
    when = clock.seconds(outcomes["run"], outcomes["time_ns"])
    ends = dict(zip(known, zip(when, outcomes["committed"], strict=True), strict=True))
    for plan in plans:
        plan["ended"], plan["committed"] = ends.get((plan["run"], plan["plan"]), (np.nan, False))
    return plans[~np.isnan(plans["sent"])]
