import numpy as np
import pytest
from planner_runs import SKEWED

from flash_eplb.ipc.round_log import Transfer
from flash_eplb.planners import follower as follower_module
from flash_eplb.planners.follower import Follower
from flash_eplb.planners.group import Group
from flash_eplb.planners.recorder import NoRecorder


class Told(NoRecorder):
    """What a recorder was told, in order."""

    def __init__(self):
        self.calls = []
        self.lost_so_far = 0

    def lost(self, records):
        self.lost_so_far = records

    def step(self, step):
        self.calls.append(("step", step.step, step.epoch))

    def placement(self, epoch, placement):
        self.calls.append(("placement", epoch))

    def transfers(self, ended):
        self.calls += [("transfer", int(row["sequence"]), int(row["rank"])) for row in ended]


@pytest.fixture
def follower(engine, session):
    group = Group.attach(session, writable=False)
    yield Follower(group, Told())
    group.close()


def another(engine):
    """A placement of other experts."""
    return np.ascontiguousarray(engine.placement[:, ::-1])


def told(follower):
    calls = list(follower._recorder.calls)
    follower._recorder.calls.clear()
    return calls


def test_a_step_comes_after_the_placement_that_it_ran_under(engine, follower):
    engine.step(SKEWED)
    follower.look()
    assert told(follower) == [("placement", 0), ("step", 1, 0)]
    engine.commit(another(engine))
    engine.step(SKEWED)
    follower.look()
    follower.look()
    assert told(follower) == [("placement", 1), ("step", 2, 1)]
    assert (follower.steps, follower.lost, follower.unknown_epochs) == (2, 0, 0)


def test_a_step_waits_until_the_ranks_agree_on_its_placement(engine, follower, monkeypatch):
    follower.look()
    told(follower)
    board = engine.ranks[1].board
    monkeypatch.setattr(board, "write", lambda *_: None)  # this rank is late
    engine.commit(another(engine))
    engine.step(SKEWED)
    follower.look()
    assert told(follower) == []
    monkeypatch.undo()
    board.write(engine.epoch, engine.placement)
    follower.look()
    assert told(follower) == [("placement", 1), ("step", 1, 1)]


@pytest.mark.parametrize("at_the_end", [True, False])
def test_a_step_whose_placement_never_comes_does_not_wait_for_ever(
    engine, follower, monkeypatch, at_the_end
):
    monkeypatch.setattr(follower_module, "_MOST_WAITING", 2)
    follower.look()
    told(follower)
    monkeypatch.setattr(engine.ranks[1].board, "write", lambda *_: None)
    engine.commit(another(engine))
    for _ in range(2 if at_the_end else 3):
        engine.step(SKEWED)
    follower.end() if at_the_end else follower.look()
    calls = told(follower)
    assert calls == ([("step", 1, 1), ("step", 2, 1)] if at_the_end else [("step", 1, 1)])
    assert follower.unknown_epochs == 1


def test_an_epoch_that_was_over_before_a_look_is_unknown(engine, follower):
    follower.look()
    for _ in range(2):
        engine.commit(another(engine))
        engine.step(SKEWED)
    follower.look()
    assert told(follower) == [("placement", 0), ("placement", 2), ("step", 1, 1), ("step", 2, 2)]
    assert follower.unknown_epochs == 1


def test_steps_that_the_ring_has_overwritten_are_lost(engine, follower):
    engine.step(SKEWED)
    follower.look()
    for _ in range(engine.shape.ring_slots + 10):
        engine.step(SKEWED)
    follower.look()
    assert follower.lost == 10
    assert follower.steps == engine.shape.ring_slots + 1


def test_what_was_overwritten_before_the_first_look_was_never_there(engine, follower):
    for _ in range(engine.shape.ring_slots + 10):
        engine.step(SKEWED)
    follower.look()
    assert (follower.lost, follower._recorder.lost_so_far) == (0, 0)
    for _ in range(engine.shape.ring_slots + 3):
        engine.step(SKEWED)
    follower.look()
    assert (follower.lost, follower._recorder.lost_so_far) == (3, 3)


def end_round(engine, sequence):
    """A round ends on all ranks at the step that was the last."""
    for rank in engine.ranks:
        rank.rounds.add(Transfer(1, 1, sequence, *[engine.steps] * 10))


def test_rounds_count_from_the_first_recorded_step_on(engine, follower):
    engine.steps = 7  # of the engine, before its ring holds one
    end_round(engine, 1)
    follower.look()
    assert (told(follower), follower.rounds) == ([("placement", 0)], 0)
    engine.step(SKEWED)
    end_round(engine, 2)
    follower.look()
    assert follower.rounds == 1
    assert told(follower) == [("step", 8, 0), ("transfer", 2, 0), ("transfer", 2, 1)]


def test_it_cannot_write(follower):
    for rank in follower._group.ranks:
        assert not rank.segment.bytes.flags.writeable
