"""A process of a stress that runs some ranks of the engine, step by step.

Usage: python -m flash_eplb.eplb.stress.host SETUP HOST GENERATION
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from typing import Any

import numpy as np

from ...collectors.synthetic import Demand, Noise, draw, parts, spread
from ..config import load_config
from . import clock
from .figures import Order, Rank
from .scenario import scenario_of
from .setup import Setup, decoded

DRAWS = 4
"""Ranks of a process that draw anew in a step; the others send what they sent before."""

_BEHIND_NS = 1_000_000_000  # what is further behind than this is not made up for


class Host:
    """The ranks of one process, and the heat that they count."""

    def __init__(self, setup: Setup, host: int, generation: int):
        self._setup = setup
        self._config = load_config()
        self._figures = setup.figures()
        self._order = self._figures.order
        self._host = host
        self._numbers = list(setup.ranks_of(host))
        kind = _rank_class(setup.weights)
        self._ranks = [
            kind(setup, self._config, self._figures, rank, generation) for rank in self._numbers
        ]
        self._scenario = scenario_of(setup)
        self._noise = Noise(setup.seed * 1000 + host)
        self._at = 0
        self._tokens = [0] * len(self._ranks)
        self._turns = -(-len(self._ranks) // DRAWS)
        count, layers, ranks = len(self._ranks), setup.layers, setup.ranks
        self._counts = np.zeros((count, layers, setup.experts), np.int64)
        self._heat = np.zeros((count, layers, ranks * setup.slots), np.int32)
        self._loads = np.zeros((count, layers, ranks), np.int64)
        self._sent = np.zeros((layers, setup.experts), np.int64)
        self._arrived = np.zeros((layers, ranks), np.int64)
        self._shuffled = (0, np.zeros(0), np.zeros(0))
        self._epoch = -1
        self._step = 0
        self._ending = False

    def run(self) -> None:
        """Until the step that the supervisor names, or SIGTERM."""
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_ending", True))
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's
        try:
            for rank in self._numbers:
                self._figures.ranks[rank, Rank.PID] = os.getpid()
                self._figures.ranks[rank, Rank.READY] = 1
            while not self._order[Order.GO] and not self._ending:
                time.sleep(0.005)
            if self._ending:
                return
            for one in self._ranks:
                one.open()
            clock.inject(self._order)
            self._loop()
        finally:
            for one in self._ranks:
                with contextlib.suppress(AttributeError):  # it was never opened
                    one.close()

    def _loop(self) -> None:
        begin, counted = time.perf_counter_ns(), 0
        while not self._ending:
            end = self._order[Order.END_STEP]
            if end and self._step >= end:
                break
            self.step()
            counted += 1
            if not self._setup.rate:
                continue
            due = begin + int(counted * 1e9 / self._setup.rate)
            left = due - time.perf_counter_ns()
            for rank in self._numbers:
                self._figures.ranks[rank, Rank.BEHIND_NS] = max(0, -left)
            if left > 0:
                time.sleep(left * 1e-9)
            elif left < -_BEHIND_NS:
                begin, counted = time.perf_counter_ns(), 0

    def step(self) -> None:
        """One step of every rank."""
        self._step += 1
        demand = self._demand()
        is_moved = self._learn()
        for place in range(len(self._ranks)):
            is_drawn = (place + self._step) % self._turns == 0 or not self._tokens[place]
            if is_drawn:
                self._draw(place, demand)
            if is_drawn or is_moved:
                self._spread(place)
        self._figures.tokens[self._host] += self._sent
        self._figures.loads[self._host] += self._arrived
        for place, (number, rank) in enumerate(zip(self._numbers, self._ranks, strict=True)):
            self._sleep_if_slow(number)
            rank.step(self._heat[place], self._tokens[place], demand.flags)

    def _draw(self, place: int, demand: Demand) -> None:
        """Other tokens for a rank."""
        setup, noise, counts = self._setup, self._noise, self._counts[place]
        # Another number in each step, so that a record that mixes two does not add up.
        tokens = max(1, int(setup.tokens * demand.scale)) + (self._step * 13 + place) % 7
        self._tokens[place] = tokens
        self._sent -= counts
        first = self._at + 12345 * self._step % 4096
        total = tokens * setup.top_k
        self._at = int(draw(demand.share, total, noise.uniform, noise.normal, first, counts))
        self._sent += counts

    def _spread(self, place: int) -> None:
        """A rank's tokens to the slots that hold their experts."""
        heat, load = self._heat[place], self._loads[place]
        first = self._step * 7 + self._numbers[place]
        spread(self._counts[place], *self._parts, self._noise.uniform, first, heat)
        self._arrived -= load
        heat.reshape(*load.shape, -1).sum(2, out=load)
        self._arrived += load

    def _learn(self) -> bool:
        """Where the experts are; whether that has changed."""
        first = self._ranks[0]
        if first.epoch == self._epoch:
            return False
        self._epoch = first.epoch
        self._parts = parts(first.placement, first.columns, self._setup.experts)
        placed = getattr(self._scenario, "placed", None)
        if placed is not None:
            placed(self._epoch, first.placement)
        return True

    def _demand(self) -> Demand:
        """The scenario's, with other experts hot after each shuffle."""
        demand = self._scenario(self._step)
        number = int(self._order[Order.SHUFFLES])
        if not number:
            return demand
        if self._shuffled[0] != number or self._shuffled[1] is not demand.share:
            distance = number * (self._setup.experts // 3 + 1)
            rolled = np.roll(demand.share, distance, axis=1)
            self._shuffled = number, demand.share, rolled
        return demand._replace(share=self._shuffled[2])

    def _sleep_if_slow(self, rank: int) -> None:
        if self._order[Order.SLOW_RANK] == rank + 1:
            time.sleep(int(self._order[Order.SLOW_NS]) * 1e-9)


def _rank_class(weights: bool) -> Any:
    if weights:
        from .weighted import WeightedRank

        return WeightedRank
    from .rank import RowRank

    return RowRank


def end_with(parent: int) -> None:
    """End this process soon after its parent, who may be killed, has ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent").start()


def main() -> None:
    """See the module."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    setup, host, generation = decoded(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    end_with(os.getppid())
    Host(setup, host, generation).run()


if __name__ == "__main__":
    main()
