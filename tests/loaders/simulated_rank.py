"""One rank of a simulated group: the real loader, stager pool, staging rows and segment.

It checks after each of its events what must always hold.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from simulated_parts import SimulatedEngine, SimulatedStager, SimulatedVote, Transfer

from flash_eplb.ipc.placement import apply_moves
from flash_eplb.ipc.plan_queue import PlanQueue
from flash_eplb.ipc.rank_segment import RankSegment
from flash_eplb.ipc.status import Field
from flash_eplb.loaders.loader import Loader
from flash_eplb.loaders.patrol import Beat, Patrol
from flash_eplb.loaders.stager_pool import StagerPool
from flash_eplb.loaders.staging import Staging, slot_views

if TYPE_CHECKING:
    from simulation import Simulation


class Choice(NamedTuple):
    """An event that may come next."""

    weight: float
    name: str
    rank: int
    action: Callable[[], None]


class ObservedLoader(Loader):
    """The loader, whose rank sees what each tick did."""

    def __init__(self, rank: SimulatedRank, *arguments: Any):
        self._observer = rank
        super().__init__(*arguments)

    def tick(self) -> bool:
        self._observer.steps += 1
        committed = super().tick()
        self._observer.see_tick()
        return committed

    def _guard(self, action: Callable[[], Any]) -> Any:
        return action()  # an error shall be seen here

    def _commit(self) -> None:
        super()._commit()
        self._observer.see_commit()  # the same tick may start the next round


class LoaderDriver:
    """Moves a rank by one forward pass and its tick."""

    ticks = 1
    """Ticks in the next `advance`."""

    def __init__(self, rank: SimulatedRank):
        self._rank = rank

    def advance(self) -> None:
        self._rank.passes += 1
        self._rank.loader.tick()
        self._rank.segment.status[Field.STEP] = self._rank.steps


class SimulatedRank:
    """One rank: its real parts, and what it has been seen to do."""

    def __init__(self, simulation: Simulation, number: int, loader: type[ObservedLoader]):
        self.simulation = simulation
        self.number = number
        self.pace = simulation.dice.uniform(0.1, 1)
        self.steps = self.passes = 0
        self.stagers: list[SimulatedStager] = []
        self.current: Transfer | None = None
        self.log: list[tuple[int, int, str, int | str]] = []
        self._rows: dict[tuple[int, int], list[np.ndarray]] = {}
        self._aborted = self._generation = 0
        self._stopped = False
        placement = simulation.placements[0].copy()
        self.expected = self._expected(placement)
        self.engine = SimulatedEngine(placement, self.expected.copy())
        shape = simulation.shape
        self.segment = RankSegment.create(simulation.session, shape, number, 5)
        self.segment.publish()
        self.segment.plans.put = self._put  # type: ignore[method-assign]
        self.vote = SimulatedVote(self)
        self.staging = Staging(self.engine.weights, shape.staging_rows)
        self.pool = StagerPool(lambda: SimulatedStager(self), number, shape.staging_rows)  # type: ignore[arg-type, return-value]
        patrol = Patrol(shape.layers, shape.slots, simulation.patrol_steps)
        parts = (self.engine, self.segment, self.vote, self.pool, patrol)
        pace = (simulation.vote_steps, simulation.timeout_steps)
        self.loader = loader(self, *parts, *pace)
        self.driver: Any = simulation.driver(self)

    def _put(self, record: bytes) -> None:
        self.simulation.know(record).ranks.add(self.number)
        PlanQueue.put(self.segment.plans, record)

    def choices(self) -> list[Choice]:
        found = []
        interval = self.simulation.vote_steps
        votes = (self.steps + self.driver.ticks) // interval > self.steps // interval
        if not (votes and self.vote.would_wait()):
            found.append(Choice(self.pace, "step", self.number, self.driver.advance))
        faults = self.simulation.faults
        for stager in self.stagers:
            if stager.is_hung:
                found.append(Choice(faults.wake, "wake", self.number, stager.wake))
            elif stager.busy:
                found.append(Choice(0.5, "stage", self.number, stager.advance))
            if stager.may_fail:
                found.append(Choice(faults.fail, "fail", self.number, stager.fail))
                found.append(Choice(faults.hang, "hang", self.number, stager.hang))
        return found

    def receive(self, transfer: Transfer, row: int, move: Any) -> None:
        """A row arrives: what stands in its source now."""
        source = self.simulation.ranks[move["source_rank"]]
        parts = source.live_views(move["layer"], move["source_slot"])
        for view, part in zip(self.staging.views(row, int(move["layer"])), parts, strict=True):
            view.copy_(part)
        if transfer.is_given_up:
            self.simulation.seen["late row"] += 1
            self.simulation.seen["late row beside a round"] += not self.loader.is_idle
            self._check_apart(transfer)
        self.check()

    def live_views(self, layer: int, slot: int) -> list[torch.Tensor]:
        return slot_views(self.engine.weights[layer], int(slot))

    def is_whole(self, row: int, move: Any) -> bool:
        key = (row, int(move["layer"]))
        if key not in self._rows:
            self._rows[key] = [view.numpy() for view in self.staging.views(*key)]
        wanted = self.simulation.content[move["layer"], move["expert"]].tobytes()
        return b"".join(view.tobytes() for view in self._rows[key]) == wanted

    def see_begin(self, transfer: Transfer) -> None:
        self._check_apart(transfer)
        if transfer.errand.identity:
            self.current = transfer
            written = self.simulation.records[transfer.errand.identity]
            assert len(written.ranks) == len(self.simulation.votes.words), "not in all queues"
            self.see("start", transfer.errand.identity)

    def see_staged(self, transfer: Transfer) -> None:
        self.simulation.staged.setdefault(transfer.errand.identity, set()).add(self.number)

    def see_failure(self, transfer: Transfer) -> None:
        if transfer.errand.identity and not transfer.is_given_up:
            others = self.simulation.staged.get(transfer.errand.identity)
            self.simulation.seen["late failure" if others else "early failure"] += 1

    def see_tick(self) -> None:
        """Take down what the tick did beside commits, and check it."""
        if (aborted := self.segment.status[Field.ABORTED]) > self._aborted:
            self._aborted = aborted
            self.current.is_given_up = True  # type: ignore[union-attr]
            self.see("abort", self.current.errand.identity)  # type: ignore[union-attr]
        if self.loader.stopped and not self._stopped:
            self._stopped = True
            assert self.simulation.may_stop, self.loader.stopped
            self.see("stop", self.loader.stopped)
        status = self.segment.status
        assert status[Field.REFUSED] == 0, "a right plan was refused"
        if status[Field.GENERATION] != self._generation:
            self._generation = status[Field.GENERATION]
            assert self._generation == self.segment.plans.generation, "follows a dead planner"
        self.check()

    def see(self, what: str, whom: int | str) -> None:
        """All ranks do the same, at the same step, after the same passes."""
        entry = (self.passes, self.steps, what, whom)
        history = self.simulation.history
        if len(self.log) == len(history):
            history.append(entry)
            self.simulation.seen[what] += 1
        theirs = history[len(self.log)]
        assert entry == theirs, f"rank {self.number}: {entry}, another rank: {theirs}"
        self.log.append(entry)

    def see_commit(self) -> None:
        assert self.current is not None
        identity = self.current.errand.identity
        simulation, epoch = self.simulation, self.loader.epoch
        self.see("commit", identity)
        everyone = set(range(simulation.shape.ranks))
        assert simulation.staged.get(identity) == everyone, "committed before all had staged it"
        moves = simulation.records[identity].round.move_array()
        if epoch == len(simulation.placements):
            simulation.placements.append(apply_moves(simulation.placements[-1], moves))
        placement = simulation.placements[epoch]
        self.expected = self._expected(placement)
        board = self.segment.board.read()
        assert board is not None
        assert board[0] == epoch
        for found in (board[1], self.loader.placement, self.engine.routed):
            assert np.array_equal(found, placement), f"rank {self.number}: another placement"
        columns = simulation.columns.setdefault(epoch, zlib.crc32(self.engine.columns))
        assert columns == zlib.crc32(self.engine.columns), f"rank {self.number}: other columns"

    def check_candidate(self, identity: int) -> None:
        """A vote names no round but those of the planner that has this queue."""
        if identity:
            generation = self.simulation.records[identity].round.generation
            assert generation == self.segment.plans.generation, "voted for a dead planner's round"

    def check_beat(self, beat: Beat) -> None:
        """A live expert that the stager looks at stays where it is meanwhile."""
        found = self.engine.live[beat.layer, beat.slot]
        assert np.array_equal(found, self.simulation.content[beat.layer, beat.expert]), "a look"
        self.simulation.seen["look"] += 1

    def check(self) -> None:
        """Live slots hold what the latest commit put there, and staged rows what arrived."""
        assert np.array_equal(self.engine.live, self.expected), f"rank {self.number}: live slots"
        if self.current is not None and not self.current.is_given_up:
            for row, move in self.current.landed:
                assert self.is_whole(row, move), "a row of the round under way has changed"

    def _check_apart(self, one: Transfer) -> None:
        others = [stager.transfer for stager in self.stagers if stager.busy]
        taken = {row for other in others if other is not one for row in other.errand.rows}
        assert not taken & set(one.errand.rows), "two transfers share rows"

    def _expected(self, placement: np.ndarray) -> np.ndarray:
        return self.simulation.content[
            np.arange(len(placement))[:, None], placement[:, self.number]
        ]
