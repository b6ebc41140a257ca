"""An engine without torch: segments, heat, and loaders that commit whatever they are sent."""

from __future__ import annotations

import time

import numpy as np

from flash_eplb.ipc.doorbell import Doorbell
from flash_eplb.ipc.names import bell_name
from flash_eplb.ipc.rank_segment import RankSegment
from flash_eplb.ipc.round import Round, check_round, decode_round
from flash_eplb.ipc.round_log import Transfer
from flash_eplb.ipc.shape import GroupShape, ModelShape
from flash_eplb.ipc.status import Field


class FakeEngine:
    """All ranks of a group in one process; `step` counts heat and carries out waiting rounds."""

    def __init__(
        self,
        session: str,
        layers=2,
        experts=8,
        ranks=2,
        slots=5,
        counting=(0,),
        rows=4,
        own=False,
        ring=64,
        by_source=False,
    ):
        self.shape = GroupShape(
            models=(ModelShape("fake", layers),),
            experts=experts,
            ranks=ranks,
            slots=slots,
            counting=counting,
            row_bytes=(64,) * layers,
            staging_rows=rows,
            ring_slots=ring,
            counts_own_slots=own,
            routes_by_source=by_source,
        )
        self.flags = 0
        self.ranks = [RankSegment.create(session, self.shape, rank, 3) for rank in range(ranks)]
        self.bell = Doorbell.create(bell_name(session))
        physical = np.arange(ranks * slots, dtype=np.int32) % experts
        self.placement = np.tile(physical, (layers, 1)).reshape(layers, ranks, slots)
        self.epoch = 0
        self.steps = 0
        self.refuse = False
        self.most_rows = 0
        self.columns = None
        self.moves = None
        for rank in self.ranks:
            rank.board.write(0, self.placement)
            rank.publish()

    def step(self, demand: np.ndarray) -> None:
        """One step with `demand` (int [layers, experts]) tokens per logical expert."""
        self.steps += 1
        heat = np.zeros((self.shape.layers, self.shape.columns), np.int32)
        flat = self.placement.reshape(self.shape.layers, -1)
        for layer in range(self.shape.layers):
            counts = np.bincount(flat[layer], minlength=self.shape.experts)
            heat[layer] = demand[layer][flat[layer]] // counts[flat[layer]]
        shares = [heat] * len(self.ranks)
        if self.shape.counts_own_slots:
            shares = np.split(heat, len(self.ranks), axis=1)
        for rank, share in zip(self.ranks, shares, strict=True):
            counts = np.ascontiguousarray(share)
            rank.heat.push(self.steps, time.monotonic_ns(), 8, self.flags, self.epoch, counts)
            rank.status[Field.STEP] = self.steps
        self._serve()
        self.bell.ring()

    def _serve(self) -> None:
        if not all(rank.plans.has_record() for rank in self.ranks):
            return
        rounds = [decode_round(rank.plans.get()) for rank in self.ranks]
        assert all(round_ == rounds[0] for round_ in rounds)
        round_ = rounds[0]
        for rank in self.ranks:
            rank.status[Field.GENERATION] = round_.generation
        begun = time.monotonic_ns()
        if self.refuse:
            for rank in self.ranks:
                rank.status.add(Field.REFUSED)
                rank.status[Field.DROPPED_ROUND] = round_.sequence
            return
        assert round_.epoch == self.epoch
        rows = np.bincount(round_.move_array()["rank"], minlength=1)
        self.most_rows = max(self.most_rows, rows.max())
        self.columns = round_.column_array()
        self.moves = round_.move_array()
        self.commit(check_round(round_, self.shape, self.placement))
        for rank in self.ranks:
            rank.rounds.add(self._transfer(round_, rank.header.rank, begun))
            rank.status[Field.COMMITTED_ROUND] = round_.sequence

    def _transfer(self, round_: Round, rank: int, begun: int) -> Transfer:
        rows = int((round_.move_array()["rank"] == rank).sum())
        times = (begun, begun, begun + 1, self.steps, begun + 1, time.monotonic_ns())
        named = (round_.generation, round_.plan, round_.sequence, self.steps - 1)
        return Transfer(*named, *times, rows, 64 * rows, 1)

    def commit(self, placement: np.ndarray) -> None:
        """Commit a round; on its own, one that a planner before sent and the ranks had begun."""
        self.placement = placement
        self.epoch += 1
        for rank in self.ranks:
            rank.board.write(self.epoch, self.placement)
            rank.status.add(Field.COMMITTED)
            rank.status[Field.EPOCH] = self.epoch

    def close(self) -> None:
        self.bell.close()
        for rank in self.ranks:
            rank.close()
