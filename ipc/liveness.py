"""Whether the owner of a segment lives; imports nothing heavy, for it is asked at exit, too."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import stat
from collections.abc import Iterator

NO_FILE = (errno.ELOOP, errno.EISDIR, errno.ENXIO)
"""How a link, a directory and a socket refuse to be opened."""

OTHER_MAGIC = "it has another magic; remove it or choose another EPLB_SESSION"

MAGIC = b"FLSHEPLB"
"""The first bytes of a segment that is published; before, they are zero."""


class SegmentError(Exception):
    """A segment that cannot be created or must not be used; the text says why and what to do."""


class SegmentInUseError(SegmentError):
    """The name belongs to a living process."""


class SegmentAbsentError(SegmentError):
    """There is no segment of that name."""


def owner_is_alive(name: str) -> bool:
    """Whether a process holds the lock of segment `name`; False if there is no such segment.

    Raises:
        SegmentError: the segment belongs to another user, or is no file.
    """
    try:
        with opened(name) as fd:
            if os.fstat(fd).st_uid != os.geteuid():
                raise SegmentError(foreign(name, os.fstat(fd).st_uid))
            return is_locked(fd)
    except SegmentAbsentError:
        return False


def is_locked(fd: int) -> bool:
    """Whether the owner holds the lock of the segment behind `fd`."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


@contextlib.contextmanager
def opened(name: str) -> Iterator[int]:
    """A descriptor of segment `name` for a look at it; raises what `open_fd` does."""
    fd = open_fd(name, writable=False)
    try:
        yield fd
    finally:
        os.close(fd)


def open_fd(name: str, writable: bool) -> int:
    """A descriptor of segment `name`; SegmentError if it cannot be opened, or is no file.

    A FIFO of that name would block its opener for ever without O_NONBLOCK.
    """
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_NONBLOCK
    try:
        fd = os.open("/dev/shm" + name, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise SegmentAbsentError(
            f"shared memory {name} cannot be opened: {error.strerror}"
        ) from error
    except PermissionError as error:
        raise SegmentError(_forbidden(name, error)) from error
    except OSError as error:
        if error.errno in NO_FILE:
            raise SegmentError(_no_file(name)) from error
        why = lack_of_files(error) or error.strerror
        raise SegmentError(f"shared memory {name} cannot be opened: {why}") from error
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise SegmentError(_no_file(name))


def lack_of_files(error: OSError) -> str:
    """What to say where `error` is that no more files may be opened; "" if it is another one."""
    if error.errno not in (errno.EMFILE, errno.ENFILE):
        return ""
    if error.errno == errno.ENFILE:
        return "this system may open no more files; raise it with `sysctl fs.file-max`"
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (
        f"no more files may be opened (RLIMIT_NOFILE is {limit}); raise it with "
        f"`ulimit -n {2 * limit}`"
    )


def _no_file(name: str) -> str:
    return (
        f"shared memory {name} cannot be opened: it is not a regular file; "
        "remove it or choose another EPLB_SESSION"
    )


def _forbidden(name: str, error: OSError) -> str:
    """What to say of a segment that the kernel does not let us open."""
    try:
        status = os.lstat("/dev/shm" + name)
    except OSError:  # gone meanwhile
        return f"shared memory {name} cannot be opened: {error.strerror}"
    if status.st_uid != os.geteuid():
        return foreign(name, status.st_uid)
    return f"shared memory {name} cannot be opened: {error.strerror}; {wrong_mode(status.st_mode)}"


def wrong_mode(mode: int) -> str:
    """What to say of a file of ours that flash_eplb has not made as it is."""
    return f"its mode is {stat.S_IMODE(mode):04o}, ours is 0600; remove it"


def why_not_ours(fd: int) -> str:
    """Why the file behind `fd` is no segment or lock that flash_eplb has made; "" if it may be."""
    why = why_unlike_ours(os.fstat(fd))
    if not why and os.pread(fd, len(MAGIC), 0) not in (b"", bytes(len(MAGIC)), MAGIC):
        return OTHER_MAGIC
    return why


def why_unlike_ours(status: os.stat_result) -> str:
    """Why a file's owner or mode are not what ours have; "" if they are."""
    if status.st_uid != os.geteuid():
        return f"it belongs to user id {status.st_uid}, not to {os.geteuid()}"
    return "" if stat.S_IMODE(status.st_mode) == 0o600 else wrong_mode(status.st_mode)


def foreign(name: str, uid: int) -> str:
    """What to say of a segment that belongs to user `uid`."""
    return (
        f"shared memory {name} belongs to user id {uid}, not to {os.geteuid()}; "
        "choose another EPLB_SESSION"
    )
