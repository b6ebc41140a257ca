"""What a child does until it is killed, and what its survivor must then find.

Every record, board and round tells its number, so that half of one is always noticed. `point` is
where the child died, at its pass number `passes`; None where nobody knows, at any instruction.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import numpy as np
from forks import PLACEMENT, SHAPE, Engine, has_bell, leave, left_over, work_as_successor

from flash_eplb.ipc.ballot_box import CLOSED, COMPLETE, WORDS
from flash_eplb.ipc.heat_ring import HeatRecords
from flash_eplb.ipc.liveness import SegmentError, owner_is_alive
from flash_eplb.ipc.names import planner_name, rank_name
from flash_eplb.ipc.plan_queue import SLOTS
from flash_eplb.ipc.rank_segment import RankAreas, RankSegment
from flash_eplb.ipc.round_log import Transfer
from flash_eplb.ipc.segment import take_name
from flash_eplb.ipc.session import remove_dead, segment_names, session_lock
from flash_eplb.ipc.status import Field

PLACES = np.arange(SHAPE.layers * SHAPE.columns).reshape(SHAPE.layers, SHAPE.columns)


class Scenario:
    """One area; `points` are the beginnings of the names of its crash points.

    `begin` and then `act`, which never ends, run in the child; the other calls in the survivor:
    `prepare` before the child is there, `attach` between its `begin` and its `act`, `watch` again
    and again while it lives, `check` after its death. In the end nothing may be left.
    """

    points: tuple[str, ...]
    longest_life = 0.004
    """Seconds until a child of which nobody knows where it dies is killed, at most."""

    def __init__(self, session: str):
        self.session = session
        self.name = rank_name(session, 0)

    def prepare(self) -> None:
        pass

    def begin(self) -> None:
        pass

    def attach(self) -> None:
        pass

    def act(self) -> None:
        raise NotImplementedError

    def watch(self) -> None:
        pass

    def check(self, point: str | None, passes: int) -> None:
        raise NotImplementedError


def counts_of(number: int) -> np.ndarray:
    wide = 2**16 * (number % 2)  # every second record takes twice the bytes
    return (PLACES + 1000 * number + wide).astype(np.int32)


def fields_of(number):
    return [(k + 2) * number + k for k in range(5)]


def placement_of(number: int) -> np.ndarray:
    return ((PLACES + number) % 30_000).reshape(SHAPE.layers, SHAPE.ranks, SHAPE.slots)


def step_of(segment: RankSegment, number: int) -> Callable[[], None]:
    """A call that writes what a worker writes in one step."""
    *fields, span = fields_of(number)
    counts, placement = counts_of(number), placement_of(number)

    def write() -> None:
        segment.heat.push(number, *fields, counts, span)
        segment.board.write(number, placement)
        segment.status[Field.STEP] = number
        segment.status[Field.COMMITTED] = segment.status[Field.COMMITTED] + 1

    return write


def check_records(records: HeatRecords) -> None:
    """AssertionError if one of the records is torn."""
    for row, number in enumerate(records.steps.tolist()):
        found = [column[row] for column in records[1:6]]
        assert found == fields_of(number), f"record {number} is torn: {found}"
        assert (records.heat[row] == counts_of(number)).all(), f"record {number} is torn"


class Heat:
    """A reader of a ring whose records are numbered from 1 on."""

    def __init__(self, areas: RankAreas):
        self.ring = areas.heat
        self.numbers: list[int] = []

    def take(self) -> None:
        """Read what is there; AssertionError if a record is torn or out of order."""
        while len((records := self.ring.read(3)).steps):
            check_records(records)
            self.numbers += records.steps.tolist()
        assert self.numbers == sorted(set(self.numbers)), "out of order"

    @property
    def head(self) -> int:
        """Records that the writer has shown, seen or lost."""
        return len(self.numbers) + self.ring.lost


class Writing(Scenario):
    """A worker records heat, shows its placement and counts; the planner reads all of it."""

    points = ("ring.", "board.", "status.")

    def begin(self) -> None:
        self.mine = RankSegment.create(self.session, SHAPE, 0, 5)
        self.mine.board.write(0, placement_of(0))
        self.mine.publish()

    def attach(self) -> None:
        self.found = RankSegment.open(self.name)
        self.heat = Heat(self.found)

    def act(self) -> None:
        for number in itertools.count(1):
            step_of(self.mine, number)()

    def watch(self) -> None:
        self.heat.take()
        self.read_board()

    def read_board(self) -> int | None:
        board = self.found.board.read()
        if board is None:
            return None
        epoch, placement = board
        assert (placement == placement_of(epoch)).all(), f"the board of epoch {epoch} is mixed"
        return epoch

    def see(self) -> tuple[int, int | None, int, int]:
        """Records, epoch on the board, steps and commits, as the reader finds them."""
        self.heat.take()
        late = Heat(RankSegment.open(self.name))
        late.take()
        assert late.head == self.heat.head
        assert set(late.numbers[1:]) <= set(self.heat.numbers)
        status = self.found.status
        return self.heat.head, self.read_board(), status[Field.STEP], status[Field.COMMITTED]

    def check(self, point: str | None, passes: int) -> None:
        seen = self.see()
        if point is None:
            heads, epoch, steps, commits = seen
            assert heads >= steps >= commits >= heads - 1, seen
            assert epoch is None or heads >= epoch >= steps, seen
        else:
            assert seen == written(point, passes)
        assert not self.found.owner_is_alive()
        self.found.segment.close()
        work_as_successor(self.session)


def written(point: str, passes: int) -> tuple[int, int | None, int, int]:
    """What `Writing.see` must give after a death at `point`."""
    before = passes - 1
    if point == "ring.narrowed":  # the first record passes it, and every second one after it
        before *= 2
    if point.startswith("ring."):
        return passes if point == "ring.head" else before, before, before, before
    if point.startswith("board."):
        boards = {"board.begin": before, "board.even": passes}
        return passes, boards.get(point), before, before
    done = before + (point == "status.new")  # two words are stored in turn
    rounds = before // 2 + 1
    return rounds, rounds, (done + 1) // 2, done // 2


def transfer_of(number: int) -> Transfer:
    """A transfer that tells its number in every field."""
    return Transfer(*((k + 2) * number + k for k in range(len(Transfer._fields))))


class Logging(Scenario):
    """A worker logs rounds that have ended; anyone reads them."""

    points = ("log.",)

    def begin(self) -> None:
        self.mine = RankSegment.create(self.session, SHAPE, 0, 5)
        self.mine.publish()

    def attach(self) -> None:
        self.found = RankSegment.open(self.name)
        self.numbers: list[int] = []

    def act(self) -> None:
        for number in itertools.count(1):
            self.mine.rounds.add(transfer_of(number))

    def watch(self) -> None:
        for row in self.found.rounds.read().tolist():
            number = row[0] // 2
            assert row == tuple(transfer_of(number)), f"record {number} is torn: {row}"
            self.numbers.append(number)
        assert self.numbers == sorted(set(self.numbers)), "out of order"

    def check(self, point: str | None, passes: int) -> None:
        self.watch()
        head = len(self.numbers) + self.found.rounds.lost
        assert not self.numbers or self.numbers[-1] == head
        if point is not None:
            assert head == passes - (point == "log.before")
        assert not self.found.owner_is_alive()
        self.found.segment.close()
        work_as_successor(self.session)


def record_of(number: int) -> bytes:
    """A round of a length of its own."""
    return b"%d:" % number + bytes((number + k) % 256 for k in range(number * 37 % 90))


class Producing(Scenario):
    """A planner sends rounds; the worker consumes them."""

    points = ("queue.put.", "queue.take_over.")

    def prepare(self) -> None:
        self.mine = RankSegment.create(self.session, SHAPE, 0, 5)
        self.mine.publish()
        self.taken = 0

    def act(self) -> None:
        plans = RankSegment.open(self.name, writable=True).plans
        for number in itertools.count(1):
            plans.take_over(number)
            while plans.is_full():
                time.sleep(0)
            plans.put(record_of(number))

    def watch(self) -> None:
        while self.mine.plans.has_record():
            assert self.mine.plans.get() == record_of(self.taken + 1)
            self.taken += 1

    def check(self, point: str | None, passes: int) -> None:
        self.watch()
        generation = self.mine.plans.generation
        if point is None:
            assert generation - 1 <= self.taken <= generation
        else:
            done = passes - 1
            assert self.taken == (passes if point == "queue.put.head" else done)
            assert generation == (done if point == "queue.take_over.old" else passes)
        self.succeed()
        self.mine.close()

    def succeed(self) -> None:
        """A new planner finds the queue as good as new."""
        found = RankSegment.open(self.name, writable=True)
        found.plans.take_over(10**6)
        for number in range(SLOTS):
            assert not found.plans.is_full()
            found.plans.put(record_of(number))
        assert found.plans.is_full()
        assert self.mine.plans.generation == 10**6
        assert [self.mine.plans.get() for _ in range(SLOTS)] == list(map(record_of, range(SLOTS)))
        assert not self.mine.plans.has_record()
        found.close()


class Consuming(Scenario):
    """A worker consumes rounds; the planner sends them."""

    points = ("queue.get.",)

    def begin(self) -> None:
        self.mine = RankSegment.create(self.session, SHAPE, 0, 5)
        self.mine.publish()

    def attach(self) -> None:
        self.found = RankSegment.open(self.name, writable=True)
        self.sent = 0

    def act(self) -> None:
        for number in itertools.count(1):
            while not self.mine.plans.has_record():
                time.sleep(0)
            assert self.mine.plans.get() == record_of(number)

    def watch(self) -> None:
        while not self.found.plans.is_full():
            self.sent += 1
            self.found.plans.put(record_of(self.sent))

    def check(self, point: str | None, passes: int) -> None:
        self.watch()  # until it is full, with SLOTS records that nobody will take
        if point is not None:
            taken = passes if point == "queue.get.tail" else passes - 1
            assert self.sent == taken + SLOTS
        assert self.found.plans.is_full()
        assert not self.found.owner_is_alive()
        self.found.close()
        work_as_successor(self.session)


def words_of(rank: int, number: int) -> list[int]:
    """What `rank` casts in vote `number`; rank 1 the lower words, but for the first."""
    return [number * 10 + rank, *[number * 20 - rank] * (WORDS - 1)]


class Voting(Scenario):
    """Rank 0 votes with rank 1, which survives it and gives up the vote that never comes."""

    points = ("box.",)

    def begin(self) -> None:
        self.mine = RankSegment.create(self.session, SHAPE, 0, 5)

    def attach(self) -> None:
        self.found = RankSegment.open(self.name, writable=True, published=False)
        self.acted = 0
        self.cast()

    def act(self) -> None:
        for number in itertools.count(1):
            self.mine.ballots.cast(0, number, words_of(0, number))
            while (missing := self.mine.ballots.tally(number)[0]) == 1:
                time.sleep(0)
            assert missing == COMPLETE

    def cast(self) -> None:
        self.found.ballots.cast(1, self.acted + 1, words_of(1, self.acted + 1))

    def watch(self) -> None:
        number = self.acted + 1
        missing, words = self.found.ballots.tally(number)
        if missing == COMPLETE:
            assert words == [words_of(0, number)[0], *words_of(1, number)[1:]], "a torn vote"
            self.acted = number
            self.cast()
        else:
            assert missing == 0

    def check(self, point: str | None, passes: int) -> None:
        before = -1
        while before < self.acted:
            before = self.acted
            self.watch()
        if point is not None:
            cast = passes - (point in ("box.cast.words", "box.cast.number"))
            assert self.acted == cast
        assert self.found.why_silent() == "is dead"
        assert self.found.ballots.close(self.acted + 1)
        assert self.found.ballots.tally(self.acted + 1) == (CLOSED, [])
        self.found.close()
        work_as_successor(self.session)


class Living(Scenario):
    """A whole life of an engine, again and again: names made, published and removed."""

    points = ("segment.", "bell.", "lock.")
    longest_life = 0.02

    def act(self) -> None:
        for generation in itertools.count(1):
            Engine(self.session, generation).close()

    def watch(self) -> None:
        """Whoever attaches at any moment finds a whole segment, or is told why not."""
        for name in segment_names(self.session):
            try:
                found = RankSegment.open(name)
            except SegmentError:
                continue
            board = found.board.read()
            assert board is not None
            assert (board[1] == PLACEMENT).all()
            found.close()

    def check(self, point: str | None, passes: int) -> None:
        self.watch()
        names = segment_names(self.session)
        assert not any(owner_is_alive(name) for name in names)
        if point == "segment.publish.end":
            RankSegment.open(rank_name(self.session, (passes - 1) % SHAPE.ranks)).close()
        if passes % 2:
            work_as_successor(self.session)
        else:
            clean(self.session)


def clean(session: str) -> None:
    """Remove what the dead left, as `eplb clean` does; nothing of it is left."""
    with session_lock(session, timeout=1):
        remove_dead(session)
    assert left_over(session) == []


class Taking(Scenario):
    """A successor takes over what others left, again and again."""

    points = ("take.", "remove.")
    longest_life = 0.06

    def act(self) -> None:
        for number in itertools.count():
            leave(self.session)
            if number % 2:
                take_name(self.session, planner_name(self.session), b"", 0, 6).close()
            else:
                clean(self.session)

    def check(self, point: str | None, passes: int) -> None:
        names = segment_names(self.session)
        assert not any(owner_is_alive(name) for name in names)
        assert not has_bell(self.session) or self.name in names
        if passes % 2:
            work_as_successor(self.session)
        else:
            clean(self.session)


SCENARIOS = {
    kind.__name__: kind for kind in (Writing, Logging, Producing, Consuming, Voting, Living, Taking)
}


def scenario_of(point: str) -> type[Scenario]:
    """The one scenario in which a child passes `point`."""
    (kind,) = (kind for kind in SCENARIOS.values() if point.startswith(kind.points))
    return kind
