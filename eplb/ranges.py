"""Ranges of memory that tensors take up."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

import torch

Dimensions = list[tuple[int, int]]
"""(bytes from one to the next, how many), the furthest apart first."""


class Ranges:
    """The bytes of `tensors`, none of which has gaps, as ranges of addresses."""

    def __init__(self, tensors: Iterable[torch.Tensor]):
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in sorted(range_of(tensor) for tensor in tensors if tensor.numel()):
            if self._ends and start <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end)
            else:
                self._starts.append(start)
                self._ends.append(end)

    def hold(self, tensor: torch.Tensor) -> bool:
        """Whether every element of `tensor`, which may have gaps, lies in them."""
        if not tensor.numel():
            return True
        return self._hold(tensor.data_ptr(), _dimensions(tensor), tensor.element_size())

    def _hold(self, start: int, dimensions: Dimensions, size: int) -> bool:
        place = bisect_right(self._starts, start) - 1
        if place >= 0 and start + _length(dimensions, size) <= self._ends[place]:
            return True
        if not _has_gaps(dimensions, size):
            return False
        (step, count), *inner = dimensions
        return all(self._hold(start + step * index, inner, size) for index in range(count))


def range_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses of its first byte and behind its last one."""
    start = tensor.data_ptr()
    return start, start + _length(_dimensions(tensor), tensor.element_size())


def _dimensions(tensor: torch.Tensor) -> Dimensions:
    size = tensor.element_size()
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    return sorted(((step * size, n) for step, n in pairs if step and n > 1), reverse=True)


def _length(dimensions: Dimensions, size: int) -> int:
    """Bytes from the first to the end of the last element, of `size` bytes each."""
    return size + sum(step * (count - 1) for step, count in dimensions)


def _has_gaps(dimensions: Dimensions, size: int) -> bool:
    """Whether there are bytes between the first and the last that are no element's."""
    return any(
        step > _length(dimensions[place + 1 :], size) for place, (step, _) in enumerate(dimensions)
    )
