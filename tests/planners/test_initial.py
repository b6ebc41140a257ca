import asyncio
import contextlib
import logging
from dataclasses import replace

import numpy as np
import pytest
from fake_engine import FakeEngine
from planner_runs import OTHER, PACE, SKEWED, run, until

from flash_eplb.planners.baselines import Static
from flash_eplb.planners.expert_map import ExpertMap, SavedPlacement, read_map
from flash_eplb.planners.flashlb import FlashLB
from flash_eplb.planners.guard import Guard
from flash_eplb.planners.planner import Planner
from flash_eplb.planners.recorder import recorder_of
from flash_eplb.planners.recording import Recording

# Rank 0 keeps experts 0 and 2 of its 0, 1, 2, 3, 4; rank 1 keeps 6 and 7 of 5, 6, 7, 0, 1.
WANTED = np.array([[[5, 0, 2, 7, 6], [1, 3, 4, 6, 7]]] * 2)
NAME = "EPLB_INITIAL_PLACEMENT=map.json"
NO_HEAT = replace(PACE, min_episodes=10**6)


@pytest.fixture
def roomy(session):
    """An engine that takes all moves in one round, and so refuses a plan as a whole."""
    made = FakeEngine(session, rows=10)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def listening(caplog):
    logging.getLogger("flash_eplb").propagate = True
    with caplog.at_level(logging.INFO, "flash_eplb.planner"):
        yield


@contextlib.asynccontextmanager
async def planning(session, placement=WANTED, policy=Static, pace=PACE, **options):
    planner = Planner(session, policy, pace, initial=ExpertMap("map.json", placement), **options)
    task = asyncio.create_task(planner.run())
    yield
    planner.stop()
    await task


def is_reached(engine, wanted=WANTED):
    return (np.sort(engine.placement) == np.sort(wanted)).all()


def said(caplog, level=logging.INFO):
    """What was logged of the initial placement, at one level."""
    records = [each for each in caplog.records if each.levelno == level]
    return [each.getMessage() for each in records if NAME in each.getMessage()]


def test_a_new_engine_is_brought_to_it_before_any_heat_is_planned_on(session, engine, caplog):
    before = engine.placement

    async def scenario():
        async with planning(session, pace=NO_HEAT):
            await until(engine, lambda: is_reached(engine))
            await until(engine, lambda: engine.steps >= 200)

    run(scenario())
    assert "no layer is worth a move" not in caplog.text  # it has not planned on too little heat
    stays = np.isin(before, WANTED[0, 0]) & (np.arange(2) == 0)[:, None]
    stays |= np.isin(before, WANTED[0, 1]) & (np.arange(2) == 1)[:, None]
    assert stays.any()
    assert (engine.placement[stays] == before[stays]).all()
    assert engine.columns is None  # uniform
    moves = int((engine.placement != before).sum())
    assert said(caplog) == [
        f"plan 1: 2 of 2 layers, {moves} moves in {engine.epoch} rounds; to {NAME}"
    ]


def test_then_the_policy_goes_on_and_static_stays(session, engine, caplog):
    async def scenario():
        async with planning(session):
            await until(engine, lambda: is_reached(engine))
            epoch = engine.epoch
            await until(engine, lambda: engine.steps >= 200)
            assert engine.epoch == epoch
            assert is_reached(engine)
        assert "no layer is worth a move" in caplog.text  # it has planned
        assert len(said(caplog)) == 1

    run(scenario())


def test_flashlb_plans_from_it(session, engine):
    async def scenario():
        async with planning(session, policy=FlashLB):
            await until(engine, lambda: is_reached(engine))
            epoch = engine.epoch
            await until(engine, lambda: engine.epoch > epoch, OTHER)

    run(scenario())


def test_a_planner_that_comes_later_does_not_do_it_again(session, engine, caplog):
    async def scenario():
        async with planning(session):
            await until(engine, lambda: is_reached(engine))
        engine.commit(np.ascontiguousarray(WANTED[:, ::-1]).astype(np.int32))
        epoch = engine.epoch
        caplog.clear()
        async with planning(session):
            await until(engine, lambda: "no layer is worth a move" in caplog.text)
        assert engine.epoch == epoch
        assert said(caplog) == [
            f"{NAME} is for the start of an engine; this one has committed {epoch} rounds already, "
            "so its experts stay where they are"
        ]

    run(scenario())


