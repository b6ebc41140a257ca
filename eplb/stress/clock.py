"""The injected clock: what our modules get from `time` in the processes of a stress."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from .figures import Order


def inject(order: np.ndarray) -> None:
    """Let every clock of this process be off by what `Order.JUMP_NS` says, from now on.

    Python's own modules took their clock when they were imported, and uvloop asks the kernel: they
    are not touched, as they would not be by a clock that jumps within a step.
    """

    def seconds(clock: Callable[[], float]) -> Callable[[], float]:
        return lambda: clock() + order[Order.JUMP_NS] * 1e-9

    def nanoseconds(clock: Callable[[], int]) -> Callable[[], int]:
        return lambda: clock() + int(order[Order.JUMP_NS])

    time.monotonic = seconds(time.monotonic)
    time.time = seconds(time.time)
    time.monotonic_ns = nanoseconds(time.monotonic_ns)
    time.time_ns = nanoseconds(time.time_ns)
