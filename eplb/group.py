"""The EP group as an engine gives it to us, and what all its ranks do together."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from ..ipc.liveness import SegmentError

log = logging.getLogger("flash_eplb.worker")


class UnsupportedError(Exception):
    """This group cannot be balanced; the text names the reason. Equal on all ranks."""


@dataclass
class Group:
    """The EP group as an engine gives it to us.

    Attributes:
        rank, ranks: of this process in the group.
        cpu_group: process group of the EP ranks on the CPU, for the start and for updates.
        store: a store that all ranks share, for our own connections.
        counting: EP ranks whose heat adds up to the group's (`GroupShape.counting`).
        patience: seconds that the engine waits for a rank in a collective.
    """

    rank: int
    ranks: int
    cpu_group: dist.ProcessGroup
    store: dist.Store
    counting: tuple[int, ...]
    patience: float = 1800.0

    def gather(self, item: Any) -> list[Any]:
        """`item` of every rank, in the order of the ranks."""
        items: list[Any] = [None] * self.ranks
        dist.all_gather_object(items, item, group=self.cpu_group)
        return items

    def together(self, action: Callable[[], None]) -> None:
        """Run `action` on every rank; UnsupportedError everywhere if it fails on one.

        A rank that fails alone would leave the others waiting for its votes.
        """
        reason = ""
        try:
            action()
        except (SegmentError, UnsupportedError) as error:
            reason = str(error)
        except Exception as error:
            log.exception(
                "EP rank %d has failed, so all ranks give up what they were at", self.rank
            )
            reason = f"{type(error).__name__}: {error}"
        for rank, theirs in enumerate(self.gather(reason)):
            if theirs:
                raise UnsupportedError(f"EP rank {rank}: {theirs}")
