"""What a stager is asked and what it answers; without torch, which not every engine has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .patrol import Beat

if TYPE_CHECKING:
    import torch

    from .copies import Copies

Tables = Callable[[], "tuple[list[torch.Tensor], list[torch.Tensor]]"]


@dataclass(frozen=True)
class Errand:
    """A round, as the stager of one rank sees it.

    Attributes:
        identity: of the round; 0 only opens the connections.
        moves: `MOVE` records of all ranks.
        transport_epoch: whose connections to use.
        rows: staging rows to fill, one for each move that arrives here, in their order.
        tables: gives the engine's tables and their values after the round (`Engine.tables`).
        beat: instead of all that, a live expert to be looked at.
    """

    identity: int
    moves: np.ndarray
    transport_epoch: int
    rows: tuple[int, ...] = ()
    tables: Tables | None = None
    beat: Beat | None = None


@dataclass(frozen=True)
class Result:
    """How an errand ended.

    Attributes:
        identity: of the errand.
        error: empty if its rows are staged and proved.
        damaged: whether an expert had another digest than at the start.
        changed: whether that was so in the live weights themselves.
        received_bytes: from other ranks.
        failed_us: monotonic clock when it failed; 0 if it did not.
        staged_ns: monotonic clock when its rows were staged and proved; 0 if they are not.
        copies: what a commit copies: rows to slots, values to the engine's tables.
    """

    identity: int
    error: str = ""
    damaged: bool = False
    changed: bool = False
    failed_us: int = 0
    received_bytes: int = 0
    staged_ns: int = 0
    copies: Copies | None = None

    def commit(self) -> None:
        """Main thread, between two steps: write what was staged over what is live."""
        if self.copies is not None:
            self.copies.run()


def my_rows(moves: np.ndarray, rank: int) -> list[int]:
    """Indices of the moves that arrive on `rank`."""
    return np.flatnonzero(moves["rank"] == rank).tolist()
