"""Planners come and go beside an engine that lives on, or engines beside a planner.

    python tests/planners/planner_cycles.py SESSION CYCLES stop|kill|engines

`stop` and `kill` end one planner after the other, `engines` one engine after the other. Prints what
the survivor holds before and after, and what is left in the end, in JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # who forks has no other threads
sys.path.append(str(Path(__file__).parents[1] / "ipc"))
import numpy as np
import uvloop
from fake_engine import FakeEngine
from forks import Engine, fork, holdings, kill, left_over

from flash_eplb.eplb.cli import compile_kernels
from flash_eplb.ipc.liveness import SegmentError
from flash_eplb.ipc.names import bell_name, rank_name
from flash_eplb.ipc.plan_queue import PlanQueue
from flash_eplb.ipc.rank_segment import RankSegment
from flash_eplb.ipc.round import decode_round
from flash_eplb.planners import planner as planner_module
from flash_eplb.planners.engine_loop import Pace
from flash_eplb.planners.flashlb import FlashLB
from flash_eplb.planners.planner import Planner

PACE = Pace(episode_steps=2, window_episodes=8, min_episodes=4, plan_interval=4, timeout_steps=1000)
LONGEST_LIFE = 0.08
PATIENCE = 30.0


class FreshRounds:
    """A plan queue as a loader reads it: rounds of a planner that is gone are dropped."""

    def __init__(self, plans: PlanQueue):
        self._plans = plans
        self._waiting: list[bytes] = []

    @property
    def generation(self) -> int:
        return self._plans.generation

    def has_record(self) -> bool:
        while self._plans.has_record():
            self._waiting.append(self._plans.get())
        generation = self.generation
        self._waiting = [r for r in self._waiting if decode_round(r).generation == generation]
        return bool(self._waiting)

    def get(self) -> bytes:
        return self._waiting.pop(0)


def unbalanced(placement: np.ndarray) -> np.ndarray:
    """A demand, int [layers, experts], for experts that rank 0 alone has."""
    demand = np.ones((len(placement), placement.max() + 1), np.int64)
    for layer, (first, *others) in enumerate(placement):
        demand[layer, np.setdiff1d(first, others)] = 100
    return demand


class Server:
    """An engine that lives on while planners come and go."""

    def __init__(self, session: str):
        self.session = session
        self.engine = FakeEngine(session)
        self.plans = [FreshRounds(rank.plans) for rank in self.engine.ranks]
        for rank, plans in zip(self.engine.ranks, self.plans, strict=True):
            rank.plans = plans

    def serve(self, seconds: float, done: Callable[[], bool] = lambda: False) -> None:
        """Make steps until they are `done`, at most for `seconds`."""
        demand = unbalanced(self.engine.placement)
        deadline = time.monotonic() + seconds
        while not done() and time.monotonic() < deadline:
            self.engine.step(demand)
            time.sleep(0.001)

    def is_planned_for(self) -> bool:
        return all(plans.generation > 0 for plans in self.plans)

    def see_planner(self, how: str) -> None:
        """Serve beside a planner until it is killed at any moment, or stopped while it works."""
        pid = fork(lambda: plan(self.session), seconds=60)
        if how == "stop":
            self.serve(PATIENCE, self.is_planned_for)
        self.serve(random.uniform(0, LONGEST_LIFE))
        if how == "kill":
            kill(pid)
            return
        os.kill(pid, signal.SIGTERM)
        assert os.waitpid(pid, 0)[1] == 0
        assert not self.is_planned_for()

    def see_last_planner(self) -> None:
        """It works as if it were the first."""
        pid = fork(lambda: plan(self.session), seconds=60)
        epoch = self.engine.epoch
        self.serve(PATIENCE, lambda: self.engine.epoch > epoch)
        assert self.engine.epoch > epoch
        os.kill(pid, signal.SIGTERM)
        assert os.waitpid(pid, 0)[1] == 0


def plan(session: str) -> None:
    """A planner that ends when it gets SIGTERM."""

    async def run() -> None:
        planner = Planner(session, FlashLB, PACE)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, planner.stop)
        await planner.run()

    uvloop.run(run())


def see_planners(session: str, cycles: int, how: str) -> dict[str, object]:
    server = Server(session)
    for _ in range(4):
        server.see_planner(how)
    before, epoch = holdings(), server.engine.epoch
    for _ in range(cycles):
        server.see_planner(how)
    after, rounds = holdings(), server.engine.epoch - epoch
    server.see_last_planner()
    left = left_over(session)
    assert left == [rank_name(session, 0), rank_name(session, 1), bell_name(session)], left
    server.engine.close()
    return {"before": before, "after": after, "left": left_over(session), "rounds": rounds}


async def see_engines(session: str, cycles: int) -> dict[str, object]:
    """The same with one planner, and engines of which every other one is killed."""
    planner_module._LOOK_FOR_ENGINE = planner_module._LOOK_AT_RANKS = 0.002
    planner = Planner(session, FlashLB, PACE)
    task = asyncio.create_task(planner.run())
    for number in range(4):
        await see_engine(session, number)
    before = holdings()
    for number in range(cycles):
        await see_engine(session, number)
    after = holdings()
    planner.stop()
    await task
    return {"before": before, "after": after, "left": left_over(session)}


async def see_engine(session: str, number: int) -> None:
    pid = fork(lambda: live(session, number + 1, number % 2 > 0))
    await until(lambda: has_planner(session), "planned for")
    os.kill(pid, signal.SIGTERM)
    os.waitpid(pid, 0)
    await until(lambda: len(left_over(session)) == 1, "removed")  # the planner's own name


def live(session: str, generation: int, closes: bool) -> None:
    """An engine that closes, or leaves all that it has, when it gets SIGTERM."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    engine = Engine(session, generation)
    signal.sigwait({signal.SIGTERM})
    if closes:
        engine.close()
    os.kill(os.getpid(), signal.SIGKILL)


def has_planner(session: str) -> bool:
    try:
        found = RankSegment.open(rank_name(session, 0))
    except SegmentError:
        return False
    with contextlib.closing(found):
        return found.plans.generation > 0


async def until(done: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < deadline, f"not {what}"
        await asyncio.sleep(0.001)


def main(session: str, cycles: int, how: str) -> None:
    compile_kernels()
    if how == "engines":
        found = uvloop.run(see_engines(session, cycles))
    else:
        found = see_planners(session, cycles, how)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
