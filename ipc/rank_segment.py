"""A worker's segment: one name, one owner, one lock for everything that bears its rank.

Its areas, in this order: status block, step timings, round log, placement board, ballot box, plan
queue, heat ring. The worker writes all of them but two: the plan queue is the planner's, and the
ballot box, of which only rank 0's is used, all workers'.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from .ballot_box import WORDS, BallotBox
from .heat_ring import HeatRing
from .liveness import SegmentError
from .names import rank_name
from .placement import try_moves
from .plan_queue import PlanQueue
from .round import record_limit
from .round_log import RoundLog
from .segment import Segment, aligned, take_name
from .shape import MOST_RANKS, GroupShape, ModelShape, ShapeError, check_shape, one_line
from .status import Board, Field, State, StatusBlock, StepTimings


class RankHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Header of a worker's segment. All ranks of a group show the same shape.

    Rank and session tell a segment that bears the name of another one.
    """

    shape: GroupShape
    rank: Annotated[int, Meta(ge=0, lt=MOST_RANKS)]
    session: Annotated[str, Meta(max_length=32)]


# Made here: two threads that are the first to decode a type at once crash the process in msgspec.
_DECODER = msgspec.msgpack.Decoder(RankHeader)


class RankAreas:
    """The areas of one rank over `body` (uint8, `segment_bytes(shape)`), as attributes:
    `status`, `timings`, `rounds`, `board`, `ballots`, `plans`, `heat`."""

    def __init__(self, body: np.ndarray, shape: GroupShape):
        areas = _split(body, _area_sizes(shape))
        self.status = StatusBlock(areas[0])
        self.timings = StepTimings(areas[1])
        self.rounds = RoundLog(areas[2])
        self.board = Board(areas[3], (shape.layers, shape.ranks, shape.slots))
        self.ballots = BallotBox(areas[4], shape.ranks)
        self.plans = PlanQueue(areas[5], record_limit(shape))
        self.heat = HeatRing(areas[6], shape.layers, shape.heat_columns, shape.ring_slots)


class RankSegment(RankAreas):
    """The areas of one rank in shared memory; make one with `create` or `open`."""

    def __init__(self, segment: Segment, header: RankHeader):
        super().__init__(segment.body, header.shape)
        self.segment = segment
        self.header = header

    @classmethod
    def create(cls, session: str, shape: GroupShape, rank: int, generation: int) -> RankSegment:
        """The worker's own segment; call `publish` when the group is complete.

        Raises:
            SegmentInUseError, SegmentError: as `take_name`, or nobody would open such a segment.
        """
        header = RankHeader(shape, rank, session)
        content = msgspec.msgpack.encode(header)
        try:
            decode_header(content)
        except ShapeError as error:
            raise SegmentError(f"EP rank {rank} cannot describe its group: {error}") from error
        name = rank_name(session, rank)
        segment = take_name(session, name, content, segment_bytes(shape), generation)
        return cls(segment, header)

    @classmethod
    def open(cls, name: str, writable: bool = False, published: bool = True) -> RankSegment:
        """Attach to a segment, by default to a published one only.

        The planner needs `writable` for the plan queue, the workers for rank 0's ballot box.

        Raises:
            SegmentError: as `Segment.open`, or as `check_header`.
        """
        segment = Segment.open(name, writable, published)
        try:
            header = check_header(name, segment.header, len(segment.body))
        except SegmentError:
            segment.close()
            raise
        return cls(segment, header)

    @property
    def generation(self) -> int:
        """Number of the group that the segment belongs to."""
        return self.segment.generation

    def owner_is_alive(self) -> bool:
        """Whether the worker still lives."""
        return self.segment.owner_is_alive()

    def why_silent(self) -> str:
        """Why the worker will not vote any more, as in "is dead"; "" if it may.

        Its lock is looked at through the descriptor held here, whatever has become of its name.
        """
        if not self.owner_is_alive():
            return "is dead"
        return "has stopped balancing" if self.status[Field.STATE] == State.STOPPED else ""

    def publish(self) -> None:
        """Let the planner attach."""
        self.segment.publish()

    def close(self) -> None:
        """Unmap; the owner unlinks."""
        self.segment.close()


