"""The calls by which vLLM writes the weights of a running engine, or reads them by their names, and
what we do around them."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any

from .hooks import Method, wrap_once

log = logging.getLogger("flash_eplb.worker")

STARTS = ("start_weight_update", "start_draft_weight_update")
BEGINS = ("reload_weights", "reset_weights", *STARTS)
ENDS = ("reload_weights", "finish_weight_update")
"""Methods of vLLM's worker before and after which weights are written, on all ranks."""

BETWEEN = "update_weights"
"""Called any number of times between a start and a finish; vLLM closes an update that fails here,
so that no finish will come."""

READS = ("save_sharded_state", "save_tensorized_model", "compute_weight_checksums")
"""Methods that read weights on all ranks, each expert where the loader would write it."""


def follow_updates(
    worker_class: type,
    begin: Callable[[], bool],
    end: Callable[[float], None],
    give_up: Callable[[str], bool],
) -> None:
    """Let `worker_class` call `begin` before it writes or reads weights and `end`, with the seconds
    that the call has taken, after it has.

    If `begin` raises, nothing is written; it returns whether it has opened an update. A start that
    fails has written nothing, and ends what it has opened. If writing fails, nobody knows what the
    weights are: `give_up` is called in the place of `end`, with what has failed, and no expert
    moves until an update succeeds. It returns whether an update is open: else (a finish without a
    start) nothing changes.
    """
    for name in dict.fromkeys((*BEGINS, *ENDS, BETWEEN)):
        around = give_up, begin if name in BEGINS else None, end if name in ENDS else None
        undo = end if name in STARTS else None
        wrap_once(worker_class, name, functools.partial(_wrapped, *around, undo))
    for name in READS:
        wrap_once(worker_class, name, functools.partial(_read, begin, end))


def _read(begin: Callable[[], bool], end: Callable[[float], None], original: Method) -> Method:
    def read(*args: Any, **kwargs: Any) -> Any:
        opened = begin()
        begun = time.monotonic()
        try:
            return original(*args, **kwargs)
        finally:
            if opened:  # else an update is under way, and experts are there
                end(time.monotonic() - begun)

    return read


def _wrapped(
    give_up: Callable[[str], bool],
    begin: Callable[[], bool] | None,
    end: Callable[[float], None] | None,
    undo: Callable[[float], None] | None,
    original: Method,
) -> Method:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        opened = begin is not None and begin()
        begun = time.monotonic()
        try:
            result = original(*args, **kwargs)
        except BaseException:
            if undo is not None:
                if opened:
                    undo(time.monotonic() - begun)
            elif give_up(f"{original.__name__} has failed"):
                log.error(
                    "%s failed: no expert moves %suntil weights have been updated",
                    original.__name__,
                    "from the start of an update " if begin is None and end is None else "",
                )
            raise
        if end is not None:
            end(time.monotonic() - begun)
        return result

    return wrapped
