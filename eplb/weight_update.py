"""Weights that change under the balancer: a reload, or an update by a trainer.

An engine's loader writes by the placement of its start, and what an engine saves is loaded by it
again. So before it writes or saves, all experts go back there; after that their digests are taken
anew, and balancing goes on. In between steps may run, and no expert moves.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable

import numpy as np

from ..ipc.round import Round, encode_round
from ..loaders.inbox import HOME
from ..loaders.loader import Loader
from ..planners.plan import make_plan
from .group import Group, UnsupportedError
from .meeting import MeetingError, forget, meet

log = logging.getLogger("flash_eplb.worker")

_GIVEN_UP = "update/given_up"  # in the store: "number why", of the last one that was given up

_MOST_VOTES = 1000  # without a commit, each of which waits for the stager

PATIENCE = 30.0
"""Seconds that a rank waits for the others to be updated too."""


class WeightUpdate:
    """One rank's part in updates of the weights; main thread only, between two steps.

    Args:
        group: the EP group.
        loader: of this rank.
        redigest: takes the digests of all weights anew; UnsupportedError on all ranks if replicas
            differ, or if something would stay behind now when experts move.
        vote_steps, timeout: as of the settings; seconds that a transfer may take.
    """

    def __init__(
        self,
        group: Group,
        loader: Loader,
        redigest: Callable[[], None],
        vote_steps: int,
        timeout: float,
    ):
        self._group = group
        self._loader = loader
        self._initial = loader.placement.copy()  # where the engine's loader writes
        self._redigest = redigest
        self._vote_steps = vote_steps
        self._timeout = timeout
        self._updates = 0
        self._met = ""
        self._known = ""  # what stood at `_GIVEN_UP` when this rank began to write
        self._deadline = 0.0
        self.is_open = False

    def begin(self, step: int) -> bool:
        """Before the engine writes: bring all experts back, on all ranks.

        Args:
            step: this rank's number of steps.

        Returns:
            whether this call has opened the update; false if it was open.

        Raises:
            RuntimeError: the experts are not where the engine would write; nothing may be written.
        """
        self._known = self._given_up()
        if self.is_open:  # an update that failed half-way is begun again
            return False
        self._check_not_stopped()
        self._meet("begin", step, PATIENCE)
        self._updates += 1
        self.is_open = True
        try:
            self._bring_home()
        except Exception:
            self._loader.release()
            self.is_open = False
            raise
        return True

    def give_up(self, why: str) -> None:
        """This rank does not come to the end that it has begun to write for, so that the others
        need not wait for it. One that has begun anew since somebody gave up is not meant."""
        number = int(self._known.partition(" ")[0] or 0) + 1
        with contextlib.suppress(RuntimeError):  # the store ends with the engine
            self._group.store.compare_set(_GIVEN_UP, self._known, f"{number} {why}")

    def _given_up(self) -> str:
        store = self._group.store
        return store.get(_GIVEN_UP).decode() if store.check([_GIVEN_UP]) else ""

    def _why_in_vain(self) -> str:
        """Why the others will not come to the end, if one of them has said so; else empty."""
        found = self._given_up()
        return found.partition(" ")[2] if found != self._known else ""

    def end(self, step: int, took: float = 0.0) -> None:
        """After the engine has written: new digests, and balance on.

        Args:
            step: this rank's number of steps.
            took: seconds that this rank has spent on it; another may take as long again.
        """
        if not self.is_open:
            return
        self._meet("end", step, max(PATIENCE, took))
        try:
            self._redigest()
        except UnsupportedError as error:
            self._loader.stop(f"after an update of the weights, {error}")
            return
        finally:
            self.is_open = False
        if not self._loader.stopped:
            self._loader.release()
            log.info(
                "EP rank %d: weights were written or read, balancing goes on", self._group.rank
            )

    def _check_not_stopped(self) -> None:
        if self._loader.stopped and not self._is_home():
            raise RuntimeError(
                "flash_eplb has moved experts and has stopped since, so it cannot bring them back "
                f"to where vLLM writes weights ({self._loader.stopped}); restart the engine"
            )

    def _meet(self, what: str, step: int, patience: float) -> None:
        group, is_end = self._group, what == "end"
        name = f"update/{self._updates}/{step}/{what}"
        why_in_vain = self._why_in_vain if is_end else lambda: ""
        try:
            meet(group.store, name, group.rank, group.ranks, patience, why_in_vain)
        except MeetingError as error:
            then = "nothing was written; pause generation on all of them first"
            if is_end:
                self.give_up(str(error))  # who comes later would wait alone
                then = "no expert moves until weights have been updated on all of them"
            raise RuntimeError(
                f"flash_eplb needs all EP ranks at the same step to update or save weights: "
                f"{error}; {then}"
            ) from error
        if self._met and group.rank == 0:  # who has come here has left the meeting before
            forget(group.store, self._met, group.ranks)
        self._met = name

    def _bring_home(self) -> None:
        loader = self._loader
        loader.hold()
        self._run()
        self._check_not_stopped()
        if not self._is_home():
            self._move_home()
        self._reorder()
        log.info("EP rank %d: experts are back where vLLM writes weights", self._group.rank)

    def _move_home(self) -> None:
        loader = self._loader
        rows = min(self._group.gather(loader.free_rows))
        if rows < 1:
            raise RuntimeError("all staging rows are taken by transfers that hang; try again later")
        rounds = make_plan(loader.placement, self._initial).rounds(rows)
        shape = dict(zip(("layers", "ranks", "slots"), self._initial.shape, strict=True))
        records = [
            Round(
                generation=HOME,
                plan=self._updates,
                sequence=number,
                last=number == len(rounds) - 1,
                epoch=loader.epoch + number,
                moves=part.moves.tobytes(),
                **shape,
            )
            for number, part in enumerate(rounds)
        ]
        loader.hold([encode_round(record) for record in records])
        self._run()
        self._check_not_stopped()
        if not self._is_home():
            raise RuntimeError("a transfer failed (the log says which); try again")

    def _reorder(self) -> None:
        """An expert that was on its rank all the time may have come to another slot, and its layer
        may have other routing columns: put right on all ranks, or on none."""
        prepared: list[Callable[[], None]] = []
        try:
            self._group.together(lambda: prepared.append(self._loader.reordering(self._initial)))
        except UnsupportedError as error:
            raise RuntimeError(
                f"experts cannot go back to where vLLM writes weights: {error}"
            ) from error
        prepared[0]()

    def _is_home(self) -> bool:
        """Whether every expert is on its first ranks, in whatever slots."""
        return np.array_equal(np.sort(self._loader.placement), np.sort(self._initial))

    def _run(self) -> None:
        """Tick without steps, alike on all ranks, until no round is under way and nobody reads
        weights; RuntimeError on all of them if that does not come."""
        loader = self._loader
        ticks, epoch = 0, loader.epoch
        while not loader.stopped and (ticks < 2 * self._vote_steps or not loader.is_idle):
            self._wait()
            loader.tick(is_step=False)
            # The votes that were cast before must be heard. What counts here is the same on all.
            ticks = ticks + 1 if loader.epoch == epoch else 0
            epoch = loader.epoch
            if ticks > _MOST_VOTES * self._vote_steps:
                raise RuntimeError("a transfer hangs (the log says which); try again later")
        self._wait()
        if loader.is_busy:
            loader.stop_looking()

    def _wait(self) -> None:
        """For the stager, which has the time of a transfer for what it is at."""
        if not self._loader.is_busy:
            self._deadline = 0.0
            return
        self._deadline = self._deadline or time.monotonic() + self._timeout
        while self._loader.is_busy and time.monotonic() < self._deadline:
            time.sleep(0.0005)
