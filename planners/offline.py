"""A placement planned from a whole recording at once, and what it would have won."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .baselines import Static
from .engine_loop import Pace
from .guard import checked_plan
from .policy import Policy, PolicyError
from .recording import Counts, RecordingError, sum_episodes
from .replay import Delay, Outcome, Replay


class Trial(NamedTuple):
    """A placement that is measured from an episode on.

    Attributes:
        placement: int32 [layers, ranks, slots].
        first: number of the episode, from 0; the steps before it do not count.
    """

    placement: np.ndarray
    first: int = 0


def busy_steps(counts: Iterator[Counts]) -> Iterator[Counts]:
    """The steps that have tokens: the planner makes episodes of no others."""
    return (each for each in counts if each.heat.any())


def all_episodes(counts: Iterator[Counts], steps: int) -> np.ndarray:
    """int64 [episodes, layers, experts] as a planner would make them of the steps.

    Raises:
        RecordingError: there is not even one.
    """
    episodes = list(sum_episodes(busy_steps(counts), steps))
    if not episodes:
        raise RecordingError(
            f"there are no {steps} steps with tokens, which make an episode; record more, or lower "
            "EPLB_EPISODE_STEPS"
        )
    return np.stack(episodes)


def plan_offline(
    name: str,
    make_policy: Callable[[], Policy],
    heat: np.ndarray,
    start: np.ndarray,
    at_once: int,
    tell: Callable[[int], None],
) -> np.ndarray:
    """The placement that a policy wants for heat that is known in full.

    A policy that can be asked for every layer (`every_layer`, as FlashLB) is: moves are free.

    Args:
        name: of the policy, for errors.
        make_policy: makes the policy; each part of the layers is planned by one of its own.
        heat: int64 [episodes, layers, experts].
        start: int32 [layers, ranks, slots], a valid placement to start from.
        at_once: layers that the policy is given together.
        tell: called with the number of layers whenever some are planned.

    Returns:
        int32 [layers, ranks, slots]; experts that stay on their rank of `start` keep their slots.

    Raises:
        PolicyError: the policy cannot be made or fails, or what it returns is not valid.
    """
    placement = np.empty_like(start)
    for first in range(0, len(start), at_once):
        part = slice(first, first + at_once)
        tokens = np.ascontiguousarray(heat[:, part])
        policy = make_policy()
        try:
            found = _ask(policy, tokens.copy(), start[part].copy())
        except (Exception, SystemExit) as error:  # a user's policy may do anything
            text = f"EPLB_POLICY={name!r} failed: {type(error).__name__}: {error}"
            raise PolicyError(text) from error
        try:
            placement[part] = checked_plan(found, tokens, start[part]).placement
        except ValueError as error:
            text = f"what EPLB_POLICY={name!r} returned is refused: {error}"
            raise PolicyError(text) from error
        tell(len(start[part]))
    return placement


def measure(
    counts: Iterator[Counts], trials: Sequence[Trial], experts: int, steps: int
) -> list[Outcome]:
    """What each placement would have shown, were it there from the trial's first episode on.

    Args:
        counts: of all steps, oldest first; read once.
        trials: placements with as many layers as the counts.
        experts: logical experts per layer.
        steps: of an episode.
    """
    gauges = [_gauge(trial.placement, experts, steps) for trial in trials]
    episode = filled = 0
    for each in busy_steps(counts):
        for trial, gauge in zip(trials, gauges, strict=True):
            if episode >= trial.first:
                gauge.add(each)
        filled += each.span
        if filled >= steps:
            episode, filled = episode + 1, 0
    return [gauge.outcome() for gauge in gauges]


def _ask(policy: Policy, heat: np.ndarray, placement: np.ndarray) -> Any:
    plan: Any = policy.plan
    if "every_layer" in inspect.signature(plan).parameters:
        return plan(heat, placement, every_layer=True)
    return plan(heat, placement)


def _gauge(placement: np.ndarray, experts: int, steps: int) -> Replay:
    """A replay that never plans."""
    pace = Pace(steps, 1, sys.maxsize, 1, 0)
    return Replay(Static(*placement.shape[1:]), placement, experts, pace, Delay())
