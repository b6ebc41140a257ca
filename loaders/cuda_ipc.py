"""Experts pulled from the other ranks' memory: CUDA IPC between the processes of one host.

Each rank shares the memory of its live experts, and a destination copies from there into its
staging rows on its own side stream: over NVLink by the copy engines, without a kernel, without NCCL
and without work at the source.

Live weights are only read until a commit, and a commit follows only after all ranks have said that
they have staged; so a pull that has ended when `exchange` returns needs no other end, and nobody
waits for the readers. Its beginning does need a word from the source: what its last commit wrote
may still be on its way on its device. A source says so when its device has come past it.

After an abort a slow rank may still pull from slots that others write by then. What it gets it
throws away: its round is dropped and its rows are in quarantine until it is back.

The memory belongs to the rank that shared it and stays mapped here until our process ends. If its
owner dies meanwhile, what a copy from there gives is undefined by CUDA's own words, an error or any
bytes; such a round is never committed, for the dead rank does not vote, and vLLM ends an engine
that has lost a worker.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from .staging import Stack, first_tensor, slot_views
from .transport import Parcel, Transport, come_once, finish_stream, leave, wait_for

log = logging.getLogger("flash_eplb.loader")

_PREFIX = "flash_eplb/ipc"


class Memory(Protocol):
    """How the memory of a tensor reaches another process."""

    def share(self, storage: torch.UntypedStorage) -> bytes:
        """A handle by which processes of this host can open it."""
        ...

    def open(self, handle: bytes, device: torch.device) -> torch.Tensor:
        """All of its bytes: uint8 of one dimension, as memory of `device`."""
        ...


class CudaMemory:
    """CUDA's own handles, as torch makes them: **not run**.

    Memory of another device is opened as memory of the own one: addresses are unique, so that the
    copy finds it, peer access is enabled by opening, and no context is made on the other device.
    """

    def share(self, storage: torch.UntypedStorage) -> bytes:
        """See `Memory`; fails where the allocator's memory has no handle (expandable segments in
        some versions of torch, vLLM's sleep mode)."""
        return msgspec.msgpack.encode(storage._share_cuda_())  # type: ignore[attr-defined]

    def open(self, handle: bytes, device: torch.device) -> torch.Tensor:
        """See `Memory`; fails where the two devices have no peer access."""
        _, *rest = msgspec.msgpack.decode(handle)
        storage = torch.UntypedStorage._new_shared_cuda(device.index, *rest)  # type: ignore[attr-defined]
        return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


class _Place(NamedTuple):
    """Where one tensor's part of an expert lies in the memory that a rank shares."""

    storage: int
    offset: int
    size: int


class _Offer(msgspec.Struct):
    """What a rank tells the others: why it cannot share, or how to find its experts.

    `places`: [layers][slots][tensors].
    """

    error: str = ""
    handles: list[bytes] = []
    places: list[list[list[_Place]]] = []


_OFFER = msgspec.msgpack.Decoder(_Offer)  # see ipc/round.py


