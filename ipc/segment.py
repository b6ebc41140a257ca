"""A named piece of shared memory with an owner whose death anyone can tell.

Ownership: the creator holds an exclusive `flock` on a descriptor of its own for as long as it
lives. The kernel frees the lock at any kind of death, SIGKILL included, and, unlike a pid, it means
the same in every PID namespace. The lock's descriptor is separate from the mapping's, because a
mapping inherited by a forked child would keep the lock alive; the child closes the descriptor.

Death: a segment whose lock is free is a leftover. It is removed under the session lock
(`session.py`) by the next owner of its name, by the planner or by `eplb clean`; never otherwise.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import stat
import struct
import weakref
import zlib
from typing import ClassVar

import numpy as np
import posix_ipc

from .atomics import WORD, load_acquire, store_release
from .limits import LimitError, lack, no_room
from .liveness import (
    MAGIC,
    OTHER_MAGIC,
    SegmentError,
    SegmentInUseError,
    foreign,
    is_locked,
    open_fd,
    opened,
    owner_is_alive,
    why_not_ours,
    wrong_mode,
)
from .session import remove_dead, session_lock, unlink_own

LAYOUT = 7
"""Version of everything that lies in a segment or beside it; a reader of another one refuses it."""

_MAGIC = int.from_bytes(MAGIC, "little")
_PREAMBLE = struct.Struct("<QIIIIqI")  # magic, layout, header bytes, uid, pid, generation, crc
_MOST_HEADER = 2**20
ALIGNMENT = 64


def aligned(size: int) -> int:
    """`size` bytes rounded up to a cache line."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Segment:
    """A mapped segment: `header` (bytes), `generation`, `pid` of the owner, `body` (uint8 array).

    Use `create`, `open` or `owner_is_alive`; `close` unmaps, and unlinks if this is the owner.
    """

    _locked: ClassVar[weakref.WeakSet[Segment]] = weakref.WeakSet()

    def __init__(self, name: str, fd: int, writable: bool, lock_fd: int | None = None):
        self.name = name
        self._probe_fd: int | None = None
        self._lock_fd = lock_fd
        self._owner_pid = os.getpid() if lock_fd is not None else 0
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        mapping = mmap.mmap(fd, os.fstat(fd).st_size, mmap.MAP_SHARED, access)
        self.bytes = np.frombuffer(mapping, np.uint8)
        self.header = b""
        self.generation = 0
        self.pid = 0
        self.body = self.bytes
        if lock_fd is not None:
            Segment._locked.add(self)

    @classmethod
    def create(cls, name: str, header: bytes, body_bytes: int, generation: int) -> Segment:
        """Create `name`; the caller holds the session lock and has removed any leftover.

        The body is zero. Pages are reserved, so that a full /dev/shm is an error here and not a
        SIGBUS later.

        Raises:
            SegmentError: /dev/shm has not enough room, or the name exists.
        """
        start = aligned(_PREAMBLE.size + len(header))
        size = start + body_bytes
        try:
            shm = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=size)
        except posix_ipc.ExistentialError:
            raise SegmentError(f"shared memory {name} exists already{_why_kept(name)}") from None
        except (OSError, posix_ipc.Error) as error:
            why = (isinstance(error, OSError) and lack(error)) or error
            raise LimitError(f"shared memory {name} cannot be made: {why}") from error
        lock_fd = None
        try:
            # crash point: segment.create.made
            os.posix_fallocate(shm.fd, 0, size)
            # crash point: segment.create.reserved
            lock_fd = _lock_exclusively(name)
            # crash point: segment.create.locked
            segment = cls(name, shm.fd, writable=True, lock_fd=lock_fd)
            # crash point: segment.create.mapped
        except (OSError, SegmentError) as error:
            posix_ipc.unlink_shared_memory(name)
            if lock_fd is not None:
                os.close(lock_fd)
            if isinstance(error, SegmentError):
                raise
            raise LimitError(no_room(name, size, error)) from error
        finally:
            shm.close_fd()
        segment._write_header(header, start, generation)
        # crash point: segment.create.header
        return segment

    def _write_header(self, header: bytes, start: int, generation: int) -> None:
        crc = zlib.crc32(header)
        _PREAMBLE.pack_into(
            self.bytes.data, 0, 0, LAYOUT, len(header), os.geteuid(), os.getpid(), generation, crc
        )
        # crash point: segment.create.preamble
        self.bytes[_PREAMBLE.size : _PREAMBLE.size + len(header)] = np.frombuffer(header, np.uint8)
        self.header, self.generation, self.pid = header, generation, os.getpid()
        self.body = self.bytes[start:]

    def publish(self) -> None:
        """Owner only: let others attach; everything written before is visible to them."""
        # crash point: segment.publish.begin
        store_release(self.bytes[:8].view(WORD), 0, _MAGIC)
        # crash point: segment.publish.end

    @classmethod
    def open(cls, name: str, writable: bool = False, published: bool = True) -> Segment:
        """Attach to a segment of the same user and layout, by default to a published one only.

        Raises:
            SegmentError: it is absent, not published yet, another user's, of another layout,
                damaged, or no segment at all.
        """
        fd = open_fd(name, writable)
        try:
            _refuse_strangers(name, fd)
            segment = cls._map(name, fd, writable)
            segment._read_header(published)
        except BaseException:
            os.close(fd)
            raise
        segment._probe_fd = fd
        return segment

    @classmethod
    def _map(cls, name: str, fd: int, writable: bool) -> Segment:
        try:
            return cls(name, fd, writable)
        except (OSError, ValueError) as error:  # longer than addresses reach, or emptied just now
            raise SegmentError(f"shared memory {name} cannot be mapped: {error}") from error

    def _read_header(self, published: bool) -> None:
        magic = load_acquire(self.bytes[:8].view(WORD), 0)
        if magic != _MAGIC and (published or magic):
            raise SegmentError(f"shared memory {self.name} is {_not_published(magic)}")
        content = self.bytes[: _PREAMBLE.size + _MOST_HEADER].data
        self.header, self.generation, self.pid = parse_header(self.name, content)
        self.body = self.bytes[aligned(_PREAMBLE.size + len(self.header)) :]

    def owner_is_alive(self) -> bool:
        """Whether the process that made this very segment lives; True for the owner itself."""
        return self._probe_fd is None or is_locked(self._probe_fd)

    def close(self) -> None:
        """Unmap; the owner unlinks the name first, unless it is another's by now.

        The owner must not hold the session lock. Safe to call twice.
        """
        if self._lock_fd is not None and self._owner_pid == os.getpid():
            # crash point: segment.close.begin
            unlink_own(self.name, self._lock_fd)
            # crash point: segment.close.unlinked
            os.close(self._lock_fd)
            self._lock_fd = None
            # crash point: segment.close.end
        if self._probe_fd is not None:
            os.close(self._probe_fd)
            self._probe_fd = None
        # Views into the mapping may outlive this object; the mapping goes with the last of them.
        self.bytes = self.body = np.zeros(0, np.uint8)

    def __del__(self) -> None:
        # Who gives up half-way through attaching forgets its segments without closing them.
        if self._probe_fd is not None:
            os.close(self._probe_fd)


