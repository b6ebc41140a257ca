"""The scenario that a stress names: one of `collectors/synthetic.py`, or recorded heat."""

from __future__ import annotations

import numpy as np

from ...collectors.synthetic import SCENARIOS, Demand, Scenario, Sizes
from .setup import Setup

REPLAY = "replay:"
_MOST_BYTES = 1 << 28


def scenario_of(setup: Setup) -> Scenario:
    """What `setup.scenario` names."""
    if setup.scenario.startswith(REPLAY):
        return Replayed(recorded(setup.scenario.removeprefix(REPLAY)))
    make, _ = SCENARIOS[setup.scenario]
    return make(Sizes(setup.layers, setup.experts, setup.seed))


def recorded(path: str) -> np.ndarray:
    """float32 [steps, layers, experts], the tokens in a recording or a file of arrays.

    Steps without tokens are left out; of a long recording the first 256 MiB are taken.

    Raises:
        ValueError, OSError: the file is none, or has no tokens.
    """
    from ...planners.heat_file import open_heat

    source = open_heat(path)
    kept: list[np.ndarray] = []
    size = 0
    for counts in source.counts():
        if counts.heat.any():
            kept.append(counts.heat.astype(np.float32))
            size += kept[-1].nbytes
        if size > _MOST_BYTES:
            break
    if not kept:
        raise ValueError(f"{path} has no step with tokens; there is nothing to replay")
    return np.stack(kept)


class Replayed:
    """Recorded steps, one after the other, and from the start again."""

    def __init__(self, counts: np.ndarray):
        totals = counts.sum(2, keepdims=True)
        # a layer without tokens in a step gets them evenly: every record has tokens in all layers
        self._shares = np.where(totals > 0, counts / np.maximum(totals, 1), 1 / counts.shape[2])
        tokens = totals.max(axis=(1, 2))
        self._scales = tokens / tokens.max()

    def __call__(self, step: int) -> Demand:
        """The demand of a step."""
        at = step % len(self._shares)
        share = self._shares[at].astype(np.float64)
        return Demand(share, float(self._scales[at]), 0)
