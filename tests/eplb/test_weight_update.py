"""Weights that change under two workers whose experts have moved."""

import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_worker import SIZES, Workers

from flash_eplb.eplb import weight_update
from flash_eplb.eplb.derived import left_behind
from flash_eplb.ipc.names import rank_name
from flash_eplb.ipc.rank_segment import RankSegment
from flash_eplb.ipc.round import Round, encode_round
from flash_eplb.ipc.status import Field, State
from flash_eplb.loaders import stager as stager_module
from flash_eplb.planners.plan import make_plan

LAYERS, EXPERTS, RANKS, SLOTS = SIZES
GENERATION = 99


class Moving(Workers):
    """Workers with a planner's end of their queues; `early` ranks write before the first step."""

    def __init__(self, session, early=(), **options):
        self.scales = [torch.ones(SLOTS), torch.ones(SLOTS)]  # of each rank; nobody hands them out
        configs = [{"staging_rows": 1, **options}] * 2
        super().__init__(session, configs, unsupported=self.left_behind)
        for rank in early:
            assert self.workers[rank].begin_update()
            self.engines[rank].weights[1][0][1, 3] += rank  # replicas differ while it writes
        self.step()
        self.initial = self.engines[0].placement
        self.segments = [
            RankSegment.open(rank_name(session, rank), writable=True) for rank in range(2)
        ]
        for segment in self.segments:
            segment.plans.take_over(GENERATION)
        self.sequence = 1
        self.plans = 0

    def left_behind(self, rank):
        layer = SimpleNamespace(scales=self.scales[rank])
        return left_behind(layer, self.engines[rank].weights[0], SLOTS)

    @property
    def placement(self):
        return self.workers[0]._loader.placement

    def send(self, wanted):
        """The rounds of a plan to both ranks, as far as the queues hold them."""
        self.plans += 1
        epoch = self.workers[0].epoch
        rounds = make_plan(self.placement, wanted).rounds(1)
        for number, part in enumerate(rounds):
            record = encode_round(
                Round(
                    GENERATION,
                    self.plans,
                    self.sequence + number,
                    number == len(rounds) - 1,
                    epoch + number,
                    LAYERS,
                    RANKS,
                    SLOTS,
                    part.moves.tobytes(),
                )
            )
            for segment in self.segments:
                segment.plans.put(record)
        self.sequence += len(rounds)

    def move(self):
        """Reverse the ranks of layer 1, and wait for it."""
        wanted = self.placement.copy()
        wanted[1] = wanted[1, ::-1]
        self.send(wanted)
        self.step_until(lambda: {*self.placement[1, 0]} == {*wanted[1, 0]})

    def step_until(self, done):
        for _ in range(2000):
            if done():
                return
            self.step()
        raise AssertionError("not reached")

    def write(self, rank):
        """What an engine's loader does: new weights, by the initial placement."""
        engine = self.engines[rank]
        for layer, (wide, narrow) in enumerate(engine.weights):
            ids = torch.from_numpy(EXPERTS - 1 - self.initial[layer, rank].astype(np.float32))
            wide.copy_((ids * 1000 + layer)[:, None] + torch.arange(37) / 64)
            narrow.copy_((wide[:, :5] * 3).to(torch.bfloat16))

    def update(self):
        def one(rank):
            self.workers[rank].begin_update()
            self.write(rank)
            self.workers[rank].end_update()

        self.run(one)

    def update_after(self, steps):
        """Experts are at home after an update that comes so many steps later, and move again."""
        self.step(steps)
        self.update()
        assert np.array_equal(self.placement, self.initial)
        self.step(20)
        self.move()
        self.check(is_new=True)

    def check(self, is_new):
        """Every slot holds what the placement names, and the tables follow."""
        for rank, engine in enumerate(self.engines):
            held = engine.experts_in_slots()
            placed = self.placement[:, rank]
            assert np.array_equal(held, EXPERTS - 1 - placed if is_new else placed)
            assert np.array_equal(engine.routed, self.placement)
            assert self.workers[rank].epoch == self.workers[0].epoch


@pytest.fixture
def moving(session):
    made = []

    def make(**options):
        made.append(Moving(session, **options))
        return made[-1]

    yield make
    for one in made:
        for segment in one.segments:
            segment.close()
        one.close()


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


