"""The names of a session; `EPLB_SESSION` tells two engines on one host apart.

    /eplb.<session>.rank.<ep rank>    a worker's segment (rank_segment.py)
    /eplb.<session>.planner           held by the living planner; it carries nothing else
    /eplb.<session>.bell              FIFO, owned by EP rank 0
    /eplb.<session>.lock              exists only while names are created or removed

This module imports nothing heavy: vLLM loads the configuration, and so this, in every process.
"""

from __future__ import annotations

import re

_SESSION = re.compile(r"[A-Za-z0-9_-]{1,32}")
_NAME = re.compile(rf"/eplb\.({_SESSION.pattern})\.(rank\.\d{{1,9}}|planner|bell|lock)")


def check_session(session: str) -> str:
    """Return `session`; ValueError unless it is 1 to 32 letters, digits, '-' or '_'."""
    if not _SESSION.fullmatch(session):
        raise ValueError(f"{session!r} is not 1 to 32 letters, digits, '-' or '_'")
    return session


def session_of(name: str) -> str:
    """The session that `name` belongs to; "" if it is none of those above."""
    found = _NAME.fullmatch(name)
    return found[1] if found else ""


def rank_name(session: str, rank: int) -> str:
    """Name of a worker's segment."""
    return f"/eplb.{session}.rank.{rank}"


def planner_name(session: str) -> str:
    """Name of the segment that a living planner holds."""
    return f"/eplb.{session}.planner"


def bell_name(session: str) -> str:
    """Name of the doorbell's FIFO."""
    return f"/eplb.{session}.bell"


def lock_name(session: str) -> str:
    """Name of the session's lock."""
    return f"/eplb.{session}.lock"
