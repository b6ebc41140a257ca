"""The doorbell: a POSIX message queue whose descriptor an event loop can watch.

Owner: the worker of EP rank 0 creates and unlinks it. It rings once per episode and per commit and
never waits: a full queue means that a bell is there already, so no wake-up is lost. `/dev/mqueue`
need not be mounted.
"""

from __future__ import annotations

import contextlib
import errno

import posix_ipc

from .limits import LimitError, queue_trouble
from .liveness import SegmentError

_RING = b"\x01"


class Doorbell:
    """One end of the queue; use `create` in the worker and `open` in the planner."""

    def __init__(self, queue: posix_ipc.MessageQueue, owner: bool):
        queue.block = False  # cheaper than a timeout of 0, and asks the kernel for no time
        self._queue = queue
        self._owner = owner

    @classmethod
    def create(cls, name: str) -> Doorbell:
        """Make a new queue, replacing a leftover. The caller owns the rank segment beside it.

        Raises:
            SegmentError: message queues are not to be had, and the text names the limit; or the
                leftover is another user's.
        """
        try:
            posix_ipc.unlink_message_queue(name)
        except posix_ipc.ExistentialError:
            pass
        except (OSError, posix_ipc.Error) as error:
            raise SegmentError(
                f"message queue {name} cannot be replaced: {error}; choose another EPLB_SESSION"
            ) from error
        try:
            # crash point: bell.create.replaced
            queue = posix_ipc.MessageQueue(
                name, posix_ipc.O_CREX, mode=0o600, max_messages=4, max_message_size=1
            )
        except (OSError, posix_ipc.Error) as error:
            raise LimitError(queue_trouble(name, error)) from error
        # crash point: bell.create.made
        return cls(queue, owner=True)

    @classmethod
    def open(cls, name: str) -> Doorbell:
        """Attach for reading; SegmentError if there is none."""
        try:
            queue = posix_ipc.MessageQueue(name, read=True, write=False)
        except (OSError, posix_ipc.Error) as error:
            raise SegmentError(f"message queue {name} cannot be opened: {error}") from error
        return cls(queue, owner=False)

    @property
    def descriptor(self) -> int:
        """Readable while a bell waits: give it to `loop.add_reader`."""
        return self._queue.mqd

    def ring(self) -> None:
        """Wake the planner; does nothing if a wake-up is due already."""
        try:
            self._queue.send(_RING)
        except posix_ipc.BusyError:  # full: a bell is there already
            return

    def drain(self) -> int:
        """Take all bells; returns how many there were."""
        bells = 0
        while True:
            try:
                self._queue.receive()
            except posix_ipc.BusyError:
                return bells
            bells += 1

    def close(self) -> None:
        """Close this end; the owner unlinks the name."""
        if self._owner:
            # crash point: bell.close.begin
            with contextlib.suppress(posix_ipc.ExistentialError):
                self._queue.unlink()
            # crash point: bell.close.unlinked
            self._owner = False
        try:
            self._queue.close()
        except posix_ipc.ExistentialError:
            pass
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
