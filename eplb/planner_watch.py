"""EP rank 0's eye on the planner: says when none is there or it is silent; spawns one if told."""

from __future__ import annotations

import logging
import os
import subprocess
import time

from ..ipc.liveness import SegmentError, owner_is_alive
from ..ipc.names import planner_name
from ..planners.life import silent_planner
from .child import command_of
from .config import Config

log = logging.getLogger("flash_eplb.worker")

_LOOK_EVERY = 2.0
_GRACE = 10.0
_SPAWN_AFTER = (10.0, 300.0)
"""Seconds from one start of a planner to the next: at first, and at most where they end at once."""

_STEADY = 60.0
"""Seconds for which a planner has lived that did not end at once."""

_USELESS = 2
"""Exit code of a planner whose settings, policy or files cannot be used: so it is for the next."""


class PlannerWatch:
    """Looks for a living planner now and then; `look` costs nothing in between."""

    def __init__(self, config: Config):
        self._config = config
        self._name = planner_name(config.session)
        self._alive: bool | None = None
        self._doubted = False
        self._silent = False
        self._begin = time.monotonic()
        self._next_look = 0.0
        self._next_spawn = self._spawned = 0.0
        self._pause = _SPAWN_AFTER[0]
        self._may_spawn = config.spawn_planner
        self._process: subprocess.Popen[bytes] | None = None

    def look(self) -> None:
        """Warn once when there is no planner or it is silent, and again whenever that changes."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_EVERY
        try:
            alive = owner_is_alive(self._name)
        except SegmentError as error:
            alive = False
            log.debug("no planner of ours: %s", error)
        if alive and not self._alive:
            log.info("a planner serves session %r", self._config.session)
        elif not alive and self._may_spawn:
            self._spawn(now)
        elif not alive and self._alive is not False:
            if self._alive is None and now - self._begin < _GRACE:
                return
            log.warning(
                "no planner serves session %r, experts stay where they are; "
                "start one with `EPLB_SESSION=%s eplb planner`",
                self._config.session,
                self._config.session,
            )
        self._alive = alive
        self._listen(alive)

    def _listen(self, alive: bool) -> None:
        """Say once that a living planner is silent, at two looks, for the clock may jump."""
        why = silent_planner(self._config.session) if alive else ""
        if why and self._doubted and not self._silent:
            self._silent = True
            log.warning("the %s", why)
        elif self._silent and not why:
            self._silent = False
            if alive:
                log.info("the planner of session %r shows life again", self._config.session)
        self._doubted = bool(why)

    def _spawn(self, now: float) -> None:
        """Start a planner, each later than the last if they do not live; it ends with the
        workers."""
        if self._process is not None and not self._has_ended(self._process, now):
            return
        self._process = None
        if not self._may_spawn or now < self._next_spawn:
            return
        self._spawned, self._next_spawn = now, now + self._pause
        self._pause = min(2 * self._pause, _SPAWN_AFTER[1])
        parent = str(os.getpid())  # we may be killed before it has found the engine
        command = command_of("cli", "planner", "--exit-with-engine", "--parent", parent)
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
            # It inherits the core that this worker computes on; give it all, and a low priority.
            os.sched_setaffinity(self._process.pid, range(os.cpu_count() or 1))
            niceness = max(10, os.getpriority(os.PRIO_PROCESS, 0))
            os.setpriority(os.PRIO_PROCESS, self._process.pid, niceness)
        except OSError as error:
            log.warning("the planner could not be started as it should be: %s", error)

    def _has_ended(self, process: subprocess.Popen[bytes], now: float) -> bool:
        """Whether the planner has, and what follows from how."""
        code = process.poll()
        if code is None:
            return False
        if code == _USELESS:
            self._may_spawn = False
            log.error(
                "the planner ended with exit code 2: its settings, policy or files cannot be used, "
                "as it has said; no planner serves session %r, experts stay where they are: put "
                "that right and restart the engine, or start one with `EPLB_SESSION=%s eplb "
                "planner`",
                self._config.session,
                self._config.session,
            )
            return True
        if now - self._spawned >= _STEADY:
            self._pause, self._next_spawn = _SPAWN_AFTER[0], now
        log.warning(
            "the planner ended with exit code %s; another is started in %.0f s",
            code,
            max(0.0, self._next_spawn - now),
        )
        return True

    def close(self) -> None:
        """End the planner that was spawned here, if any."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
