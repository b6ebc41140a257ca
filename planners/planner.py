"""The planner: an asyncio loop that turns heat into plans and sends them, one at a time.

It sleeps on the doorbell, which the workers ring once per episode and after a commit, and looks
once a second in any case. Heat is drained on the loop; planning runs in a thread on kernels that
release the GIL. It owns nothing but its session lock: killed at any point, inference goes on and a
successor starts from the placement boards.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from ..ipc.doorbell import Doorbell
from ..ipc.limits import LimitError
from ..ipc.liveness import SegmentAbsentError, SegmentError, SegmentInUseError
from ..ipc.names import bell_name, planner_name
from ..ipc.segment import Segment, take_name
from ..ipc.session import engines, remove_dead, session_lock
from .engine_loop import EngineLoop, Pace
from .expert_map import ExpertMap, SavedPlacement
from .group import Group, RankMissingError
from .life import show_life, silent_planner
from .policy import Policy
from .recorder import MakeRecorder, NoRecorder

log = logging.getLogger("flash_eplb.planner")

_LOOK_FOR_ENGINE = 0.5
_LOOK_AT_RANKS = 1.0
_CLEANING_SECONDS = 2.0  # for the session lock, which the loop waits for
_LOOKS_BEFORE_HINT = 120
_LOOKS_BEFORE_REFUSAL = 10  # an engine that is just starting is not ready for a moment


class _PlanThreads(Executor):
    """Each call in a thread of its own, for which nothing waits when the process ends.

    A policy that hangs would hold up the end of a ThreadPoolExecutor, and of the interpreter; one
    that hangs in a pool of its own still does.
    """

    def __init__(self) -> None:
        self._last = threading.Thread()

    def submit(self, call: Callable, /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()

        def run() -> None:
            try:
                result = call(*args, **kwargs)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        self._last = threading.Thread(target=run, name="eplb-plan", daemon=True)
        self._last.start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let a plan that is under way end, but for no more than a second."""
        if self._last.ident is not None:
            self._last.join(1.0)