def test_the_next_engine_is_brought_to_it_too(session):
    async def scenario():
        async with planning(session):
            for _ in range(2):
                engine = FakeEngine(session)
                await until(engine, lambda e=engine: is_reached(e))
                engine.close()
                await asyncio.sleep(1.5)  # the planner sees that it is gone

    run(scenario())


@pytest.mark.parametrize(
    ("placement", "shape"),
    [
        (WANTED[:1], "1 layers, 8 experts on 2 ranks x 5 slots"),
        (WANTED[:, :, :4], "2 layers, 8 experts on 2 ranks x 4 slots"),
        (np.where(WANTED > 5, 5, WANTED), "2 layers, 6 experts on 2 ranks x 5 slots"),
        (WANTED.reshape(2, 5, 2), "2 layers, 8 experts on 5 ranks x 2 slots"),
    ],
)
def test_one_of_another_shape_is_refused_and_balancing_goes_on(
    session, engine, caplog, placement, shape
):
    async def scenario():
        async with planning(session, placement, FlashLB):
            await until(engine, lambda: engine.epoch >= 1)

    run(scenario())
    assert said(caplog) == []
    assert said(caplog, logging.ERROR) == [
        f"{NAME} is for {shape}, and this engine has 2 layers, 8 experts on 2 ranks x 5 slots; "
        "balancing goes on without it: plan a map of the engine's shape with `eplb plan`, or unset "
        "it"
    ]


def test_an_engine_that_is_there_already_is_left_alone(session, engine, caplog):
    async def scenario():
        async with planning(session, engine.placement[:, :, ::-1]):
            await until(engine, lambda: "no layer is worth a move" in caplog.text)

    run(scenario())
    assert engine.epoch == 0
    assert said(caplog) == [f"the experts are where {NAME} wants them"]


def test_what_was_given_up_is_tried_again(session, roomy, caplog):
    async def scenario():
        async with planning(session):
            roomy.refuse = True
            await until(roomy, lambda: "plan 1 given up" in caplog.text)
            steps = roomy.steps
            roomy.refuse = False
            await until(roomy, lambda: is_reached(roomy))
            assert roomy.steps - steps >= PACE.plan_interval * PACE.episode_steps - 2

    run(scenario())
    assert len(said(caplog)) == 2


def test_after_three_tries_balancing_goes_on_without_it(session, roomy, caplog):
    async def scenario():
        async with planning(session, policy=FlashLB):
            roomy.refuse = True
            await until(roomy, lambda: "plan 3 given up" in caplog.text)
            roomy.refuse = False
            await until(roomy, lambda: roomy.epoch >= 1)

    run(scenario())
    assert len(said(caplog)) == 3
    assert said(caplog, logging.ERROR) == [
        f"{NAME} was given up 3 times and is not tried again; balancing goes on from where the "
        "experts are"
    ]


def test_a_round_that_comes_late_is_planned_around(session, engine, monkeypatch):
    """A planner before had begun it; the epoch is no longer 0, and yet the map is reached."""
    reach, seen = Guard.reach, []
    moved = np.ascontiguousarray(engine.placement[:, ::-1])

    def slow(guard, wanted, placement, rows):
        seen.append(placement.copy())
        if len(seen) == 1:
            engine.commit(moved)
            engine.step(SKEWED)
            asyncio.run(asyncio.sleep(0.3))  # the loop learns of it while this plan is being made
        return reach(guard, wanted, placement, rows)

    monkeypatch.setattr(Guard, "reach", slow)

    async def scenario():
        async with planning(session):
            await until(engine, lambda: is_reached(engine))

    run(scenario())
    assert (seen[1] == moved).all()


