"""The doorbell: a FIFO in /dev/shm whose descriptor an event loop can watch.

Owner: the worker of EP rank 0 creates and unlinks it. It rings once per episode (more often where
the ring holds less than two) and per commit, and never waits: a full FIFO means that bells are
there already, so no wake-up is lost. Both ends open it for reading and writing: bells that nobody
takes stay in it for as long as the worker lives, and neither end is told of the other's death by an
error, for the lock of the segment tells that.

A FIFO wakes its reader sooner than a message queue does, has no limits of its own, and is there
wherever the segments are, in a container that shares nothing but /dev/shm, too.
"""

from __future__ import annotations

import contextlib
import os
import stat

from .limits import LimitError, bell_trouble
from .liveness import NO_FILE, SegmentError, why_unlike_ours
from .session import unlink_own

_RING = b"\x01"
_AT_ONCE = 4096
"""Bytes that one read takes; a FIFO holds 16 times as many."""


class Doorbell:
    """One end of the FIFO; use `create` in the worker and `open` in the planner."""

    def __init__(self, name: str, descriptor: int, owner: bool):
        self._name = name
        self._descriptor = descriptor
        self._owner_pid = os.getpid() if owner else 0

    @classmethod
    def create(cls, name: str) -> Doorbell:
        """Make a new FIFO, replacing a leftover. The caller owns the rank segment beside it.

        Raises:
            SegmentError: the leftover is another user's, or no FIFO can be made; the text says why.
        """
        path = _path(name)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        except OSError as error:
            raise SegmentError(
                f"doorbell {name} cannot be replaced: {error.strerror}; choose another EPLB_SESSION"
            ) from error
        try:
            # crash point: bell.create.replaced
            os.mkfifo(path, 0o600)
            # crash point: bell.create.made
            return cls(name, _open(name), owner=True)
        except (OSError, SegmentError) as error:
            with contextlib.suppress(OSError):
                os.unlink(path)
            if isinstance(error, SegmentError):
                raise
            raise LimitError(bell_trouble(name, error)) from error

    @classmethod
    def open(cls, name: str) -> Doorbell:
        """Attach for reading; SegmentError if there is none, or it is not a FIFO of this user."""
        try:
            return cls(name, _open(name), owner=False)
        except OSError as error:
            why = "it is no FIFO; remove it" if error.errno in NO_FILE else error.strerror
            raise SegmentError(f"doorbell {name} cannot be opened: {why}") from error

    @property
    def descriptor(self) -> int:
        """Readable while a bell waits: give it to `loop.add_reader`."""
        return self._descriptor

    def ring(self) -> None:
        """Wake the planner; does nothing if so many wake-ups are due that the FIFO is full."""
        try:  # contextlib.suppress takes as long as the rest
            os.write(self._descriptor, _RING)
        except BlockingIOError:
            return

    def drain(self) -> int:
        """Take all bells; returns how many there were."""
        bells = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                taken = len(os.read(self._descriptor, _AT_ONCE))
                bells += taken
                if taken < _AT_ONCE:
                    break
        return bells

    def close(self) -> None:
        """Close this end; the owner unlinks the name first, unless it is another's by now.

        Safe to call twice.
        """
        if self._owner_pid == os.getpid():  # a forked child leaves it to its parent
            # crash point: bell.close.begin
            unlink_own(self._name, self._descriptor)
            # crash point: bell.close.unlinked
            self._owner_pid = 0
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _path(name: str) -> str:
    return "/dev/shm" + name


def _open(name: str) -> int:
    """A descriptor of the FIFO `name`, made by flash_eplb for this user; SegmentError if not so."""
    flags = os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(_path(name), flags)
    status = os.fstat(descriptor)
    is_bell = stat.S_ISFIFO(status.st_mode)
    why = why_unlike_ours(status) if is_bell else "it is no FIFO; remove it"
    if why:
        os.close(descriptor)
        raise SegmentError(f"doorbell {name} cannot be opened: {why}")
    return descriptor