def test_experts_that_cannot_change_slots_on_one_rank_stay_on_all(moving, monkeypatch, caplog):
    group = moving()
    for experts in ([1, 2, 3], [0, 2, 3], [0, 1, 2]):
        wanted = group.placement.copy()
        wanted[:, 0] = experts
        group.send(wanted)
        group.step_until(lambda want=experts: (np.sort(group.placement[:, 0]) == want).all())
    before = group.placement.copy()

    def tables(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(group.engines[0], "tables", tables)
    errors = group.run(lambda rank: _error(group.workers[rank].begin_update))
    for error in errors:
        assert error.startswith("experts cannot go back to where vLLM writes weights: EP rank 0: ")
        assert error.endswith("MemoryError: no room")
    assert "EP rank 0 has failed, so all ranks give up what they were at" in caplog.text
    assert "cannot be balanced" not in caplog.text  # they are, after this update
    assert not any(worker.is_updating for worker in group.workers)
    assert np.array_equal(group.placement, before)
    group.check(is_new=False)
    monkeypatch.undo()
    group.step(20)
    group.move()
    group.check(is_new=False)
    group.update()
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


def test_a_stager_that_hangs_does_not_hang_the_update(moving, monkeypatch):
    group = moving(staging_rows=2, transfer_timeout=2)
    hangs, release, stage = threading.Event(), threading.Event(), stager_module.Stager._stage

    def hang(self, errand):
        if self._rank == 1 and errand.identity:
            hangs.set()
            release.wait(60)
        return stage(self, errand)

    group.move()
    monkeypatch.setattr(stager_module.Stager, "_stage", hang)
    wanted = group.placement.copy()
    wanted[0] = wanted[0, ::-1]
    group.send(wanted)
    group.step_until(hangs.is_set)
    monkeypatch.setattr(stager_module.Stager, "_stage", stage)
    group.update()
    assert np.array_equal(group.placement, group.initial)
    assert group.segments[1].status[Field.QUARANTINED_ROWS] == 1  # it still hangs
    release.set()
    group.step_until(lambda: group.segments[1].status[Field.QUARANTINED_ROWS] == 0)
    group.move()
    group.check(is_new=True)


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


def test_a_rank_that_is_not_updated_refuses_it_to_the_others(moving, monkeypatch):
    monkeypatch.setattr(weight_update, "PATIENCE", 0.2)
    group = moving()
    group.move()
    before = group.placement.copy()
    with pytest.raises(RuntimeError, match=r"EP rank 0 .* EP ranks \[1\] .*pause generation"):
        group.workers[0].begin_update()
    group.step(10)
    assert np.array_equal(group.placement, before)
    group.update()
    group.check(is_new=True)


def test_a_rank_whose_write_took_long_is_waited_for_as_long_again(moving, monkeypatch):
    group = moving()
    group.move()
    group.run(lambda rank: group.workers[rank].begin_update())
    monkeypatch.setattr(weight_update, "PATIENCE", 0.1)

    def end(rank):
        group.write(rank)
        time.sleep(0.5 * rank)
        group.workers[rank].end_update(60.0)

    group.run(end)
    assert not any(worker.is_updating for worker in group.workers)
    group.move()
    group.check(is_new=True)


def test_a_rank_whose_write_has_failed_is_not_waited_for(moving):
    """Nor is it at the next failure; and what has failed before keeps no later update from its
    end."""
    group = moving()
    group.move()
    for _ in range(2):
        group.run(lambda rank: group.workers[rank].begin_update())
        assert group.workers[1].give_up_update("reload_weights has failed")
        group.write(0)
        begun = time.monotonic()
        words = (
            "EP rank 0 waits no longer: reload_weights has failed on EP rank 1; no expert moves "
            "until weights have been updated on all of them"
        )
        with pytest.raises(RuntimeError, match=words):
            group.workers[0].end_update()
        assert time.monotonic() - begun < weight_update.PATIENCE / 3
        group.step(4)
    group.update()
    assert not any(worker.give_up_update("finish_weight_update") for worker in group.workers)
    group.move()
    group.check(is_new=True)
    group.update()
    group.check(is_new=True)


def test_a_rank_that_comes_late_to_the_end_does_not_wait_for_one_that_has_gone(moving, monkeypatch):
    group = moving()
    group.run(lambda rank: group.workers[rank].begin_update())
    monkeypatch.setattr(weight_update, "PATIENCE", 0.2)
    with pytest.raises(
        RuntimeError, match=r"EP rank 0 has waited 0.2 s for EP ranks \[1\] in vain"
    ):
        group.workers[0].end_update()
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=r"EP rank 1 waits no longer: EP rank 0 has waited 0.2"):
        group.workers[1].end_update(60.0)
    assert time.monotonic() - begun < 20
    monkeypatch.undo()
    group.update()
    group.move()
    group.check(is_new=True)


