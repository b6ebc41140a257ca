"""The loader: from the plan queue to weights and maps, on all ranks at the same step.

One round at a time goes through these states, and every change of state that another rank must
share follows from a vote (`vote.py`) alone. The vote that commits a round may start the next one:

    idle --(all ranks name the same round)--> staging --(all have staged it)--> commit --> idle
                                                  '----(any rank failed)-----> abort ---> idle

What is decided here alone is only what goes into the ballot: which round waits at the head of the
queue, and whether the stager is done. A stager that is still busy with an aborted round keeps its
rows, in which a late receive may land; another stager with connections of its own takes its place,
and a round for which the rows that are left do not suffice waits.

While the engine's weights are updated (`hold`) the planner's rounds are dropped, and the only ones
that start are those that bring the experts back to where the engine's loader writes them.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ..ipc.rank_segment import RankSegment
from ..ipc.round import RoundError
from ..ipc.status import Field, State
from .candidate import Candidate, checked
from .errand import Result
from .inbox import Inbox, Pending
from .patrol import Patrol
from .round_times import RoundTimes
from .stager_pool import StagerPool
from .vote import Ballot, Outcome, Vote, reason_to_stop

if TYPE_CHECKING:
    from .engine import Engine

log = logging.getLogger("flash_eplb.loader")
T = TypeVar("T")


class Loader:
    """The loader of one rank; all methods belong to the engine's main thread.

    Args:
        engine: whose weights and maps change.
        segment: this rank's segment.
        vote: over all ranks of the group.
        stagers: fetch rows.
        patrol: live experts to look at while no round is under way.
        vote_steps: steps between two votes, equal on all ranks.
        timeout_steps: steps after which a round that is not staged fails.
    """

    def __init__(
        self,
        engine: Engine,
        segment: RankSegment,
        vote: Vote,
        stagers: StagerPool,
        patrol: Patrol,
        vote_steps: int,
        timeout_steps: int,
    ):
        self._engine = engine
        self._shape = segment.header.shape
        self._rank = segment.header.rank
        self._status = segment.status
        self._inbox = Inbox(segment.plans, segment.status, self._rank)
        self._board = segment.board
        self._times = RoundTimes(segment.rounds)
        self._vote = vote
        self._stagers = stagers
        self._patrol = patrol
        self._vote_steps = vote_steps
        self._timeout_steps = timeout_steps
        self._voted: Candidate | None = None
        self._votes_later = False
        self._active: Candidate | None = None
        self._begins_later = False
        self._active_since = 0
        self._step = 0  # of the engine
        self._ticks = 0
        self._transport_epoch = 0
        self.placement = engine.placement.copy()
        self.epoch = 0
        self.mismatch = False
        self.stopped = ""
        self._broken = False
        self._board.write(0, self.placement)
        self._stagers.connect(self._transport_epoch)

    def tick(self, is_step: bool = True) -> bool:
        """Once per step, after the forward pass; returns whether a round was committed.

        Nothing here waits, except for a rank that has not cast the vote it owes.

        Args:
            is_step: of the engine; else all ranks only go on with rounds between two steps.
        """
        self._ticks += 1
        self._step += is_step
        self._times.write()
        if self.stopped:
            return False
        if self._begins_later:
            self._guard(self._begin)
        if self._inbox.has_record():
            self._guard(self._inbox.collect)
        if self._ticks % self._vote_steps:
            if self._votes_later:
                self._cast()
            return False
        try:
            outcome = self._vote.consume()
        except RuntimeError as error:
            self.stop(f"the vote failed: {error}")  # on all ranks, before any acts on it
            return False
        committed = outcome is not None and self._act(outcome)
        # A step with a commit is long enough, and no thread hinders its copies.
        self._votes_later = committed and self._vote_steps > 1
        if not self.stopped and not self._votes_later:
            self._cast()
        if not self.stopped and not committed:
            self._guard(self._look)
        return committed

    def _cast(self) -> None:
        """Issue this rank's vote."""
        self._votes_later = False
        self._voted = self._guard(self._candidate)
        self._vote.issue(self._ballot())

    def hold(self, home: list[bytes] | None = None) -> None:
        """Start no round of the planner's until `release`, and give up the one under way.

        Args:
            home: rounds to be carried out meanwhile, in order, equal on all ranks; they follow on
                the epoch of now.
        """
        self._inbox.hold(home or [])
        self._show(State.HELD)

    def reordering(self, placement: np.ndarray) -> Callable[[], None]:
        """What gives experts other slots on the ranks where they are, and even routing columns in
        all layers: all ranks call it, at the same step, or none does.

        Args:
            placement: int32 [layers, ranks, slots], with the experts of now on every rank.

        Raises:
            MemoryError: there is no room for it; nothing was written.
        """
        from .reorder import reordering

        write = reordering(self._engine, self._rank, self.placement, placement)

        def turn() -> None:
            write()
            self.placement = placement.copy()
            self._turn_epoch()

        return turn

    def release(self) -> None:
        """The weights are those of `placement` again: all ranks call it at the same step.

        Whatever the planner has sent so far was made for an epoch that has passed.
        """
        self._inbox.release()
        if not self.stopped:
            self._turn_epoch()
            self._show(State.IDLE)

    @property
    def is_idle(self) -> bool:
        """Whether no round is under way and none waits that `hold` was given."""
        return self._active is None and not self._inbox.has_home

    @property
    def is_busy(self) -> bool:
        """Whether the stager is at something: a transfer, a look, or opening connections."""
        return self._stagers.busy

    def stop_looking(self) -> None:
        """No stager's answer counts from now on that has not come yet; nothing is under way."""
        self._guard(self._stagers.give_up)

    @property
    def free_rows(self) -> int:
        """Staging rows that no stager holds that hangs."""
        return self._shape.staging_rows - self._stagers.quarantined

    def _guard(self, action: Callable[[], T]) -> T | None:
        """Run `action`; an error of ours stops balancing, by the next vote, and not inference."""
        try:
            return action()
        except Exception:
            log.exception("EP rank %d stops balancing after an error", self._rank)
            self._broken = True
            return None

    def _candidate(self) -> Candidate | None:
        """The round that this rank would start now, or after the commit of one that is staged."""
        self._status.show(Field.QUARANTINED_ROWS, self._stagers.quarantined)
        self._stagers.watch(self._ticks, self._timeout_steps, self._active is not None)
        if self._stagers.busy or (self._active is not None and not self._is_staged()):
            return None
        if self._inbox.is_held:
            return self._checked(home) if (home := self._inbox.head) else None
        if self._active is not None:
            return self._following()
        return self._inbox.choose(self.epoch, self._checked)

    def _following(self) -> Candidate | None:
        """The round after the staged one; if it is not good, that is said after the commit."""
        head = self._inbox.head
        try:
            return self._checked(head) if head and head.round.epoch == self.epoch + 1 else None
        except RoundError:
            return None

    def _checked(self, head: Pending) -> Candidate | None:
        """`head` as a candidate; None if there is no room for it, RoundError if it is bad."""
        if self._voted is not None and self._voted.identity == head.identity:
            return self._voted
        base = self.placement if self._active is None else self._active.after
        candidate = checked(head, self._shape, base)
        return candidate if self._stagers.has_room(candidate.moves) else None

    def _is_staged(self) -> bool:
        result = self._result()
        return result is not None and not result.error

    def _look(self) -> None:
        """Hand the next live expert to a stager that has nothing else to do until the next vote."""
        if self._voted or self._active or self._inbox.is_held or self._stagers.busy:
            return
        beat = self._patrol.next(self._ticks, self.placement[:, self._rank])
        if beat is not None:
            self._stagers.look(beat)

    def _ballot(self) -> Ballot:
        staged = failed = False
        failed_us = 0
        latest = self._stagers.result
        if self._active is not None:
            failed_us = time.monotonic_ns() // 1000
            result = self._result()
            if result is not None:
                staged, failed = not result.error, bool(result.error)
                failed_us = result.failed_us or failed_us
            elif self._ticks - self._active_since >= self._timeout_steps:
                failed = True
                failed_us *= self._stagers.waits  # else the others may wait for this one
            # A rank that has voted staged may not fail it, and this one may have: so no answer
            # takes back what an earlier vote said, and `hold` lets a staged round commit.
            failed = failed or (not staged and self._is_refused(self._active))
        return Ballot(
            candidate=self._voted.identity if self._voted else 0,
            staged=staged,
            failed=failed,
            failed_us=failed_us,
            changed=latest is not None and latest.changed,
            mismatch=self.mismatch,
            stopped=self._broken,
            epoch=self.epoch,
        )

    def _result(self) -> Result | None:
        """The stager's answer to the round under way; None if it has none yet."""
        result, active = self._stagers.result, self._active
        return result if result and active and result.identity == active.identity else None

    def _act(self, outcome: Outcome) -> bool:
        """What follows from a vote, the same on every rank; returns whether a round was committed.

        All ranks name a round to start only if none is under way, or all have staged it.
        """
        reason = reason_to_stop(outcome)
        if reason:
            self.stop(reason)
            return False
        if self._active is not None and outcome.failed_rank >= 0:
            self._abort(outcome.failed_rank)
            return False
        committed = self._active is not None and outcome.staged
        if committed:
            self._commit()
        if self._active is None and outcome.start and not self._is_refused(self._voted):
            self._start(at_once=not committed)
        return committed

    def _is_refused(self, candidate: Candidate | None) -> bool:
        """Whether `hold` has come since all ranks voted for this round; the same on all of them."""
        return self._inbox.is_held and candidate is not None and candidate.is_planners

    def _start(self, at_once: bool) -> None:
        """The voted round is under way; its transfer begins in the next step if this one commits,
        so that no thread of ours competes with the copies of a commit, here or on another rank."""
        assert self._voted is not None
        self._active = active = self._voted
        self._active_since = self._ticks
        self._times.start(self._step)
        self._inbox.take(active.identity)
        self._show(State.STAGING)
        self._begins_later = not at_once
        if at_once:
            self._guard(self._begin)

    def _begin(self) -> None:
        """Hand the round under way to the stager."""
        active = self._active
        assert active is not None
        self._begins_later = False
        self._times.begin()
        tables = functools.partial(active.tables, self._engine)
        self._stagers.begin(active.identity, active.moves, self._transport_epoch, tables)

    def _commit(self) -> None:
        """Rows and tables, then the board: on all ranks between the same two steps."""
        active, result = self._active, self._result()
        assert active is not None
        assert result is not None
        self._times.commit()
        result.commit()
        self.placement = active.after
        self._turn_epoch()
        rows = len(self._stagers.rows)
        self._status.add(Field.MOVED_ROWS, rows)
        self._status.add(Field.RECEIVED_BYTES, result.received_bytes)
        self._status.add(Field.COMMITTED)
        self._times.end(active.round, self._step, result, rows)
        self._inbox.tell(Field.COMMITTED_ROUND, active.round)
        self._rest()

    def _rest(self) -> None:
        """No round is under way now."""
        self._active = None
        self._show(State.HELD if self._inbox.is_held else State.IDLE)

    def _show(self, state: State) -> None:
        """A loader that has stopped has stopped, whatever else is so."""
        self._status.show(Field.STATE, State.STOPPED if self.stopped else state)

    def _turn_epoch(self) -> None:
        self.epoch += 1
        self._board.write(self.epoch, self.placement)
        self._status[Field.EPOCH] = self.epoch

    def _abort(self, failed_rank: int) -> None:
        """Forget the round on all ranks; the next one uses fresh connections."""
        assert self._active is not None
        waited, result = self._ticks - self._active_since, self._result()
        self._guard(self._stagers.give_up)
        rows = self._status[Field.QUARANTINED_ROWS] = self._stagers.quarantined
        log.warning(
            "round %d aborted after %d steps: EP rank %d failed%s",
            self._active.round.sequence,
            waited,
            failed_rank,
            f"; its transfer still runs here, {rows} staging rows are left to it" if rows else "",
        )
        self._transport_epoch += 1
        self._drop_active(result)

    def _drop_active(self, result: Result | None) -> None:
        assert self._active is not None
        self._inbox.drop_home()
        self._voted = None  # it may have been checked against what is not committed now
        self._status.add(Field.ABORTED)
        self._status.add(Field.DAMAGED, int(result is not None and result.damaged))
        self._times.end(self._active.round, self._step, result, rows=0)
        self._times.write()
        self._inbox.tell(Field.DROPPED_ROUND, self._active.round)
        self._inbox.drop_plan(self._active.round)
        self._rest()

    def stop(self, reason: str) -> None:
        """Balance no more: all ranks call this at the same step, for the same reason."""
        self.stopped = reason
        if self._active is not None:
            self._drop_active(self._result())
        self._show(State.STOPPED)
        log.error(
            "balancing stopped on EP rank %d, experts stay where they are: %s", self._rank, reason
        )

    def close(self) -> None:
        """Let the stagers' threads end."""
        self._times.write()
        self._stagers.close()
