"""What the planner does for one engine, from bell to bell."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..ipc import rank_segment
from . import guard
from .delivery import Delivery, Progress
from .episodes import EpisodeWindow
from .expert_map import ExpertMap, SavedPlacement
from .group import Group
from .guard import Guard, Proposal
from .heat_watch import HeatWatch
from .initial import InitialPlacement
from .policy import Policy
from .recorder import NoRecorder
from .step_heat import StepHeat

log = logging.getLogger("flash_eplb.planner")

_QUIET_SECONDS = 60.0
_TOLD = 4  # plans given up in a row that are all told of; then those that double their number
_NO_THREAD = (
    "nothing is planned until a thread can be started (%s): raise `ulimit -u`, or the limit of "
    "processes of the container"
)
LONG_PLAN = 60.0
"""Seconds after which a policy that still plans is reported."""


@dataclass(frozen=True)
class Pace:
    """When the planner looks and plans: steps of an episode, episodes of the window, episodes
    before the first plan and between two plans, steps after which a plan is given up, and which
    steps count (`phase` of `step_heat.group_heat`)."""

    episode_steps: int
    window_episodes: int
    min_episodes: int
    plan_interval: int
    timeout_steps: int
    heat_phase: str = "all"


class EngineLoop:
    """The planner's work for one engine: episodes in, plans out, one delivery at a time.

    Args:
        group: the engine's ranks.
        policy: decides placements; called in `executor`, never twice at once. What it gives is
            checked, whoever wrote it.
        pace: when to plan.
        generation: of the planner, as it stands in the plan queues.
        executor: of one plan at a time, in a thread.
        wake: called from that thread's completion, so that `turn` comes soon.
        ranks_per_node: consecutive ranks that share a node, from which experts are taken first;
            None if all do.
        recorder: told of what is read and done; None records nothing.
        initial: placement that an engine is brought to before any heat is planned on, if it has
            committed nothing yet.
        saved: told of the placement after each plan that was committed.
    """

    def __init__(
        self,
        group: Group,
        policy: Policy,
        pace: Pace,
        generation: int,
        executor: Executor,
        wake: Callable[[], None],
        ranks_per_node: int | None = None,
        recorder: NoRecorder | None = None,
        initial: ExpertMap | None = None,
        saved: SavedPlacement | None = None,
    ):
        shape = group.shape
        self._group = group
        self._guard = Guard(policy, ranks_per_node)
        self._pace = pace
        self._generation = generation
        self._executor = executor
        self._wake = wake
        self._recorder = recorder or NoRecorder()
        self._saved = saved or SavedPlacement()
        self._window = EpisodeWindow(
            shape.layers, shape.experts, shape.ranks, pace.episode_steps, pace.window_episodes
        )
        self._heat_watch = HeatWatch(group, self._window, pace.heat_phase)
        self._delivery: Delivery | None = None
        self._planning: Future[Proposal | None] | None = None
        self._planning_seconds = 0.0
        self._hangs_at = math.inf
        self._planned_from = -1
        self._plans = 0
        self._given_up = 0  # since the last one that was committed
        self._sequence = 1
        self._next_plan = pace.min_episodes
        self._epoch = -1
        self._resumed = False
        self._quiet_until = 0.0
        self._said: set[str] = set()
        self._placement = np.zeros(0)
        log.info(
            "serving an engine: %d layers, %d experts on %d ranks x %d slots",
            shape.layers,
            shape.experts,
            shape.ranks,
            shape.slots,
        )
        _check_nodes(shape.ranks, ranks_per_node or shape.ranks)
        self._initial = InitialPlacement(initial, shape)

    def turn(self) -> None:
        """Once per bell: take the heat, follow the plan under way, or begin the next one."""
        steps = list(self._group.read_heat(self._pace.heat_phase))
        if not self._resumed:
            self._heat_watch.forgive()  # what was overwritten while this planner was coming
        self._recorder.lost(self._group.lost)
        if self._delivery is not None:
            self._follow_delivery(self._delivery)
        elif self._epoch < 0 or any(step.epoch > self._epoch for step in steps):
            self._read_boards()  # a round of a planner before us, or of a plan given up, came late
        for step in steps:
            self._recorder.step(step)
            self._window.add(step)
        self._heat_watch.look()
        self._recorder.transfers(self._group.read_transfers())
        if self._planning is not None:
            if self._planning.done():
                self._send(self._planning.result())
                self._planning = None
            elif time.monotonic() > self._hangs_at:
                self._hangs_at = math.inf
                log.warning(
                    "the policy has been planning for %.0f s; no other plan is made until it "
                    "returns",
                    LONG_PLAN,
                )
        elif self._delivery is None and self._is_due():
            self._begin_plan()

    def _read_boards(self) -> None:
        board = self._group.committed()
        if board is not None:
            if not self._resumed:
                self._resumed = True
                log.info("resuming from epoch %d of the placement boards", board[0])
                self._initial.resume(board[0])
                if self._initial.wanted is not None:
                    self._next_plan = 0
            self._epoch, self._placement = board
            self._learn(*board)

    def _learn(self, epoch: int, placement: np.ndarray) -> None:
        self._window.learn(epoch, placement)
        self._recorder.placement(epoch, placement)

    def _is_due(self) -> bool:
        if self._has_stopped() or self._epoch < 0 or self._window.count < self._next_plan:
            return False
        return not self._is_held() and self._has_rows()

    def _is_held(self) -> bool:
        """Whether ranks would drop a plan; says so once."""
        held = self._group.held()
        return self._say_once(
            bool(held),
            logging.INFO,
            "EP ranks %s hold their experts while weights are written or read, or since that "
            "failed, as their log says; nothing is planned until they go on",
            held,
        )

    def _has_stopped(self) -> bool:
        """Whether ranks balance no more, be there heat and a placement or not; says so once."""
        stopped = self._group.stopped()
        return self._say_once(
            bool(stopped),
            logging.ERROR,
            "EP ranks %s have stopped balancing, their log says why; nothing is planned until the "
            "engine is restarted",
            stopped,
        )

    def _has_rows(self) -> bool:
        """Whether a round can be staged at all; says once if not."""
        return not self._say_once(
            self._group.free_rows() == 0,
            logging.WARNING,
            "a rank's staging rows are all left to transfers that hang; nothing is planned until "
            "one ends (EPLB_TRANSFER_TIMEOUT); raise EPLB_STAGING_ROWS to go on meanwhile",
        )

    def _say_once(self, is_so: bool, level: int, text: str, *arguments: object) -> bool:
        """Log `text` if it has come to be so; returns whether it is."""
        if is_so and text not in self._said:
            log.log(level, text, *arguments)
        (self._said.add if is_so else self._said.discard)(text)
        return is_so

    def _begin_plan(self) -> None:
        self._read_boards()
        self._planned_from = self._epoch
        self._plan_later()
        rows = self._group.free_rows()
        if not rows:  # the last one has gone since it was asked for
            return
        make: Callable[[], Proposal | None]
        if self._initial.wanted is None:
            make = partial(self._guard.propose, self._window.heat(), self._placement, rows)
        else:
            make = partial(self._guard.reach, self._initial.wanted, self._placement, rows)
        self._submit(make)

    def _submit(self, make: Callable[[], Proposal | None]) -> None:
        """Plan in a thread; where none can be started, which is said once, the next plan may be."""
        try:
            self._planning = self._executor.submit(self._timed, make)
        except RuntimeError as error:
            self._say_once(True, logging.WARNING, _NO_THREAD, error)
            return
        self._said.discard(_NO_THREAD)
        self._hangs_at = time.monotonic() + LONG_PLAN
        self._planning.add_done_callback(lambda _: self._wake())

    def _plan_later(self) -> None:
        """The next plan comes an interval from now, and not before there is heat to plan on."""
        later = self._window.count + self._pace.plan_interval
        self._next_plan = max(self._pace.min_episodes, later)

    def _timed(self, make: Callable[[], Proposal | None]) -> Proposal | None:
        begun = time.monotonic()
        proposal = make()
        self._planning_seconds = time.monotonic() - begun
        return proposal

    def _send(self, proposal: Proposal | None) -> None:
        """Begin to deliver the plan; one that wins nothing or was refused is not sent.

        Nor is one from a placement that is gone: a round that came late was committed meanwhile.
        """
        if self._epoch != self._planned_from:
            self._next_plan = self._window.count
            self._guard.forget()
            return
        if proposal is None:
            return
        plan, rounds = proposal
        if not plan:
            self._say_quiet(plan.why)
            return
        self._quiet_until = 0.0
        self._plans += 1
        self._delivery = Delivery(
            self._group,
            rounds,
            self._generation,
            self._plans,
            self._sequence,
            self._epoch,
            self._pace.timeout_steps,
        )
        self._sequence = self._delivery.next_sequence
        self._recorder.plan(self._plans, self._epoch, plan, rounds, self._planning_seconds)
        self._say_sent(proposal)
        self._follow_delivery(self._delivery)

    def _say_sent(self, proposal: Proposal) -> None:
        plan, rounds = proposal
        picked = plan.changed
        if self._initial.wanted is None:
            why = (
                f"PAR measured {self._observed_par():.3f}, of these layers "
                f"{plan.par_before[picked].mean():.3f} -> {plan.par_after[picked].mean():.3f}"
            )
        else:
            why = f"to {self._initial.name}"
        log.log(
            self._level(logging.INFO),
            "plan %d: %d of %d layers%s, %d moves in %d rounds; %s",
            self._plans,
            len(picked),
            self._group.shape.layers,
            f" ({len(plan.rerouted)} of them only routed anew)" if len(plan.rerouted) else "",
            sum(len(part.moves) for part in rounds),
            len(rounds),
            why,
        )

    def _observed_par(self) -> float:
        return self._window.observed_par(self._pace.plan_interval)

    def _say_quiet(self, why: str) -> None:
        """That nothing is worth a move: after a plan, and once a minute from then on."""
        if self._initial.wanted is not None:
            log.info("the experts are where %s wants them", self._initial.name)
            self._initial.ended(True)
            return
        now = time.monotonic()
        if now >= self._quiet_until:
            reason = f" ({why})" if why else ""
            log.info("PAR %.3f: no layer is worth a move%s", self._observed_par(), reason)
            self._quiet_until = now + _QUIET_SECONDS

    def _say_given_up(self, reason: str) -> None:
        """Where plans are given up for ever, less and less often, and that nothing is balanced."""
        level = self._level(logging.WARNING)
        log.log(level, "plan %d given up: %s", self._plans, reason)
        self._given_up += 1
        if self._given_up >= _TOLD:
            log.log(
                level,
                "the last %d plans were all given up, so the planner runs and balances nothing, or "
                "little; this is said again when there are %d",
                self._given_up,
                2 * self._given_up,
            )

    def _level(self, level: int) -> int:
        """`level` for the plan under way, if it is told of should it be given up like the last."""
        number = self._given_up + 1
        is_told = number <= _TOLD or number & (number - 1) == 0
        return level if is_told else logging.DEBUG

    def _follow_delivery(self, delivery: Delivery) -> None:
        progress = delivery.advance()
        for epoch, placement in delivery.placements():
            self._learn(epoch, placement)
        if progress is Progress.UNDER_WAY:
            return
        if progress is Progress.DONE:
            log.info("plan %d committed", self._plans)
            self._given_up = 0
        else:
            self._say_given_up(delivery.reason)
            self._guard.forget()
        self._recorder.ended(self._plans, progress is Progress.DONE)
        if self._initial.wanted is not None:
            self._initial.ended(progress is Progress.DONE)
        self._delivery = None
        self._epoch = -1
        self._read_boards()
        if progress is Progress.DONE and self._epoch >= 0:
            self._saved.save(self._placement)
        self._plan_later()


def _check_nodes(ranks: int, near: int) -> None:
    """Say that nodes of `near` ranks leave one that has fewer, which may be meant or a mistake."""
    if near < ranks and ranks % near:
        log.warning(
            "EPLB_RANKS_PER_NODE=%d does not divide the engine's %d ranks, so the last node is "
            "taken to have %d; unless it has, set the ranks that each node has, or 0 if all ranks "
            "share one",
            near,
            ranks,
            ranks % near,
        )


def warmup() -> None:
    """Compile, or load from the cache, the kernels that a turn uses; the policy has its own."""
    rank_segment.warmup()
    guard.warmup()
    window = EpisodeWindow(1, 2, 2, 1, 1)
    window.learn(0, np.zeros((1, 2, 1), np.int32))
    window.add(StepHeat(0, 0, np.ones((1, 2), np.int64)))
