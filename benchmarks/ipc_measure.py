"""Times the writer's call at a steady pace, and the throughput to a reader without one."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from .ipc_ends import Size, Writer
from .ipc_peers import KINDS, MEMCPY, OURS, RingWriter
from .ipc_run import DONE, LONGEST, PeerError, ReaderProcess, Run, stamp

BLOCK = 500  # calls of ours, then as many of memcpy
PACE = 100_000  # nanoseconds from one call to the next; a call that takes longer sets the pace
QUANTILES = (50, 99, 99.9)


@dataclass(frozen=True)
class Amount:
    """How much is measured: `calls` timed and `records` received per round, of a fast peer."""

    rounds: int
    calls: int
    records: int


@dataclass
class Cell:
    """One peer at one size; times in microseconds.

    Attributes:
        rounds: times of each round's calls.
        rates: each round's records per second that the reader received; of memcpy, written.
        losses: each round's share of records overwritten before the reader had them.
        fault: why it was not run, or "".
    """

    peer: str
    size: Size
    rounds: list[np.ndarray] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    fault: str = ""

    @property
    def calls(self) -> int:
        """Calls that were timed."""
        return sum(map(len, self.rounds))

    @property
    def rate(self) -> float:
        """The median of the rounds' rates."""
        return float(np.median(self.rates)) if self.rates else np.nan

    @property
    def lost(self) -> float:
        """The median of the rounds' losses."""
        return float(np.median(self.losses)) if self.losses else np.nan

    def per_round(self, quantile: float) -> np.ndarray:
        """The quantile of each round's times."""
        return np.array([np.percentile(times, quantile) for times in self.rounds])

    def time(self, quantile: float) -> float:
        """The median of the rounds' p50 or p99; of p99.9, that of all calls together."""
        if self.fault or not self.rounds:
            return np.nan
        if quantile > 99:
            return float(np.percentile(np.concatenate(self.rounds), quantile))
        return float(np.median(self.per_round(quantile)))


class SizeBench:
    """All peers at one size, their readers attached to one process."""

    def __init__(self, run: Run, size: Size, amount: Amount):
        self._run, self._size, self._amount = run, size, amount
        self._counts = np.random.default_rng(0).integers(0, 4096, size.shape, np.int32)
        self._numbers = itertools.count(1)
        self._writers: dict[str, Writer] = {}
        self.cells = {name: Cell(name, size) for name in (OURS, MEMCPY, *KINDS)}

    def measure(self) -> list[Cell]:
        """Every peer's cell; one that fails has a `fault`."""
        try:
            for name in KINDS:
                self._guard(name, self._open)
            gc.collect()
            gc.freeze()
            for _ in range(self._amount.rounds):
                for name in list(self._writers):
                    self._guard(name, self._round)
                for name in list(self._writers):
                    self._guard(name, self._throughput)
                self._memcpy_throughput()
        finally:
            for name in list(self._writers):
                self._close(name)
        return list(self.cells.values())

    def _guard(self, name: str, step: Callable[[str], None]) -> None:
        try:
            step(name)
        except Exception as error:
            if name == OURS:
                raise
            why = str(error) if isinstance(error, PeerError) else f"{type(error).__name__}: {error}"
            self.cells[name].fault = why
            self._close(name)

    def _open(self, name: str) -> None:
        writer = KINDS[name].writer(self._run, self._size)
        self._writers[name] = writer
        self._reader.attach(name, self._size, writer)
        with self._reader.following(name, self._counts):  # compile and import, out of the way
            for _ in range(3):
                self._times(writer.write, 100)

    def _close(self, name: str) -> None:
        writer = self._writers.pop(name, None)
        if writer is not None:
            with suppress(PeerError):
                self._reader.detach(name)
            writer.close()

    @property
    def _reader(self) -> ReaderProcess:
        return self._run.reader

    def _round(self, name: str) -> None:
        writer = self._writers[name]
        calls = int(self._amount.calls * KINDS[name].calls)
        with self._reader.following(name, self._counts):
            if isinstance(writer, RingWriter):
                self._in_turn(writer, calls)
            else:
                self.cells[name].rounds.append(self._times(writer.write, calls))

    def _in_turn(self, writer: RingWriter, calls: int) -> None:
        blocks = range(max(1, calls // BLOCK))
        both = [(self._times(writer.write), self._times(writer.copy)) for _ in blocks]
        for name, times in zip((OURS, MEMCPY), zip(*both, strict=True), strict=True):
            self.cells[name].rounds.append(np.concatenate(times))

    def _times(self, write: Callable[[np.ndarray], None], calls: int = BLOCK) -> np.ndarray:
        """Microseconds of each call; between two calls the thread yields but does not sleep."""
        counts, clock, sleep = self._counts, time.perf_counter_ns, time.sleep
        times = np.empty(calls, np.int64)
        for call, number in zip(range(calls), self._numbers, strict=False):
            stamp(counts, number)
            begin = clock()
            write(counts)
            times[call] = clock() - begin
            while clock() < begin + PACE:
                sleep(0)
        return times / 1e3

    def _throughput(self, name: str) -> None:
        write, kind = self._writers[name].write, KINDS[name]
        wanted = int(self._amount.records * kind.records * _lightness(self._size))
        first = next(self._numbers)
        with self._reader.counting(name, first, wanted) as answers:
            began = time.monotonic_ns()
            self._write_until_done(write, first, None if kind.overwrites else wanted)
        received, lost, came = answers[0]
        cell = self.cells[name]
        cell.rates.append(received / (came - began) * 1e9)
        cell.losses.append(lost / max(1, received + lost))

    def _write_until_done(self, write: Callable, first: int, limit: int | None) -> None:
        counts, words = self._counts, self._run.words
        deadline = time.monotonic() + LONGEST
        written = 0
        while not words[DONE] and written != limit:
            stamp(counts, first + written)
            write(counts)
            written += 1
            if not written % 1024 and time.monotonic() > deadline:
                break
        self._numbers = itertools.count(first + written)
        while not words[DONE] and time.monotonic() < deadline:
            time.sleep(0.0005)

    def _memcpy_throughput(self) -> None:
        ring = self._writers[OURS]
        assert isinstance(ring, RingWriter)
        records = int(self._amount.records * KINDS[OURS].records * _lightness(self._size))
        began = time.monotonic_ns()
        for number in range(records):
            stamp(self._counts, number)
            ring.copy(self._counts)
        self.cells[MEMCPY].rates.append(records / (time.monotonic_ns() - began) * 1e9)


def _lightness(size: Size) -> float:
    """Fewer records where they are large."""
    return min(1.0, (64 * 1024 / size.nbytes) ** 0.5)
