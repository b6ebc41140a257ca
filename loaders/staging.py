"""Staging: rows that hold experts on their way, and the digest that proves a row whole.

A row holds one expert of one layer: the bytes of all its tensors, one after the other. Rows are
allocated once; a round fills them while inference goes on, and its commit copies them into live
slots.
"""

from __future__ import annotations

import zlib

import torch


def row_bytes(weights: list[list[torch.Tensor]]) -> tuple[int, ...]:
    """Bytes of one expert, per layer, of `weights` (per layer, tensors [slots, ...])."""
    return tuple(
        sum(tensor[0].numel() * tensor.element_size() for tensor in layer) for layer in weights
    )


def slot_views(layer: list[torch.Tensor], slot: int) -> list[torch.Tensor]:
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


def row_digest(views: list[torch.Tensor]) -> int:
    """CRC-32 over the bytes of one expert (uint8 tensors on the CPU)."""
    digest = 0
    for view in views:
        digest = zlib.crc32(view.numpy().data, digest)
    return digest


def digests(weights: list[list[torch.Tensor]]) -> list[list[int]]:
    """[layers][slots] digests of all experts of a rank."""
    return [
        [row_digest(slot_views(layer, slot)) for slot in range(layer[0].shape[0])]
        for layer in weights
    ]


class Staging:
    """`rows` rows, each long enough for an expert of any layer of `weights`."""

    def __init__(self, weights: list[list[torch.Tensor]], rows: int):
        self._weights = weights
        width = max(row_bytes(weights))
        self._rows = torch.empty((rows, width), dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self._rows.numel()

    def views(self, row: int, layer: int) -> list[torch.Tensor]:
        """Row `row` cut into the tensors of an expert of `layer`, as uint8."""
        views = []
        start = 0
        for live in slot_views(self._weights[layer], 0):
            views.append(self._rows[row, start : start + live.numel()])
            start += live.numel()
        return views

    def commit(self, row: int, layer: int, slot: int) -> None:
        """Copy row `row` over the live expert in `slot` of `layer`."""
        live = slot_views(self._weights[layer], slot)
        for target, staged in zip(live, self.views(row, layer), strict=True):
            target.copy_(staged)
