"""Hundreds of schedules for each thing that may go wrong between planner, votes and transfers."""

import logging
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from simulated_rank import ObservedLoader
from simulation import LAYERS, Faults, Simulation

from flash_eplb.eplb.config import Config
from flash_eplb.eplb.group import Group
from flash_eplb.eplb.worker import Worker
from flash_eplb.ipc.status import Field, State
from flash_eplb.loaders import stager_pool

pytestmark = pytest.mark.soak
DEATHS = Faults(die=0.1)
FAILURES = Faults(fail=0.07)
HANGS = Faults(hang=0.3, wake=0.1)
ALL = Faults(die=0.05, fail=0.05, hang=0.1)


@pytest.fixture
def play(session, monkeypatch):
    """`play(seed, faults, ...)` runs one schedule and returns its simulation.

    Args: `events` until the faults end, `until(simulation)` what comes then.
    """
    monkeypatch.setattr(logging.getLogger("flash_eplb.loader"), "disabled", True)

    def run(seed, faults, events=100, until=Simulation.settle, **options):
        simulation = Simulation(session, seed, faults, **options)
        try:
            simulation.run(events)
            until(simulation)
        except Exception as error:
            last = ", ".join(simulation.trace[-40:])
            raise AssertionError(f"seed {seed}: {error!r}\nafter ... {last}") from error
        finally:
            simulation.close()
        return simulation

    return run


@pytest.fixture
def explore(play):
    """`explore(seeds, faults, ...)` plays them all; how often each thing was seen."""

    def run(seeds, faults, **options):
        seen = Counter()
        for seed in range(seeds):
            seen += play(seed, faults, **options).seen
        print(dict(seen))
        return seen

    return run


def test_a_planner_dies_halfway_and_its_successor_reuses_the_numbers(explore, amount):
    seeds = amount(200, 5_000)
    seen = explore(seeds, DEATHS, events=120)
    assert seen["halfway"] > seeds / 2
    assert seen["number reused"] > seeds
    assert seen["commit"] > seeds


def test_a_failure_on_one_rank_before_and_after_others_have_staged(explore, amount):
    seeds = amount(200, 5_000)
    seen = explore(seeds, FAILURES)
    assert min(seen["early failure"], seen["late failure"]) > seeds / 4
    assert min(seen["abort"], seen["commit"]) > seeds / 2


def test_rows_that_arrive_late_after_an_abort(explore, amount):
    seeds = amount(200, 5_000)
    seen = explore(seeds, HANGS, events=160, rows=4)
    assert seen["late row"] > seeds / 4
    assert seen["late row beside a round"] > seeds / 25
    assert seen["plan beside a hanging one"] > seeds / 20


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_any_budget_from_one_row_up(explore, amount, rows):
    seeds = amount(60, 1_500)
    seen = explore(seeds, Faults(), events=60, rows=rows)
    assert seen["commit"] > 2 * seeds


def test_all_faults_together(explore, amount, monkeypatch):
    monkeypatch.setattr(stager_pool, "MOST_HUNG", 2)
    seeds = amount(200, 5_000)
    seen = explore(seeds, ALL, events=140)
    assert min(seen[what] for what in ("early failure", "late failure", "abort")) > seeds / 10
    assert min(seen["halfway"], seen["number reused"], seen["late row"]) > seeds / 10


class WorkerDriver:
    """Moves a rank through its real `Worker`, by passes and steps; `skip` loses one step, adds one
    that no pass belongs to, or loses one before a dummy pass."""

    ticks = 1

    def __init__(self, rank):
        shape = rank.simulation.shape
        group = Group(rank.number, shape.ranks, None, None, (0,))
        config = Config(session=rank.simulation.session, staging_rows=shape.staging_rows)
        worker = Worker(config, group, rank.engine, [("simulated", LAYERS)], shape.experts)
        worker._segment, worker._loader, worker._collector = rank.segment, rank.loader, NoHeat()
        worker._started = True
        self._rank, self._worker, self._in_pass = rank, worker, False
        self.skip = ""
        self.skipped_at = -1
        self._dummy = ""

    def advance(self):
        if self._dummy == "due":
            self._worker.settle()
            self._dummy = "runs"
        elif self._dummy == "runs":
            self._rank.passes += 1
            self._worker.step(is_dummy=True)
            self._dummy = ""
        elif not self._in_pass:
            if self.skip == "extra":
                self._skip()
                self._worker.step(is_dummy=False)
            self._worker.forward(1)
            self._rank.passes += 1
            self._in_pass = True
        elif self.skip in ("missing", "dummy"):
            self._dummy = "due" if self.skip == "dummy" else ""
            self._skip()
            self._in_pass = False
        else:
            self._worker.step(is_dummy=False)
            self._in_pass = False

    def _skip(self):
        self.skip = ""
        self.skipped_at = self._rank.steps


