"""The vote: how all ranks come to the same decision at the same step without waiting.

Every few steps each rank casts a few words into the ballot box (`ipc/ballot_box.py`), and consumes
the minimum over all ranks exactly as many steps later. All ranks then look at the same numbers at
the same step, so whatever follows from them alone happens everywhere or nowhere. A vote that was
issued is given up by all ranks or by none: who no longer waits for a rank closes the vote in the
box, unless it is complete by then.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

from ..ipc.ballot_box import CLOSED, COMPLETE, BallotBox

log = logging.getLogger("flash_eplb.loader")

_QUIET_SECONDS = 10.0
_LOOK_SECONDS = 1.0  # from one look at a rank that is late to the next

_MOST_RANKS = 1 << 12
_FAR = 1 << 50  # microseconds, later than any failure


class Ballot(NamedTuple):
    """What one rank says.

    Attributes:
        candidate: identity of the round it would start, 0 if none.
        staged: whether the round under way stands in its staging rows, proved.
        failed: whether the round under way failed here.
        failed_us: when it did, by the host's monotonic clock; 0 if it hangs, and not for others.
        mismatch: whether its steps and its forward passes differ.
        changed: whether live weights have changed under it.
        stopped: whether it has stopped balancing.
        epoch: rounds committed here.
    """

    candidate: int = 0
    staged: bool = False
    failed: bool = False
    failed_us: int = 0
    mismatch: bool = False
    changed: bool = False
    stopped: bool = False
    epoch: int = 0


class Outcome(NamedTuple):
    """What all ranks said; equal on all of them. Ranks are -1 where nobody said it.

    Attributes:
        start: identity of the round that all ranks would start; 0 unless all name the same.
        staged: whether all ranks have staged the round under way.
        failed_rank: the rank that failed first: its peers fail by it.
        mismatch_rank, changed_rank, stopped_rank: the highest rank that said so.
        diverged: whether the ranks have committed different numbers of rounds.
    """

    start: int
    staged: bool
    failed_rank: int
    mismatch_rank: int
    changed_rank: int
    stopped_rank: int
    diverged: bool


def to_words(ballot: Ballot, rank: int) -> list[int]:
    """The ballot as integers whose minimum over the ranks tells what `Outcome` needs."""
    flag = -(rank + 1)
    return [
        ballot.candidate,
        -ballot.candidate,
        int(ballot.staged),
        (ballot.failed_us - _FAR) * _MOST_RANKS + flag if ballot.failed else 0,
        flag if ballot.mismatch else 0,
        flag if ballot.changed else 0,
        flag if ballot.stopped else 0,
        ballot.epoch,
        -ballot.epoch,
    ]


def to_outcome(words: list[int]) -> Outcome:
    """Read the minimum over all ranks' words."""
    lowest, minus_highest = words[0], words[1]
    return Outcome(
        start=lowest if lowest == -minus_highest else 0,
        staged=words[2] == 1,
        failed_rank=(-words[3] - 1) % _MOST_RANKS if words[3] else -1,
        mismatch_rank=-words[4] - 1,
        changed_rank=-words[5] - 1,
        stopped_rank=-words[6] - 1,
        diverged=words[7] != -words[8],
    )


def reason_to_stop(outcome: Outcome) -> str:
    """Why all ranks stop balancing after this vote; empty if they go on."""
    if outcome.mismatch_rank >= 0:
        return (
            f"EP rank {outcome.mismatch_rank} has run a forward pass without the step that "
            "belongs to it, so the ranks no longer count the same steps"
        )
    if outcome.changed_rank >= 0:
        return (
            f"EP rank {outcome.changed_rank} holds an expert whose weights are not those of the "
            "start: they were written in a way that flash_eplb does not see, and maybe into slots "
            "that hold other experts by now (its log names the first); restart the engine"
        )
    if outcome.stopped_rank >= 0:
        return f"EP rank {outcome.stopped_rank} has stopped balancing"
    if outcome.diverged:
        return "the ranks have committed different numbers of rounds"
    return ""


class Vote:
    """One vote at a time over a ballot box, from the main thread only.

    Args:
        box: of the group.
        rank: of this process.
        why_silent: why a rank will not vote any more, as in "is dead"; "" if it may.
        patience: seconds after which a vote that a living rank owes is given up: as long as the
            engine would wait for that rank in a collective of its own.
    """

    def __init__(
        self, box: BallotBox, rank: int, why_silent: Callable[[int], str], patience: float
    ):
        self._box = box
        self._rank = rank
        self._why_silent = why_silent
        self._patience = patience
        self._number = 0
        self._is_owed = False

    def issue(self, ballot: Ballot) -> None:
        """Cast this rank's ballot; does not wait."""
        assert not self._is_owed
        self._number += 1
        self._box.cast(self._rank, self._number, to_words(ballot, self._rank))
        self._is_owed = True

    def consume(self) -> Outcome | None:
        """The outcome of the vote that was issued; None if none was.

        Waits for ranks that have not issued it yet, and says so when that takes long.

        Raises:
            RuntimeError: the vote is closed, and no rank acts on it: one that has not issued it is
                dead or has stopped, or patience is out, here or on another rank.
        """
        if not self._is_owed:
            return None
        self._is_owed = False
        missing, words = self._box.tally(self._number)
        return to_outcome(words if missing == COMPLETE else self._wait())

    def _wait(self) -> list[int]:
        waited = looked = 0.0
        last = time.monotonic()
        warned = False
        while True:
            missing, words = self._box.tally(self._number)
            if missing == COMPLETE:
                return words
            if missing == CLOSED:
                raise RuntimeError(
                    f"vote {self._number} was closed by a rank that waits for it no longer; the "
                    "log of that rank says why"
                )
            time.sleep(20e-6)
            now = time.monotonic()
            # While this process was stopped, or its clock jumped, nobody was waited for.
            waited += min(max(0.0, now - last), _LOOK_SECONDS)
            last = now
            if waited - looked >= _LOOK_SECONDS:
                looked = waited
                self._give_up(missing, waited)
            if not warned and waited > _QUIET_SECONDS:
                warned = True
                log.warning(
                    "EP rank %d has waited %.0f s for the vote of EP rank %d",
                    self._rank,
                    _QUIET_SECONDS,
                    missing,
                )

    def _give_up(self, rank: int, waited: float) -> None:
        """Close the vote if `rank` will not cast it, or not in time; it may just have done so."""
        try:
            why = self._why_silent(rank)
        except Exception:  # it cannot be told now; patience decides
            why = ""
        if not why and waited > self._patience:
            why = f"has not voted for {waited:.0f} s"
        number = self._number
        if why and self._box.tally(number)[0] == rank and self._box.close(number):
            raise RuntimeError(f"EP rank {rank} {why}, so vote {number} is closed on all ranks")
