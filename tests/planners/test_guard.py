"""The planner does not trust a policy: what comes back is checked, and said once if it is bad."""

import asyncio
import dataclasses
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import uvloop

sys.path.insert(0, str(Path(__file__).parent))

from flash_eplb.planners.engine_loop import Pace
from flash_eplb.planners.guard import Guard, checked_plan
from flash_eplb.planners.par import par
from flash_eplb.planners.plan import Plan, PlannedRound, make_plan
from flash_eplb.planners.planner import Planner

HEAT = np.array([[[9, 1, 1, 9, 1, 1]] * 2])
BEFORE = np.array([[[0, 1, 2], [3, 4, 5]]] * 2, np.int32)
WANTED = np.array([[[0, 1, 4], [3, 2, 5]], [[0, 1, 2], [3, 4, 5]]], np.int32)


@pytest.fixture(autouse=True)
def log(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("flash_eplb"), "propagate", True)
    caplog.set_level(logging.DEBUG, "flash_eplb.planner")
    return caplog


class Returning:
    """A policy that returns what the function makes of its arguments."""

    def __init__(self, make):
        self._make = make

    def plan(self, heat, placement):
        return self._make(heat, placement)


def assert_leads(plan, before, wanted):
    """The plan starts from `before` and puts the experts of `wanted` on each rank."""
    assert (plan.before == before).all()
    assert (np.sort(plan.placement) == np.sort(wanted)).all()
    rounds = plan.rounds(1)
    assert (rounds[-1].placement == plan.placement).all()


def assert_taken(plan, found):
    """`plan` says what `found` does, but is another object with arrays of its own."""
    assert type(plan) is Plan
    for field in dataclasses.fields(Plan):
        ours, theirs = getattr(plan, field.name), getattr(found, field.name)
        np.testing.assert_array_equal(ours, theirs)
        assert not isinstance(ours, np.ndarray) or not np.shares_memory(ours, theirs)


def test_a_plan_of_make_plan_is_taken_as_it_is():
    plan = make_plan(BEFORE, WANTED, par_before=[3, 4], par_after=[1, 2])
    assert_taken(checked_plan(plan, HEAT, BEFORE), plan)
    weighed = dataclasses.replace(plan, columns=np.full(BEFORE.shape, 3, np.int16))
    assert_taken(checked_plan(weighed, HEAT, BEFORE), weighed)
    empty = make_plan(BEFORE, BEFORE, ranks_per_node=2)
    assert_taken(checked_plan(empty, HEAT, BEFORE), empty)


def test_of_a_plan_of_a_users_class_its_arrays_are_taken_and_nothing_else():
    class Own(Plan):
        def rounds(self, rows):
            return [PlannedRound(self.moves, np.zeros_like(self.before))]

    made = make_plan(BEFORE, WANTED, par_before=[3, 4], par_after=[1, 2])
    own = Own(**{field.name: getattr(made, field.name) for field in dataclasses.fields(Plan)})
    plan, rounds = Guard(Returning(lambda *_: own)).propose(HEAT, BEFORE, 4)
    assert_taken(plan, made)
    assert (rounds[-1].placement == made.placement).all()


def test_par_in_lists_becomes_arrays():
    plan = make_plan(BEFORE, WANTED, par_before=[3, 4], par_after=[1, 2])
    lists = dataclasses.replace(plan, par_before=[3.0, 4.0], par_after=[1.0, 2.0])
    found, _ = Guard(Returning(lambda *_: lists)).propose(HEAT, BEFORE, 4)
    assert found.par_before[found.changed].tolist() == [3]
    assert_taken(found, plan)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.uint64, None])
def test_a_bare_placement_becomes_a_plan(dtype):
    found = WANTED.tolist() if dtype is None else WANTED.astype(dtype)
    plan = checked_plan(found, HEAT, BEFORE)
    assert_leads(plan, BEFORE, WANTED)
    assert plan.layers.tolist() == [0]
    np.testing.assert_allclose(plan.par_before, par(HEAT, BEFORE))
    np.testing.assert_allclose(plan.par_after, par(HEAT, WANTED))


def test_a_plan_that_does_not_say_how_large_a_node_is_is_told():
    plan = make_plan(BEFORE, WANTED, par_before=[3, 4], par_after=[1, 2])
    stale = dataclasses.replace(plan, before=BEFORE[:, ::-1].copy(), ranks_per_node=3)
    for found in (WANTED, plan, stale):
        assert checked_plan(found, HEAT, BEFORE, 1).ranks_per_node == 1
        told, _ = Guard(Returning(lambda *_, found=found: found), 1).propose(HEAT, BEFORE, 4)
        assert told.ranks_per_node == 1
    assert checked_plan(plan, HEAT, BEFORE, 1).par_after.tolist() == [1, 2]
    sure = dataclasses.replace(plan, ranks_per_node=2)
    assert_taken(checked_plan(sure, HEAT, BEFORE, 1), sure)


