"""A meeting of all ranks outside the steps, which none of them waits for in vain.

An engine's call that changes weights reaches the ranks one by one, and may not reach some at all
(data parallelism, an error before us). Who would wait in a collective for a rank that runs on would
hang both. So the ranks meet at the store first, at the same step, for a limited time. Whether they
met is decided once, by whoever comes last or first loses patience, and all follow it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch.distributed as dist

_MET = "met"


class MeetingError(RuntimeError):
    """Some ranks did not come; the text names them."""


def meet(
    store: dist.Store,
    name: str,
    rank: int,
    ranks: int,
    patience: float,
    why_in_vain: Callable[[], str] = lambda: "",
) -> None:
    """Come back when all ranks have come; after a failed meeting the next try is a new one.

    Args:
        store: shared by all ranks.
        name: of the meeting, equal on all ranks; it takes place once.
        rank, ranks: of the group.
        patience: seconds after which a rank gives up, for all that are there.
        why_in_vain: why a rank will not come, so that it gives up at once; "" if all may.

    Raises:
        MeetingError: on all ranks that had come.
    """
    attempts = f"{name}/attempts"
    name = f"{name}/{store.add(attempts, 0)}"
    decision = f"{name}/decision"
    store.set(f"{name}/rank{rank}", "here")
    if store.add(f"{name}/count", 1) == ranks:
        store.compare_set(decision, "", _MET)
    deadline = time.monotonic() + patience
    while not store.check([decision]):
        why = why_in_vain()
        if why:  # with the rank, so that one of those that decide alike counts
            why = f"EP rank {rank} waits no longer: {why}"
        elif time.monotonic() > deadline:
            absent = [n for n in range(ranks) if not store.check([f"{name}/rank{n}"])]
            why = f"EP rank {rank} has waited {patience:g} s for EP ranks {absent} in vain"
        if why and store.compare_set(decision, "", why) == why.encode():
            store.add(attempts, 1)
        time.sleep(0.002)
    found = store.get(decision).decode()
    if found != _MET:
        raise MeetingError(found)


def forget(store: dist.Store, name: str, ranks: int) -> None:
    """Remove what a meeting has left in the store; one rank calls it, when all have left it."""
    attempts = f"{name}/attempts"
    for attempt in range(store.add(attempts, 0) + 1):
        for key in ("decision", "count", *(f"rank{rank}" for rank in range(ranks))):
            store.delete_key(f"{name}/{attempt}/{key}")
    store.delete_key(attempts)
