"""Everything that reads shared memory, as functions of bytes, and valid bytes for each."""

from __future__ import annotations

import os
import random
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

import msgspec
import numpy as np

from flash_eplb.ipc.heat_ring import HeatRing
from flash_eplb.ipc.liveness import SegmentError
from flash_eplb.ipc.names import rank_name
from flash_eplb.ipc.placement import MOVE, PlacementError, check_placement
from flash_eplb.ipc.plan_queue import RECORD_VERSION, SLOTS, PlanQueue
from flash_eplb.ipc.rank_segment import RankHeader, check_header, segment_bytes
from flash_eplb.ipc.round import Round, RoundError, check_round, decode_round, encode_round
from flash_eplb.ipc.round_log import RoundLog, Transfer
from flash_eplb.ipc.segment import LAYOUT, aligned, parse_header
from flash_eplb.ipc.shape import GroupShape, ModelShape
from flash_eplb.ipc.status import Board, Field, StatusBlock, StepTimings, state_name
from flash_eplb.planners.step_heat import StepMatcher, group_heat

SHAPE = GroupShape(
    models=(ModelShape("draft", 1), ModelShape("main", 1)),
    experts=5,
    ranks=2,
    slots=3,
    counting=(0, 1),
    row_bytes=(1, 1),
    staging_rows=2,
    ring_slots=8,
)
PLACEMENT = np.array([[[0, 1, 2], [3, 4, 1]], [[0, 1, 2], [3, 4, 0]]], np.int32)
BODY = segment_bytes(SHAPE)
NAME = rank_name("fuzz", 0)
PREAMBLE = struct.Struct("<8sIIIIqI")
NUMBERS = [
    sign * (2**power + delta)
    for power in (0, 1, 2, 7, 8, 12, 15, 16, 20, 22, 31, 32, 40, 53, 62, 63)
    for delta in (-1, 0, 1)
    for sign in (1, -1)
    if -(2**63) <= sign * (2**power + delta) < 2**63
]


class NeverError(Exception):
    """The refusals of what refuses nothing."""


class Target(NamedTuple):
    """Something that reads: `valid` inputs, `repair` of their checksums, `run` on any bytes.

    `run` returns what it made of the input, in a word; an error of the kind `refusal` is one, too.
    """

    valid: list[bytes]
    repair: Callable[[bytearray], None]
    run: Callable[[bytes], str]
    refusal: type[Exception]


def header_of(session: str, /, **changes: object) -> bytes:
    """The header of EP rank 0 of SHAPE in `session`, with other values in some fields."""
    fields = msgspec.to_builtins(RankHeader(SHAPE, 0, session))
    return msgspec.msgpack.encode(fields | changes)


def segment_of(header: bytes, body_bytes: int = BODY) -> bytes:
    """The file of a published segment with this header and an empty body."""
    crc = zlib.crc32(header)
    preamble = PREAMBLE.pack(b"FLSHEPLB", LAYOUT, len(header), os.geteuid(), 7, 5, crc)
    return (preamble + header).ljust(aligned(PREAMBLE.size + len(header)), b"\0") + bytes(
        body_bytes
    )


def no_repair(_: bytearray) -> None:
    """For what has no checksum."""


def repair_header(content: bytearray) -> None:
    if len(content) >= PREAMBLE.size:
        struct.pack_into("<8sII", content, 0, b"FLSHEPLB", LAYOUT, len(content) - PREAMBLE.size)
        struct.pack_into("<I", content, 32, zlib.crc32(content[PREAMBLE.size :]))


def headers(session: str = "fuzz") -> list[bytes]:
    """Preambles with headers: a valid one, and one for every number in every field."""
    found = [header_of(session)]
    shape = msgspec.to_builtins(SHAPE)
    values = [*NUMBERS, None, "x", [], [[]], {}, True, 0.5, [0], [1, 1], b"\xff"]
    for field in shape:
        found += [header_of(session, shape=shape | {field: value}) for value in values]
    found += [header_of(session, rank=value) for value in values]
    found += [header_of(session, session=value) for value in ("", "b", "x" * 33, "\n", "\x1b[2J")]
    for layers in NUMBERS:
        found.append(header_of(session, shape=shape | {"models": [{"name": "", "layers": layers}]}))
    found += found[:1] * 200
    return [segment_of(header, 0)[: PREAMBLE.size + len(header)] for header in found]


