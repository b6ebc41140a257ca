"""Staging: rows that hold experts on their way.

A row holds one expert of one layer: the bytes of all its tensors, one after the other. Rows are
allocated once; a round fills them while inference goes on, and its commit copies them into live
slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_ALIGNMENT = 16  # bytes; so that a device reads whole words


def row_bytes(weights: Sequence[Sequence[torch.Tensor]]) -> tuple[int, ...]:
    """Bytes of one expert, per layer, of `weights` (per layer, tensors [slots, ...])."""
    return tuple(sum(_sizes(layer)) for layer in weights)


def default_rows(row: int) -> int:
    """Staging rows where nobody says how many: few large ones, for each is a pause in a commit, and
    many small ones, for each round takes some steps. `row`: bytes of the largest expert."""
    return min(64, max(8, 2**22 // max(1, row)))


def slot_views(layer: Sequence[torch.Tensor], slot: int) -> list[torch.Tensor]:
    """The bytes (uint8, one dimension) of each tensor of an expert in `slot`, without a copy.

    Raises:
        ValueError: a tensor's row is not contiguous, so that it has no bytes to send.
    """
    views = []
    for tensor in layer:
        row = tensor[slot]
        if not row.is_contiguous():
            raise ValueError(f"an expert tensor of shape {tuple(tensor.shape)} is not contiguous")
        views.append(row.view(-1).view(torch.uint8))
    return views


def copy_rows(live: list[torch.Tensor], staged: list[torch.Tensor]) -> None:
    """Write what was staged over what is live, one for one, in one call."""
    if live:
        torch._foreach_copy_(live, staged)


def reorder_slots(layer: Sequence[torch.Tensor], before: np.ndarray, after: np.ndarray) -> None:
    """Exchange the slots of the experts of one rank, in place, with room for one of them.

    Args:
        layer: tensors [slots, ...].
        before, after: int [slots], the experts in the slots; the same experts, each once.
    """
    source = {expert: slot for slot, expert in enumerate(before.tolist())}
    left = {slot for slot, expert in enumerate(after.tolist()) if source[expert] != slot}
    while left:
        first = slot = min(left)
        kept = [view.clone() for view in slot_views(layer, first)]
        while slot in left:
            left.remove(slot)
            follower = source[int(after[slot])]
            arriving = kept if follower == first else slot_views(layer, follower)
            for target, view in zip(slot_views(layer, slot), arriving, strict=True):
                target.copy_(view)
            slot = follower


class Staging:
    """`rows` rows, each long enough for an expert of any layer of `weights`, on their device.

    Args:
        weights: per layer, tensors [slots, ...].
        rows: how many.
        buffer: tensors [n, ...] that the engine has allocated and does not use: they are the first
            n rows, if an expert of every layer fits into them tensor by tensor.
    """

    def __init__(
        self,
        weights: Sequence[Sequence[torch.Tensor]],
        rows: int,
        buffer: Sequence[torch.Tensor] = (),
    ):
        self._weights = weights
        self.borrowed = min(rows, len(buffer[0])) if _fits(weights, buffer) else 0
        self._buffer = [slot_views(buffer, row) for row in range(self.borrowed)]
        width = max(sum(map(_aligned, _sizes(layer))) for layer in weights)
        device = weights[0][0].device
        own = rows - self.borrowed
        # An engine makes us within inference mode; the stager's thread, which writes, is outside.
        with torch.inference_mode(False):
            self._rows = torch.empty((own, width if own else 0), dtype=torch.uint8, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that were allocated; those of the engine's buffer do not count."""
        return self._rows.numel()

    def views(self, row: int, layer: int) -> list[torch.Tensor]:
        """Row `row` cut into the tensors of an expert of `layer`, as uint8."""
        sizes = _sizes(self._weights[layer])
        if row < self.borrowed:
            return [part[:size] for part, size in zip(self._buffer[row], sizes, strict=False)]
        views = []
        start = 0
        for size in sizes:
            views.append(self._rows[row - self.borrowed, start : start + size])
            start += _aligned(size)
        return views


def _sizes(layer: Sequence[torch.Tensor]) -> list[int]:
    """Bytes of one expert's part of each tensor."""
    return [tensor[0].numel() * tensor.element_size() for tensor in layer]


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _fits(weights: Sequence[Sequence[torch.Tensor]], buffer: Sequence[torch.Tensor]) -> bool:
    """Whether an expert of any layer fits into a row of `buffer`, tensor by tensor."""
    if not buffer or any(not tensor[0].is_contiguous() for tensor in buffer):
        return False
    room = _sizes(buffer)
    return all(
        len(layer) <= len(room)
        and all(size <= space for size, space in zip(_sizes(layer), room, strict=False))
        for layer in weights
    )
