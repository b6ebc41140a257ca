"""Experts that change slots on the rank where they are: in place, with room for one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from .copies import Copies
from .engine import Engine
from .staging import Stack, Staging, slot_views


def reordering(
    engine: Engine, rank: int, before: np.ndarray, after: np.ndarray
) -> Callable[[], None]:
    """What brings the experts of a rank, and all tables, from one placement to another.

    All that may fail for want of memory is done here, and nothing is written before the call of
    what is returned.

    Args:
        engine: of the rank.
        rank: whose slots change.
        before, after: int32 [layers, ranks, slots], with the same experts on every rank.

    Raises:
        MemoryError: there is no room for one expert more.
    """
    layers = np.flatnonzero((before[:, rank] != after[:, rank]).any(axis=1)).tolist()
    row = Staging(engine.weights, 1) if layers else None
    tables = Copies(*engine.tables(np.arange(len(after)), after, None))

    def write() -> None:
        for layer in layers:
            assert row is not None
            slots = before[layer, rank], after[layer, rank]
            reorder_slots(engine.weights[layer], *slots, row.views(0, layer))
        tables.run()

    return write


@torch.inference_mode()  # whatever mode they were made in
def reorder_slots(
    layer: Sequence[Stack], before: np.ndarray, after: np.ndarray, row: Sequence[torch.Tensor]
) -> None:
    """Exchange the slots of the experts of one rank, in place.

    Args:
        layer: stacks of its tensors.
        before, after: int [slots], the experts in the slots; the same experts, each once.
        row: room for one of them, as `Staging.views` gives it.
    """
    source = {expert: slot for slot, expert in enumerate(before.tolist())}
    left = {slot for slot, expert in enumerate(after.tolist()) if source[expert] != slot}
    while left:
        first = slot = min(left)
        _copy(row, slot_views(layer, first))
        while slot in left:
            left.remove(slot)
            follower = source[int(after[slot])]
            _copy(
                slot_views(layer, slot), row if follower == first else slot_views(layer, follower)
            )
            slot = follower


def _copy(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