def test_what_the_ranks_have_met_by_does_not_pile_up_in_the_store(moving):
    group = moving()
    group.update()
    keys = group.workers[0]._group.store.num_keys()
    for _ in range(3):
        group.step(2)
        group.update()
    assert group.workers[0]._group.store.num_keys() == keys


def test_weights_that_were_changed_unseen_are_not_moved_back(moving):
    group = moving()
    group.move()
    group.engines[0].weights[1][0][2, 3] += 1  # expert 3, which belongs on rank 1
    errors = group.run(lambda rank: _error(group.workers[rank].begin_update))
    for error in errors:
        assert "flash_eplb has moved experts and has stopped since" in error
        assert "weights are not those of the start" in error
        assert "restart the engine" in error
    assert "restart the engine" in _error(group.workers[0].begin_update)


def test_replicas_that_differ_after_an_update_stop_balancing(moving, caplog):
    group = moving()

    def one(rank):
        group.workers[rank].begin_update()
        group.write(rank)
        group.engines[rank].weights[1][0][1, 3] += rank  # rank 1's replica of expert 0
        group.workers[rank].end_update()

    group.run(one)
    for rank in range(2):
        stopped = group.workers[rank]._loader.stopped
        assert stopped.startswith("after an update of the weights, layer 1 expert 0")
    group.step(4)
    # experts are where the engine writes, so it may write again
    group.update()


def test_rows_that_differ_since_an_update_and_would_stay_behind_stop_balancing(moving):
    group = moving()
    group.update()
    group.move()
    group.scales[1][2] = 3
    group.update()
    for worker in group.workers:
        assert worker._loader.stopped == "after an update of the weights, EP rank 1: scales"
    group.check(is_new=True)
    group.update()  # experts are where the engine writes, so it may write again
    assert np.array_equal(group.placement, group.initial)


def test_weights_that_an_update_puts_into_other_memory_stop_balancing_though_no_digest_is_taken(
    moving,
):
    """Experts would move in memory that nobody reads, and the tables would follow them."""
    group = moving(verify=False)
    group.move()
    group.engines[1].replaced = lambda layer: "w2_weight" * layer
    group.update()
    for worker in group.workers:
        assert worker._loader.stopped == (
            "after an update of the weights, EP rank 1: layer 1: w2_weight is in other memory than "
            "at the start, so what we move is no longer what the engine computes with"
        )
    assert np.array_equal(group.placement, group.initial)


def test_a_rank_that_cannot_look_after_an_update_stops_balancing_on_all(moving):
    group = moving()
    group.workers[1]._unsupported = lambda: 1 // 0
    group.update()
    for worker in group.workers:
        assert "EP rank 1: ZeroDivisionError" in worker._loader.stopped


def test_an_update_that_failed_half_way_is_begun_again(moving):
    group = moving()
    group.move()
    group.run(lambda rank: group.workers[rank].begin_update())
    group.step(6)
    group.update()
    group.check(is_new=True)
    group.move()
    group.check(is_new=True)


def test_before_the_first_step_there_is_nothing_to_do(session):
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
def test_an_update_that_begins_before_the_first_step_holds_the_experts_to_its_end(moving, early):
    """They would move meanwhile, and the engine write by the placement of the start."""
    group = moving(early=early)
    assert [worker.refused for worker in group.workers] == ["", ""]
    assert all(worker.is_updating for worker in group.workers)
    wanted = group.placement.copy()
    wanted[1] = wanted[1, ::-1]
    group.send(wanted)
    group.step(40)
    assert np.array_equal(group.placement, group.initial)
    group.update()
    group.check(is_new=True)
    group.move()  # proved by the digests of what was written last
    group.check(is_new=True)


def _error(action) -> str:
    try:
        action()
    except RuntimeError as error:
        return str(error)
    return ""
