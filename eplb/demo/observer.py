"""An observer of a running engine: follows the heat rings, as anyone may, and measures PAR."""

from __future__ import annotations

import threading
import time

import numpy as np

from ...ipc.liveness import SegmentError
from ...ipc.status import Field
from ...planners.episodes import rank_tokens
from ...planners.group import Group

_EPISODE = 16


class Observer:
    """Reads the heat of `session` in a thread from the first step on, until `close`."""

    def __init__(self, session: str):
        self._session = session
        self._loads: list[tuple[int, np.ndarray]] = []
        self.group: Group | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self._done.is_set():
            if self.group is None:
                try:
                    self.group = Group.attach(self._session)
                except SegmentError:
                    time.sleep(0.1)
                    continue
            ranks = self.group.shape.ranks
            for step in self.group.read_heat():
                load = rank_tokens(step.heat, ranks)
                self._loads.append((step.step, load))
            time.sleep(0.05)

    @property
    def steps(self) -> int:
        """Steps seen so far."""
        return len(self._loads)

    def total(self, field: Field) -> int:
        """A status field, summed over the ranks; 0 before there is an engine."""
        return sum(rank.status[field] for rank in self.group.ranks) if self.group else 0

    def commits(self) -> int:
        """Rounds that all ranks have committed."""
        return self.group.ranks[0].status[Field.COMMITTED] if self.group else 0

    def par(self, first: int, last: int) -> float:
        """PAR of the steps [first, last) as seen: max over mean of the ranks' tokens, per layer
        and episode of 16 steps, then averaged."""
        loads = np.array([load for _, load in self._loads[first:last]], dtype=float)
        episodes = len(loads) // _EPISODE
        if not episodes:
            return float("nan")
        summed = loads[: episodes * _EPISODE].reshape(episodes, _EPISODE, *loads.shape[1:]).sum(1)
        return float((summed.max(axis=2) / summed.mean(axis=2)).mean())

    def timings(self) -> np.ndarray:
        """int64 [steps, 2] of EP rank 0: ns in our step, ns between two steps."""
        assert self.group is not None
        return self.group.ranks[0].timings.read()

    def close(self) -> None:
        """End the thread and unmap."""
        self._done.set()
        self._thread.join()
        if self.group is not None:
            self.group.close()