def run_header(content: bytes) -> str:
    if len(content) < PREAMBLE.size:
        return "short"  # `Segment.open` does not map it
    header, generation, pid = parse_header(NAME, memoryview(content))
    assert -(2**63) <= generation < 2**63
    assert 0 <= pid < 2**32
    found = check_header(NAME, header, BODY)
    shape = found.shape
    assert segment_bytes(shape) == BODY
    assert 1 <= shape.slots <= shape.experts <= shape.columns
    assert set(shape.counting) <= set(range(shape.ranks))
    assert 0 <= found.rank < shape.ranks
    assert len(shape.row_bytes) == shape.layers
    return "accepted"


def rounds() -> list[bytes]:
    """Records: rounds that may be carried out, that may not, and of every number."""
    move = np.array([(0, 0, 0, 0, 1, 2)], MOVE).tobytes()
    fields = {
        "generation": 1, "plan": 2, "sequence": 3, "last": True, "epoch": 4,
        "layers": 2, "ranks": 2, "slots": 3, "moves": move, "columns": b"",
    }  # fmt: skip
    found = [encode_round(Round(**fields))] * 300
    chance = random.Random(0)
    for number in range(600):
        moves = some_moves(chance) if number % 3 else move
        columns = b"" if number % 3 == 1 else some_columns(chance, moves)
        found.append(encode_round(Round(**fields | {"moves": moves, "columns": columns})))
    for field in fields:
        for value in (*NUMBERS, None, "x", [], {}, True, 0.5):
            found.append(msgspec.msgpack.encode(["Round", *(fields | {field: value}).values()]))
    found.append(msgspec.msgpack.encode(["x" * 300, *fields.values()]))
    found.append(msgspec.msgpack.encode(["Round", *fields.values(), 1]))
    return found


def some_moves(chance: random.Random) -> bytes:
    """0 to 4 moves whose sources hold what they say, seldom with a byte too many."""
    rows = []
    for _ in range(chance.randrange(5)):
        layer, rank, slot = chance.randrange(2), chance.randrange(2), chance.randrange(3)
        target = chance.randrange(2), chance.randrange(3)
        rows.append((layer, PLACEMENT[layer, rank, slot], rank, slot, *target))
    return np.array(rows, MOVE).tobytes() + bytes(chance.random() < 0.05)


def some_columns(chance: random.Random, moves: bytes) -> bytes:
    """Routing columns for the layers of `moves`, seldom a nonsense or for another layer."""
    layers = {moves[at] for at in range(0, len(moves) - 1, MOVE.itemsize)}
    count = 6 * len(layers) + (chance.random() < 0.1)
    columns = [chance.choice((1, 1, 2, 3, 4)) for _ in range(count)]
    if count and chance.random() < 0.3:
        columns[-1] = chance.choice((0, -1, 2**14, 2**15 - 1, -(2**15)))
    return np.array(columns, "<i2").tobytes()


def run_record(content: bytes) -> str:
    round_ = decode_round(content)
    check_placement(check_round(round_, SHAPE, PLACEMENT), SHAPE.experts)
    return "accepted"


LIMIT = 112
SLOT = aligned(16 + LIMIT)


def queues() -> list[bytes]:
    """Queues of 0 to 4 records, and with every number in every word."""
    found = []
    for waiting in range(SLOTS + 1):
        body = np.zeros(PlanQueue.size(LIMIT), np.uint8)
        queue = PlanQueue(body, LIMIT)
        queue.take_over(9)
        for record in rounds()[:waiting]:
            queue.put(record)
        found.append(body.tobytes())
    for word in (0, 64, 128):
        for number in NUMBERS:
            some = bytearray(found[-1])
            struct.pack_into("<q", some, word, number)
            found.append(bytes(some))
    return found


def repair_queue(content: bytearray) -> None:
    for start in range(192, len(content) - SLOT + 1, SLOT):
        length = min(int.from_bytes(content[start + 4 : start + 8], "little"), LIMIT)
        crc = zlib.crc32(content[start + 16 : start + 16 + length])
        struct.pack_into("<III", content, start, RECORD_VERSION, length, crc)


def run_queue(content: bytes) -> str:
    queue = PlanQueue(body_of(content, PlanQueue.size(LIMIT)), LIMIT)
    taken = refused = 0
    while queue.has_record():
        try:
            decode_round(queue.get())
            taken += 1
        except RoundError:
            refused += 1
        assert taken + refused <= SLOTS, "the consumer does not come to an end"
    if not queue.is_full():
        queue.put(b"next")
        assert queue.get() == b"next"
    assert isinstance(queue.generation, int)
    return f"{taken} taken, {refused} refused"


CELLS = PLACEMENT.size
STATUS_BYTES = StatusBlock.SIZE + Board.size(CELLS) + 8
TIMINGS = np.zeros(StepTimings.SIZE, np.uint8)