class CudaIpc:
    """See the module. Where a rank cannot share or open memory, `fallback` serves on all ranks.

    Args:
        weights: live experts, per layer tensors [slots, ...].
        store: shared by all ranks of the group; no other thread waits on it.
        rank, ranks: of the EP group, which lies on one host.
        timeout: seconds that a rank waits for another one.
        fallback: for groups that cannot.
        memory: how memory is shared.
    """

    def __init__(
        self,
        weights: list[list[Stack]],
        store: dist.Store,
        rank: int,
        ranks: int,
        timeout: float,
        fallback: Transport,
        memory: Memory | None = None,
    ):
        self._weights = weights
        self._everyone = store
        self._rank = rank
        self._ranks = ranks
        self._timeout = timeout
        self._fallback = fallback
        self._memory = memory or CudaMemory()
        self._device = first_tensor(weights).device
        self._offer: _Offer | None = None
        self._peers: dict[int, tuple[_Offer, list[torch.Tensor]]] = {}
        self._store: dist.Store | None = None
        self._epoch = -1
        self._exchanges = 0
        self._fell_back = False

    @property
    def name(self) -> str:
        """ "ipc", or the fallback's once it has taken over."""
        return self._fallback.name if self._fell_back else "ipc"

    def connect(self, epoch: int) -> None:
        """See `Transport`. Memory is shared and opened once; every epoch all ranks meet."""
        if self._everyone.check([f"{_PREFIX}/fallback"]):
            self._fell_back = True
        if self._fell_back:
            self._fallback.connect(epoch)
            return
        if epoch == self._epoch:
            return
        self._store, self._epoch, self._exchanges = None, -1, 0
        store: Any = dist.PrefixStore(f"{_PREFIX}/{epoch}", self._everyone)
        self._store = store
        come_once(store, self._rank)
        store.set(f"ready{self._rank}", "0")
        store.set(f"offer{self._rank}", msgspec.msgpack.encode(self._share()))
        self._meet("offer")
        store.set(f"opened{self._rank}", self._open_all())
        self._meet("opened")
        for rank in range(self._ranks):
            if error := store.get(f"opened{rank}").decode():
                self._fall_back(epoch, f"EP rank {rank}: {error}")
                return
        self._epoch = epoch

    def disconnect(self) -> None:
        """See `Transport`: the others wait for our word no longer."""
        if self._fell_back:
            self._fallback.disconnect()
        elif self._store is not None:
            leave(self._store, self._rank)
        self._store, self._epoch = None, -1

    def exchange(self, moves: np.ndarray, leaving: list[Parcel], arriving: list[Parcel]) -> None:
        """See `Transport`; returns when the copies have ended."""
        if self._fell_back:
            self._fallback.exchange(moves, leaving, arriving)
            return
        if not len(moves):
            return
        assert self._store is not None
        self._exchanges += 1
        if leaving:
            finish_stream(self._device)
            self._store.set(f"ready{self._rank}", str(self._exchanges))
        sources = sorted({parcel.peer for parcel in arriving})
        self._wait("say that its experts may be read", sources, self._is_ready)
        for parcel in arriving:
            slot = int(moves[parcel.number]["source_slot"])
            for target, source in zip(
                parcel.views, self._views(parcel.peer, parcel.layer, slot), strict=True
            ):
                target.copy_(source, non_blocking=True)
        finish_stream(self._device)

    def _share(self) -> _Offer:
        """Of this rank, made once: each sharing wraps the memory anew."""
        if self._offer is None:
            try:
                self._offer = self._make_offer()
            except Exception as error:  # whatever it is, the others must hear of it
                self._offer = _Offer(error=f"{type(error).__name__}: {error}")
        return self._offer

    def _make_offer(self) -> _Offer:
        numbers: dict[int, int] = {}
        offer = _Offer()
        for layer in self._weights:
            slots: list[list[_Place]] = []
            for slot in range(len(layer[0])):
                slots.append([])
                for view in slot_views(layer, slot):
                    storage = view.untyped_storage()
                    number = numbers.setdefault(storage.data_ptr(), len(numbers))
                    if number == len(offer.handles):
                        offer.handles.append(self._memory.share(storage))
                    slots[-1].append(_Place(number, int(view.storage_offset()), view.numel()))
            offer.places.append(slots)
        return offer

    def _open_all(self) -> str:
        """Open what the others offer; why that is not possible, or ""."""
        assert self._store is not None
        for rank in range(self._ranks):
            if rank == self._rank or rank in self._peers:
                continue
            offer = _OFFER.decode(self._store.get(f"offer{rank}"))
            if offer.error:
                return f"cannot open the memory of EP rank {rank} ({offer.error})"
            try:
                opened = [self._memory.open(handle, self._device) for handle in offer.handles]
            except Exception as error:
                what = f"{type(error).__name__}: {error}"
                return f"cannot open the memory of EP rank {rank} ({what})"
            self._peers[rank] = (offer, opened)
        return ""

    def _fall_back(self, epoch: int, reason: str) -> None:
        self._everyone.set(f"{_PREFIX}/fallback", reason)  # for stagers that come later
        self._fell_back, self._store = True, None
        self._peers.clear()
        if self._rank == 0:
            log.warning(
                "no CUDA IPC in this group (%s); experts travel by %s", reason, self._fallback.name
            )
        self._fallback.connect(epoch)

    def _views(self, rank: int, layer: int, slot: int) -> list[torch.Tensor]:
        """The bytes of an expert in a slot of another rank, in place."""
        offer, opened = self._peers[rank]
        return [
            opened[place.storage][place.offset : place.offset + place.size]
            for place in offer.places[layer][slot]
        ]

    def _is_ready(self, rank: int) -> bool:
        assert self._store is not None
        return int(self._store.get(f"ready{rank}")) >= self._exchanges

    def _meet(self, what: str) -> None:
        """Until all ranks have set `what`."""
        store: Any = self._store
        everyone = list(range(self._ranks))
        self._wait("come", everyone, lambda rank: store.check([f"{what}{rank}"]))

    def _wait(self, what: str, ranks: list[int], is_there: Callable[[int], bool]) -> None:
        assert self._store is not None
        wait_for(what, ranks, is_there, self._store, self._timeout)
