"""A device whose copies arrive when the test says so."""

from __future__ import annotations

from collections import deque

import torch


class FakeEvent:
    def __init__(self, device):
        self._device = device
        self.has_passed = False

    def record(self):
        self._device.stream.append(self)

    def query(self):
        return self.has_passed


class FakeDevice:
    """Copies take the values at their turn in the stream and land in their memory at `run` only."""

    is_host = False

    def __init__(self):
        self.stream = deque()
        self.buffers = 0

    def pinned(self, layers, columns, dtype):
        self.buffers += 1
        return torch.full((layers, columns), -(10**6), dtype=dtype)

    def copy(self, target, source):
        self.stream.append((target, source.clone()))

    def event(self):
        return FakeEvent(self)

    def run(self, events=1, order=None):
        """Let the next `events` events pass, and what was issued before them happen.

        Args:
            order: indices of the events to be marked as passed, instead of those from the front:
                a driver that answers out of step.
        """
        if order is not None:
            waiting = [item for item in self.stream if isinstance(item, FakeEvent)]
            for index in order:
                waiting[index].has_passed = True
            return
        while events and self.stream:
            item = self.stream.popleft()
            if isinstance(item, FakeEvent):
                item.has_passed = True
                events -= 1
            else:
                target, values = item
                target.copy_(values)
