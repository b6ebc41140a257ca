"""Transport: experts from rank to rank over torch.distributed's point-to-point calls (gloo).

The group is our own, built on a prefix of the engine's store that is used once. After a round that
failed a receive may still be under way, so the group is dropped and the next one gets a new prefix.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class Transport:
    """Point-to-point messages within an EP group; used by one thread only.

    Args:
        store: shared by all ranks of the group; no other thread waits on it.
        rank, ranks: of the EP group.
        timeout: seconds that a transfer may take before it fails.
    """

    def __init__(self, store: dist.Store, rank: int, ranks: int, timeout: float):
        self._store = store
        self._rank = rank
        self._ranks = ranks
        self._timeout = timedelta(seconds=timeout)
        self._group: Any = None
        self._epoch = -1
        self._pending: list[dist.Work] = []

    def connect(self, epoch: int) -> None:
        """Open connections between all ranks for transport epoch `epoch`; all ranks call it.

        Raises:
            RuntimeError: a rank did not come within the timeout.
        """
        if epoch == self._epoch:
            return
        self.disconnect()
        store = dist.PrefixStore(f"flash_eplb/transport/{epoch}", self._store)
        group: Any = dist.ProcessGroupGloo(store, self._rank, self._ranks, self._timeout)
        group.barrier().wait()
        self._group, self._epoch = group, epoch

    def disconnect(self) -> None:
        """Close the connections; what the other ranks still wait for fails there at once."""
        self._group, self._epoch = None, -1
        self._pending = []

    def send(self, views: list[torch.Tensor], rank: int, tag: int) -> None:
        """Begin to send `views` to `rank`; they must not change until `wait` is back."""
        assert self._group is not None
        for offset, view in enumerate(views):
            self._pending.append(self._group.send([view], rank, tag + offset))

    def receive(self, views: list[torch.Tensor], rank: int, tag: int) -> None:
        """Begin to receive into `views` from `rank`."""
        assert self._group is not None
        for offset, view in enumerate(views):
            self._pending.append(self._group.recv([view], rank, tag + offset))

    def wait(self) -> None:
        """Wait until all that was begun has ended, so that no late receive writes into a row.

        Raises:
            RuntimeError: a transfer failed or timed out; the group is of no more use.
        """
        pending, self._pending = self._pending, []
        failure: RuntimeError | None = None
        for work in pending:
            try:
                work.wait()
            except RuntimeError as error:
                failure = failure or error
        if failure is not None:
            raise failure