def statuses() -> list[bytes]:
    """Status block, board and number of timings: valid, and with every number in every word."""
    found = []
    for epoch in (0, 7):
        body = np.zeros(STATUS_BYTES, np.uint8)
        status = StatusBlock(body)
        for field in Field:
            status[field] = field % 4
        board = Board(body[StatusBlock.SIZE : -8], PLACEMENT.shape)
        board.write(epoch, PLACEMENT)
        found += [body.tobytes()] * 20
    for word in [8 * field for field in Field] + [256, 264, STATUS_BYTES - 8]:
        for number in NUMBERS:
            some = bytearray(found[-1])
            struct.pack_into("<q", some, word, number)
            found.append(bytes(some))
    return found


def run_status(content: bytes) -> str:
    body = body_of(content, STATUS_BYTES)
    shown = StatusBlock(body).snapshot()
    assert all(-(2**63) <= value < 2**63 for value in shown.values())
    assert state_name(shown["state"]).isprintable()
    TIMINGS[:8] = body[-8:]
    samples = StepTimings(TIMINGS).read()
    assert len(samples) == min(max(0, int(body[-8:].view("<i8")[0])), StepTimings.CAPACITY)
    found = Board(body[StatusBlock.SIZE : -8], PLACEMENT.shape).read()
    if found is None:
        return "no board"
    check_placement(found[1], SHAPE.experts)
    return "accepted" if found[0] >= 0 else "epoch below zero"


RING = (2, 3, 4)  # layers, columns, slots
RING_BYTES = HeatRing.size(*RING)
RING_SHAPE = msgspec.structs.replace(SHAPE, ring_slots=4, counts_own_slots=True)


def rings() -> list[bytes]:
    """Two ranks' rings of 0 to 9 records, and with every number in every word of a record."""
    found = []
    for records in (0, 1, 3, 4, 9):
        body = np.zeros(RING_BYTES, np.uint8)
        ring = HeatRing(body, *RING)
        for step in range(1, records + 1):
            ring.push(step, step, 8, 0, 0, np.full(RING[:2], step, np.int32))
        found.append(body.tobytes() * 2)
    for word in range(0, 128, 8):
        for number in NUMBERS:
            some = bytearray(found[2])
            struct.pack_into("<q", some, word, number)
            found.append(bytes(some))
    return found


def run_ring(content: bytes) -> str:
    body = body_of(content, 2 * RING_BYTES)
    matcher = StepMatcher(2, RING[2])
    read = 0
    for rank in range(2):
        ring = HeatRing(body[rank * RING_BYTES : (rank + 1) * RING_BYTES], *RING)
        if body[0] % 2:
            ring.follow()
        found = 0
        while len((records := ring.read(2)).steps):
            matcher.add(rank, records)
            found += len(records.steps)
            assert found <= RING[2], "the reader does not come to an end"
        read += found
    for number, parts in enumerate(matcher.take()):
        assert number <= 2 * RING[2]
        group_heat(parts, RING_SHAPE, "all")
    return f"{read} read"


def logs() -> list[bytes]:
    """Round logs of 0 to 130 records, and with every number in every word of a record."""
    found = []
    for records in (0, 1, 5, RoundLog.CAPACITY + 2):
        body = np.zeros(RoundLog.SIZE, np.uint8)
        log = RoundLog(body)
        for number in range(records):
            log.add(Transfer(*[number] * len(Transfer._fields)))
        found.append(body.tobytes())
    for word in range(0, 64 + 192, 8):
        for number in NUMBERS[::6]:
            some = bytearray(found[2])
            struct.pack_into("<q", some, word, number)
            found.append(bytes(some))
    return found


def run_log(content: bytes) -> str:
    body = body_of(content, RoundLog.SIZE)
    log = RoundLog(body)
    if body[0] % 2:
        log.follow()
    found = len(log.read())
    assert found + len(log.read()) <= RoundLog.CAPACITY, "the reader does not come to an end"
    return f"{found} read"


def body_of(content: bytes, size: int) -> np.ndarray:
    """`content` as an area of `size` bytes: cut, or followed by zeros."""
    return np.frombuffer(bytearray(content[:size].ljust(size, b"\0")), np.uint8)


TARGETS = {
    "header": Target(headers(), repair_header, run_header, SegmentError),
    "record": Target(rounds(), no_repair, run_record, RoundError),
    "queue": Target(queues(), repair_queue, run_queue, RoundError),
    "status": Target(statuses(), no_repair, run_status, PlacementError),
    "log": Target(logs(), no_repair, run_log, NeverError),
    "ring": Target(rings(), no_repair, run_ring, NeverError),
}