class NoHeat:
    merged = dropped = 0

    def collect(self, *_):
        pass


@pytest.mark.parametrize("kind", ["missing", "extra", "dummy"])
def test_a_rank_whose_step_is_skipped_stops_all_ranks(explore, amount, environment, kind):
    def skip_and_stop(simulation):
        simulation.may_stop = True
        victim = simulation.dice.choice(simulation.ranks)
        victim.driver.skip = kind
        for _ in range(200):
            simulation.run(10)
            if all(rank.loader.stopped for rank in simulation.ranks):
                break
        simulation.run(50)
        interval = simulation.vote_steps
        vote = (victim.driver.skipped_at // interval + 1) * interval
        reason = f"EP rank {victim.number} has run a forward pass without the step"
        for rank in simulation.ranks:
            assert rank.log == simulation.history
            assert reason in rank.loader.stopped
            assert rank.segment.status[Field.STATE] == State.STOPPED
        *before, (_, stopped_at, what, _) = simulation.history
        assert what == "stop"
        if stopped_at == vote:  # told in the vote that a commit had put off to the next step
            vote -= interval
            assert ("commit", vote) in [(what, step) for _, step, what, _ in before]
        assert stopped_at == vote + interval
        for _, step, what, _ in before:
            # a round that a commit in the vote has started begins a step after it
            late = [("start", vote + 1), ("abort", stopped_at)]
            assert step <= vote or (what, step) in late
            simulation.seen["commit just before"] += (what, step) == ("commit", vote)

    seeds = amount(120, 3_000)
    faults = Faults(die=0.02, fail=0.02, hang=0.02)
    seen = explore(seeds, faults, events=120, until=skip_and_stop, driver=WorkerDriver)
    assert seen["stop"] == seeds
    assert min(seen["commit"], seen["start"]) > seeds / 2
    assert seen["commit just before"] > 0


def test_a_seed_replays_exactly(play):
    for seed in range(5):
        first, second = play(seed, ALL), play(seed, ALL)
        assert first.trace == second.trace
        assert first.history == second.history


class CommitsAlone(ObservedLoader):
    def _act(self, outcome):
        result = self._stagers.result
        if self._active is not None and result is not None and not result.error:
            outcome = outcome._replace(staged=True)
        return super()._act(outcome)


class StartsAlone(ObservedLoader):
    def _act(self, outcome):
        start = self._voted.identity if self._voted else 0
        return super()._act(outcome._replace(start=start))


class NeverAborts(ObservedLoader):
    def _act(self, outcome):
        return super()._act(outcome._replace(failed_rank=-1))


@pytest.mark.parametrize(
    ("loader", "complaint"),
    [
        (CommitsAlone, "committed before all had staged it"),
        (StartsAlone, "not in all queues|another rank"),
        (NeverAborts, "does not come to rest"),
    ],
)
def test_the_simulation_notices_a_loader_that_decides_alone(explore, loader, complaint):
    with pytest.raises(AssertionError, match=complaint):
        explore(50, ALL, loader=loader)


def test_the_simulation_notices_rows_that_are_given_back_too_early(explore, monkeypatch):
    def give_up(pool):
        if pool.busy:
            pool._stager = pool._make()

    monkeypatch.setattr(stager_pool.StagerPool, "give_up", give_up)
    with pytest.raises(AssertionError, match="two transfers share rows"):
        explore(50, HANGS, events=140)
