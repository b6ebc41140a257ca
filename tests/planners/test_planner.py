import asyncio
import logging
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_engine import FakeEngine
from planner_runs import OTHER, PACE, SKEWED, planning, rank_load, run, until

from flash_eplb.ipc.flags import FLAG_DECODE, FLAG_DUMMY, FLAG_PREFILL
from flash_eplb.ipc.liveness import SegmentInUseError, owner_is_alive
from flash_eplb.ipc.names import planner_name
from flash_eplb.ipc.session import segment_names
from flash_eplb.planners.flashlb import FlashLB
from flash_eplb.planners.planner import Planner


def test_it_balances_an_engine_and_stops_when_told(session, engine):
    async def scenario():
        async with planning(session):
            before = rank_load(engine, SKEWED)
            await until(engine, lambda: engine.epoch >= 1)
            await until(engine, lambda: not engine.steps % 40)
            after = rank_load(engine, SKEWED)
            assert (after.max(axis=1) < before.max(axis=1)).all()

    run(scenario())
    assert not owner_is_alive(planner_name(session))
    assert all(rank.plans.generation == 0 for rank in engine.ranks)


def test_an_engine_whose_ranks_count_their_own_slots_is_balanced_too(session):
    engine = FakeEngine(session, own=True)

    async def scenario():
        async with planning(session):
            before = rank_load(engine, SKEWED)
            await until(engine, lambda: engine.epoch >= 1)
            await until(engine, lambda: not engine.steps % 40)
            assert (rank_load(engine, SKEWED).max(axis=1) < before.max(axis=1)).all()

    run(scenario())
    engine.close()


def test_planned_routing_weights_are_sent_with_the_moves(session, engine):
    def weighted(ranks, slots):
        return FlashLB(ranks, slots, routing="weighted")

    async def scenario():
        async with planning(session, weighted):
            await until(engine, lambda: engine.columns is not None)

    run(scenario())
    assert engine.columns.max() > 1


class Mirror:
    """A policy that knows of no nodes: the experts of the first rank go to the last, and so on."""

    def __init__(self, ranks, slots):
        pass

    def plan(self, heat, placement):
        return placement[:, ::-1]


def test_experts_come_from_the_node_whatever_the_policy_knows_of_it(session):
    engine = FakeEngine(session, ranks=4)
    before = engine.placement

    async def scenario():
        async with planning(session, Mirror, ranks_per_node=2):
            await until(engine, lambda: engine.moves is not None and engine.epoch == 1)

    run(scenario())
    assert len(engine.moves) > 0
    for layer, expert, source, _, rank, _ in engine.moves.tolist():
        nodes = {r // 2 for r, held in enumerate(before[layer].tolist()) if expert in held}
        assert source // 2 == rank // 2 or rank // 2 not in nodes
    engine.close()


@pytest.mark.parametrize(("near", "last"), [(None, None), (1, None), (2, 1), (3, None), (8, None)])
def test_nodes_that_do_not_divide_the_ranks_are_said_once(session, caplog, near, last):
    engine = FakeEngine(session, ranks=3)

    async def scenario():
        async with planning(session, ranks_per_node=near):
            await until(engine, lambda: engine.epoch >= 1)

    with caplog.at_level(logging.WARNING, "flash_eplb.planner"):
        run(scenario())
    engine.close()
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"EPLB_RANKS_PER_NODE={near} does not divide the engine's 3 ranks, so the last node is "
        f"taken to have {last}; unless it has, set the ranks that each node has, or 0 if all "
        "ranks share one"
    ] * (last is not None)


def test_only_the_phase_that_was_asked_for_counts(session, engine, caplog):
    async def scenario():
        async with planning(session, pace=replace(PACE, heat_phase="decode")):
            engine.flags = FLAG_PREFILL
            await until(engine, lambda: engine.steps >= 200)
            assert engine.epoch == 0
            engine.flags = FLAG_DECODE
            await until(engine, lambda: engine.epoch >= 1)

    with caplog.at_level(logging.WARNING, "flash_eplb.planner"):
        run(scenario())
    assert not caplog.text


@pytest.mark.parametrize("idle", [False, True])
def test_a_phase_that_the_engine_does_not_tell_is_complained_about_once(session, caplog, idle):
    engine = FakeEngine(session, counting=(0, 1))
    if idle:  # rank 1 has no requests of its own
        push = engine.ranks[1].heat.push
        engine.ranks[1].heat.push = lambda step, time, tokens, flags, epoch, counts: push(
            step, time, 0, FLAG_DUMMY, epoch, 0 * counts
        )

    async def scenario():
        async with planning(session, pace=replace(PACE, heat_phase="prefill")):
            await until(engine, lambda: engine.steps >= 200)

    with caplog.at_level(logging.WARNING, "flash_eplb.planner"):
        run(scenario())
    assert engine.epoch == 0
    engine.close()
    assert caplog.text.count("EPLB_HEAT_PHASE=prefill such steps do not count") == 1


def test_a_successor_resumes_from_the_boards(session, engine, caplog):
    async def scenario():
        async with planning(session):
            await until(engine, lambda: engine.epoch >= 1)
        epoch = engine.epoch
        with caplog.at_level(logging.INFO, "flash_eplb.planner"):
            async with planning(session):
                await until(engine, lambda: engine.epoch > epoch, OTHER)
        assert f"resuming from epoch {epoch}" in caplog.text

    logging.getLogger("flash_eplb").propagate = True
    run(scenario())


def test_a_round_of_the_planner_before_that_comes_late_is_learned(session, engine):
    async def scenario():
        async with planning(session):
            engine.step(SKEWED)
            await asyncio.sleep(0.5)  # it has read the boards
            engine.commit(np.ascontiguousarray(engine.placement[:, ::-1]))
            await until(engine, lambda: engine.epoch >= 2)

    run(scenario())


def test_a_plan_from_a_placement_that_is_gone_is_made_anew(session, engine):
    swapped = np.ascontiguousarray(engine.placement[:, ::-1])
    seen = []

    class Slow(FlashLB):
        def plan(self, heat, placement, **options):
            seen.append(placement.copy())
            if len(seen) == 1:
                engine.commit(swapped)
                engine.step(SKEWED)
                time.sleep(0.3)  # the loop learns of it while this plan is being made
            return super().plan(heat, placement, **options)

    async def scenario():
        async with planning(session, Slow):
            await until(engine, lambda: engine.epoch >= 2)

    run(scenario())
    assert (seen[1] == swapped).all()


def test_a_second_planner_is_refused(session, engine):
    async def scenario():
        async with planning(session):
            await until(engine, lambda: engine.epoch >= 1)
            with pytest.raises(SegmentInUseError, match="belongs to the living process"):
                await Planner(session, FlashLB, PACE).run()

    run(scenario())


def test_it_leaves_with_the_engine_and_cleans_up_after_it(session):
    engine = FakeEngine(session)

    async def scenario():
        planner = Planner(session, FlashLB, PACE, exit_with_engine=True)
        task = asyncio.create_task(planner.run())
        await until(engine, lambda: engine.epoch >= 1)
        engine.close()
        await task

    run(scenario())
    assert segment_names(session) == []


def test_stationary_heat_gets_one_plan(session, engine, caplog):
    async def scenario():
        async with planning(session):
            await until(engine, lambda: engine.epoch >= 1)
            await until(engine, lambda: engine.steps >= 400)

    with caplog.at_level(logging.INFO, "flash_eplb.planner"):
        run(scenario())
    assert caplog.text.count("moves in") == 1
    assert "no layer is worth a move (" in caplog.text
