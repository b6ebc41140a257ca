"""The planner's signs of life, in the time of its segment's file; its lock tells only of its death.

A planner that is stopped (SIGSTOP), or whose event loop hangs, keeps its lock and plans nothing.
From its silence follows a sentence and never an act, for the clock may have jumped.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time

from ..ipc.liveness import SegmentError, open_fd
from ..ipc.names import planner_name
from ..ipc.segment import Segment

log = logging.getLogger("flash_eplb.planner")

_EVERY = 1.0

LONGEST_SILENCE = 30.0
"""Seconds without a sign after which a planner is spoken of."""


async def show_life(session: str) -> None:
    """Set the time of the file of our segment once a second, until cancelled."""
    try:
        sign = open_fd(planner_name(session), writable=True)
    except SegmentError as error:
        log.warning("the planner shows no life, and will be said to be silent: %s", error)
        return
    try:
        while True:
            os.utime(sign)
            await asyncio.sleep(_EVERY)
    finally:
        os.close(sign)


def silent_planner(session: str) -> str:
    """What to say of the living planner of `session`, after "the", if it is silent; else empty."""
    name = planner_name(session)
    try:
        silent = time.time() - os.stat("/dev/shm" + name).st_mtime
        if silent <= LONGEST_SILENCE:
            return ""
        pid = Segment.open(name).pid
    except (FileNotFoundError, SegmentError):  # it has just ended, or is none of ours
        return ""
    return (
        f"planner (pid {pid}) has shown no life for {silent:.0f} s: it is stopped or hangs; "
        f"experts stay where they are; `kill -CONT {pid}` lets a stopped one go on, "
        f"`kill -KILL {pid}` makes room for another"
    )
