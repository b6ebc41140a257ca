"""Ways of handing a record to another process, by name."""

from __future__ import annotations

import itertools
import mmap
import os
import queue
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import posix_ipc

from flash_eplb.ipc.heat_ring import HeatRing

from .ipc_ends import Reader, Size, Writer, no_record
from .ipc_iceoryx2 import Iceoryx2Reader, Iceoryx2Writer

if TYPE_CHECKING:
    from .ipc_run import Run

OURS, MEMCPY = "heat ring (ours)", "memcpy"
MANAGER_ARRAY, MANAGER_TENSOR = "Manager dict, array", "Manager dict, tensor"
QUEUE, SHM_BROADCAST, ICEORYX2 = "multiprocessing Queue", "vLLM shm_broadcast", "iceoryx2"
WAIT = 0.02  # seconds for which a reader that blocks waits before it looks whether to stop
GIVE_UP = 20.0  # seconds after which a writer that blocks fails


class RingWriter(Writer):
    """Ours, and beside it, in the same memory, as many buffers that `copy` fills in turn."""

    def __init__(self, run: Run, size: Size):
        self._name = f"/{run.prefix}-ring"
        half = HeatRing.size(size.layers, size.columns, size.slots)
        body = _create(self._name, 2 * half)
        push = HeatRing(body[:half], size.layers, size.columns, size.slots).push
        self.write = lambda counts: push(1, 0, 4096, 4, 0, counts)
        stride = half // size.slots // 64 * 64
        starts = range(half, 2 * half - size.nbytes, stride)[: size.slots]
        buffers = [body[at : at + size.nbytes].view(np.int32).reshape(size.shape) for at in starts]
        turn = itertools.cycle(buffers)
        copyto = np.copyto
        self.copy = lambda counts: copyto(next(turn), counts)

    def handle(self) -> str:
        return self._name

    def close(self) -> None:
        posix_ipc.unlink_shared_memory(self._name)


class RingReader(Reader):
    pause = 0.0005

    def __init__(self, run: Run, size: Size, handle: str):
        shm = posix_ipc.SharedMemory(handle, read_only=True)
        mapping = mmap.mmap(shm.fd, shm.size, mmap.MAP_SHARED, mmap.PROT_READ)
        shm.close_fd()
        body = np.frombuffer(mapping, np.uint8)
        self._ring = HeatRing(body, size.layers, size.columns, size.slots)

    def take(self) -> np.ndarray:
        return self._ring.read().heat


class ManagerWriter(Writer):
    """Keeps the latest record only. vLLM-Ascend puts a new tensor in at each update."""

    def __init__(self, run: Run, size: Size, tensor: bool):
        self._dict = run.manager.dict()
        self.write = self._put_tensor if tensor else self._put_array

    def _put_array(self, counts: np.ndarray) -> None:
        self._dict["moe_load"] = counts

    def _put_tensor(self, counts: np.ndarray) -> None:
        from torch import from_numpy

        self._dict["moe_load"] = from_numpy(counts)

    def handle(self) -> Any:
        return self._dict


class ManagerReader(Reader):
    pause = 0.01

    def __init__(self, run: Run, size: Size, handle: Any):
        self._dict = handle
        self._none = no_record(size)

    def take(self) -> np.ndarray:
        record = self._dict.get("moe_load")
        return self._none if record is None else np.asarray(record)[None]


class QueueWriter(Writer):
    """`put` leaves the record to a thread, which pickles it later: it takes a copy."""

    def __init__(self, run: Run, size: Size):
        self._put = run.queue.put

    def write(self, counts: np.ndarray) -> None:
        self._put(counts.copy(), timeout=GIVE_UP)


class QueueReader(Reader):
    def __init__(self, run: Run, size: Size, handle: Any):
        self._get = run.queue.get
        self._none = no_record(size)

    def take(self) -> np.ndarray:
        try:
            return self._get(timeout=WAIT)[None]
        except queue.Empty:
            return self._none


class BroadcastWriter(Writer):
    """vLLM's MessageQueue with its own number of chunks; they are cut to the record."""

    def __init__(self, run: Run, size: Size):
        from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

        self._queue = MessageQueue(1, 1, max_chunk_bytes=size.nbytes + 4096)

    def write(self, counts: np.ndarray) -> None:
        self._queue.enqueue(counts, timeout=GIVE_UP)

    def handle(self) -> Any:
        return self._queue.export_handle()

    def ready(self) -> None:
        self._queue.wait_until_ready()

    def close(self) -> None:
        del self._queue  # unlinks


class BroadcastReader(Reader):
    def __init__(self, run: Run, size: Size, handle: Any):
        from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

        self._queue = MessageQueue.create_from_handle(handle, 0)
        self._none = no_record(size)

    def ready(self) -> None:
        self._queue.wait_until_ready()

    def take(self) -> np.ndarray:
        try:
            return self._queue.dequeue(timeout=WAIT)[None]
        except TimeoutError:
            return self._none

    def close(self) -> None:
        del self._queue


@dataclass(frozen=True)
class Kind:
    """A peer.

    Attributes:
        writer: makes the writer's end, from the run and the size.
        reader: makes the reader's end, from those and the writer's handle.
        overwrites: whether the writer goes on where the reader is slow, and records are lost.
        calls: of the writer's that are timed, as a share of the fast peers'.
        records: that the reader has to receive for a throughput, in the same way.
    """

    writer: Callable[[Run, Size], Writer]
    reader: Callable[[Run, Size, Any], Reader]
    overwrites: bool
    calls: float = 1.0
    records: float = 1.0


KINDS: dict[str, Kind] = {
    OURS: Kind(RingWriter, RingReader, True, 1.5, 4.0),
    ICEORYX2: Kind(Iceoryx2Writer, Iceoryx2Reader, True, 1.0, 2.0),
    SHM_BROADCAST: Kind(BroadcastWriter, BroadcastReader, False),
    QUEUE: Kind(QueueWriter, QueueReader, False),
    MANAGER_ARRAY: Kind(lambda r, s: ManagerWriter(r, s, False), ManagerReader, True, 0.15, 0.05),
    MANAGER_TENSOR: Kind(lambda r, s: ManagerWriter(r, s, True), ManagerReader, True, 0.05, 0.02),
}
PEERS = tuple(name for name in KINDS if name != OURS)


def _create(name: str, nbytes: int) -> np.ndarray:
    """New shared memory with its pages in place."""
    shm = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=nbytes)
    try:
        os.posix_fallocate(shm.fd, 0, nbytes)
        body = np.frombuffer(mmap.mmap(shm.fd, nbytes), np.uint8)
    except BaseException:
        shm.unlink()
        raise
    finally:
        shm.close_fd()
    body[:] = 0
    return body
