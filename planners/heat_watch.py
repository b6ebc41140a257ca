"""What the planner says of heat that it does not get: each thing once, until it is otherwise."""

from __future__ import annotations

import logging
import time

from .episodes import EpisodeWindow
from .group import Group

log = logging.getLogger("flash_eplb.planner")

_HEATLESS_STEPS = 1000
_LOSSES_SECONDS = 60.0  # from one word of losses to the next


class HeatWatch:
    """Looks at what was read and at what has become of it.

    Args:
        group: the engine's ranks, whose heat is read by who owns this.
        window: where it goes.
        phase: of `step_heat.group_heat`.
    """

    def __init__(self, group: Group, window: EpisodeWindow, phase: str):
        self._group = group
        self._window = window
        self._phase = phase
        self._lost = 0
        self._next_report = 0.0
        self._unphased = False
        self._heatless = False

    def forgive(self) -> None:
        """What was lost until now is not spoken of."""
        self._lost = self._group.lost

    def look(self) -> None:
        """After the heat of a turn has gone into the window."""
        self._say_losses()
        self._say_unphased()
        self._say_no_heat()

    def _say_losses(self) -> None:
        now = time.monotonic()
        if self._group.lost > self._lost and now >= self._next_report:
            log.warning(
                "%d records of heat, one for each step of a rank, were overwritten before they "
                "were read; raise EPLB_RING_STEPS",
                self._group.lost - self._lost,
            )
            self._lost = self._group.lost
            self._next_report = now + _LOSSES_SECONDS

    def _say_unphased(self) -> None:
        """Once, that EPLB_HEAT_PHASE leaves out steps of which nobody knows the phase."""
        if self._phase != "all" and self._group.unphased and not self._unphased:
            self._unphased = True
            log.warning(
                "the engine does not say which steps are prefill and which are decode: with "
                "EPLB_HEAT_PHASE=%s such steps do not count; unset it to count all",
                self._phase,
            )

    def _say_no_heat(self) -> None:
        """Once, until there is some, that an engine that runs gives nothing to plan on."""
        rank, behind = self._group.behind()
        why = ""
        if self._window.empty >= _HEATLESS_STEPS:
            why = (
                f"in {self._window.empty} steps that had tokens the engine has counted none for "
                "any expert: do its MoE layers count them (vLLM: expert_load_pass)?"
            )
        elif self._window.unplaced >= _HEATLESS_STEPS:
            why = (
                f"where the experts were in the last {self._window.unplaced} steps is unknown: the "
                "ranks' placement boards differ, or show another epoch than that of their heat; "
                "restart the engine"
            )
        elif self._group.out_of_phase >= _HEATLESS_STEPS:
            why = (
                f"none of the engine's {self._group.out_of_phase} steps counts for "
                f"EPLB_HEAT_PHASE={self._phase}; unset it to count all"
            )
        elif behind >= max(_HEATLESS_STEPS, self._group.shape.ring_slots):
            why = (
                f"EP rank {rank} has recorded no heat for {behind} steps of the other ranks; see "
                "its log"
            )
        elif self._group.unfit() >= _HEATLESS_STEPS:
            why = (
                f"the ranks' records of the last {self._group.unfit()} steps do not fit together "
                "(`eplb status` tells where heat is merged): raise EPLB_RING_STEPS"
            )
        if why and not self._heatless:
            log.warning("nothing is planned: %s", why)
        self._heatless = bool(why)