def decode_header(content: bytes) -> RankHeader:
    """The header in `content`; ShapeError if it is none, or of a group that cannot be."""
    try:
        header = _DECODER.decode(content)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ShapeError(f"it describes no rank: {one_line(error)}") from error
    check_shape(header.shape)
    if header.rank >= header.shape.ranks:
        raise ShapeError(f"it says rank {header.rank} of {header.shape.ranks} ranks")
    return header


def check_header(name: str, content: bytes, body_bytes: int) -> RankHeader:
    """The header in `content`, if segment `name` with `body_bytes` after it is what it says.

    Raises:
        SegmentError: no header of a rank, another name's, or a body of another length.
    """
    try:
        header = decode_header(content)
    except ShapeError as error:
        raise SegmentError(
            f"shared memory {name} has a wrong header: {error}; "
            "run the same flash_eplb in the workers and the planner"
        ) from error
    maker = rank_name(header.session, header.rank)
    if maker != name:
        raise SegmentError(
            f"shared memory {name} was made as {maker!r} and has got this name since; remove it"
        )
    wanted = segment_bytes(header.shape)
    if body_bytes != wanted:
        raise SegmentError(
            f"shared memory {name} has {body_bytes} bytes after its header, its shape takes "
            f"{wanted}: it was cut or has grown; restart the engine"
        )
    return header


def check_group(ranks: list[RankSegment]) -> None:
    """Refuse segments that are not of one group; `ranks` in the order of their names.

    Raises:
        SegmentError: naming the first rank whose generation or shape is not that of rank 0.
    """
    first = ranks[0]
    for rank in ranks:
        name = rank.segment.name
        if rank.generation != first.generation:
            raise SegmentError(
                f"shared memory {name} is of generation {rank.generation}, rank 0 of "
                f"{first.generation}: an engine is starting, or left it behind; "
                "`eplb clean` removes what the dead left"
            )
        if rank.header.shape != first.header.shape:
            raise SegmentError(
                f"shared memory {name} describes another group than that of rank 0; "
                "restart the engine"
            )


def why_silent(session: str, rank: int) -> str:
    """Why the worker of `rank` will not vote any more, as in "is dead"; "" if it may.

    Raises:
        SegmentError: it cannot be told, as when its name is gone.
    """
    found = RankSegment.open(rank_name(session, rank), published=False)
    try:
        return found.why_silent()
    finally:
        found.close()


def segment_bytes(shape: GroupShape) -> int:
    """Bytes of a rank's segment, its header aside."""
    return sum(_area_sizes(shape))


def step_bytes(shape: GroupShape) -> int:
    """Bytes of one step in the heat ring."""
    return HeatRing.slot_bytes(shape.layers, shape.heat_columns)


def _area_sizes(shape: GroupShape) -> list[int]:
    sizes = [
        StatusBlock.SIZE,
        StepTimings.SIZE,
        RoundLog.SIZE,
        Board.size(shape.layers * shape.columns),
        BallotBox.size(shape.ranks),
        PlanQueue.size(record_limit(shape)),
        HeatRing.size(shape.layers, shape.heat_columns, shape.ring_slots),
    ]
    return [aligned(size) for size in sizes]


def _split(body: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    return np.split(body[: sum(sizes)], np.cumsum(sizes)[:-1])


_WARM = GroupShape((ModelShape("", 1),), 2, 2, 1, (0,), (1,), 1, 8)


def warmup_reader() -> None:
    """Compile, or load from the cache, the kernels with which a segment that may not be written is
    read."""
    body = np.zeros(segment_bytes(_WARM), np.uint8)
    body.flags.writeable = False
    areas = RankAreas(body, _WARM)
    areas.heat.read()
    areas.rounds.read()
    areas.board.read()
    assert areas.status[Field.STEP] == 0


def warmup() -> None:
    """Compile, or load from the cache, the kernels of both ends of a rank's segment."""
    shape = _WARM
    areas = RankAreas(np.zeros(segment_bytes(shape), np.uint8), shape)
    areas.heat.push(1, 0, 0, 0, 0, np.zeros((1, 2), np.int32))
    areas.heat.read()
    areas.board.write(0, np.zeros((1, 2, 1), np.int32))
    areas.board.read()
    areas.status.add(Field.STEP)
    try_moves(np.zeros((1, 2, 1), np.int32), np.frombuffer(bytes(24), np.int32).reshape(1, 6), 1, 1)
    areas.ballots.cast(0, 1, [0] * WORDS)
    areas.ballots.tally(1)
    areas.ballots.close(1)
    areas.plans.has_record()
