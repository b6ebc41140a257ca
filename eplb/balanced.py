"""What of this process is balanced: the objects in serving engines through which we do it."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .group import Group
from .hooks import call_before
from .meeting import MeetingError, meet
from .runners import state_of
from .updates import follow_updates

if TYPE_CHECKING:
    from .worker import Worker

log = logging.getLogger("flash_eplb.worker")

PATIENCE = 60.0
"""Seconds that a rank which begins to load its model waits for the others to do so."""


class Balanced(Protocol):
    """An engine's EPLB object that is ours.

    Attributes:
        worker: its `Worker`, or None as yet.
        inert: why there will be none; "" if there may be.
        is_writing: whether an update of the weights has begun while there was none.
    """

    worker: Worker | None
    inert: str
    is_writing: bool


_balanced: list[weakref.ref[Balanced]] = []
"""All that were made: who has been one of them is known, and none is kept by it."""


def add(state: Balanced) -> None:
    """`state` has been made in this process, which therefore runs a rank."""
    _balanced.append(weakref.ref(state))


def is_worker() -> bool:
    """Whether this process runs a rank, or has run one."""
    return bool(_balanced)


def _states() -> Iterator[Balanced]:
    """Of this process, those that are balanced or may be."""
    for reference in _balanced:
        state = reference()
        if state is not None and not state.inert:
            yield state


def begin_update() -> bool:
    """See `Worker.begin_update`: of all workers of this process, and of those that are to come."""
    opened = False
    for state in _states():
        if state.worker is not None:
            opened |= state.worker.begin_update()
        elif not state.is_writing:
            opened = state.is_writing = True
            log.info("weights are written or read before the first step; balancing begins after it")
    return opened


def end_update(took: float) -> None:
    """See `Worker.end_update`: of all workers of this process, and of those that are to come."""
    for state in _states():
        state.is_writing = False
        if state.worker is not None:
            state.worker.end_update(took)


def give_up_update(why: str) -> bool:
    """See `Worker.give_up_update`: of all workers of this process, and of those that are to
    come."""
    is_open = False
    for state in _states():
        if state.worker is None:
            is_open |= state.is_writing
        else:
            is_open |= state.worker.give_up_update(why)
    return is_open


def is_any_writing(state: Balanced, group: torch.distributed.ProcessGroup) -> bool:
    """Whether an update that has begun before there was a worker is open on any rank of `group`."""
    return bool(agree(group, "weights are written" if state.is_writing else ""))


def release(engine_worker: Any) -> None:
    """An engine's worker ends, and maybe not its process: what we hold of it (its weights, the
    session) is free for another engine."""
    state = state_of(getattr(engine_worker, "model_runner", None))
    worker = getattr(state, "worker", None)
    if worker is None:
        return
    state.worker = None
    try:
        worker.close()
    except Exception:  # the engine's own end comes after ours
        log.exception(
            "flash_eplb has not let go of all that it holds; the rest is free when this process "
            "ends, and `eplb clean` removes its names then"
        )


def follow_worker(worker_class: type) -> None:
    """Let vLLM's worker tell all workers of this process of updates of the weights, and ours of its
    end."""
    follow_updates(worker_class, begin_update, end_update, give_up_update)
    call_before(worker_class, "shutdown", release)


def why_not(reason: Callable[..., str], *args: Any, **kwargs: Any) -> str:
    """Why a state that is being made is not to be ours: what `reason` says of the arguments, or
    that some ranks are without us; "" if it is.

    What fails while we ask is a reason too: a model is being loaded, which must not fail by us.
    """
    try:
        return reason(*args, **kwargs) or where_we_are_not()
    except Exception as error:
        log.exception("flash_eplb does not fit this vLLM")
        return f"{type(error).__name__}: {error}"


def where_we_are_not() -> str:
    """Why no rank of vLLM's EP group may be ours: some rank is not; "" if all are about to be.

    Ranks with settings or an installation of their own may be without us. They would enter
    collectives of upstream's balancer, and ours would enter others: all would wait for ever.
    """
    from vllm.distributed.parallel_state import get_ep_group

    if not torch.distributed.is_initialized():
        return ""
    try:
        coordinator = get_ep_group()
    except AssertionError:  # a model without experts has none
        return ""
    group = group_of(coordinator, 1)
    first = torch.distributed.get_process_group_ranks(group.cpu_group)[0]
    try:
        meet(group.store, f"flash_eplb/start/{first}", group.rank, group.ranks, PATIENCE)
    except MeetingError as error:
        return (
            f"{error}: flash_eplb is off or not installed there; give all ranks of the engine "
            "the same EPLB_ variables and VLLM_PLUGINS (their logs may say more)"
        )
    return ""


def agree(group: torch.distributed.ProcessGroup, reason: str) -> str:
    """The first reason that any rank of `group` has not to balance; "" if none has one."""
    reasons: list[str] = [""] * group.size()
    torch.distributed.all_gather_object(reasons, reason, group=group)
    return next(filter(None, reasons), "")


def group_of(coordinator: Any, tensor_parallel: int) -> Group:
    """The EP group of vLLM's `GroupCoordinator`, of which `tensor_parallel` ranks each run the same
    batch."""
    return Group(
        rank=coordinator.rank_in_group,
        ranks=coordinator.world_size,
        cpu_group=coordinator.cpu_group,
        store=torch.distributed.distributed_c10d._get_default_store(),
        counting=tuple(range(0, coordinator.world_size, tensor_parallel)),
        patience=_patience(coordinator.cpu_group),
    )


def _patience(group: Any) -> float:
    """Seconds after which a collective of `group` fails; torch's default where it does not say."""
    try:
        timeout = group._get_backend(torch.device("cpu")).options._timeout
    except (AttributeError, RuntimeError):
        timeout = torch.distributed.constants.default_pg_timeout
    return timeout.total_seconds()
