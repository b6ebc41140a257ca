"""Heat rings under stress: writers at full speed, readers of every pace, each a process of its own.

    python tests/ipc/ring_stress.py [RECORDS [SESSION]]

Every field and every cell of a record tells its number, so that a mix of two records is always
noticed. For each reader the records read and those counted as lost must add up to those written.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import multiprocessing
import os
import random
import signal
import sys
import time
from typing import NamedTuple

import numpy as np
from numba import njit

from flash_eplb.ipc.atomics import WORD, load_acquire, store_release
from flash_eplb.ipc.heat_ring import OVERTAKEN_SHARE
from flash_eplb.ipc.names import rank_name
from flash_eplb.ipc.rank_segment import RankSegment
from flash_eplb.ipc.shape import GroupShape, ModelShape

MOST = 16
"""Records that a reader asks for at once."""

READ, LOST, TORN, DISORDERED, UNDUE = range(5)
PR_SET_PDEATHSIG = 1


class Case(NamedTuple):
    """`rings` rings of one form; all writers together write `share` of the records."""

    name: str
    layers: int
    columns: int
    slots: int
    rings: int
    share: float


CASES = (
    Case("tiny", 1, 2, 3, 1, 0.45),
    Case("roomy", 4, 16, 4096, 1, 0.2),
    Case("two rings", 8, 32, 4, 2, 0.33),
    Case("large", 58, 288, 3, 1, 0.02),
)


class Pace(NamedTuple):
    """A reader that sleeps `pause` seconds after every `reads` reads."""

    name: str
    reads: int
    pause: float


STOPPED = Pace("stopped", 1, 0)
"""A fast reader that signals stop and continue, wherever it just is."""

PACES = (Pace("fast", 1, 0), Pace("slow", 1, 0.001), Pace("stalling", 50, 0.2), STOPPED)


class Line(NamedTuple):
    """What one reader found in all rings of its case."""

    case: str
    reader: str
    written: int
    read: int
    lost: int
    torn: int
    disordered: int
    undue: int
    """Reads that counted records as lost before they were overwritten."""
    exact: bool
    """Whether read and lost add up to what was written, for each of the rings."""

    def __str__(self) -> str:
        verdict = "exact" if self.exact else "NOT EXACT"
        return (
            f"{self.case:9}  {self.reader:8}  written {self.written:9}  read {self.read:9}  "
            f"lost {self.lost:9}  torn {self.torn}  out of order {self.disordered}  "
            f"lost too early {self.undue}  {verdict}"
        )

    def is_good(self) -> bool:
        return self.exact and not (self.torn or self.disordered or self.undue)


def field_of(number, field, ring):
    return (2 * field + 3) * number + ring


def cell_of(number, place, ring):
    cell = np.int32(number * 0x9E3779B1 + place + (ring << 24))  # an odd factor: one to one
    return cell if number % 3 else np.int32(cell & 0xFFFF)  # that is written in half the bytes


_field_of, _cell_of = njit(field_of), njit(cell_of)


@njit
def fill(number, ring, counts):
    """Make the counts of a record."""
    flat = counts.reshape(-1)
    for place in range(flat.size):
        flat[place] = _cell_of(number, place, ring)


@njit
def _is_torn(fields, heat, record, ring):
    number = fields[0, record]
    wrong = 0
    for field in range(1, len(fields)):
        wrong += fields[field, record] != _field_of(number, field, ring)
    flat = heat[record].reshape(-1)
    for place in range(flat.size):
        wrong += flat[place] != _cell_of(number, place, ring)
    return wrong > 0


@njit
def judge(fields, heat, ring, cursor, after):
    """Check one read that moved the cursor from `cursor` to `after`.

    Returns (records that are mixed, records out of order, the latest lost record or -1).
    """
    torn = disordered = 0
    lost = -1
    for record in range(len(heat)):
        number = fields[0, record]
        torn += _is_torn(fields, heat, record, ring)
        disordered += number < cursor or number >= after
        if number > cursor:
            lost = number - 1
        cursor = number + 1
    return torn, disordered, lost if cursor >= after else after - 1


def write(session, ring, records):
    """Writer: `records` records to ring number `ring`, without a pause."""
    heat = RankSegment.open(rank_name(session, ring), writable=True).heat
    counts = np.empty((heat.layers, heat.columns), np.int32)
    for number in range(records):
        fill(number, ring, counts)
        *fields, span = (field_of(number, field, ring) for field in range(1, 6))
        heat.push(number, *fields, counts, span)


def read_ring(heat, ring, result):
    """Reader: read once and add to `result`; whether there was anything."""
    cursor = int(result[READ] + result[LOST])
    records = heat.read(MOST)
    result[READ] += len(records.steps)
    result[LOST] = heat.lost
    after = int(result[READ] + result[LOST])
    torn, disordered, lost = judge(np.array(records[:-1]), records.heat, ring, cursor, after)
    result[TORN] += torn
    result[DISORDERED] += disordered
    # Record i may be lost once the writer has begun i + slots, so i + slots records are written;
    # and a little earlier, if one before it was.
    begun = load_acquire(heat._words, 0) + heat.slots // OVERTAKEN_SHARE
    result[UNDUE] += lost >= 0 and begun < lost + heat.slots
    return after > cursor


def read_all(session, pace, results, done):
    """Reader: read the rings one after the other until `done` is set and nothing is left."""
    rings = [RankSegment.open(rank_name(session, ring)).heat for ring in range(len(results))]
    for turn in itertools.count(1):
        last = load_acquire(done, 0)
        moved = [read_ring(heat, ring, results[ring]) for ring, heat in enumerate(rings)]
        if last and not any(moved):
            return
        if pace.pause and turn % pace.reads == 0:
            time.sleep(pace.pause)


def _child(work, *arguments):
    def run():
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        work(*arguments)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def _stop_and_go(process, until):
    chance = random.Random(0)
    while not until():
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(chance.uniform(0.0005, 0.02))
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(chance.uniform(0.0005, 0.005))


@contextlib.contextmanager
def _segments(session, case):
    shape = GroupShape(
        models=(ModelShape("", case.layers),),
        experts=case.columns,
        ranks=case.rings,
        slots=case.columns,
        counting=(0,),
        row_bytes=(1,) * case.layers,
        staging_rows=1,
        ring_slots=case.slots,
        counts_own_slots=True,
    )
    segments = []
    try:
        for ring in range(case.rings):
            segments.append(RankSegment.create(session, shape, ring, 1))
            segments[-1].publish()
        yield segments
    finally:
        for segment in segments:
            segment.close()


def _shared(*shape):
    return np.frombuffer(mmap.mmap(-1, 8 * int(np.prod(shape))), WORD).reshape(shape)


def run_case(session, case, records):
    """Write about `records` records; returns a Line for each reader."""
    each = records // case.rings
    results, done = _shared(len(PACES), case.rings, 5), _shared(1)
    children = []
    with _segments(session, case):
        try:
            readers = [
                _child(read_all, session, pace, results[number], done)
                for number, pace in enumerate(PACES)
            ]
            children += readers
            writers = [_child(write, session, ring, each) for ring in range(case.rings)]
            children += writers
            stopped = readers[PACES.index(STOPPED)]
            _stop_and_go(stopped, lambda: all(writer.exitcode is not None for writer in writers))
            store_release(done, 0, 1)
            for child in children:
                child.join()
                if child.exitcode:
                    raise RuntimeError(f"{case.name}: a process ended with {child.exitcode}")
        finally:
            for child in children:
                child.kill()
                child.join()
    return [_line(case, pace, each, found) for pace, found in zip(PACES, results, strict=True)]


def _line(case, pace, each, found):
    exact = bool((found[:, READ] + found[:, LOST] == each).all())
    return Line(case.name, pace.name, each * case.rings, *found.sum(axis=0).tolist(), exact)


def _warm(session):
    """Compile before there are children: they inherit the code."""
    with _segments(session, Case("", 1, 1, 1, 1, 0)):
        write(session, 0, 1)
        read_all(session, PACES[0], _shared(1, 5), np.ones(1, WORD))


def main(arguments):
    """Run all cases and print a line for each reader; returns the exit code."""
    records = int(arguments[0]) if arguments else 200_000
    session = arguments[1] if len(arguments) > 1 else f"stress-{os.getpid()}"
    _warm(session)
    good = True
    for case in CASES:
        for line in run_case(session, case, round(records * case.share)):
            print(line, flush=True)
            good &= line.is_good()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
