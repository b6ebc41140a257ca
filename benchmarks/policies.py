"""The policies under measurement, ours and the peers, behind one interface."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from flash_eplb.planners.deepseek import DeepSeek

from .peers import REFERENCE, SWIFT, VLLM, PeerError, Policy, peers

EFFORTS = ("fast", "balanced", "thorough")
GREEDY = "DeepSeek greedy, ours"
RANKS_PER_NODE = 8
NAMES = (*EFFORTS, REFERENCE, SWIFT, VLLM, GREEDY)


@dataclass(frozen=True)
class Entry:
    """A policy by name.

    Attributes:
        name: as printed.
        fresh: `fresh(ranks, slots)` gives a new object that plans every layer.
        lasting: the same for an object that lives over many windows and picks its layers by
            itself; None for a policy that keeps no memory.
    """

    name: str
    fresh: Callable[[int, int], Policy]
    lasting: Callable[[int, int], Policy] | None = None


class Ours:
    """One of our policies; `plan` gives the placement, and `last` holds the whole plan."""

    def __init__(self, policy: Any, **options: Any) -> None:
        self._policy, self._options = policy, options
        self.seconds = 0.0
        self.last: Any = None

    def plan(self, heat: np.ndarray, placement: np.ndarray) -> np.ndarray:
        start = time.perf_counter()
        self.last = self._policy.plan(heat, placement, **self._options)
        self.seconds = time.perf_counter() - start
        return self.last.placement


def flash_lb(ranks: int, slots: int, effort: str, **options: Any) -> Any:
    """A fresh FlashLB on one thread."""
    from flash_eplb import FlashLB

    return FlashLB(ranks, slots, RANKS_PER_NODE, effort=effort, threads=1, **options)


def entries() -> tuple[list[Entry], list[str]]:
    """The policies that can run here, ours first, and why the others cannot."""
    found = [_effort(effort) for effort in EFFORTS]
    missing = []
    try:
        for name, make in peers().items():
            fresh = partial(_peer, make)
            found.append(Entry(name, fresh, fresh if name == REFERENCE else None))
    except PeerError as error:
        missing.append(str(error))
    found.append(Entry(GREEDY, lambda ranks, slots: Ours(DeepSeek(ranks, slots))))
    return found, missing


def _peer(make: Callable[[int, int, int], Policy], ranks: int, slots: int) -> Policy:
    return make(ranks, slots, RANKS_PER_NODE)


def _effort(effort: str) -> Entry:
    return Entry(
        effort,
        lambda ranks, slots: Ours(flash_lb(ranks, slots, effort), every_layer=True),
        lambda ranks, slots: Ours(flash_lb(ranks, slots, effort)),
    )