def parse_header(name: str, content: memoryview) -> tuple[bytes, int, int]:
    """(header, generation, pid of the owner) of segment `name`, whose first bytes are `content`.

    Raises:
        SegmentError: another layout, a header that is cut, too long or damaged.
    """
    _, layout, length, _uid, pid, generation, crc = _PREAMBLE.unpack_from(content, 0)
    if layout != LAYOUT:
        raise SegmentError(
            f"shared memory {name} has layout {layout}, this version reads {LAYOUT}; "
            "run the same flash_eplb in the workers and the planner"
        )
    header = bytes(content[_PREAMBLE.size : _PREAMBLE.size + length])
    if len(header) != length or zlib.crc32(header) != crc:
        raise SegmentError(f"shared memory {name} has a damaged header; restart its owner")
    return header, generation, pid


def _not_published(magic: int) -> str:
    if magic:
        return f"not flash_eplb's: {OTHER_MAGIC}"
    return "not ready: its owner has not published it yet"


def take_name(session: str, name: str, header: bytes, body_bytes: int, generation: int) -> Segment:
    """Create segment `name` after removing what dead processes of the session left.

    Raises:
        SegmentInUseError: a living process owns the name; the text names its pid.
        SegmentError: no room, another user's segment, or the session lock is stuck.
    """
    with session_lock(session):
        # crash point: take.locked
        if owner_is_alive(name):
            raise SegmentInUseError(
                f"session {session!r} is in use: {name} belongs to the living process "
                f"{_pid_of(name)}; stop it or choose another EPLB_SESSION"
            )
        # crash point: take.dead
        remove_dead(session)
        # crash point: take.removed
        return Segment.create(name, header, body_bytes, generation)


def _why_kept(name: str) -> str:
    """What to say of a name that exists though what dead processes left has been removed."""
    why = ""
    with contextlib.suppress(SegmentError), opened(name) as fd:
        why = why_not_ours(fd)
    if why:
        return f", and flash_eplb has not made it: {why}"
    return "; run `eplb clean` if nothing uses it"


def _pid_of(name: str) -> str:
    try:
        return str(Segment.open(name, published=False).pid)
    except SegmentError:
        return "that is just starting"


def _lock_exclusively(name: str) -> int:
    fd = open_fd(name, writable=True)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # a prober holds it for an instant at most
    except OSError:
        os.close(fd)
        raise
    return fd


def _refuse_strangers(name: str, fd: int) -> None:
    status = os.fstat(fd)
    if status.st_uid != os.geteuid():
        raise SegmentError(foreign(name, status.st_uid))
    if status.st_size < _PREAMBLE.size:
        raise SegmentError(f"shared memory {name} is not ready: {status.st_size} bytes long")
    if stat.S_IMODE(status.st_mode) != 0o600:
        raise SegmentError(f"shared memory {name} is not ours: {wrong_mode(status.st_mode)}")


def _forget_locks_after_fork() -> None:
    for segment in list(Segment._locked):
        if segment._lock_fd is not None:
            os.close(segment._lock_fd)
            segment._lock_fd = None


os.register_at_fork(after_in_child=_forget_locks_after_fork)
