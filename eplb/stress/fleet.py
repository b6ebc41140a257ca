"""The processes of a stress: the engine's ranks and the planner. Only those started here are ended.

Each writes its words to a log of its own in the stress's folder.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from ...ipc.liveness import owner_is_alive
from ...ipc.names import planner_name
from ...ipc.session import remove_dead, session_lock
from ...ipc.status import Field
from ...planners.group import Group
from ..child import command_of
from .figures import Order, Planned, Rank
from .setup import Setup

_COMPILE_SECONDS = 1800.0
_START_SECONDS = 120.0
_END_SECONDS = 20.0


class FleetError(RuntimeError):
    """A process of the stress does not do what it is there for; the text has its last words."""


class Fleet:
    """Starts, stops and looks at the processes of one stress.

    Args:
        setup: of the stress; its folder is there.
        settings: `EPLB_*` variables of the processes.

    Attributes:
        figures: what the processes tell.
        group: the living engine's segments, as this process reads them.
        hosts, planner: the processes.
        is_losing: whether a process of the engine was killed, and the engine is to start again.
        stopping: set from outside: whoever waits for something gives up.
    """

    def __init__(self, setup: Setup, settings: dict[str, str]):
        self.setup = setup
        self.figures = setup.figures(create=True)
        self.group: Group | None = None
        self.hosts: list[subprocess.Popen[bytes]] = []
        self.planner: subprocess.Popen[bytes] | None = None
        self.stopping = False
        self.is_losing = False
        self._environment = {**os.environ, **settings}

    def start_engine(self) -> None:
        """Start all ranks and wait until they step.

        Raises:
            FleetError: a process ended instead, or it takes too long.
        """
        self.figures.ranks[:] = 0
        self.figures.order[Order.GO] = self.figures.order[Order.END_STEP] = 0
        generation = secrets.randbits(62) | 1
        self.hosts = [
            self._start("host", str(host), str(generation)) for host in range(self.setup.hosts)
        ]
        self._await("the engine's ranks are not ready", lambda: self._all(Rank.READY))
        self.figures.order[Order.GO] = 1
        self._await("the engine's ranks do not step", lambda: self._all(Rank.STEP))
        self.group = Group.attach(self.setup.session)

    def start_planner(self) -> None:
        """Start a planner; `planner_is_serving` tells when it has found the engine."""
        self.figures.planned[:] = 0
        self.planner = self._start("planner_process")

    def await_planner(self) -> None:
        """Wait until the planner has compiled its kernels; FleetError if it ends instead."""
        name = planner_name(self.setup.session)
        self._await("the planner is not ready", lambda: owner_is_alive(name), _COMPILE_SECONDS)

    def planner_is_serving(self) -> bool:
        """Whether the planner of now has found the engine; FleetError if it has ended."""
        assert self.planner is not None
        self._check(self.planner, "planner_process")
        return bool(self.figures.planned[Planned.SERVING])

    def kill_planner(self) -> None:
        """SIGKILL, wherever it is."""
        assert self.planner is not None
        self.planner.kill()
        self.planner.wait()
        self.planner = None

    def lose(self, number: int) -> None:
        """SIGKILL one process of the engine; until `leave_engine` the others may end, too."""
        self.is_losing = True
        self.hosts[number].kill()
        self.hosts[number].wait()

    def stop_ranks(self) -> None:
        """SIGKILL every process of the engine, as a serving engine ends when a rank is lost."""
        for host in self.hosts:
            host.kill()
        for host in self.hosts:
            host.wait()

    def leave_engine(self) -> None:
        """Its processes have ended, and their segments are of no more use."""
        self.is_losing = False
        self.hosts = []
        if self.group is not None:
            self.group.close()
            self.group = None

    def end_engine(self) -> None:
        """Let all ranks end after the same step, and wait for them.

        Raises:
            FleetError: they do not end, or one fails.
        """
        if not self.hosts:
            return
        interval = 64
        self.figures.order[Order.END_STEP] = int(self.steps()) + 2 * interval
        deadline = time.perf_counter() + _END_SECONDS + 4 * interval / (self.setup.rate or 100)
        for number, host in enumerate(self.hosts):
            try:
                code = host.wait(max(0.1, deadline - time.perf_counter()))
            except subprocess.TimeoutExpired:
                raise FleetError(f"{self._log('host', number)} does not end") from None
            if code:
                raise FleetError(f"{self._log('host', number)} ended with {code}")
        self.hosts = []

    def end_planner(self) -> None:
        """SIGTERM, as a user would; FleetError if it fails or does not end."""
        if self.planner is None:
            return
        self.planner.terminate()
        try:
            code = self.planner.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            raise FleetError("the planner does not end when asked to") from None
        self.planner = None
        if code:
            raise FleetError(f"the planner ended with {code}: {self.last_words('planner_process')}")

    def close(self) -> None:
        """Kill what still runs, and remove what it left."""
        for process in (*self.hosts, *([self.planner] if self.planner else [])):
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()
        self.planner = None
        self.leave_engine()
        with session_lock(self.setup.session):
            remove_dead(self.setup.session)

    def heed(self) -> None:
        """KeyboardInterrupt if the stress is to stop: raised where it can do no harm."""
        if self.stopping:
            raise KeyboardInterrupt

    def check(self) -> None:
        """FleetError if a process has ended that should run."""
        for number, host in enumerate(self.hosts):
            if not self.is_losing:
                self._check(host, "host", number)
        if self.planner is not None:
            self._check(self.planner, "planner_process")

    def steps(self) -> int:
        """Steps of the engine of now: those of the rank that is ahead."""
        return int(self.figures.ranks[:, Rank.STEP].max())

    def slowest(self) -> int:
        """Steps of the rank that is behind."""
        return int(self.figures.ranks[:, Rank.STEP].min())

    def epoch(self) -> int:
        """Rounds that all ranks have committed."""
        return int(self.figures.ranks[:, Rank.EPOCH].min())

    def total(self, field: Field) -> int:
        """A status word, summed over the ranks."""
        assert self.group is not None
        return sum(rank.status[field] for rank in self.group.ranks)

    def last_words(self, kind: str, number: int = 0) -> str:
        """The end of a process's log, in one line."""
        lines = self._path(kind, number).read_text(errors="replace").strip().splitlines()
        return " | ".join(lines[-3:])

    def words(self, kind: str, number: int = 0) -> str:
        """A process's log; a planner's holds those of all planners so far."""
        return self._path(kind, number).read_text(errors="replace")

    def start_second(self) -> subprocess.Popen[bytes]:
        """Start the first process of another engine, which must not start; its words are in
        `second_words`."""
        folder = Path(self.setup.folder) / "second"
        folder.mkdir(exist_ok=True)
        session = self.setup.session[:28] + "-2nd"
        setup = msgspec.structs.replace(
            self.setup, folder=str(folder), session=session, weights=False
        )
        setup.figures(create=True)
        return self._start("host", "0", "1", setup=setup)

    def second_words(self) -> str:
        """What the other engine has said."""
        return (Path(self.setup.folder) / "second" / "host-0.log").read_text(errors="replace")

    def _all(self, word: Rank) -> bool:
        return bool(self.figures.ranks[:, word].all())

    def _path(self, kind: str, number: int = 0) -> Path:
        return Path(self.setup.folder) / f"{kind}-{number}.log"

    def _log(self, kind: str, number: int) -> str:
        return f"{kind} {number} ({self.last_words(kind, number)})"

    def _start(
        self, kind: str, *arguments: str, setup: Setup | None = None
    ) -> subprocess.Popen[bytes]:
        setup = setup or self.setup
        command = command_of(f"stress.{kind}", setup.encoded(), *arguments)
        number = int(arguments[0]) if arguments else 0
        with open(Path(setup.folder) / f"{kind}-{number}.log", "ab") as log:
            return subprocess.Popen(
                command,
                env={**self._environment, "EPLB_SESSION": setup.session},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the supervisor alone
            )

    def _check(self, process: subprocess.Popen[bytes], kind: str, number: int = 0) -> None:
        code = process.poll()
        if code is not None:
            raise FleetError(f"{self._log(kind, number)} ended with {code}")

    def _await(self, what: str, done: Callable[[], bool], seconds: float = _START_SECONDS) -> None:
        deadline = time.perf_counter() + seconds
        while not done():
            self.check()
            self.heed()
            if time.perf_counter() > deadline:
                raise FleetError(f"{what} after {seconds:.0f} s")
            time.sleep(0.02)
