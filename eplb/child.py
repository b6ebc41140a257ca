"""How a process of ours starts another."""

from __future__ import annotations

import sys


def command_of(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of ours by this Python.

    `-m` alone looks into the working folder first, where a user may have a `queue.py`; the command
    `eplb` does not, nor do its children (from Python 3.11 on).
    """
    safe = ["-P"] if sys.version_info >= (3, 11) else []
    return [sys.executable, *safe, "-m", f"flash_eplb.eplb.{module}", *arguments]
