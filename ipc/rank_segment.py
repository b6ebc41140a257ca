"""A worker's segment: one name, one owner, one lock for everything that bears its rank.

Its areas, in this order: status block, step timings, placement board, plan queue, heat ring. The
worker writes all of them but the plan queue; the planner writes that one and reads the rest.
"""

from __future__ import annotations

import msgspec
import numpy as np

from .heat_ring import HeatRing
from .liveness import SegmentError
from .names import rank_name
from .plan_queue import PlanQueue
from .round import record_limit
from .segment import Segment, aligned, take_name
from .shape import GroupShape, ModelShape
from .status import Board, Field, StatusBlock, StepTimings


class RankHeader(msgspec.Struct, frozen=True):
    """Header of a worker's segment. All ranks of a group show the same shape."""

    shape: GroupShape
    rank: int


class RankAreas:
    """The areas of one rank over `body` (uint8, `segment_bytes(shape)`), as attributes:
    `status`, `timings`, `board`, `plans`, `heat`."""

    def __init__(self, body: np.ndarray, shape: GroupShape):
        areas = _split(body, _area_sizes(shape))
        self.status = StatusBlock(areas[0])
        self.timings = StepTimings(areas[1])
        self.board = Board(areas[2], (shape.layers, shape.ranks, shape.slots))
        self.plans = PlanQueue(areas[3], record_limit(shape))
        self.heat = HeatRing(areas[4], shape.layers, shape.columns, shape.ring_slots)


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
            SegmentInUseError, SegmentError: as `session.take_name`.
        """
        header = RankHeader(shape, rank)
        segment = take_name(
            session,
            rank_name(session, rank),
            msgspec.msgpack.encode(header),
            segment_bytes(shape),
            generation,
        )
        return cls(segment, header)

    @classmethod
    def open(cls, name: str, writable: bool = False) -> RankSegment:
        """Attach to a published segment; the planner needs `writable` for the plan queue.

        Raises:
            SegmentError: as `Segment.open`, or it is no rank's, or cut short.
        """
        segment = Segment.open(name, writable)
        header = segment.decode_header(RankHeader)
        assert isinstance(header, RankHeader)
        if len(segment.body) < segment_bytes(header.shape):
            raise SegmentError(f"shared memory {name} is cut short")
        return cls(segment, header)

    @property
    def generation(self) -> int:
        """Number of the group that the segment belongs to."""
        return self.segment.generation

    def owner_is_alive(self) -> bool:
        """Whether the worker still lives."""
        return self.segment.owner_is_alive()

    def publish(self) -> None:
        """Let the planner attach."""
        self.segment.publish()

    def close(self) -> None:
        """Unmap; the owner unlinks."""
        self.segment.close()


def segment_bytes(shape: GroupShape) -> int:
    """Bytes of a rank's segment, its header aside."""
    return sum(_area_sizes(shape))


def _area_sizes(shape: GroupShape) -> list[int]:
    sizes = [
        StatusBlock.SIZE,
        StepTimings.SIZE,
        Board.size(shape.layers * shape.columns),
        PlanQueue.size(record_limit(shape)),
        HeatRing.size(shape.layers, shape.columns, shape.ring_slots),
    ]
    return [aligned(size) for size in sizes]


def _split(body: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    return np.split(body[: sum(sizes)], np.cumsum(sizes)[:-1])


def warmup() -> None:
    """Compile, or load from the cache, the kernels of both ends of a rank's segment."""
    shape = GroupShape((ModelShape("", 1),), 2, 2, 1, (0,), (1,), 1, 8)
    areas = RankAreas(np.zeros(segment_bytes(shape), np.uint8), shape)
    areas.heat.push(1, 0, 0, 0, 0, [np.zeros((1, 2), np.int32)])
    areas.heat.read()
    areas.board.write(0, np.zeros((1, 2, 1), np.int32))
    areas.board.read()
    areas.status.add(Field.STEP)
    areas.plans.has_record()
