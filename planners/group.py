"""An EP group as the planner sees it: all ranks' segments, their heat and their placement."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..ipc.heat_ring import FLAG_DUMMY
from ..ipc.liveness import SegmentError
from ..ipc.names import rank_name
from ..ipc.rank_segment import RankSegment


class StepHeat(NamedTuple):
    """The group's heat in one step: int64 [layers, columns], counted under `epoch`."""

    step: int
    epoch: int
    heat: np.ndarray


class Group:
    """The living ranks of one session. Make one with `attach`."""

    def __init__(self, ranks: list[RankSegment]):
        self.ranks = ranks
        self.shape = ranks[0].header.shape
        self.generation = ranks[0].generation
        self._counting = [ranks[rank] for rank in self.shape.counting]
        self._waiting: list[dict[int, tuple[int, int, np.ndarray]]] = [{} for _ in self._counting]
        self.unmatched = 0

    @classmethod
    def attach(cls, session: str) -> Group:
        """All ranks of the engine that runs in `session`.

        Raises:
            SegmentError: there is none, it is not complete yet, or a rank is dead.
        """
        ranks = [RankSegment.open(rank_name(session, 0), writable=True)]
        try:
            for rank in range(1, ranks[0].header.shape.ranks):
                ranks.append(RankSegment.open(rank_name(session, rank), writable=True))
            for found in ranks:
                if found.generation != ranks[0].generation or not found.owner_is_alive():
                    raise SegmentError(
                        f"EP rank {found.header.rank} of session {session!r} is dead"
                    )
        except SegmentError:
            for found in ranks:
                found.close()
            raise
        for found in ranks:
            found.heat.follow()
        return cls(ranks)

    def is_alive(self) -> bool:
        """Whether every rank's process lives."""
        return all(rank.owner_is_alive() for rank in self.ranks)

    def committed(self) -> tuple[int, np.ndarray] | None:
        """(epoch, int32 [layers, ranks, slots]) if all ranks show the same; else None."""
        boards = [rank.board.read() for rank in self.ranks]
        first = boards[0]
        for board in boards:
            if board is None or first is None or board[0] != first[0]:
                return None
            if not np.array_equal(board[1], first[1]):
                return None
        return first

    @property
    def lost(self) -> int:
        """Records that a ring's writer overwrote before they were read."""
        return sum(rank.heat.lost for rank in self._counting)

    def read_heat(self) -> Iterator[StepHeat]:
        """The steps that all counting ranks have recorded since the last call, oldest first.

        A step that one of them lost is left out and counted in `unmatched`. Dummy steps of all
        ranks are left out.
        """
        for rank, waiting in zip(self._counting, self._waiting, strict=True):
            while len(records := rank.heat.read()[:]) and len(records[0]):
                for step, _, _, flags, epoch, heat in zip(*records, strict=True):
                    waiting[int(step)] = (int(flags), int(epoch), heat)
        common = set(self._waiting[0]).intersection(*self._waiting[1:])
        for step in sorted(common):
            parts = [waiting.pop(step) for waiting in self._waiting]
            if any(epoch != parts[0][1] for _, epoch, _ in parts):
                self.unmatched += 1
            elif not all(flags & FLAG_DUMMY for flags, _, _ in parts):
                heat = np.sum([part[2] for part in parts], axis=0, dtype=np.int64)
                yield StepHeat(step, parts[0][1], heat)
        if common:
            self._forget_before(max(common))

    def _forget_before(self, step: int) -> None:
        for waiting in self._waiting:
            for old in [key for key in waiting if key < step]:
                del waiting[old]
                self.unmatched += 1

    def close(self) -> None:
        """Unmap all segments."""
        for rank in self.ranks:
            rank.close()