def test_experts_come_from_the_node_first(session):
    engine = FakeEngine(session, ranks=4)
    before = engine.placement

    async def scenario():
        async with planning(session, before[:, ::-1], pace=NO_HEAT, ranks_per_node=2):
            await until(engine, lambda: engine.moves is not None and engine.epoch == 1)

    run(scenario())
    assert len(engine.moves) > 0
    for layer, expert, source, _, rank, _ in engine.moves.tolist():
        nodes = {r // 2 for r, held in enumerate(before[layer].tolist()) if expert in held}
        assert source // 2 == rank // 2 or rank // 2 not in nodes
    engine.close()


def test_it_is_recorded_as_any_plan(session, engine, tmp_path):
    made = recorder_of(str(tmp_path), 10, session, {})

    async def scenario():
        async with planning(session, pace=NO_HEAT, make_recorder=made):
            await until(engine, lambda: is_reached(engine))
            await until(engine, lambda: not engine.steps % 40)

    run(scenario())
    recording = Recording(tmp_path)
    (plan,) = recording.table("plans")
    assert (plan["plan"], plan["epoch"], plan["rounds"]) == (1, 0, engine.epoch)
    assert np.isnan(plan["par_before"])  # there was no heat to measure it on
    assert len(recording.table("plan_moves")) == plan["moves"]
    assert list(recording.table("outcomes")["committed"]) == [True]
    assert recording.header["row_bytes"] == [64, 64]
    placements = {epoch: placement for (_, epoch), placement in recording.placements().items()}
    assert (placements[engine.epoch] == engine.placement).all()


def test_the_placement_is_saved_after_each_plan(session, engine, tmp_path):
    path = tmp_path / "saved.json"

    async def scenario():
        saved = SavedPlacement(str(path))
        async with planning(session, policy=FlashLB, saved=saved):
            await until(engine, path.exists)
            assert is_reached(engine)
            assert (read_map(path).placement == engine.placement).all()
            await until(engine, lambda: not is_reached(engine), OTHER)
            await until(engine, lambda: not (read_map(path).placement == WANTED).all(), OTHER)
        assert (read_map(path).placement == engine.placement).all()
        assert [file.name for file in tmp_path.iterdir()] == ["saved.json"]

    run(scenario())


def test_a_placement_that_cannot_be_saved_is_complained_about_once(tmp_path, caplog):
    path = tmp_path / "absent" / "saved.json"
    saved = SavedPlacement(str(path))
    for _ in range(2):
        saved.save(WANTED)
    assert [each.getMessage() for each in caplog.records] == [
        f"EPLB_SAVE_PLACEMENT={path} cannot be written: No such file or directory; balancing goes "
        "on without it"
    ]
    path.parent.mkdir()
    saved.save(WANTED)
    assert (read_map(path).placement == WANTED).all()


def test_an_engine_whose_ranks_pick_replicas_gets_senders_as_columns(session):
    engine = FakeEngine(session, ranks=4, slots=3, own=True, by_source=True)
    try:

        async def scenario():
            async with planning(session, np.sort(engine.placement), FlashLB):
                await until(engine, lambda: engine.columns is not None)
            layer = int(engine.moves["layer"][0])
            replicas = np.bincount(engine.placement[layer].ravel())
            senders = np.bincount(engine.placement[layer].ravel(), engine.columns[0].ravel())
            assert set(senders[replicas > 1]) <= {4, *replicas[replicas > 1].tolist()}
            assert 4 in senders[replicas > 1]
            assert (senders[replicas == 1] == 1).all()

        run(scenario())
    finally:
        engine.close()


def test_a_plan_that_only_routes_anew_is_sent_committed_and_recorded(session, tmp_path, caplog):
    engine = FakeEngine(session, layers=1, experts=15, ranks=8, slots=2, own=True, by_source=True)
    demand = np.full((1, 15), 160)
    demand[0, :2] = 320, 240  # expert 0 is on the ranks of experts 1 and 14
    before = engine.placement.copy()
    made = recorder_of(str(tmp_path), 64, session, {})
    try:

        async def scenario():
            planner = Planner(session, FlashLB, PACE, make_recorder=made)
            task = asyncio.create_task(planner.run())
            await until(engine, lambda: engine.epoch, demand)
            await until(engine, lambda: "plan 1 committed" in caplog.text, demand)
            planner.stop()
            await task

        run(scenario())
        assert len(engine.moves) == 0
        assert (engine.placement == before).all()
        assert engine.columns[0, 0, 0] < 4 < engine.columns[0, 7, 1]
        assert "plan 1: 1 of 1 layers (1 of them only routed anew), 0 moves in 1 r" in caplog.text
    finally:
        engine.close()
    plans = Recording(tmp_path).table("plans")
    assert (plans["moves"].tolist(), plans["layers"].tolist()) == ([0], [1])
