"""The stager: a thread that fetches a round's experts into staging rows, and proves them.

The main thread hands it one round at a time and looks at `result`; while a round is under way, live
weights are only read. Reference digests, one per (layer, expert), were taken from the weights at
start and agreed on by all ranks; a row is checked against them at its source and on arrival.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from .staging import Staging, row_digest, slot_views
from .transport import Transport

log = logging.getLogger("flash_eplb.loader")


@dataclass(frozen=True)
class Errand:
    """A round, as the stager of one rank sees it.

    Attributes:
        identity: of the round; 0 only opens the connections.
        moves: `MOVE` records of all ranks.
        transport_epoch: whose connections to use.
        rows: staging rows to fill, one for each move that arrives here, in their order.
    """

    identity: int
    moves: np.ndarray
    transport_epoch: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Result:
    """How an errand ended: `error` is empty if its rows are staged and proved."""

    identity: int
    error: str = ""
    received_bytes: int = 0


class Stager:
    """Runs errands in a thread of its own.

    Args:
        weights: per layer, tensors [slots, ...].
        staging: the rows to fill.
        transport: used by this thread only.
        rank: EP rank.
        reference: int64 [layers, experts], digests; None to verify nothing.
        prepare: called first in the thread (names the CUDA device, for instance).
    """

    def __init__(
        self,
        weights: list[list[torch.Tensor]],
        staging: Staging,
        transport: Transport,
        rank: int,
        reference: np.ndarray | None,
        prepare: Callable[[], None] = lambda: None,
    ):
        self._weights = weights
        self._staging = staging
        self._transport = transport
        self._rank = rank
        self._reference = reference
        self._prepare = prepare
        self._errands: queue.SimpleQueue[Errand | None] = queue.SimpleQueue()
        self.result: Result | None = None
        self.busy = False
        self._thread = threading.Thread(target=self._run, name="eplb-stager", daemon=True)
        self._thread.start()

    def begin(self, errand: Errand) -> None:
        """Main thread: hand over a round. The stager must not be busy."""
        assert not self.busy
        self.busy, self.result = True, None
        self._errands.put(errand)

    def close(self) -> None:
        """Main thread: let the thread end after what it is doing."""
        self._errands.put(None)

    def _run(self) -> None:
        self._prepare()
        while (errand := self._errands.get()) is not None:
            try:
                received = self._stage(errand)
                self.result = Result(errand.identity, received_bytes=received)
            except Exception as error:  # whatever it is, the vote must hear of it
                self._fail(errand, f"{type(error).__name__}: {error}")
            self.busy = False

    def _fail(self, errand: Errand, reason: str) -> None:
        """Say why, then tell the main thread, then let the peers fail: in this order, or a peer's
        complaint about our connection would stand in the log for the reason."""
        what = "staging failed" if errand.identity else "no connection to the other ranks yet"
        log.warning("EP rank %d: %s: %s", self._rank, what, reason)
        self.result = Result(errand.identity, reason)
        self._transport.disconnect()

    def _stage(self, errand: Errand) -> int:
        self._transport.connect(errand.transport_epoch)
        leaving = [
            (number, move)
            for number, move in enumerate(errand.moves)
            if move["source_rank"] == self._rank
        ]
        arriving = [
            (self._staging.views(row, int(errand.moves[number]["layer"])), number)
            for row, number in zip(errand.rows, my_rows(errand.moves, self._rank), strict=True)
        ]
        for _, move in leaving:
            self._verify(self._source(move), move, "at its source")
        for number, move in leaving:
            if move["rank"] != self._rank:
                self._transport.send(self._source(move), int(move["rank"]), _tag(number))
        received = 0
        for views, number in arriving:
            move = errand.moves[number]
            if move["source_rank"] == self._rank:
                for target, source in zip(views, self._source(move), strict=True):
                    target.copy_(source)
            else:
                self._transport.receive(views, int(move["source_rank"]), _tag(number))
                received += sum(view.numel() for view in views)
        self._transport.wait()
        for views, number in arriving:
            self._verify(views, errand.moves[number], "on arrival")
        return received

    def _source(self, move: np.void) -> list[torch.Tensor]:
        return slot_views(self._weights[int(move["layer"])], int(move["source_slot"]))

    def _verify(self, views: list[torch.Tensor], move: np.void, where: str) -> None:
        if self._reference is None:
            return
        expected = int(self._reference[move["layer"], move["expert"]])
        found = row_digest(views)
        if found != expected:
            raise RuntimeError(
                f"layer {move['layer']} expert {move['expert']} from rank {move['source_rank']} "
                f"slot {move['source_slot']} to rank {move['rank']}: digest {found:08x} {where}, "
                f"{expected:08x} at start"
            )


def my_rows(moves: np.ndarray, rank: int) -> list[int]:
    """Indices of the moves that arrive on `rank`."""
    return np.flatnonzero(moves["rank"] == rank).tolist()


def _tag(number: int) -> int:
    """First message tag of move `number`; an expert has far fewer than 64 tensors."""
    return number * 64
