"""The planner of a stress: the real one, with a recorder that tells the supervisor what it does.

Usage: python -m flash_eplb.eplb.stress.planner_process SETUP
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import typer

from ...planners.recorder import NoRecorder, recorder_of
from ..choice import load
from ..cli import run_planner
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

    Args:
        figures: shared by the processes.
        recorder: told of everything, too: that of EPLB_RECORD.
    """

    def __init__(self, figures: Figures, recorder: NoRecorder):
        self._figures = figures
        self._recorder = recorder
        self.placement = recorder.placement  # type: ignore[method-assign]
        self.ended = recorder.ended  # type: ignore[method-assign]
        self.transfers = recorder.transfers  # type: ignore[method-assign]
        self.close = recorder.close  # type: ignore[method-assign]
        self._told = figures.planned
        self._told[Planned.SERVING] += 1
        self._from = int(figures.ranks[:, Rank.STEP].max())
        self._lost = self._lost_before = 0
        self._told[Planned.LOST] = 0

    def step(self, step: StepHeat) -> None:
        """See `NoRecorder`."""
        self._recorder.step(step)
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
        self._recorder.plan(number, epoch, plan, rounds, seconds)
        told = self._told
        told[Planned.PLANS] += 1
        told[Planned.PLANNING_NS] += int(seconds * 1e9)
        longest = max(told[Planned.LONGEST_PLANNING_NS], int(seconds * 1e9))
        told[Planned.LONGEST_PLANNING_NS] = longest

    def lost(self, records: int) -> None:
        """See `NoRecorder`."""
        self._recorder.lost(records)
        self._lost = records


def main() -> None:
    """See the module."""
    end_with(os.getppid())
    figures = decoded(sys.argv[1]).figures()
    figures.planned[:] = 0
    figures.planned[Planned.PID] = os.getpid()
    config = load()
    configure(config.log_level)
    clock.inject(figures.order)
    record = recorder_of(
        config.record, config.record_mb, config.session, config.model_dump(mode="json")
    )
    try:
        run_planner(config, lambda shape: Tap(figures, record(shape)), exit_with_engine=False)
    except typer.Exit as ended:  # it has said why
        sys.exit(ended.exit_code)


if __name__ == "__main__":
    main()
