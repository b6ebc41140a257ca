"""The heat collector: what the engine counted in a step becomes one record in the heat ring.

On the CPU the counts are copied at once. On a device with streams nothing may wait for the device:
each step issues a copy to one of a few pinned buffers, zeroes the counters behind it and leaves an
event; a later step finds the event passed and writes the record. While all buffers are on their way
the counters are left alone, so they go on adding up and a later record sums several steps.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import NamedTuple

import numpy as np
import torch

from ..device import Device, Event, device_of
from ..ipc.flags import FLAG_DUMMY
from ..ipc.heat_ring import HeatRing

log = logging.getLogger("flash_eplb.collector")

BUFFERS = 4
"""Copies that may be on their way: a device is seldom more than two steps behind its host."""

QUEUED = 256
"""Records that may wait for a copy before them; dummy steps need no buffer, so they are capped."""

LATE_STEPS = 1000
"""Steps after which a copy that has not arrived is complained about."""


class _Span(NamedTuple):
    """The steps of one record; see `HeatRing.push`."""

    step: int
    time: int
    tokens: int
    flags: int
    epoch: int
    span: int

    def followed_by(self, later: _Span) -> _Span:
        """Both as one, of the same epoch; it is a dummy only if both are."""
        dummy = self.flags & later.flags & FLAG_DUMMY
        return later._replace(
            tokens=self.tokens + later.tokens,
            flags=(self.flags | later.flags) & ~FLAG_DUMMY | dummy,
            span=self.span + later.span,
        )


class _Copy(NamedTuple):
    """A record on its way; a dummy step has no counts and nothing to wait for."""

    span: _Span
    counts: torch.Tensor | None
    event: Event | None


class HeatCollector:
    """Collects the heat of one rank, on the engine's main thread; no call waits for the device.

    Args:
        ring: where the records go.
        loads: per model, integers [layers, columns], counted by the engine on its device. A
            drafter's come first where it is registered first. They are set to zero with each
            record.
        device: that of `loads`; None finds it.
        counts_dummies: whether a dummy step has counts: of an engine that counts what arrives at
            its own slots, where other ranks' batches may arrive meanwhile.

    Attributes:
        merged: steps that were left to the record of a later step.
        dropped: steps whose heat is lost: their counts had been left to a later step, and before
            that came a commit or a dummy step, whose counts cannot be told from theirs.

    Raises:
        ValueError: the models' layers do not add up to the ring's, or an unknown device.
    """

    def __init__(
        self,
        ring: HeatRing,
        loads: list[torch.Tensor],
        device: Device | None = None,
        counts_dummies: bool = False,
    ):
        if sum(len(load) for load in loads) != ring.layers:
            raise ValueError(f"loads of {[len(load) for load in loads]} layers for {ring.layers}")
        self._ring = ring
        self._loads = loads
        self._uncounted = 0 if counts_dummies else FLAG_DUMMY
        self._device = device or device_of(loads[0])
        self._host = [load.numpy() for load in loads] if self._device.is_host else []
        plain = [load for load in self._host if load.flags.c_contiguous and load.dtype == np.int32]
        self._is_plain = len(plain) == len(loads) == 1
        count = 1 if self._device.is_host else BUFFERS
        # no copy from a device has to convert
        kind = torch.int32 if self._device.is_host else loads[0].dtype
        self._free = [self._device.pinned(ring.layers, ring.columns, kind) for _ in range(count)]
        self._zeros = np.zeros((ring.layers, ring.columns), np.int32)
        self._on_their_way: deque[_Copy] = deque()
        self._left: _Span | None = None
        self._late = False
        self.merged = 0
        self.dropped = 0
        self._clear()

    def collect(self, step: int, tokens: int, flags: int, epoch: int) -> None:
        """Write the record of step `step`, or see to it that a later step does.

        Args:
            step: number of the step, equal on all ranks.
            tokens: unpadded tokens of the forward pass.
            flags: of `flags.py`; the heat of a dummy step does not count, its record is zero
                (but see `counts_dummies`).
            epoch: rounds committed before the forward pass: the placement that was counted.
        """
        span = _Span(step, time.monotonic_ns(), tokens, flags, epoch, 1)
        if self._device.is_host:
            self._write_at_once(span)
            return
        self._write_arrived(step)
        if flags & self._uncounted:
            self._drop_left()
            self._clear()
            self._enqueue_dummy(span)
        else:
            self._issue(span)
        self._write_arrived(step)

    def _write_at_once(self, span: _Span) -> None:
        if span.flags & self._uncounted:
            self._write(span, self._zeros)
        elif self._is_plain:
            self._write(span, self._host[0])
        else:
            self._gather(self._free[0])
            self._write(span, self._free[0].numpy())
        for load in self._host:  # a call of torch takes longer than all of this
            load.fill(0)

    def _issue(self, span: _Span) -> None:
        """Copy the counters and zero them, or leave them to the next step."""
        if self._left is not None:
            if self._left.epoch != span.epoch:  # counts of two placements in one
                self._drop_left()
                self.dropped += 1
                self._clear()
                return
            span = self._left.followed_by(span)
        if not self._free or len(self._on_their_way) == QUEUED:
            self._left = span
            self.merged += 1
            return
        self._left = None
        counts = self._free.pop()
        self._gather(counts)
        self._clear()
        event = self._device.event()
        event.record()
        self._on_their_way.append(_Copy(span, counts, event))

    def _enqueue_dummy(self, span: _Span) -> None:
        if len(self._on_their_way) < QUEUED:
            self._on_their_way.append(_Copy(span, None, None))
        else:
            self.dropped += 1

    def _drop_left(self) -> None:
        if self._left is not None:
            self.dropped += self._left.span
            self._left = None

    def _write_arrived(self, step: int) -> None:
        """Write the records whose counts have arrived, in the order of their steps."""
        while self._on_their_way:
            copy = self._on_their_way[0]
            if copy.event is not None and not copy.event.query():
                self._watch(step - copy.span.step)
                return
            self._on_their_way.popleft()
            self._late = False
            if copy.counts is None:
                self._write(copy.span, self._zeros)
            else:
                counts = copy.counts.numpy()
                self._write(copy.span, counts.astype(np.int32, copy=False))
                self._free.append(copy.counts)

    def _watch(self, steps: int) -> None:
        if steps > LATE_STEPS and not self._late:
            self._late = True
            log.error(
                "no heat has come from the device for %d steps, the planner sees none; inference "
                "goes on. Is the device's stream blocked?",
                steps,
            )

    def _gather(self, target: torch.Tensor) -> None:
        start = 0
        for load in self._loads:
            self._device.copy(target[start : start + len(load)], load)
            start += len(load)

    def _clear(self) -> None:
        for load in self._loads:
            load.zero_()

    def _write(self, span: _Span, counts: np.ndarray) -> None:
        step, time_, tokens, flags, epoch, steps = span
        self._ring.push(step, time_, tokens, flags, epoch, counts, steps)
