"""A session's lock, and the removal of what dead processes left; imports nothing heavy."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Iterator

from .limits import lack
from .liveness import (
    SegmentError,
    is_locked,
    opened,
    owner_is_alive,
    why_not_ours,
    why_unlike_ours,
)
from .names import bell_name, lock_name, rank_name, session_of

_CLOSING_SECONDS = 2.0
"""What an owner that ends waits at most for the session lock, so that it ends."""


@contextlib.contextmanager
def session_lock(session: str, timeout: float = 20.0) -> Iterator[None]:
    """Hold the session's lock: names are created, taken over and unlinked under it only.

    The lock is a segment that its holder unlinks before it lets go; whoever waited on the old
    inode sees that the name is gone and tries again. A holder that dies leaves a free lock.

    Raises:
        SegmentError: the lock was not free within `timeout` seconds, or is another user's.
    """
    path = "/dev/shm" + lock_name(session)
    deadline = time.monotonic() + timeout
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            why = lack(error) or f"{error.strerror}; choose another EPLB_SESSION"
            raise SegmentError(
                f"the lock of session {session!r} ({path}) cannot be opened: {why}"
            ) from error
        try:
            # crash point: lock.opened
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # crash point: lock.locked
            if _is_same_file(path, fd):
                break
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(fd)
                raise SegmentError(
                    f"the lock of session {session!r} ({path}) was held for {timeout:.0f} s; "
                    "is a process of this session stopped?"
                ) from None
            time.sleep(0.005)
        os.close(fd)
    try:
        # crash point: lock.held
        yield
    finally:
        # crash point: lock.ending
        _unlink_if_same(path, fd)
        # crash point: lock.unlinked
        os.close(fd)


def _is_same_file(path: str, fd: int) -> bool:
    """Whether `path` still names the file behind `fd`: somebody may have removed the name."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _unlink_if_same(path: str, fd: int) -> None:
    """Remove `path` if it names the file behind `fd`; it may be removed from outside just now."""
    with contextlib.suppress(FileNotFoundError):
        if _is_same_file(path, fd):
            os.unlink(path)


def unlink_own(name: str, fd: int) -> None:
    """Remove `name` if it is still that of the file behind `fd`; for an owner that ends.

    A name that was removed from outside may belong to another engine by now. Takes the session
    lock; where that cannot be had, in time or for lack of files, the name stays as a dead owner's
    does.
    """
    path = "/dev/shm" + name
    with contextlib.suppress(SegmentError), session_lock(session_of(name), _CLOSING_SECONDS):
        _unlink_if_same(path, fd)


def sessions() -> list[str]:
    """Sessions that have a name in /dev/shm, dead or alive."""
    return sorted({session_of(name) for name in _names()} - {""})


def engines() -> str:
    """Sessions of this user in which an engine lives, for a text; "" if there is none."""
    living = []
    for session in sessions():
        with contextlib.suppress(SegmentError):
            if owner_is_alive(rank_name(session, 0)):
                living.append(repr(session))
    return ", ".join(living)


def _names() -> list[str]:
    """Everything in /dev/shm, as names are written here."""
    return sorted("/" + entry for entry in os.listdir("/dev/shm"))


def segment_names(session: str) -> list[str]:
    """Segments of `session`; its lock and its doorbell are none."""
    others = lock_name(session), bell_name(session)
    return [name for name in _names() if session_of(name) == session and name not in others]


def dead_names(session: str) -> list[str]:
    """What dead owners of `session` left, its lock among it; strangers' files are passed over."""
    lock = lock_name(session)
    return [*_dead_owners_names(session), *([lock] if _is_leftover(lock) else [])]


def _dead_owners_names(session: str) -> list[str]:
    """Doorbell and segments that dead owners of `session` left.

    The doorbell has no lock of its own: its owner makes it after the segment of rank 0 and removes
    it before. So it comes first, and what a cleaner that dies in between leaves can be told dead.
    """
    dead = [name for name in segment_names(session) if _is_leftover(name)]
    bell = bell_name(session)
    if not _may_live(rank_name(session, 0)) and _is_bell_of_ours(bell):
        return [bell, *dead]
    return dead


def _is_bell_of_ours(name: str) -> bool:
    """Whether there is a FIFO of this user by the name."""
    try:
        status = os.lstat("/dev/shm" + name)
    except FileNotFoundError:
        return False
    return stat.S_ISFIFO(status.st_mode) and not why_unlike_ours(status)


def _is_leftover(name: str) -> bool:
    """Whether `name` is a segment or a lock that flash_eplb has made, and its owner is dead."""
    try:
        with opened(name) as fd:
            return not why_not_ours(fd) and not is_locked(fd)
    except SegmentError:
        return False


def _may_live(name: str) -> bool:
    """Whether the owner lives, or is another user whose life cannot be told."""
    try:
        return owner_is_alive(name)
    except SegmentError:
        return True


def remove_dead(session: str) -> list[str]:
    """Unlink what dead owners of `session` left and return the names. Call it under the lock."""
    removed = []
    for name in _dead_owners_names(session):
        with contextlib.suppress(FileNotFoundError):
            os.unlink("/dev/shm" + name)
            removed.append(name)
        # crash point: remove.name
    return removed


def clean_session(session: str) -> list[str]:
    """Remove what dead owners of `session` left, its lock among it, and return the names.

    Raises:
        SegmentError: as `session_lock`.
    """
    lock = [name for name in dead_names(session) if name == lock_name(session)]
    with session_lock(session):  # which takes over a lock that was left, and removes it
        return remove_dead(session) + lock


def sweep(session: str, patience: float) -> None:
    """At the end of an engine's main process: remove what its killed workers left.

    `vllm serve` kills its workers on SIGTERM; `patience` is how many seconds they may take to die.
    """
    deadline = time.monotonic() + patience
    while segment_names(session):
        try:
            with session_lock(session):
                remove_dead(session)
        except SegmentError:
            return  # nobody reads what is raised here; `eplb clean` will say it
        workers = [name for name in segment_names(session) if ".rank." in name]
        if not workers or time.monotonic() > deadline:
            return
        time.sleep(0.05)