def test_a_plan_that_starts_elsewhere_is_made_anew():
    stale = make_plan(BEFORE[:, ::-1], WANTED, par_before=[3, 4], par_after=[1, 2])
    plan = checked_plan(stale, HEAT, BEFORE)
    assert_leads(plan, BEFORE, WANTED)
    np.testing.assert_allclose(plan.par_before, par(HEAT, BEFORE))


def test_a_plan_by_hand_with_slots_that_one_row_cannot_carry_out_is_made_anew():
    # Rank 0 must give up 0 and 1 while it takes 2 and 3; paired like this they form one cycle.
    before = np.array([[[0, 1], [2, 3]]], np.int32)
    for wanted in ([[2, 3], [1, 0]], [[3, 2], [0, 1]], [[2, 3], [0, 1]]):
        wanted = np.array([wanted], np.int32)
        made = make_plan(before, wanted)
        hand = dataclasses.replace(made, placement=wanted)
        plan = checked_plan(hand, np.ones((1, 1, 4)), before)
        assert (plan.placement == made.placement).all()
        assert_leads(plan, before, wanted)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": np.array([0, 1], np.int32)},
        {"layers": np.array([], np.int32)},
        {"layers": np.array([1], np.int32)},
        {"layers": [0]},
        {"par_after": None},
        {"par_before": np.zeros(5)},
        {"before": BEFORE.astype(np.int64)},
        {"before": BEFORE[:1]},
        {"before": BEFORE[:, ::-1].copy()},
        {"columns": np.zeros(BEFORE.shape, np.int16)},
        {"columns": np.ones(BEFORE.shape)},
        {"ranks_per_node": 0},
        {"ranks_per_node": "all"},
    ],
    ids=lambda change: str(*change),
)
def test_of_a_plan_with_another_fault_only_the_placement_counts(change):
    plan = dataclasses.replace(make_plan(BEFORE, WANTED), **change)
    found = checked_plan(plan, HEAT, BEFORE)
    assert_leads(found, BEFORE, WANTED)
    assert found.layers.tolist() == [0]
    np.testing.assert_allclose(found.par_before, par(HEAT, BEFORE))


BAD = {
    "it is None; it must be a Plan or an int array": None,
    "it is of type ndarray and holds float64; it must be a Plan or an int array": BEFORE * 1.0,
    "its placement has shape (2, 3); it must be (2, 2, 3), [layers, ranks, slots]": BEFORE[0],
    "layer 1: rank 0 slot 2 holds expert 6; experts are 0..5": np.add(BEFORE, [[[0]], [[4]]]),
    "layer 0: rank 0 slot 0 holds expert -1; experts are 0..5": BEFORE - 1,
    "layer 0: expert 5 stands twice on rank 0": np.maximum(BEFORE, [[[5], [0]], [[0], [0]]]),
    "layer 0: expert 5 has no slot": np.array([[[0, 1, 2], [3, 4, 0]], [[0, 1, 2], [3, 4, 5]]]),
}


@pytest.mark.parametrize(("text", "found"), BAD.items(), ids=range(len(BAD)))
def test_what_is_no_placement_is_refused_and_said_once(text, found, log):
    guard = Guard(Returning(lambda *_: found))
    for _ in range(3):
        assert guard.propose(HEAT, BEFORE, 4) is None
    said = [record.getMessage() for record in log.records if record.levelno >= logging.INFO]
    assert len(said) == 1
    assert said[0].startswith(
        f"what the policy returned is refused, experts stay where they are: {text}"
    )
    assert [record.levelno for record in log.records[1:]] == [logging.DEBUG] * 2


def test_a_plan_that_loses_an_expert_is_refused():
    good = make_plan(BEFORE, WANTED)
    bad = dataclasses.replace(good, placement=np.zeros_like(BEFORE))
    assert Guard(Returning(lambda *_: bad)).propose(HEAT, BEFORE, 4) is None


def test_each_reason_is_said_once_whatever_its_details(log):
    answers = iter(
        [
            BEFORE[:1],
            BEFORE[:, :1],  # another shape, the same reason
            np.zeros_like(BEFORE),
            np.ones_like(BEFORE),
            WANTED,
            BEFORE[:1],
        ]
    )
    guard = Guard(Returning(lambda *_: next(answers)))
    proposals = [guard.propose(HEAT, BEFORE, 4) for _ in range(6)]
    assert [proposal is not None for proposal in proposals] == [False] * 4 + [True, False]
    errors = [record.getMessage() for record in log.records if record.levelno == logging.ERROR]
    assert len(errors) == 2
    assert "shape" in errors[0]
    assert "twice" in errors[1]


def test_a_policy_that_fails_is_said_once_for_each_place(log):
    def fail(heat, placement):
        count = next(counter)
        if count % 3 == 0:
            raise SystemExit(count)
        if count % 3 == 1:
            raise ZeroDivisionError(f"one {count}")
        raise ZeroDivisionError(f"two {count}")

    counter = iter(range(9))
    guard = Guard(Returning(fail))
    assert [guard.propose(HEAT, BEFORE, 4) for _ in range(9)] == [None] * 9
    errors = [record for record in log.records if record.levelno == logging.ERROR]
    assert {record.getMessage() for record in errors} == {
        "the policy failed; experts stay where they are until the next plan"
    }
    kinds = [record.exc_info[0] for record in errors]
    assert kinds == [SystemExit, ZeroDivisionError, ZeroDivisionError]


