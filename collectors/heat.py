"""The heat collector: what the engine counted in a step becomes one record in the heat ring."""

from __future__ import annotations

import time

import numpy as np

from ..ipc.heat_ring import FLAG_DUMMY, HeatRing


class HeatCollector:
    """Collects the heat of one rank, on the engine's main thread.

    Args:
        ring: where the records go.
        loads: per model, int32 [layers, columns], counted by the engine on the CPU. They are set
            to zero with each record.

    Raises:
        ValueError: the models' layers do not add up to the ring's.
    """

    def __init__(self, ring: HeatRing, loads: list[np.ndarray]):
        if sum(len(load) for load in loads) != ring.layers:
            raise ValueError(f"loads of {[len(load) for load in loads]} layers for {ring.layers}")
        self._ring = ring
        self._loads = loads
        for load in loads:
            load[:] = 0

    def collect(self, step: int, tokens: int, is_dummy: bool, epoch: int) -> None:
        """Write the record of step `step`.

        Args:
            step: number of the step, equal on all ranks.
            tokens: unpadded tokens of the forward pass.
            is_dummy: the step's heat does not count; its record is zero.
            epoch: rounds committed before the forward pass: the placement that was counted.
        """
        if is_dummy:
            for load in self._loads:
                load[:] = 0
        flags = FLAG_DUMMY if is_dummy else 0
        self._ring.push(step, time.monotonic_ns(), tokens, flags, epoch, self._loads)
