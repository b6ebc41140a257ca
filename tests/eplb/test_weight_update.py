"""Weights that change under two workers whose experts have moved."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from moving import LAYERS
from test_worker import Workers

from flash_eplb.ipc.session import segment_names
from flash_eplb.ipc.status import Field, State
from flash_eplb.loaders import stager as stager_module


def test_experts_go_back_before_weights_are_written_and_move_again_after(moving):
    group = moving()
    group.move()
    group.check(is_new=False)
    assert not np.array_equal(group.placement, group.initial)
    epoch = group.workers[0].epoch
    group.update()
    assert np.array_equal(group.placement, group.initial)
    group.check(is_new=True)
    assert group.workers[0].epoch > epoch
    group.step(20)
    group.move()  # proved by the new digests
    group.check(is_new=True)
    assert [s.status[Field.ABORTED] for s in group.segments] == [0, 0]
    assert [s.status[Field.DAMAGED] for s in group.segments] == [0, 0]


def test_experts_go_back_to_their_very_slots(moving):
    """There and back between the ranks, an expert may be left in another slot."""
    group = moving()
    for experts in ([1, 2, 3], [0, 2, 3], [0, 1, 2]):  # of rank 0; rank 1 holds 0, 1 and 3
        wanted = group.placement.copy()
        wanted[:, 0] = experts
        group.send(wanted)
        group.step_until(lambda want=experts: (np.sort(group.placement[:, 0]) == want).all())
    assert not np.array_equal(group.placement, group.initial)
    group.update()
    assert np.array_equal(group.placement, group.initial)
    group.check(is_new=True)


def test_all_layers_have_even_columns_again_whether_experts_have_moved_or_not(moving):
    group = moving()
    last = [{}, {}]
    for rank, engine in enumerate(group.engines):

        def tables(layers, placement, columns=None, engine=engine, seen=last[rank]):
            seen.update((layer, columns) for layer in layers.tolist())
            return type(engine).tables(engine, layers, placement, columns)

        engine.tables = tables
    group.update()
    assert last == [dict.fromkeys(range(LAYERS))] * 2
    group.move()
    group.check(is_new=True)


def test_nothing_moves_between_the_begin_and_the_end_of_an_update(moving):
    group = moving()
    group.move()
    assert not any(worker.is_updating for worker in group.workers)
    group.run(lambda rank: group.workers[rank].begin_update())
    assert all(worker.is_updating for worker in group.workers)
    epoch = group.workers[0].epoch
    wanted = group.placement.copy()
    wanted[0] = wanted[0, ::-1]
    group.send(wanted)
    group.step(40)
    assert group.workers[0].epoch == epoch
    assert np.array_equal(group.placement, group.initial)
    group.run(group.write)
    group.step(10)
    group.run(lambda rank: group.workers[rank].end_update())
    assert not any(worker.is_updating for worker in group.workers)
    group.step(20)
    assert group.workers[0].epoch == epoch + 1  # the plan of before is void
    group.move()
    group.check(is_new=True)


@pytest.mark.parametrize("steps", range(7))
def test_a_round_under_way_is_given_up_or_committed_by_all(moving, steps):
    group = moving()
    wanted = group.placement.copy()
    wanted[1] = wanted[1, ::-1]
    group.send(wanted)
    group.update_after(steps)


def test_a_look_that_is_slow_does_not_see_the_update(moving, monkeypatch):
    group = moving(patrol_steps=1)
    group.move()
    digest = stager_module.row_digest

    def slow(views):
        time.sleep(0.03)
        return digest(views)

    monkeypatch.setattr(stager_module, "row_digest", slow)
    for _ in range(5):
        group.step(2)
        group.update()
    group.step(20)
    monkeypatch.setattr(stager_module, "row_digest", digest)
    assert [worker._loader.stopped for worker in group.workers] == ["", ""]
    group.move()
    group.check(is_new=True)


def test_the_status_says_that_experts_are_held(moving):
    group = moving()
    group.move()
    group.run(lambda rank: group.workers[rank].begin_update())
    assert [s.status[Field.STATE] for s in group.segments] == [State.HELD] * 2
    group.run(group.write)
    group.run(lambda rank: group.workers[rank].end_update())
    assert [s.status[Field.STATE] for s in group.segments] == [State.IDLE] * 2


@pytest.mark.parametrize("steps", range(1, 6))
def test_an_update_between_two_rounds_needs_no_patience(moving, steps):
    """With a vote at each step, the one that is out starts a round just as all are held."""
    group = moving(vote_steps=1)
    wanted = group.placement.copy()
    wanted[:] = wanted[:, ::-1]
    group.send(wanted)
    group.update_after(steps)


def test_the_steps_of_a_round_are_the_engine_s_after_an_update_too(moving):
    """A time line shows them beside the heat, whose steps are counted by the worker."""
    group = moving()
    for _ in range(2):
        group.move()
        group.update()
    before = group.workers[0]._step
    group.move()
    group.step()
    last = group.segments[0].rounds.read()[-1]
    assert before < last["start_step"] < last["end_step"] < group.workers[0]._step


def test_what_the_ranks_have_met_by_does_not_pile_up_in_the_store(moving):
    group = moving()
    group.update()
    keys = group.workers[0]._group.store.num_keys()
    for _ in range(3):
        group.step(2)
        group.update()
    assert group.workers[0]._group.store.num_keys() == keys


def test_an_update_that_ends_before_the_first_step_holds_nothing_back(session):
    group = Workers(session)
    for worker in group.workers:
        assert worker.begin_update()
        assert worker.is_updating
        assert not worker.begin_update()
        worker.end_update()
        assert not worker.is_updating
    group.step(2)
    assert not any(worker.is_updating for worker in group.workers)
    group.close()


@pytest.mark.parametrize("early", [(0,), (1,), (0, 1)])
def test_no_rank_begins_to_balance_while_one_writes_weights(session, early):
    """Replicas differ meanwhile, which would keep the group from balancing for ever."""
    group = Workers(session)
    replica = group.engines[1].weights[1][0][1]
    for rank in early:
        assert group.workers[rank].begin_update()
    replica[3] += 1
    group.step(3)
    group.run(lambda rank: group.workers[rank].step(is_dummy=True))
    assert segment_names(session) == []
    assert [worker.is_updating for worker in group.workers] == [0 in early, 1 in early]
    assert not any(engine.loads[0].any() for engine in group.engines)
    replica[3] -= 1
    for rank in early:
        group.workers[rank].end_update()
    group.step(3)
    assert len(segment_names(session)) == 2
    assert [worker.refused for worker in group.workers] == ["", ""]
    assert not any(worker._loader.mismatch for worker in group.workers)
    group.close()
