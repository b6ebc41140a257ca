"""Cleaners and starters race for what dead owners left, round after round.

    python tests/ipc/races.py SESSION ROUNDS

All begin at about the same moment, each in a process of its own: two that clean under the session
lock, one that sweeps, one that runs `eplb clean`, and two that start an engine. When one of these
has started, the others go on for a while. It must still have its names then, and all that was dead
must be gone. The next round finds it dead, or alive and about to close.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import signal
import sys
import time
from collections.abc import Callable

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # who forks has no other threads
from forks import Engine, fork, has_bell, kill, leave, left_over, wait_until

from flash_eplb.eplb import cli
from flash_eplb.ipc.liveness import SegmentInUseError, owner_is_alive
from flash_eplb.ipc.names import bell_name, rank_name
from flash_eplb.ipc.rank_segment import RankSegment
from flash_eplb.ipc.session import remove_dead, session_lock, sweep

OVER, WINNER, INODE = range(3)
"""Words of the memory that all share."""

MOST_HEAD_START = 0.004
MORE_SECONDS = 0.005


class Race:
    """One round over what is there."""

    def __init__(self, session: str, rng: random.Random):
        self.session = session
        self.name = rank_name(session, 0)
        self.rng = rng
        self.words = memoryview(mmap.mmap(-1, 8 * 3)).cast("q")
        self.begin = time.monotonic() + 0.01

    def start_at_random(self) -> Callable[[], None]:
        begin = self.begin + self.rng.uniform(0, MOST_HEAD_START)

        def wait() -> None:
            while time.monotonic() < begin:
                pass

        return wait

    def cleaner(self, clean: Callable[[], object]) -> int:
        """A child that does `clean` again and again until the race is over."""
        wait = self.start_at_random()

        def race() -> None:
            wait()
            while not self.words[OVER]:
                clean()

        return fork(race)

    def starter(self, number: int) -> int:
        """A child that starts an engine, which closes at SIGTERM, unless another one has."""
        wait = self.start_at_random()

        def race() -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            wait()
            while not self.words[WINNER]:
                with contextlib.suppress(SegmentInUseError):
                    engine = Engine(self.session, number, ranks=1)
                    self.words[INODE] = inode(self.name)
                    self.words[WINNER] = number
                    signal.sigwait({signal.SIGTERM})
                    engine.close()

        return fork(race)

    def run(self, owner: int | None) -> int:
        """All of it; AssertionError if the winner has lost a name or something else is there.

        Args:
            owner: process of the engine that closes meanwhile, or None.

        Returns:
            The process of the engine that has started.
        """
        cleaners = [
            self.cleaner(lambda: remove(self.session)),
            self.cleaner(lambda: remove(self.session)),
            self.cleaner(lambda: sweep(self.session, patience=0)),
            self.cleaner(lambda: run_clean(self.session)),
        ]
        starters = {number: self.starter(number) for number in (1, 2)}
        if owner is not None:
            self.start_at_random()()
            os.kill(owner, signal.SIGTERM)
            assert os.waitpid(owner, 0)[1] == 0
        wait_until(lambda: self.words[WINNER] > 0, "started")
        winner = starters.pop(self.words[WINNER])
        time.sleep(MORE_SECONDS)
        self.words[OVER] = 1
        for pid in [*cleaners, *starters.values()]:
            assert os.waitpid(pid, 0)[1] == 0, "a racer has failed"
        self.look(winner)
        return winner

    def look(self, winner: int) -> None:
        assert left_over(self.session) == [self.name, bell_name(self.session)]
        assert inode(self.name) == self.words[INODE]
        assert owner_is_alive(self.name)
        found = RankSegment.open(self.name)
        assert (found.segment.pid, found.generation) == (winner, self.words[WINNER])
        assert found.owner_is_alive()
        found.close()


def inode(name: str) -> int:
    return os.stat(f"/dev/shm{name}").st_ino


def remove(session: str) -> None:
    with session_lock(session):
        remove_dead(session)


def run_clean(session: str) -> None:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        cli.clean(session=session, dry_run=False)


def main(session: str, rounds: int) -> None:
    seed = random.getrandbits(32)
    print("seed", seed, flush=True)
    rng = random.Random(seed)
    remove(session)  # once here, so that the children have everything imported
    run_clean(session)
    owner = None
    for _ in range(rounds):
        if owner is not None and rng.random() < 0.5:
            kill(owner)
            owner = None
        if owner is None and rng.random() < 0.5:
            remove(session)
            leave(session)
        owner = Race(session, rng).run(owner)
    kill(owner)
    remove(session)
    assert left_over(session) == []
    assert not has_bell(session)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
