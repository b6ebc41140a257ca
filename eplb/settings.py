"""What all ranks of a group must have alike: the host, the settings and the shape of their models.

Each rank votes, counts steps and cuts its segment by them, so one that differs would wait for the
others, or they for it, at the first vote.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
from typing import Any

from ..ipc.shape import GroupShape
from .config import Config
from .group import Group, UnsupportedError

_BOOT_ID = "/proc/sys/kernel/random/boot_id"


def agree_on_settings(group: Group, config: Config, shape: GroupShape) -> int:
    """That all ranks are set alike; a collective of all ranks.

    Returns:
        a random number for this group, equal on all ranks: its generation.

    Raises:
        UnsupportedError: on all ranks; names the first rank that differs, and in what.
    """
    mine = {
        "host": socket.gethostname(),
        "boot": _boot_id(),
        "shape": shape,
        "config": config.model_dump(exclude={"log_level"}),
        "generation": secrets.randbits(62) | 1,
    }
    everyone = group.gather(mine)
    for rank, theirs in enumerate(everyone):
        if theirs["boot"] != everyone[0]["boot"]:
            raise UnsupportedError(
                f"EP rank {rank} is on host {theirs['host']} and EP rank 0 on "
                f"{everyone[0]['host']}: an EP group over several hosts is not supported yet"
            )
        for what in ("config", "shape"):
            if theirs[what] != everyone[0][what]:
                raise UnsupportedError(
                    f"EP rank {rank} and EP rank 0 differ in their {what}: "
                    f"{_difference(theirs[what], everyone[0][what])}"
                )
    return everyone[0]["generation"]


def _boot_id() -> str:
    """Equal on ranks of one host; "" where a sandbox hides it: then what they share tells."""
    with contextlib.suppress(OSError), open(_BOOT_ID) as file:
        return file.read().strip()
    return ""


def _difference(mine: Any, theirs: Any) -> str:
    if not isinstance(mine, dict):
        return f"{mine} and {theirs}"
    return ", ".join(
        f"EPLB_{name.upper()}={mine[name]!r} and {theirs[name]!r}"
        for name in mine
        if mine[name] != theirs[name]
    )
