"""The figures of a session as Prometheus asks for them, read beside engine and planner."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator

import numpy as np
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    StateSetMetricFamily,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from ..ipc.liveness import SegmentAbsentError, SegmentError, owner_is_alive
from ..ipc.names import planner_name
from ..ipc.shape import GroupShape
from ..ipc.status import Field, State
from ..planners.episodes import rank_tokens, step_par
from ..planners.group import Group
from ..planners.life import silent_planner
from ..planners.step_heat import StepHeat

log = logging.getLogger("flash_eplb.metrics")

COUNTERS = {
    "eplb_steps": (Field.STEP, "Steps of the engine."),
    "eplb_rounds_committed": (Field.COMMITTED, "Rounds of moves that were carried out."),
    "eplb_rounds_aborted": (Field.ABORTED, "Rounds that were given up on all ranks."),
    "eplb_rounds_refused": (Field.REFUSED, "Rounds that the rank refused as not valid."),
    "eplb_rounds_stale": (Field.STALE, "Rounds that were dropped before they began."),
    "eplb_rounds_damaged": (Field.DAMAGED, "Rounds in which an expert arrived damaged."),
    "eplb_moved_rows": (Field.MOVED_ROWS, "Slots of the rank that were given another expert."),
    "eplb_received_bytes": (Field.RECEIVED_BYTES, "Bytes of experts from other ranks."),
    "eplb_step_mismatches": (Field.MISMATCHES, "Forward passes without their step."),
    "eplb_heat_merged": (Field.HEAT_MERGED, "Steps whose heat is in a later step's record."),
    "eplb_heat_dropped": (Field.HEAT_DROPPED, "Steps whose heat was dropped at a commit."),
}
"""Counters of a rank, without the suffix _total."""

GAUGES = {
    "eplb_epoch": (Field.EPOCH, "Epoch of the placement that the rank has."),
    "eplb_quarantined_rows": (Field.QUARANTINED_ROWS, "Staging rows that a hung transfer holds."),
}
"""Gauges of a rank."""

_LOOK_FOR_ENGINE = 1.0
_LOOKS_BEFORE_REFUSAL = 10


class Meter:
    """What the heat of an engine adds up to since it was found.

    Args:
        shape: of the group.
        steps: of an episode.
        latest: episodes that `par` is the mean of.

    Attributes:
        load: int64 [ranks], tokens that a rank's slots got, over all layers.
        episodes: that are whole.
        par_sum: float64 [layers], the PAR of all of them in sum.
    """

    def __init__(self, shape: GroupShape, steps: int, latest: int):
        self._ranks, self._steps = shape.ranks, steps
        self._filling = np.zeros((shape.layers, shape.ranks), np.int64)
        self._filled = 0
        self._latest: deque[float] = deque(maxlen=latest)
        self.load = np.zeros(shape.ranks, np.int64)
        self.episodes = 0
        self.par_sum = np.zeros(shape.layers)

    @property
    def par(self) -> float:
        """Mean over layers and the latest episodes; nan if there is none."""
        return float(np.mean(self._latest)) if self._latest else float("nan")

    def add(self, step: StepHeat) -> None:
        """Count one step; one without heat is none."""
        load = rank_tokens(step.heat, self._ranks)
        if not load.any():
            return
        self.load += load.sum(axis=0)
        self._filling += load
        self._filled += step.span
        if self._filled >= self._steps:
            pars = step_par(self._filling, self._ranks)
            self.par_sum += pars
            self._latest.append(float(pars.mean()))
            self.episodes += 1
            self._filling[:] = 0
            self._filled = 0


class Exporter(Collector):
    """Follows the engine of a session; what is asked for comes from another thread.

    Args:
        session: its name.
        steps, latest: of `Meter`.
    """

    def __init__(self, session: str, steps: int, latest: int):
        self._session = session
        self._steps, self._latest = steps, latest
        self._lock = threading.Lock()  # the engine's memory is unmapped when it is gone
        self._group: Group | None = None
        self._meter: Meter | None = None
        self._next_look = 0.0
        self._refusals: Counter[str] = Counter()

    def look(self) -> None:
        """Read what has come; more often than the heat rings go round.

        Raises:
            LimitError: this process may not open as many files as the engine has ranks.
        """
        now = time.monotonic()
        is_due = now >= self._next_look
        if is_due:
            self._next_look = now + _LOOK_FOR_ENGINE
        with self._lock:
            if is_due and self._group is not None and not self._group.is_alive():
                log.info("the engine of session %r is gone, waiting for the next", self._session)
                self._leave()
            if is_due and self._group is None:
                self._find()
            if self._group is not None and self._meter is not None:
                for step in self._group.read_heat():
                    self._meter.add(step)

    def close(self) -> None:
        """Let the engine go."""
        with self._lock:
            self._leave()

    def _leave(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = self._meter = None

    def _find(self) -> None:
        try:
            self._group = Group.attach(self._session, writable=False, who="eplb metrics")
        except SegmentAbsentError:
            return
        except SegmentError as error:  # it may be starting
            self._refusals[str(error)] += 1
            if self._refusals[str(error)] == _LOOKS_BEFORE_REFUSAL:
                log.warning("no figures of the engine of session %r: %s", self._session, error)
            return
        self._refusals.clear()
        self._meter = Meter(self._group.shape, self._steps, self._latest)
        log.info("following the %d ranks of session %r", self._group.shape.ranks, self._session)

    def collect(self) -> Iterable[Metric]:
        """All figures of now."""
        with self._lock:
            return list(self._collect())

    def _collect(self) -> Iterator[Metric]:
        yield self._gauge("engine_up", "Whether there is an engine.", self._group is not None)
        planner = _has_planner(self._session)
        yield self._gauge("planner_up", "Whether a planner runs and shows life.", planner)
        if self._group is not None and self._meter is not None:
            yield from self._of_ranks(self._group)
            yield from self._of_heat(self._group, self._meter)

    def _of_ranks(self, group: Group) -> Iterator[Metric]:
        labels = ["session", "ep_rank"]
        ranks = [([self._session, str(i)], rank.status) for i, rank in enumerate(group.ranks)]
        for kind, table in ((CounterMetricFamily, COUNTERS), (GaugeMetricFamily, GAUGES)):
            for name, (field, text) in table.items():
                family = kind(name, text, labels=labels)
                for values, status in ranks:
                    family.add_metric(values, status[field])
                yield family
        states = StateSetMetricFamily("eplb_state", "What the rank's loader does.", labels=labels)
        for values, status in ranks:
            now = status[Field.STATE]
            states.add_metric(values, {state.name.lower(): state == now for state in State})
        yield states

    def _of_heat(self, group: Group, meter: Meter) -> Iterator[Metric]:
        labels, session = ["session"], [self._session]
        tokens = CounterMetricFamily(
            "eplb_rank_tokens", "Tokens of the rank's experts.", labels=[*labels, "ep_rank"]
        )
        for rank, load in enumerate(meter.load.tolist()):
            tokens.add_metric([*session, str(rank)], load)
        yield tokens
        pars = SummaryMetricFamily(
            "eplb_episode_par", "PAR of the layer's episodes.", labels=[*labels, "layer"]
        )
        for layer, total in enumerate(meter.par_sum.tolist()):
            pars.add_metric([*session, str(layer)], meter.episodes, total)
        yield pars
        lost = CounterMetricFamily(
            "eplb_heat_lost", "Records of heat that were overwritten unread here.", labels=labels
        )
        lost.add_metric(session, group.lost)
        yield lost
        yield self._gauge("par", "Mean PAR of all layers, latest episodes.", meter.par)
        yield self._gauge("balancedness", "1 / eplb_par.", 1 / meter.par)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        """One value for the session."""
        gauge = GaugeMetricFamily(f"eplb_{name}", text, labels=["session"])
        gauge.add_metric([self._session], value)
        return gauge


def _has_planner(session: str) -> bool:
    """Whether one runs and is not silent."""
    try:
        return owner_is_alive(planner_name(session)) and not silent_planner(session)
    except SegmentError:  # another user's
        return False
