"""The planner of a stress: the real one, with a recorder that tells the supervisor what it does.

Usage: python -m flash_eplb.eplb.stress.planner_process SETUP
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING

import uvloop

from ...planners.planner import Planner
from ...planners.policy import Policy
from ...planners.recorder import NoRecorder
from .. import cli
from ..choice import choose, load, options_of, pace_of, policy_of
from ..logs import configure
from . import clock
from .figures import Figures, Planned, Rank
from .host import end_with
from .setup import decoded

if TYPE_CHECKING:
    from ...planners.plan import Plan, PlannedRound
    from ...planners.step_heat import StepHeat


class Tap(NoRecorder):
    """Tells in `Figures.planned` what a planner reads and does.

    What had been written before it found the engine is neither behind nor lost.
    """

    def __init__(self, figures: Figures):
        self._figures = figures
        self._told = figures.planned
        self._told[Planned.SERVING] += 1
        self._from = int(figures.ranks[:, Rank.STEP].max())
        self._lost = self._lost_before = 0
        self._told[Planned.LOST] = 0

    def step(self, step: StepHeat) -> None:
        """See `NoRecorder`."""
        told = self._told
        told[Planned.STEPS] += step.span
        told[Planned.STEP] = step.step
        behind = int(self._figures.ranks[:, Rank.STEP].max()) - step.step
        if step.step <= self._from:
            self._lost_before = self._lost
            return
        told[Planned.MOST_BEHIND] = max(told[Planned.MOST_BEHIND], behind)
        told[Planned.LOST] = self._lost - self._lost_before

    def plan(
        self, number: int, epoch: int, plan: Plan, rounds: list[PlannedRound], seconds: float
    ) -> None:
        """See `NoRecorder`."""
        told = self._told
        told[Planned.PLANS] += 1
        told[Planned.PLANNING_NS] += int(seconds * 1e9)
        longest = max(told[Planned.LONGEST_PLANNING_NS], int(seconds * 1e9))
        told[Planned.LONGEST_PLANNING_NS] = longest

    def lost(self, records: int) -> None:
        """See `NoRecorder`."""
        self._lost = records


async def _serve(make: type, *arguments: object) -> None:
    planner = make(*arguments)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, planner.stop if number == signal.SIGTERM else lambda: None)
    await planner.run()


def main() -> None:
    """See the module."""
    end_with(os.getppid())
    setup = decoded(sys.argv[1])
    figures = setup.figures()
    figures.planned[:] = 0
    figures.planned[Planned.PID] = os.getpid()
    config = load()
    configure(config.log_level)
    choice = choose(config.policy)
    options = options_of(config, choice)
    cli.compile_kernels(choice)
    clock.inject(figures.order)

    def make_policy(ranks: int, slots: int) -> Policy:
        return policy_of(config, choice, ranks, slots, options)

    near = config.ranks_per_node or None
    arguments = (config.session, make_policy, pace_of(config), False, near, lambda _: Tap(figures))
    uvloop.run(_serve(Planner, *arguments))


if __name__ == "__main__":
    main()
