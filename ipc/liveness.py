"""Whether the owner of a segment lives; imports nothing heavy, for it is asked at exit, too."""

from __future__ import annotations

import fcntl
import os


class SegmentError(Exception):
    """A segment that cannot be created or must not be used; the text says why and what to do."""


class SegmentInUseError(SegmentError):
    """The name belongs to a living process."""


class SegmentAbsentError(SegmentError):
    """There is no segment of that name."""


def owner_is_alive(name: str) -> bool:
    """Whether a process holds the lock of segment `name`; False if there is no such segment.

    Raises:
        SegmentError: the segment belongs to another user.
    """
    try:
        fd = open_fd(name, writable=False)
    except SegmentAbsentError:
        return False
    try:
        if os.fstat(fd).st_uid != os.geteuid():
            raise SegmentError(foreign(name, os.fstat(fd).st_uid))
        return is_locked(fd)
    finally:
        os.close(fd)


def is_locked(fd: int) -> bool:
    """Whether the owner holds the lock of the segment behind `fd`."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def open_fd(name: str, writable: bool) -> int:
    """A descriptor of segment `name`; SegmentError if it cannot be opened."""
    flags = os.O_RDWR if writable else os.O_RDONLY
    try:
        return os.open("/dev/shm" + name, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise SegmentAbsentError(
            f"shared memory {name} cannot be opened: {error.strerror}"
        ) from error
    except PermissionError as error:
        raise SegmentError(
            f"shared memory {name} belongs to another user; choose another EPLB_SESSION"
        ) from error
    except OSError as error:
        raise SegmentError(f"shared memory {name} cannot be opened: {error.strerror}") from error


def foreign(name: str, uid: int) -> str:
    """What to say of a segment that belongs to user `uid`."""
    return (
        f"shared memory {name} belongs to user id {uid}, not to {os.geteuid()}; "
        "choose another EPLB_SESSION"
    )
