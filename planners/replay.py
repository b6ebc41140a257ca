"""Plays recorded heat through a policy, as a planner would have balanced it live."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numba import njit

from ..ipc.shape import why_no_placement
from .engine_loop import Pace
from .episodes import EpisodeWindow
from .guard import Guard
from .par import slot_shares
from .plan import PlannedRound
from .policy import Policy
from .recording import Counts
from .step_heat import StepHeat

_STRETCHES = 240


@dataclass(frozen=True)
class Delay:
    """How long a plan takes, in steps.

    Attributes:
        first: from the end of the episode that a plan is made at to its first round's commit.
        each: from one round's commit to the next one's.
        rows: staging rows per rank that a round may fill.
    """

    first: int = 16
    each: int = 8
    rows: int = 8


@dataclass(frozen=True)
class Outcome:
    """What a policy made of the heat.

    Attributes:
        steps, episodes: that had tokens.
        step_par: (mean, 95th percentile) over records of the PAR, each the mean over its layers
            with tokens.
        episode_par: the same over episodes.
        step_par_over_time, episode_par_over_time: means of up to 240 equal stretches of them.
        plans: plans sent.
        refused: plans that failed or were not valid.
        rounds: committed.
        moves: slots written by them.
        moved_per_plan: share of all slots that a plan writes, mean.
        planning_ms: (mean, longest) of a call of the policy, with checks and rounds.
        peak: tokens of the busiest rank, summed over layers and steps.
        placement: int32 [layers, ranks, slots] at the end.
    """

    steps: int
    episodes: int
    step_par: tuple[float, float]
    episode_par: tuple[float, float]
    step_par_over_time: list[float]
    episode_par_over_time: list[float]
    plans: int
    refused: int
    rounds: int
    moves: int
    moved_per_plan: float
    planning_ms: tuple[float, float]
    peak: float
    placement: np.ndarray

    def as_json(self) -> dict[str, Any]:
        """All but the placement, as JSON takes it: None for nan."""
        fields = asdict(self)
        del fields["placement"]
        for name in ("step_par", "episode_par"):
            mean, high = fields.pop(name)
            fields |= {f"{name}_mean": mean, f"{name}_p95": high}
        mean, high = fields.pop("planning_ms")
        fields |= {"planning_ms_mean": mean, "planning_ms_max": high}
        return {name: None if value != value else value for name, value in fields.items()}


class Replay:
    """One policy over one sequence of heat. Feed it with `add`; `outcome` says how it went.

    The window, the plan's check and its rounds are the planner's own. No time passes while a policy
    plans, other than `delay`. A plan whose rounds are under way is finished before the next.

    Args:
        policy: made for the placement's ranks and slots.
        placement: int [layers, ranks, slots], where it starts.
        experts: logical experts per layer.
        pace: episodes, window and interval.
        delay: of plans.
        ranks_per_node: as of `Guard`.
    """

    def __init__(
        self,
        policy: Policy,
        placement: np.ndarray,
        experts: int,
        pace: Pace,
        delay: Delay,
        ranks_per_node: int | None = None,
    ):
        self._guard = Guard(policy, ranks_per_node)
        self._pace = pace
        self._delay = delay
        self._placement = np.array(placement, np.int32)
        self._columns = np.ones(self._placement.shape, np.int16)
        self._experts = experts
        self._shares = slot_shares(self._placement, self._columns, experts)
        layers = len(self._placement)
        self._window = EpisodeWindow(layers, experts, 1, pace.episode_steps, pace.window_episodes)
        self._window.learn(0, np.tile(np.arange(experts), (layers, 1)))  # heat is logical already
        self._coming: deque[tuple[int, PlannedRound]] = deque()
        self._next_plan = pace.min_episodes
        self._steps = 0
        self._load = np.zeros(self._placement.shape[:2])
        self._step_pars: list[float] = []
        self._episode_pars: list[float] = []
        self._seconds: list[float] = []
        self._plans = self._refused = self._rounds = self._moves = 0
        self._peak = 0.0

    def add(self, counts: Counts) -> None:
        """The next step's tokens, or several steps' as one; one without tokens does not count."""
        if not counts.heat.any():
            return
        self._commit()
        load = _rank_load(counts.heat, self._placement, self._shares)
        self._step_pars.append(_mean_par(load))
        self._peak += load.max(axis=1).sum()
        self._load += load
        self._steps += counts.span
        before = self._window.count
        self._window.add(StepHeat(0, 0, counts.heat, counts.span))
        if self._window.count > before:
            self._episode_pars.append(_mean_par(self._load))
            self._load[:] = 0
            if not self._coming and self._window.count >= self._next_plan:
                self._plan()

    def outcome(self) -> Outcome:
        """How it went so far; PAR are nan where there was no step or no whole episode."""
        milliseconds = 1e3 * np.array(self._seconds or [0.0])
        sent = self._moves + sum(len(part.moves) for _, part in self._coming)
        return Outcome(
            steps=self._steps,
            episodes=self._window.count,
            step_par=_mean_and_p95(self._step_pars),
            episode_par=_mean_and_p95(self._episode_pars),
            step_par_over_time=stretches(self._step_pars, _STRETCHES),
            episode_par_over_time=stretches(self._episode_pars, _STRETCHES),
            plans=self._plans,
            refused=self._refused,
            rounds=self._rounds,
            moves=self._moves,
            moved_per_plan=sent / max(1, self._plans) / self._placement.size,
            planning_ms=(float(milliseconds.mean()), float(milliseconds.max())),
            peak=self._peak,
            placement=self._placement.copy(),
        )

    def _plan(self) -> None:
        self._next_plan = self._window.count + self._pace.plan_interval
        begun = time.perf_counter()
        proposal = self._guard.propose(self._window.heat(), self._placement, self._delay.rows)
        self._seconds.append(time.perf_counter() - begun)
        if proposal is None:
            self._refused += 1
        elif proposal.plan:
            self._plans += 1
            first = self._steps + self._delay.first
            self._coming.extend(
                (first + n * self._delay.each, part) for n, part in enumerate(proposal.rounds)
            )

    def _commit(self) -> None:
        """Commit the rounds whose time has come."""
        while self._coming and self._coming[0][0] <= self._steps:
            part = self._coming.popleft()[1]
            layers = part.layers
            self._placement = part.placement
            self._columns[layers] = 1 if part.columns is None else part.columns
            self._shares[layers] = slot_shares(
                part.placement[layers], self._columns[layers], self._experts
            )
            self._rounds += 1
            self._moves += len(part.moves)
            if not self._coming:
                self._next_plan = self._window.count + self._pace.plan_interval


def stretches(values: list[float], most: int) -> list[float]:
    """Means of `most` stretches of `values`, as equal as can be; `values` if they are fewer."""
    count = min(most, len(values))
    return [float(np.mean(part)) for part in np.array_split(values, count)] if count else []


def linear_placement(layers: int, experts: int, ranks: int, slots: int) -> np.ndarray:
    """What vLLM starts with, int32 [layers, ranks, slots]: slot i holds expert i % experts.

    Raises:
        ValueError: so many experts do not fit on so many slots.
    """
    if text := why_no_placement(experts, ranks, slots):
        raise ValueError(text)
    flat = np.arange(ranks * slots, dtype=np.int32) % experts
    return np.tile(flat, (layers, 1)).reshape(layers, ranks, slots)


def step_time(outcome: Outcome, base: Outcome, moe_share: float) -> float:
    """Time of a step relative to `base`, in a model of it.

    `moe_share` of a step's time under `base` is spent in MoE layers, each of which takes as long as
    its busiest rank has tokens; all else stays as it is, and moving experts costs nothing.
    """
    return 1 - moe_share + moe_share * (outcome.peak / base.peak if base.peak else 1.0)


def step_time_model(moe_share: float, base: str) -> str:
    """What `step_time` assumes, in a sentence.

    Args:
        moe_share: as of `step_time`.
        base: what the time is relative to, such as "the placement at the start".
    """
    return (
        f"Step time: {moe_share:.0%} of a step under {base} is taken to be MoE, each layer as long "
        "as its busiest rank has tokens; all else stays, and moves cost nothing."
    )


@njit(cache=True, nogil=True)
def _rank_load(heat, placement, shares):
    """float64 [layers, ranks]: tokens of each rank for heat [layers, experts]."""
    layers, ranks, slots = placement.shape
    load = np.zeros((layers, ranks))
    for layer in range(layers):
        for rank in range(ranks):
            for slot in range(slots):
                expert = placement[layer, rank, slot]
                load[layer, rank] += heat[layer, expert] * shares[layer, rank, slot]
    return load


def _mean_par(load: np.ndarray) -> float:
    """Mean over the layers with tokens of max over mean; `load` is [layers, ranks]."""
    mean = load.mean(axis=1)
    busy = mean > 0
    return float((load.max(axis=1)[busy] / mean[busy]).mean())


def _mean_and_p95(values: list[float]) -> tuple[float, float]:
    if not values:
        return float("nan"), float("nan")
    return float(np.mean(values)), float(np.percentile(values, 95))