def test_a_policy_without_plan_or_with_another_signature_only_fails(log):
    assert Guard(object()).propose(HEAT, BEFORE, 4) is None
    assert Guard(Returning(lambda heat: BEFORE)).propose(HEAT, BEFORE, 4) is None
    assert len(log.records) == 2


def test_a_policy_cannot_change_what_the_planner_knows():
    def spoil(heat, placement):
        placement[:] = placement[:, ::-1]
        heat[:] = -5
        return placement

    heat, before = HEAT.copy(), BEFORE.copy()
    plan, rounds = Guard(Returning(spoil)).propose(heat, before, 4)
    assert (before == BEFORE).all()
    assert (heat == HEAT).all()
    assert_leads(plan, BEFORE, BEFORE[:, ::-1])
    np.testing.assert_allclose(plan.par_after, par(HEAT, BEFORE))
    assert (rounds[-1].placement == plan.placement).all()


def test_the_rounds_fit_the_rows():
    for rows in (1, 2, 4):
        plan, rounds = Guard(Returning(lambda _, p: p[:, ::-1])).propose(HEAT, BEFORE, rows)
        for part in rounds:
            assert np.bincount(part.moves["rank"]).max() <= rows
        assert sum(len(part.moves) for part in rounds) == len(plan.moves) == 12


PACE = Pace(episode_steps=2, window_episodes=8, min_episodes=4, plan_interval=4, timeout_steps=1000)
DEMAND = np.array([[10, 10, 90, 80, 70, 10, 10, 10]] * 2)


def test_the_planner_sends_nothing_invalid_and_serves_on(session, engine, log):
    """A bad policy's plans never reach the engine; as soon as it is good again, its plans do."""
    calls = []

    class Wavering:
        def __init__(self, ranks, slots):
            self.good = False

        def plan(self, heat, placement):
            calls.append(self)
            if self.good:
                return placement[:, ::-1].copy()
            if len(calls) % 2:
                raise KeyError("bug")
            placement[:] = 0
            return placement

    async def until(done):
        for _ in range(3000):
            if done():
                return
            engine.step(DEMAND)
            await asyncio.sleep(0.002)
        raise AssertionError("not reached")

    async def scenario():
        planner = Planner(session, Wavering, PACE)
        task = asyncio.create_task(planner.run())
        await until(lambda: len(calls) >= 6)
        assert engine.epoch == 0
        assert not any(rank.plans.has_record() for rank in engine.ranks)
        calls[0].good = True
        await until(lambda: engine.epoch >= 1)
        planner.stop()
        await task

    uvloop.run(scenario())
    errors = [record.getMessage() for record in log.records if record.levelno == logging.ERROR]
    assert len(errors) == 2
    assert "the policy failed" in errors[0]
    assert "layer 0: expert 0 stands twice on rank 0" in errors[1]


@pytest.mark.parametrize("error", [asyncio.CancelledError, KeyboardInterrupt, SystemExit])
def test_whatever_a_policy_raises_costs_balance_only(error, caplog):
    def fail(*_):
        raise error

    assert Guard(Returning(fail)).propose(HEAT, BEFORE, 4) is None
    assert "the policy failed; experts stay where they are" in caplog.text


def test_whatever_the_answer_of_a_policy_raises_costs_balance_only(caplog):
    class Answer:
        def __array__(self, *_, **__):
            raise KeyboardInterrupt

    assert Guard(Returning(lambda *_: Answer())).propose(HEAT, BEFORE, 4) is None
    assert "what the policy returned is refused" in caplog.text


def test_a_policy_that_fails_to_forget_is_reported_and_does_no_harm(caplog):
    class Stubborn(Returning):
        def forget(self):
            raise RuntimeError("I remember")

    guard = Guard(Stubborn(lambda *_: WANTED))
    guard.forget()
    guard.forget()
    (error,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert error.getMessage().startswith("the policy failed to forget its last plan")
    assert guard.propose(HEAT, BEFORE, 4) is not None


def test_a_policy_whose_plan_is_refused_forgets_it():
    forgotten = []

    class Remembering(Returning):
        def forget(self):
            forgotten.append(True)

    assert Guard(Remembering(lambda *_: BEFORE - 1)).propose(HEAT, BEFORE, 4) is None
    assert forgotten == [True]


def test_columns_that_no_table_can_hold_do_not_count():
    plan = make_plan(BEFORE, WANTED, par_before=[3, 4], par_after=[1, 2])
    wide = dataclasses.replace(plan, columns=np.full(BEFORE.shape, 2000, np.int16))
    assert (checked_plan(wide, HEAT, BEFORE).columns == 1).all()
