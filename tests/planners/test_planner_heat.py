"""What the planner says of heat that it does not get."""

import asyncio
import logging
import re
import sys
import tracemalloc
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_engine import FakeEngine
from planner_runs import PACE, SKEWED, planning, run, until

from flash_eplb.ipc.flags import FLAG_DECODE, FLAG_DUMMY, FLAG_PREFILL
from flash_eplb.planners import heat_watch
from flash_eplb.planners.group import Group


def test_records_that_were_overwritten_are_counted_on_each_rank(session, caplog):
    engine = FakeEngine(session, ranks=4, counting=(0, 1, 2, 3), ring=8)

    async def scenario():
        async with planning(session):
            await until(engine, lambda: engine.epoch >= 1)
            await asyncio.sleep(0.2)  # it has read all of them
            caplog.clear()
            for _ in range(18):
                engine.step(SKEWED)
            while not caplog.messages:
                await asyncio.sleep(0.01)

    with caplog.at_level(logging.WARNING, "flash_eplb.planner"):
        run(scenario(), timeout=30.0)
    engine.close()
    assert caplog.messages == [
        "40 records of heat, one for each step of a rank, were overwritten before they were read; "
        "raise EPLB_RING_STEPS"
    ]


def test_records_that_are_overwritten_for_long_are_spoken_of_once_a_minute(session, caplog):
    engine = FakeEngine(session, ring=8)

    async def scenario():
        async with planning(session, pace=replace(PACE, episode_steps=1, window_episodes=2)):
            await until(engine, lambda: engine.epoch >= 1)
            for _ in range(50):
                for _ in range(18):
                    engine.step(SKEWED)
                await asyncio.sleep(0.01)

    with caplog.at_level(logging.WARNING, "flash_eplb.planner"):
        run(scenario())
    engine.close()
    assert len([text for text in caplog.messages if "overwritten" in text]) == 1


@pytest.mark.parametrize(
    ("silent", "why"),
    [
        (
            None,
            r"in 1\d\d steps that had tokens the engine has counted none for any expert: do its",
        ),
        (0, r"EP rank 0 has recorded no heat for 1\d\d steps of the other ranks; see its log"),
        (1, r"EP rank 1 has recorded no heat for 1\d\d steps of the other ranks; see its log"),
    ],
)
def test_an_engine_that_runs_and_gives_no_heat_is_complained_about_once(
    session, caplog, monkeypatch, silent, why
):
    monkeypatch.setattr(heat_watch, "_HEATLESS_STEPS", 100)
    engine = FakeEngine(session, counting=(0, 1))

    async def scenario():
        async with planning(session):
            with pytest.MonkeyPatch.context() as patch:
                if silent is not None:
                    patch.setattr(engine.ranks[silent].heat, "push", lambda *_: None)
                demand = SKEWED * (silent is not None)
                await until(engine, lambda: engine.steps >= 400, demand)
            await until(engine, lambda: engine.epoch >= 1)

    with caplog.at_level(logging.WARNING, "flash_eplb.planner"):
        run(scenario())
    engine.close()
    (said,) = caplog.messages
    assert re.match(f"nothing is planned: {why}", said)


def test_dummy_steps_are_no_reason_to_complain(session, engine, caplog, monkeypatch):
    monkeypatch.setattr(heat_watch, "_HEATLESS_STEPS", 100)
    engine.flags = FLAG_DUMMY

    async def scenario():
        async with planning(session):
            await until(engine, lambda: engine.steps >= 400, 0 * SKEWED)

    with caplog.at_level(logging.WARNING, "flash_eplb.planner"):
        run(scenario())
    assert not caplog.messages


