"""A real planner against a fake engine, in one process."""

import asyncio
import contextlib
import sys
import time
from pathlib import Path

import numpy as np
import uvloop

sys.path.insert(0, str(Path(__file__).parent))
from fake_engine import FakeEngine

from flash_eplb.planners.engine_loop import Pace
from flash_eplb.planners.flashlb import FlashLB
from flash_eplb.planners.planner import Planner

PACE = Pace(episode_steps=2, window_episodes=8, min_episodes=4, plan_interval=4, timeout_steps=1000)
SKEWED = np.array([[1, 1, 90, 80, 70, 1, 1, 1]] * 2)
OTHER = np.array([[80, 1, 1, 1, 1, 70, 90, 60]] * 2)


def run(scenario, timeout=90.0):
    async def guarded():
        await asyncio.wait_for(scenario, timeout)

    uvloop.run(guarded())


@contextlib.asynccontextmanager
async def planning(session, policy=FlashLB, pace=PACE, ranks_per_node=None):
    """A planner that serves until the block ends."""
    planner = Planner(session, policy, pace, ranks_per_node=ranks_per_node)
    task = asyncio.create_task(planner.run())
    yield
    planner.stop()
    await task


def rank_load(engine: FakeEngine, demand: np.ndarray) -> np.ndarray:
    load = np.zeros((engine.shape.layers, engine.shape.ranks))
    for layer, ranks in enumerate(engine.placement):
        counts = np.bincount(ranks.ravel(), minlength=engine.shape.experts)
        load[layer] = (demand[layer] / counts)[ranks].sum(axis=1)
    return load


async def until(engine, done, demand=SKEWED, seconds=60):
    deadline = time.monotonic() + seconds  # kernels may have to be compiled first
    while not done():
        assert time.monotonic() < deadline, f"not reached in {engine.steps} steps"
        engine.step(demand)
        await asyncio.sleep(0.002)
