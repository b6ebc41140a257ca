"""The two ends of a way to hand a record over, and a record's size.

A writer's `write(counts)` may be called again with the same array at once, so it copies. A reader's
`take()` gives int32[records, layers, columns] of its own, maybe no record, and waits if that is how
the peer is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np


@dataclass(frozen=True)
class Size:
    """A record's size, and the records that a ring or queue may hold."""

    label: str
    layers: int
    columns: int
    slots: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.layers, self.columns

    @property
    def nbytes(self) -> int:
        return 4 * self.layers * self.columns


class Writer:
    """What every writer has."""

    write: Callable[[np.ndarray], None]

    def handle(self) -> Any:
        """What the reader needs to attach; it can be pickled."""

    def ready(self) -> None:
        """Called when the reader has attached, while its `ready` runs."""

    def close(self) -> None: ...


class Reader:
    """What every reader has; `pause` is slept between two takes while the writer keeps a pace."""

    pause: ClassVar[float] = 0.0

    def ready(self) -> None: ...

    def take(self) -> np.ndarray:
        raise NotImplementedError

    def close(self) -> None: ...


def no_record(size: Size) -> np.ndarray:
    """What `take` gives where there is nothing to take."""
    return np.empty((0, *size.shape), np.int32)