class Planner:
    """Serves the engine of one session.

    Args:
        session: name of the session.
        make_policy: called with (ranks, slots) when an engine is there, and with
            routing="by_source" if its ranks send all of an expert's tokens to one replica.
        pace: when to plan.
        exit_with_engine: return when the engine is gone instead of waiting for the next.
        ranks_per_node: consecutive ranks that share a node; None if all do.
        make_recorder: called with the engine's shape; None records nothing.
        initial: placement that an engine which has committed nothing is brought to first.
        saved: told of an engine's placement after each plan.
        parent: process that started this one for its engine: when it is dead, no engine is waited
            for; 0 if that is nobody's concern.
    """

    def __init__(
        self,
        session: str,
        make_policy: Callable[..., Policy],
        pace: Pace,
        exit_with_engine: bool = False,
        ranks_per_node: int | None = None,
        make_recorder: MakeRecorder | None = None,
        initial: ExpertMap | None = None,
        saved: SavedPlacement | None = None,
        parent: int = 0,
    ):
        self._session = session
        self._make_policy = make_policy
        self._pace = pace
        self._exit_with_engine = exit_with_engine
        self._ranks_per_node = ranks_per_node
        self._make_recorder = make_recorder or (lambda shape: NoRecorder())
        self._initial = initial
        self._saved = saved
        self._parent = parent
        self._stopping = asyncio.Event()
        self._wake = asyncio.Event()
        self._generation = secrets.randbits(62) | 1
        self._executor = _PlanThreads()

    def stop(self) -> None:
        """End `run` soon; safe to call from a signal handler of the loop."""
        self._stopping.set()
        self._wake.set()

    async def run(self) -> None:
        """Startup, serve engines until `stop`, shut down.

        Raises:
            SegmentInUseError: another planner serves the session, or has taken it over.
            LimitError: this process may not open as many files as the engine has ranks.
            PolicyError: the policy cannot be made for the engine that was found.
        """
        lock = self._take_lock()
        lock.publish()
        life = asyncio.create_task(show_life(self._session))
        try:
            log.info("planner ready in session %r, waiting for an engine", self._session)
            while not self._stopping.is_set():
                group = await self._find_engine()
                if group is None:
                    break
                await self._serve(group)
                if self._exit_with_engine:
                    break
        finally:
            life.cancel()
            self._executor.shutdown()
            lock.close()
        log.info("planner stopped")

    def _take_lock(self) -> Segment:
        """The session's lock; a SegmentInUseError says if the planner that holds it is silent."""
        try:
            return take_name(self._session, planner_name(self._session), b"", 0, self._generation)
        except SegmentInUseError:
            silent = silent_planner(self._session)
            if not silent:
                raise
            raise SegmentInUseError(f"session {self._session!r} is in use: the {silent}") from None

    async def _find_engine(self) -> Group | None:
        """The engine of the session, as soon as there is one that can be served.

        None if none is waited for any more.
        """
        looks = 0
        refusals: Counter[str] = Counter()
        while not self._stopping.is_set():
            if self._parent and os.getppid() != self._parent:
                log.info("the worker that started this planner is dead")
                break
            looks += 1
            try:
                return Group.attach(self._session)
            except LimitError:
                raise
            except RankMissingError as error:  # or it has not come yet
                self._refuse(error, refusals, _LOOKS_BEFORE_HINT)
            except SegmentAbsentError as error:
                log.debug("no engine yet: %s", error)
                if looks == _LOOKS_BEFORE_HINT:
                    self._hint()
            except SegmentError as error:
                self._refuse(error, refusals, _LOOKS_BEFORE_REFUSAL)
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _LOOK_FOR_ENGINE)
        return None

    def _refuse(self, error: SegmentError, refusals: Counter[str], looks: int) -> None:
        """Say once why an engine is not served, when that has been so for as many looks."""
        refusals[str(error)] += 1
        if refusals[str(error)] == looks:
            log.warning("cannot serve the engine of session %r: %s", self._session, error)

    def _hint(self) -> None:
        """What to look at when an engine is long in coming."""
        log.warning(
            "still no engine in session %r: it appears with its first request, has it had one? If "
            "so, does vLLM run with --enable-eplb, EPLB_ENABLED=1 and this EPLB_SESSION (engines "
            "run in: %s)? Does VLLM_PLUGINS, if it is set, name flash_eplb?",
            self._session,
            engines() or "none",
        )

    async def _serve(self, group: Group) -> None:
        """Plan for `group` until it dies or the planner is stopped."""
        loop = asyncio.get_running_loop()
        bell = self._open_bell(group)
        if bell is None and not group.is_alive():
            self._leave(group)  # it died since it was found
            return
        recorder = self._make_recorder(group.shape)
        try:
            for rank in group.ranks:
                rank.plans.take_over(self._generation)
            shape = group.shape

            def wake() -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended before the plan
                    loop.call_soon_threadsafe(self._wake.set)

            by_source = {"routing": "by_source"} if shape.routes_by_source else {}
            engine = EngineLoop(
                group,
                self._make_policy(shape.ranks, shape.slots, **by_source),
                self._pace,
                self._generation,
                self._executor,
                wake,
                self._ranks_per_node,
                recorder,
                self._initial,
                self._saved,
            )
            while not self._stopping.is_set() and group.is_alive():
                await self._next_bell(bell)
                self._check_own(group)
                engine.turn()
        finally:
            if bell is not None:
                loop.remove_reader(bell.descriptor)
                bell.close()
            self._leave(group)
            recorder.close()

    def _check_own(self, group: Group) -> None:
        """That no other planner serves the engine, which may be if our name was removed."""
        if any(rank.plans.generation != self._generation for rank in group.ranks):
            raise SegmentInUseError(
                f"another planner has taken over the engine of session {self._session!r}: this "
                f"one's name in /dev/shm ({planner_name(self._session)}) was removed from outside"
            )

    def _open_bell(self, group: Group) -> Doorbell | None:
        """The engine's doorbell, which wakes us; None if it is lost, and looks must do."""
        try:
            bell = Doorbell.open(bell_name(self._session))
        except SegmentError as error:
            if group.is_alive():
                log.warning(
                    "%s; plans come up to a second later; restart the engine to have it back", error
                )
            return None
        asyncio.get_running_loop().add_reader(bell.descriptor, self._wake.set)
        return bell

    async def _next_bell(self, bell: Doorbell | None) -> None:
        with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
            await asyncio.wait_for(self._wake.wait(), _LOOK_AT_RANKS)
        if bell is not None:
            bell.drain()
        if not self._stopping.is_set():
            self._wake.clear()

    def _leave(self, group: Group) -> None:
        if group.is_alive():
            for rank in group.ranks:
                if rank.plans.generation == self._generation:
                    rank.plans.take_over(0)  # rounds that no rank has started are void
        else:
            log.info("the engine is gone")
            self._clean()
        group.close()
        self._wake.clear()

    def _clean(self) -> None:
        """Remove what a dead engine left; where that cannot be done the next engine does it."""
        try:
            with session_lock(self._session, _CLEANING_SECONDS):
                removed = remove_dead(self._session)
        except SegmentError as error:
            log.warning("what the engine left stays until another starts: %s", error)
            return
        if removed:
            log.info("removed what it left: %s", ", ".join(removed))
