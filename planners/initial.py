"""The placement that an engine is to begin with, and whether it is still to be reached."""

from __future__ import annotations

import logging

import numpy as np

from ..ipc.shape import GroupShape
from .expert_map import ExpertMap

log = logging.getLogger("flash_eplb.planner")

_TRIES = 3


class InitialPlacement:
    """What EPLB_INITIAL_PLACEMENT wants of one engine. It speaks up when there is nothing to do.

    Args:
        expert_map: of the file; None if there is none.
        shape: of the engine.

    Attributes:
        name: of the setting, with its value, for the log.
        wanted: int32 [layers, ranks, slots] as long as it is to be reached; then None.
    """

    def __init__(self, expert_map: ExpertMap | None, shape: GroupShape):
        self.name = f"EPLB_INITIAL_PLACEMENT={expert_map.path if expert_map else ''}"
        self.wanted: np.ndarray | None = None
        self._tries = _TRIES
        if expert_map is None:
            return
        engine = (shape.layers, shape.experts, shape.ranks, shape.slots)
        if expert_map.shape == engine:
            self.wanted = expert_map.placement
            return
        log.error(
            "%s is for %s, and this engine has %s; balancing goes on without it: plan a map of the "
            "engine's shape with `eplb plan`, or unset it",
            self.name,
            _said(*expert_map.shape),
            _said(*engine),
        )

    def resume(self, epoch: int) -> None:
        """The engine was found at `epoch`: it is not new if rounds were committed before."""
        if self.wanted is not None and epoch > 0:
            log.info(
                "%s is for the start of an engine; this one has committed %d rounds already, so "
                "its experts stay where they are",
                self.name,
                epoch,
            )
            self.wanted = None

    def ended(self, committed: bool) -> None:
        """Its plan was committed, or given up; it is tried again, but not for ever."""
        self._tries -= 1
        if committed:
            self.wanted = None
        elif not self._tries:
            log.error(
                "%s was given up %d times and is not tried again; balancing goes on from where the "
                "experts are",
                self.name,
                _TRIES,
            )
            self.wanted = None


def _said(layers: int, experts: int, ranks: int, slots: int) -> str:
    return f"{layers} layers, {experts} experts on {ranks} ranks x {slots} slots"
