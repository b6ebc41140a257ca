"""Transports: how experts come from rank to rank, behind one small interface.

A transport belongs to the thread of one stager. Its connections are our own and never the engine's
collectives': a group built on a prefix of the engine's store that is used once. After a round that
failed a receive may still be under way, so the group is dropped and the next one gets a new prefix.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist

log = logging.getLogger("flash_eplb.loader")

_WATCHDOG = timedelta(minutes=30)
"""After which NCCL and HCCL may end the process: later than any vote."""

_LEFT = "left"  # in the store of an epoch: the last rank that has left it

_PAUSES = (0.0005, 0.008)  # seconds from one look into the store to the next: at first, and at most
_MOST_TENSORS = 64  # of one expert; message tags of two moves lie that far apart


class Parcel(NamedTuple):
    """One expert that leaves this rank, or arrives.

    Attributes:
        number: of the move within the round; equal on both ranks.
        layer, expert: which.
        peer: the rank at the other end.
        views: its tensors, as `staging.slot_views` gives them; alike on both ranks.
    """

    number: int
    layer: int
    expert: int
    peer: int
    views: list[torch.Tensor]


class Transport(Protocol):
    """What a stager needs; used by one thread only."""

    @property
    def name(self) -> str:
        """For the log."""
        ...

    def connect(self, epoch: int) -> None:
        """Open connections between all ranks for transport epoch `epoch`; all ranks call it.

        Raises:
            RuntimeError: a rank did not come within the timeout.
        """
        ...

    def disconnect(self) -> None:
        """Close the connections; what the other ranks still wait for fails there."""
        ...

    def exchange(self, moves: np.ndarray, leaving: list[Parcel], arriving: list[Parcel]) -> None:
        """Send and receive; back when all has ended, so that no late receive writes into a row.

        Args:
            moves: `MOVE` records of the whole round, equal on all ranks.
            leaving, arriving: of this rank, in the order of their numbers.

        Raises:
            RuntimeError: a transfer failed or timed out; the connections are of no more use.
        """
        ...


class PeerToPeer:
    """torch.distributed's send and recv: gloo, NCCL or HCCL.

    With gloo, experts on a device go through the host's memory. NCCL's and HCCL's watchdogs end a
    process whose transfer does not: so all ranks of a round meet before it, and a rank that has
    failed until then keeps nobody's device waiting. All ranks meet before they open connections,
    too: a rank that has failed until then keeps nobody waiting at all.

    Args:
        name: "gloo", "nccl" or "hccl".
        store: shared by all ranks of the group; no other thread waits on it.
        rank, ranks: of the EP group.
        timeout: seconds that a transfer may take before it fails.
    """

    def __init__(self, name: str, store: dist.Store, rank: int, ranks: int, timeout: float):
        self.name = name
        self._everyone = store
        self._rank = rank
        self._ranks = ranks
        self._timeout = timeout
        self._store: dist.Store | None = None  # of the epoch
        self._group: Any = None
        self._epoch = -1
        self._exchanges = 0
        self._word = ""  # that this rank has come to the latest exchange

    def connect(self, epoch: int) -> None:
        """See `Transport`."""
        if epoch == self._epoch:
            return
        self.disconnect()
        self._store = store = dist.PrefixStore(f"transport/{epoch}", self._everyone)
        come_once(store, self._rank)
        self._wait(store, "came", range(self._ranks))
        self._exchanges, self._word = 0, ""
        timeout = timedelta(seconds=self._timeout)
        group = _GROUPS[self.name](store, self._rank, self._ranks, timeout)
        group.barrier().wait()
        self._group, self._epoch = group, epoch

    def disconnect(self) -> None:
        """See `Transport`: what the others still wait for fails there at once."""
        if self._store is not None:
            leave(self._store, self._rank)
        self._store, self._group, self._epoch = None, None, -1

    def exchange(self, moves: np.ndarray, leaving: list[Parcel], arriving: list[Parcel]) -> None:
        """See `Transport`."""
        self._exchanges += 1
        if not leaving and not arriving:
            return
        assert self._store is not None
        assert self._group is not None
        if self.name == "gloo":
            self._through_the_host(leaving, arriving)
            return
        self._meet(self._store, moves)
        for number in np.unique(moves["layer"]).tolist():  # all ranks in the same order
            sent = [parcel for parcel in leaving if parcel.layer == number]
            received = [parcel for parcel in arriving if parcel.layer == number]
            if sent or received:
                _wait([self._in_one_batch(sent, received)])

    def _meet(self, store: dist.Store, moves: np.ndarray) -> None:
        """Until every rank of the round has come this far.

        The word of the exchange before has been read by then: without a commit on all ranks there
        is another epoch.
        """
        key = f"exchange/{self._exchanges}"
        store.set(f"{key}/{self._rank}", "")
        if self._word:
            store.delete_key(self._word)
        self._word = f"{key}/{self._rank}"
        self._wait(store, key, np.union1d(moves["source_rank"], moves["rank"]).tolist())

    def _wait(self, store: dist.Store, key: str, ranks: Iterable[int]) -> None:
        """Until `ranks` have set `key`."""
        wait_for("come", ranks, lambda rank: store.check([f"{key}/{rank}"]), store, self._timeout)

    def _in_one_batch(self, leaving: list[Parcel], arriving: list[Parcel]) -> dist.Work:
        """Begin all transfers of a layer at once, on the current stream."""
        if self.name == "hccl":  # the way that torch_npu has with every version of CANN
            named = [("isend", parcel) for parcel in leaving]
            named += [("irecv", parcel) for parcel in arriving]
            each = [(name, view, parcel.peer) for name, parcel in named for view in parcel.views]
            return self._group.batch_isend_irecv(*map(list, zip(*each, strict=True)))
        device = (leaving or arriving)[0].views[0].device
        self._group._start_coalescing(device)
        self._begin(leaving, arriving)
        return self._group._end_coalescing(device)

    def _through_the_host(self, leaving: list[Parcel], arriving: list[Parcel]) -> None:
        """On the CPU there is nothing to copy."""
        sent = [parcel._replace(views=[view.cpu() for view in parcel.views]) for parcel in leaving]
        received = [
            parcel._replace(
                views=[
                    view if view.is_cpu else torch.empty_like(view, device="cpu")
                    for view in parcel.views
                ]
            )
            for parcel in arriving
        ]
        _wait(self._begin(sent, received))
        for target, source in zip(arriving, received, strict=True):
            for view, host in zip(target.views, source.views, strict=True):
                if view is not host:
                    view.copy_(host)

    def _begin(self, leaving: list[Parcel], arriving: list[Parcel]) -> list[dist.Work]:
        works = []
        for call, parcels in ((self._group.send, leaving), (self._group.recv, arriving)):
            for parcel in parcels:
                for offset, view in enumerate(parcel.views):
                    tag = parcel.number * _MOST_TENSORS + offset
                    works.append(call([view], parcel.peer, tag))
        return works


def come_once(store: dist.Store, rank: int) -> None:
    """This rank comes to the epoch of `store`; RuntimeError if one has left it, or if this one has
    come before: it failed, or its stager hangs there, to which the others hold connections and of
    which the store tells what is past."""
    _check_left(store)
    if store.add(f"came/{rank}", 1) > 1:
        raise RuntimeError(
            "connections like these have failed, or hang here; the next round opens others"
        )


def leave(store: dist.Store, rank: int) -> None:
    """Nobody waits for `rank` any longer in the epoch of `store`: see `wait_for`."""
    with contextlib.suppress(RuntimeError):  # the store ends with the engine
        store.set(_LEFT, str(rank))


def wait_for(
    what: str,
    ranks: Iterable[int],
    is_there: Callable[[int], bool],
    store: dist.Store,
    timeout: float,
) -> None:
    """Until `is_there` of all `ranks`.

    Args:
        what: they are to do, as in "come".
        ranks: of the group.
        is_there: asks the store.
        store: of the epoch.
        timeout: seconds.

    Raises:
        RuntimeError: a rank has left the epoch, or the time is over.
    """
    deadline, pause = time.monotonic() + timeout, _PAUSES[0]
    for rank in ranks:
        while not is_there(rank):
            _check_left(store)
            if time.monotonic() > deadline:
                raise RuntimeError(f"EP rank {rank} did not {what} within {timeout:g} seconds")
            time.sleep(pause)
            pause = min(2 * pause, _PAUSES[1])


def _check_left(store: dist.Store) -> None:
    if store.check([_LEFT]):
        rank = store.get(_LEFT).decode()
        raise RuntimeError(
            f"EP rank {rank} has closed its connections; the next round opens others"
        )


def finish_stream(device: torch.device) -> None:
    """Wait until the device is through with what this thread's stream waits for and was given.

    Experts that are read from memory, or written to it, beside all streams need that first: the
    commit before may still be on its way.
    """
    if device.type != "cpu":
        torch.accelerator.current_stream(device).synchronize()


def _wait(works: list[dist.Work]) -> None:
    """Wait for all, those after a failed one too; then raise the first failure."""
    failure: RuntimeError | None = None
    for work in works:
        try:
            work.wait()
        except RuntimeError as error:
            failure = failure or error
    if failure is not None:
        raise failure


def _gloo(store: dist.Store, rank: int, ranks: int, timeout: timedelta) -> Any:
    return dist.ProcessGroupGloo(store, rank, ranks, timeout)


def _nccl(store: dist.Store, rank: int, ranks: int, timeout: timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = max(timeout, _WATCHDOG)
    return dist.ProcessGroupNCCL(store, rank, ranks, options)


def _hccl(store: dist.Store, rank: int, ranks: int, timeout: timedelta) -> Any:
    from torch_npu._C._distributed_c10d import (  # type: ignore[import-not-found]
        ProcessGroupHCCL,
    )

    options = ProcessGroupHCCL.Options()
    options._timeout = max(timeout, _WATCHDOG)
    return ProcessGroupHCCL(store, rank, ranks, options)


_GROUPS: dict[str, Callable[..., Any]] = {"gloo": _gloo, "nccl": _nccl, "hccl": _hccl}
"""Process groups as torch builds them; nccl and hccl: not run."""


class EngineCommunicator:
    """The engine's own way to move experts: vLLM's EPLB communicators (nixl, staged gloo, NCCL).

    They cannot be opened anew, so after the first round that failed `fallback` takes over, on all
    ranks alike.

    Args:
        name: of the communicator, for the log.
        layers: per layer of ours, the communicator that moves it and its number there. All ranks
            name the same.
        ranks, slots: of the EP group; slots per rank.
        fallback: from transport epoch 1 on.
    """

    def __init__(
        self,
        name: str,
        layers: list[tuple[Any, int]],
        ranks: int,
        slots: int,
        fallback: Transport,
    ):
        self._own_name = name
        self._layers = layers
        self._placement = (ranks, slots)
        self._fallback = fallback
        self._epoch = 0

    @property
    def name(self) -> str:
        """The communicator's, or the fallback's once it has taken over."""
        return self._fallback.name if self._epoch else self._own_name

    def connect(self, epoch: int) -> None:
        """See `Transport`; the engine has opened its connections before."""
        if epoch > self._epoch == 0:
            log.warning(
                "%s cannot be opened anew; experts travel by %s from now on",
                self._own_name,
                self._fallback.name,
            )
        self._epoch = max(epoch, self._epoch)
        if self._epoch:
            self._fallback.connect(epoch)

    def disconnect(self) -> None:
        """See `Transport`; the engine's communicator only ends with the group's own timeout."""
        self._fallback.disconnect()

    def exchange(self, moves: np.ndarray, leaving: list[Parcel], arriving: list[Parcel]) -> None:
        """See `Transport`; one layer after the other, on all ranks in the same order."""
        if self._epoch:
            self._fallback.exchange(moves, leaving, arriving)
            return
        self._settle(moves, [*leaving, *arriving])
        for number in np.unique(moves["layer"]).tolist():
            communicator, layer = self._layers[number]
            held = self._held(moves[moves["layer"] == number])
            communicator.set_transfer_context(held, layer)
            for call, parcels in (
                (communicator.add_send, leaving),
                (communicator.add_recv, arriving),
            ):
                for parcel in parcels:
                    if parcel.layer == number:
                        call(parcel.views, parcel.peer, parcel.expert)
            communicator.execute()

    def _settle(self, moves: np.ndarray, mine: list[Parcel]) -> None:
        """Until the commit before has ended on the devices of all ranks: nixl reads from afar,
        beside all streams. Its `execute` of nothing is a barrier; the others' has nothing to do."""
        if mine:
            finish_stream(mine[0].views[0].device)
        for number in moves["layer"][:1].tolist():
            self._layers[number][0].execute()

    def _held(self, moves: np.ndarray) -> np.ndarray:
        """int64 [ranks * slots]: the experts at the sources, -1 elsewhere."""
        held = np.full(self._placement, -1, np.int64)
        held[moves["source_rank"], moves["source_slot"]] = moves["expert"]
        return held.ravel()
