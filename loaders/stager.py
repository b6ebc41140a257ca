"""The stager: a thread that fetches a round's experts into staging rows, and proves them.

The main thread hands it one round at a time and looks at `result`; while a round is under way, live
weights are only read. Reference digests, one per (layer, expert), were taken from the weights at
start and agreed on by all ranks; a row is checked against them at its source and on arrival.
On a device all of it runs on a side stream, which begins after the engine's work so far and has
ended when the result says so.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from ..device import Event, device_of
from .copies import Copies
from .digest import row_digest
from .errand import Errand, Result, my_rows
from .patrol import Beat
from .staging import Stack, Staging, first_tensor, slot_views
from .transport import Parcel, Transport

log = logging.getLogger("flash_eplb.loader")


class DigestError(RuntimeError):
    """An expert is not what it was when its digest was taken."""


class ChangedError(DigestError):
    """The live weights of an expert have changed, and not by us."""


class _Wrong(NamedTuple):
    """A digest that is not the expected one."""

    found: int
    expected: int


def _take_no_core_on_waking() -> None:
    """Let this thread, and those that it starts, wait for a core that is free, or for a turn.

    It is the engine's main thread that wakes it, in a step, and would lose its core at once.
    """
    with contextlib.suppress(OSError):  # forbidden here
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


class Stager:
    """Runs errands in a thread of its own.

    Args:
        weights: per layer, stacks of its tensors (`staging.Stack`).
        staging: the rows to fill.
        transport: used by this thread only.
        rank: EP rank.
        reference: int64 [layers, experts], digests; None to verify nothing. Its owner may write
            other digests into it while the stager is idle.
        replaced: see `Engine.replaced`.
    """

    def __init__(
        self,
        weights: list[list[Stack]],
        staging: Staging,
        transport: Transport,
        rank: int,
        reference: np.ndarray | None,
        replaced: Callable[[int], str] = lambda layer: "",
    ):
        self._weights = weights
        self._staging = staging
        self._transport = transport
        self._rank = rank
        self._reference = reference
        self._replaced = replaced
        self._device = device_of(first_tensor(weights))
        self._errands: queue.SimpleQueue[tuple[Errand, Event | None] | None] = queue.SimpleQueue()
        self.result: Result | None = None
        self.busy = False
        self.waits = False  # for other ranks, in the transport
        self._looks = False  # at a live expert
        self._failed_look = ""  # why the latest look that failed did
        self._thread = threading.Thread(target=self._run, name="eplb-stager", daemon=True)
        self._thread.start()

    def begin(self, errand: Errand) -> None:
        """Main thread: hand over a round. The stager must not be busy."""
        assert not self.busy
        self.busy, self.result = True, None
        self._looks = errand.beat is not None
        event = None if self._device.is_host else self._device.event()
        if event is not None:
            event.record()  # in the engine's stream: what it has issued so far comes first
        self._errands.put((errand, event))

    def close(self) -> None:
        """Main thread: let the thread end after what it is doing."""
        self._errands.put(None)

    def leave(self) -> None:
        """Main thread, which gives no more errands: the others need not wait for the connections
        of a look that hangs, which uses none. In a thread, for their end may hang, too."""
        if self._looks:
            threading.Thread(target=self._disconnect, name="eplb-leave", daemon=True).start()

    def _disconnect(self) -> None:
        with self._device.side_stream().use():  # a thread begins with device 0
            self._transport.disconnect()

    def _run(self) -> None:
        _take_no_core_on_waking()
        stream = self._device.side_stream()
        with stream.use():
            while (order := self._errands.get()) is not None:
                errand, event = order
                try:
                    if event is not None:
                        stream.after(event)
                    result = self._stage(errand)
                    stream.finish()
                    self.result = replace(result, staged_ns=time.monotonic_ns())
                except BaseException as error:  # whatever it is, the vote must hear of it
                    self._fail(errand, error)
                    with contextlib.suppress(Exception):
                        stream.finish()  # before the rows count as free
                self.busy = False

    def _fail(self, errand: Errand, error: BaseException) -> None:
        """Say why, then tell the main thread, then let the peers fail: in this order, or a peer's
        complaint about our connection would stand in the log for the reason."""
        damaged = isinstance(error, DigestError)
        reason = str(error) if damaged else f"{type(error).__name__}: {error}"
        what = "staging failed" if errand.identity else "no connection to the other ranks yet"
        if errand.beat is not None:
            what = "a live expert has changed" if damaged else "a look at a live expert failed"
        if errand.beat is None or reason != self._failed_look:  # one look follows the other
            log.warning("EP rank %d: %s: %s", self._rank, what, reason)
        if errand.beat is not None:
            self._failed_look = reason
        changed = isinstance(error, ChangedError)
        now = time.monotonic_ns() // 1000
        self.result = Result(errand.identity, reason, damaged, changed, now)
        if errand.beat is None:  # a look has nothing to do with connections, which the others keep
            with contextlib.suppress(Exception):
                self._transport.disconnect()

    def _look(self, beat: Beat) -> None:
        """ChangedError if the weights in a slot are not those of its expert at the start."""
        self._check_memory(beat.layer)
        views = slot_views(self._weights[beat.layer], beat.slot)
        if wrong := self._wrong(views, beat.layer, beat.expert):
            raise ChangedError(
                f"layer {beat.layer} expert {beat.expert} in slot {beat.slot}: digest "
                f"{wrong.found:016x}, {wrong.expected:016x} at the start"
            )

    def _stage(self, errand: Errand) -> Result:
        if errand.beat is not None:
            self._look(errand.beat)
            return Result(errand.identity)
        with self._waiting():
            self._transport.connect(errand.transport_epoch)
        moves, mine = errand.moves, my_rows(errand.moves, self._rank)
        for layer in np.unique(moves["layer"]).tolist():
            self._check_memory(layer)
        rows = [
            self._staging.views(row, int(moves[number]["layer"]))
            for row, number in zip(errand.rows, mine, strict=True)
        ]
        arriving: list[Parcel] = []
        copied: list[Parcel] = []
        for views, number in zip(rows, mine, strict=True):
            peer = int(moves[number]["source_rank"])
            (copied if peer == self._rank else arriving).append(
                Parcel(number, *_expert(moves[number]), peer, views)
            )
        leaving = [
            Parcel(number, *_expert(moves[number]), int(moves[number]["rank"]), self._proved(move))
            for number, move in enumerate(moves)
            if move["source_rank"] == self._rank
        ]
        for parcel, source in _pairs(copied, leaving):
            for target, view in zip(parcel.views, source.views, strict=True):
                target.copy_(view)
        with self._waiting():
            self._transport.exchange(moves, [p for p in leaving if p.peer != self._rank], arriving)
        for views, number in zip(rows, mine, strict=True):
            self._check_arrival(views, moves[number])
        live = [
            view
            for number in mine
            for view in slot_views(
                self._weights[int(moves[number]["layer"])], int(moves[number]["slot"])
            )
        ]
        staged = [view for views in rows for view in views]
        if errand.tables is not None:
            parts, values = errand.tables()
            live, staged = live + parts, staged + values
        received = sum(view.nbytes for parcel in arriving for view in parcel.views)
        return Result(errand.identity, received_bytes=received, copies=Copies(live, staged))

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        self.waits = True
        try:
            yield
        finally:
            self.waits = False

    def _check_memory(self, layer: int) -> None:
        """ChangedError if the engine computes with other memory than `weights`."""
        if self._reference is not None and (name := self._replaced(layer)):
            raise ChangedError(f"layer {layer}: {name} is in other memory than at the start")

    def _source(self, move: np.void) -> list[torch.Tensor]:
        return slot_views(self._weights[int(move["layer"])], int(move["source_slot"]))

    def _proved(self, move: np.void) -> list[torch.Tensor]:
        """The bytes of the expert that leaves; DigestError unless they are those of the start."""
        views = self._source(move)
        if wrong := self._wrong(views, *_expert(move)):
            # Have we read a wrong row? If the right one is wrong, too, somebody else has written.
            live = slot_views(self._weights[int(move["layer"])], int(move["source_slot"]))
            kind = ChangedError if self._wrong(live, *_expert(move)) else DigestError
            raise kind(_complaint(move, wrong, "at its source"))
        return views

    def _check_arrival(self, views: list[torch.Tensor], move: np.void) -> None:
        if wrong := self._wrong(views, *_expert(move)):
            raise DigestError(_complaint(move, wrong, "on arrival"))

    def _wrong(self, views: list[torch.Tensor], layer: int, expert: int) -> _Wrong | None:
        """What is wrong with the digest of these bytes; None if it is the expert's, or unasked."""
        if self._reference is None:
            return None
        found, expected = row_digest(views), int(self._reference[layer, expert])
        return None if found == expected else _Wrong(found, expected)


def _complaint(move: np.void, wrong: _Wrong, where: str) -> str:
    return (
        f"layer {move['layer']} expert {move['expert']} from rank {move['source_rank']} "
        f"slot {move['source_slot']} to rank {move['rank']}: digest {wrong.found:016x} {where}, "
        f"{wrong.expected:016x} at the start"
    )


def _expert(move: np.void) -> tuple[int, int]:
    return int(move["layer"]), int(move["expert"])


def _pairs(copied: list[Parcel], leaving: list[Parcel]) -> list[tuple[Parcel, Parcel]]:
    """What is copied within the rank, with the parcel that it is copied from."""
    sources = {parcel.number: parcel for parcel in leaving}
    return [(parcel, sources[parcel.number]) for parcel in copied]
