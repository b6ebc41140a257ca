"""Text files that are there in full or not at all; of devices and pipes only what they hold."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_whole(target: str | Path, text: str) -> None:
    """Replace the file that `target` names or links to; what is no regular file is written into.

    Raises:
        OSError: it cannot be written; nothing is left then.
    """
    if is_special(target):
        Path(target).write_text(text, encoding="utf-8")
        return
    temporary = _temporary(target)
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, os.path.realpath(target))
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def try_whole(target: str | Path) -> None:
    """Begin what `write_whole` does with a regular file and leave nothing.

    Raises:
        OSError: it could not.
    """
    temporary = _temporary(target)
    temporary.touch()
    temporary.unlink()


def is_special(target: str | Path) -> bool:
    """Whether it is a device, a pipe or a socket, which nothing may replace."""
    return os.path.exists(target) and not (os.path.isfile(target) or os.path.isdir(target))


def _temporary(target: str | Path) -> Path:
    """Beside the file itself, for a link may lead to another file system."""
    resolved = Path(os.path.realpath(target))
    return resolved.with_name(f".{resolved.name}.{os.getpid()}")
