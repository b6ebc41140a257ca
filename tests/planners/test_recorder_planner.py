import asyncio
import logging
import threading
import time

import numpy as np
import pytest
from fake_engine import FakeEngine
from planner_runs import PACE, SKEWED, run, until
from recordings import stopped

from flash_eplb.planners import recorder
from flash_eplb.planners.flashlb import FlashLB
from flash_eplb.planners.follower import Follower
from flash_eplb.planners.group import Group
from flash_eplb.planners.planner import Planner
from flash_eplb.planners.recorder import NoRecorder, recorder_of
from flash_eplb.planners.recording import Recording


def test_a_planner_records_its_heat_and_what_it_does(session, tmp_path):
    engine = FakeEngine(session)
    before = engine.placement
    made = recorder_of(str(tmp_path), 10, session, {"policy": "flashlb"})

    async def scenario():
        planner = Planner(session, FlashLB, PACE, exit_with_engine=True, make_recorder=made)
        task = asyncio.create_task(planner.run())
        await until(engine, lambda: engine.epoch >= 1)
        await until(engine, lambda: not engine.steps % 40)
        planner.stop()
        await task

    run(scenario())
    recording = Recording(tmp_path)
    assert recording.header["session"] == session
    assert recording.header["settings"] == {"policy": "flashlb"}
    assert recording.header["models"] == ["fake"]
    steps = list(recording.steps())
    assert [one.step for one in steps] == list(range(steps[0].step, steps[0].step + len(steps)))
    assert {one.tokens for one in steps} == {8}
    placements = {epoch: placement for (_, epoch), placement in recording.placements().items()}
    assert (placements[0] == before).all()
    assert (placements[engine.epoch] == engine.placement).all()
    (plan,) = recording.table("plans")[:1]
    assert plan["epoch"] == 0
    assert plan["seconds"] > 0
    assert plan["par_after"] < plan["par_before"]
    (outcome,) = recording.table("outcomes")[:1]
    assert outcome["committed"]
    assert outcome["plan"] == plan["plan"]
    transfers = recording.table("transfers")
    first = transfers[transfers["plan"] == plan["plan"]]
    assert first["rank"].tolist() == [0, 1] * plan["rounds"]
    assert first["sequence"].tolist() == [n for n in range(1, plan["rounds"] + 1) for _ in range(2)]
    assert first["rows"].sum() == plan["moves"]
    assert first["committed"].all()
    assert (first["end_ns"] < outcome["time_ns"]).all()
    assert (first["start_ns"] > plan["sent_ns"]).all()
    counted = next(iter(recording.counts())).heat
    replicas = [np.bincount(layer.ravel(), minlength=8) for layer in before]
    assert (abs(counted - SKEWED) < np.array(replicas)).all()
    engine.close()


async def until_a_plan(engine, session, made):
    """A planner with the recorder of `made`, until its first plan is committed."""
    planner = Planner(session, FlashLB, PACE, make_recorder=made)
    task = asyncio.create_task(planner.run())
    await until(engine, lambda: engine.epoch >= 1)
    planner.stop()
    await task


def test_planning_goes_on_without_a_place_to_record(session, tmp_path, caplog):
    engine = FakeEngine(session)
    (tmp_path / "file").write_text("")
    made = recorder_of(str(tmp_path / "file" / "folder"), 10, session, {})

    with caplog.at_level(logging.ERROR, "flash_eplb.planner"):
        run(until_a_plan(engine, session, made))
    assert "Not a directory" in stopped(caplog)
    engine.close()


def test_planning_goes_on_where_no_thread_can_be_started_to_record(session, tmp_path, caplog):
    engine = FakeEngine(session)
    made = recorder_of(str(tmp_path), 10, session, {})
    start = threading.Thread.start

    def refuse(thread):
        if thread.name == "eplb-record":
            raise RuntimeError("can't start new thread")
        start(thread)

    with (
        caplog.at_level(logging.ERROR, "flash_eplb.planner"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(threading.Thread, "start", refuse)
        run(until_a_plan(engine, session, made))
    assert "can't start new thread" in stopped(caplog)
    engine.close()


def test_nothing_is_recorded_unless_it_is_asked_for():
    assert type(recorder_of("", 10, "s", {})(None)) is NoRecorder


def test_full_rings_that_are_read_at_once_are_recorded_whole(
    session, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(recorder, "CHUNK_STEPS", 10)
    write = recorder.write_chunk

    def slow(path, arrays):
        time.sleep(0.02)
        write(path, arrays)

    monkeypatch.setattr(recorder, "write_chunk", slow)
    engine = FakeEngine(session, ring=128)
    for _ in range(128):
        engine.step(SKEWED)
    group = Group.attach(session, writable=False)
    made = recorder_of(str(tmp_path), 1, session, {})(group.shape)
    Follower(group, made).look()
    made.close()
    group.close()
    engine.close()
    assert len(list(Recording(tmp_path).steps())) == 128
    assert not caplog.records


class Turned:
    """Wants the experts of each two ranks exchanged."""

    def __init__(self, ranks, slots):
        pass

    def plan(self, heat, placement):
        return placement[:, ::-1]


def test_each_placement_of_a_plan_of_many_rounds_is_recorded_once(session, tmp_path, monkeypatch):
    monkeypatch.setattr("flash_eplb.planners.recorder.CHUNK_STEPS", 40)
    engine = FakeEngine(session, layers=100, rows=1)
    made = recorder_of(str(tmp_path), 100, session, {})

    async def scenario():
        planner = Planner(session, Turned, PACE, make_recorder=made)
        task = asyncio.create_task(planner.run())
        await until(engine, lambda: engine.epoch > 280, np.ones((100, 8), int))
        planner.stop()
        await task

    run(scenario())
    engine.close()
    files = sorted(tmp_path.glob("*.npz"))
    assert len(files) > 5
    for file in files:
        with np.load(file) as chunk:
            assert len(chunk["placements"]) <= len(chunk["steps"]) + 20