def test_an_engine_without_a_step_of_the_phase_is_complained_about_once(
    session, engine, caplog, monkeypatch
):
    """As where prefill and decode have engines of their own."""
    monkeypatch.setattr(heat_watch, "_HEATLESS_STEPS", 100)
    engine.flags = FLAG_DECODE

    async def scenario():
        async with planning(session, pace=replace(PACE, heat_phase="prefill")):
            await until(engine, lambda: engine.steps >= 400)
            engine.flags = FLAG_PREFILL
            await until(engine, lambda: engine.epoch >= 1)
            engine.flags = FLAG_DECODE  # for long, now and then
            steps = engine.steps
            await until(engine, lambda: engine.steps >= steps + 300)

    with caplog.at_level(logging.WARNING, "flash_eplb.planner"):
        run(scenario())
    (said,) = caplog.messages
    assert re.match(
        r"nothing is planned: none of the engine's 1\d\d steps counts for EPLB_HEAT_PHASE=prefill; "
        r"unset it to count all$",
        said,
    )


def test_ranks_whose_records_never_fit_together_are_complained_about_once(
    session, caplog, monkeypatch
):
    """A device that is further behind its host than the ring holds sums up what others lack."""
    monkeypatch.setattr(heat_watch, "_HEATLESS_STEPS", 100)
    engine = FakeEngine(session, counting=(0, 1), ring=8)
    push = engine.ranks[1].heat.push

    def late(step, *fields):
        if not step % 12:
            push(step, *fields, 12)

    async def scenario():
        async with planning(session):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(engine.ranks[1].heat, "push", late)
                await until(engine, lambda: engine.steps >= 400)
            await until(engine, lambda: engine.epoch >= 1)

    with caplog.at_level(logging.WARNING, "flash_eplb.planner"):
        run(scenario())
    engine.close()
    (said,) = [text for text in caplog.messages if "overwritten before" not in text]
    assert re.match(
        r"nothing is planned: the ranks' records of the last 1\d\d steps do not fit together ",
        said,
    )


def test_ranks_whose_boards_differ_are_complained_about_once(session, engine, caplog, monkeypatch):
    monkeypatch.setattr(heat_watch, "_HEATLESS_STEPS", 100)
    engine.ranks[1].board.write(0, engine.placement[:, ::-1])

    async def scenario():
        async with planning(session):
            await until(engine, lambda: engine.steps >= 400)
            engine.ranks[1].board.write(0, engine.placement)
            await until(engine, lambda: engine.epoch >= 1)

    with caplog.at_level(logging.WARNING, "flash_eplb.planner"):
        run(scenario())
    (said,) = caplog.messages
    assert re.match(
        r"nothing is planned: where the experts were in the last 1\d\d steps is unknown: the "
        r"ranks' placement boards differ, .*; restart the engine$",
        said,
    )


def test_full_rings_are_not_held_in_memory_at_once(session):
    engine = FakeEngine(session, layers=16, ranks=4, counting=(0, 1, 2, 3), ring=1024)
    for _ in range(1024):
        engine.step(np.tile(SKEWED, (8, 1)))
    group = Group.attach(session)
    record = group.ranks[0].heat.read(1).heat.nbytes
    group.ranks[0].heat.follow()
    tracemalloc.start()
    steps = sum(1 for _ in group.read_heat())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    group.close()
    engine.close()
    assert steps == 1024
    assert peak < 4 * 1024 * record / 3


def test_an_engine_that_is_faster_than_it_is_read_lets_the_planner_go_on(session, monkeypatch):
    engine = FakeEngine(session, counting=(0, 1), ring=64)
    group = Group.attach(session)
    read = group.ranks[0].heat.read

    def read_late():
        engine.step(SKEWED)
        return read()

    monkeypatch.setattr(group.ranks[0].heat, "read", read_late)
    seen = [step.step for step in islice(group.read_heat(), 1000)]
    seen += [step.step for step in islice(group.read_heat(), 1000)]
    group.close()
    engine.close()
    assert len(seen) == 128
    assert seen == list(range(seen[0], seen[0] + 128))
    assert not group.lost
