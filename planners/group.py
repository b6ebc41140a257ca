"""An EP group as the planner sees it: all ranks' segments, their heat and their placement."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np

from ..ipc.flags import FLAG_DUMMY
from ..ipc.limits import check_files
from ..ipc.liveness import SegmentAbsentError, SegmentError
from ..ipc.names import rank_name
from ..ipc.placement import PlacementError, check_placement
from ..ipc.rank_segment import RankSegment, check_group
from ..ipc.round_log import TRANSFER
from ..ipc.status import Field, State
from .chunk import RANK_TRANSFER
from .step_heat import StepHeat, StepMatcher, group_heat

log = logging.getLogger("flash_eplb.planner")


class RankMissingError(SegmentAbsentError):
    """EP rank 0 has a segment and another rank has none."""


class Group:
    """The living ranks of one session. Make one with `attach`.

    Attributes:
        unphased: steps read so far of which nobody knows the phase.
        out_of_phase: steps of another phase than is asked for, as long as there was none of it.
    """

    _trouble = ""

    def __init__(self, ranks: list[RankSegment]):
        self.ranks = ranks
        self.shape = ranks[0].header.shape
        self.generation = ranks[0].generation
        every = self.shape.counts_own_slots
        self._counting = ranks if every else [ranks[rank] for rank in self.shape.counting]
        self.unphased = self.out_of_phase = 0
        self._seen = False  # a step that counts
        self._matcher = StepMatcher(len(self._counting), self.shape.ring_slots)

    @classmethod
    def attach(cls, session: str, writable: bool = True, who: str = "the planner") -> Group:
        """All ranks of the engine that runs in `session`.

        Args:
            session: its name.
            writable: not needed by who only reads.
            who: asks, for the text of a LimitError.

        Raises:
            SegmentError: there is none, it is not complete (RankMissingError), or a rank is dead.
            LimitError: this process may not open as many files.
        """
        ranks = [RankSegment.open(rank_name(session, 0), writable)]
        try:
            check_files(ranks[0].header.shape.ranks + 8, who)
            for rank in range(1, ranks[0].header.shape.ranks):
                ranks.append(_open_rank(session, rank, writable))
            for found in ranks:
                if not found.owner_is_alive():
                    raise SegmentError(
                        f"EP rank {found.header.rank} of session {session!r} is dead"
                    )
            check_group(ranks)
        except SegmentError:
            for found in ranks:
                found.close()
            raise
        for found in ranks:
            found.heat.follow()
            found.rounds.follow()
        return cls(ranks)

    def is_alive(self) -> bool:
        """Whether every rank's process lives."""
        return all(rank.owner_is_alive() for rank in self.ranks)

    def stopped(self) -> list[int]:
        """The EP ranks that have stopped balancing."""
        return self._in_state(State.STOPPED)

    def held(self) -> list[int]:
        """The EP ranks that drop whatever is planned until weights have been written or read."""
        return self._in_state(State.HELD)

    def _in_state(self, state: State) -> list[int]:
        return [rank.header.rank for rank in self.ranks if rank.status[Field.STATE] == state]

    def committed(self) -> tuple[int, np.ndarray] | None:
        """(epoch, int32 [layers, ranks, slots]) if all ranks show the same and it is valid."""
        boards = [rank.board.read() for rank in self.ranks]
        first = boards[0]
        for board in boards:
            if board is None or first is None or board[0] != first[0]:
                return None
            if not np.array_equal(board[1], first[1]):
                return None
        return first if first and self._is_valid(*first) else None

    def _is_valid(self, epoch: int, placement: np.ndarray) -> bool:
        """Whether the boards may be relied on; says once what is wrong with them."""
        trouble = f"epoch {epoch}" if epoch < 0 else ""
        try:
            check_placement(placement, self.shape.experts)
        except PlacementError as error:
            trouble = str(error)
        if trouble and trouble != self._trouble:
            log.error(
                "the placement boards are damaged: %s; nothing is planned from them, restart the "
                "engine",
                trouble,
            )
        self._trouble = trouble
        return not trouble

    def free_rows(self) -> int:
        """Staging rows that every rank has for the next rounds."""
        taken = max(rank.status[Field.QUARANTINED_ROWS] for rank in self.ranks)
        return max(0, min(self.shape.staging_rows, self.shape.staging_rows - taken))

    @property
    def lost(self) -> int:
        """Records that a ring's writer overwrote before they were read."""
        return sum(rank.heat.lost for rank in self._counting)

    @property
    def unmatched(self) -> int:
        """Steps between those read that a rank lost, or counted under another epoch."""
        return self._matcher.unmatched

    def behind(self) -> tuple[int, int]:
        """(the EP rank whose heat ends first, the steps that others have recorded since)."""
        number, steps = self._matcher.behind()
        return self._counting[number].header.rank, steps

    def unfit(self) -> int:
        """Steps that all ranks have recorded since the last of which their records fit together."""
        return self._matcher.unfit()

    def read_heat(self, phase: str = "all") -> Iterator[StepHeat]:
        """The steps that all counting ranks have recorded since the last call, oldest first.

        What they record meanwhile may be left to the next call: an engine that is faster than it is
        read would not let us out.

        Args:
            phase: as of `group_heat`; steps of another phase are left out, and dummy steps.
        """
        left = self.shape.ring_slots
        while left > 0 and (found := self._read_some()):
            left -= found
            for parts in self._matcher.take():
                flags = {part.flags for part in parts}
                is_phased = not flags <= {0, FLAG_DUMMY}
                self.unphased += 0 in flags and not is_phased
                if (heat := group_heat(parts, self.shape, phase)) is not None:
                    self._seen, self.out_of_phase = True, 0
                    yield heat
                elif is_phased and not self._seen:
                    self.out_of_phase += parts[0].span

    def _read_some(self) -> int:
        """Take the next records of each rank, not all: rings that are full are as large as memory
        may be. Returns how many the rank had that had most."""
        found = 0
        for number, rank in enumerate(self._counting):
            records = rank.heat.read()
            self._matcher.add(number, records)
            found = max(found, len(records.steps))
        return found

    def read_transfers(self) -> np.ndarray:
        """`chunk.RANK_TRANSFER` records of the rounds that have ended since the last call."""
        parts = [rank.rounds.read() for rank in self.ranks]
        ended = np.empty(sum(map(len, parts)), RANK_TRANSFER)
        if not len(ended):
            return ended
        ended["rank"] = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        logged = np.concatenate(parts)
        for name in TRANSFER.names or ():
            ended[name] = logged[name]
        return ended

    def close(self) -> None:
        """Unmap all segments."""
        for rank in self.ranks:
            rank.close()


def _open_rank(session: str, rank: int, writable: bool) -> RankSegment:
    """The segment of a rank beside rank 0's; RankMissingError if there is none."""
    name = rank_name(session, rank)
    try:
        return RankSegment.open(name, writable)
    except SegmentAbsentError:
        raise RankMissingError(
            f"EP rank {rank} has no shared memory {name}: it is still starting, or the name was "
            "removed; then restart the engine"
        ) from None
