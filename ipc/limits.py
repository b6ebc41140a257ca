"""What the machine must have room for, checked at the start: each lack by its number and remedy."""

from __future__ import annotations

import errno
import os
import resource
import sys

from .liveness import SegmentError, lack_of_files


class LimitError(SegmentError):
    """A limit of the machine or of the process that is too low; the text tells how to raise it."""


def free_bytes() -> int:
    """Bytes that this user may still take in /dev/shm."""
    status = os.statvfs("/dev/shm")
    return status.f_bavail * status.f_frsize


def check_memory(ranks: int, fixed_bytes: int, step_bytes: int, ring_steps: int) -> None:
    """Refuse a group whose segments do not fit into /dev/shm.

    Args:
        ranks: of the group on this host; each has a segment.
        fixed_bytes: of a segment without its heat ring.
        step_bytes: of a step in the heat ring.
        ring_steps: EPLB_RING_STEPS.

    Raises:
        LimitError: bytes needed, bytes free, and how many steps would fit.
    """
    needed, free = ranks * (fixed_bytes + ring_steps * step_bytes), free_bytes()
    if needed <= free:
        return
    fitting = (free // ranks - fixed_bytes) // step_bytes
    lower = f"lower EPLB_RING_STEPS from {ring_steps} to {fitting} or less, or " * (fitting >= 8)
    raise LimitError(
        f"{ranks} ranks need {_mib(needed)} of shared memory, /dev/shm has {_mib(free)} free; "
        f"{lower}{_enlarge(needed - free)}"
    )


def no_room(name: str, size: int, error: OSError) -> str:
    """What to say when `size` bytes for segment `name` could not be had at its creation."""
    if why := lack_of_files(error):
        return f"shared memory {name} cannot be made: {why}"
    lower = "lower EPLB_RING_STEPS or " * (size >= 2**20)  # in less there is no ring to speak of
    return (
        f"shared memory {name} needs {_mib(size)}, /dev/shm has {_mib(free_bytes())} free "
        f"({error.strerror}); {lower}{_enlarge(size)}"
    )


def lack(error: OSError) -> str:
    """What to say where `error` is that a file in /dev/shm could not be opened or made for a limit
    on their number, or because nobody can make one there; "" if it is another one."""
    if not os.access("/dev/shm", os.W_OK):
        return (
            f"{error.strerror}: this user cannot make files in /dev/shm; let all write there "
            "(mount -o remount,rw,mode=1777 /dev/shm)"
        )
    status = os.statvfs("/dev/shm")
    if error.errno == errno.ENOSPC and status.f_files and not status.f_favail:
        return (
            "/dev/shm has no inodes left (`df -i /dev/shm`); remove files there or allow more "
            f"(mount -o remount,nr_inodes={2 * status.f_files} /dev/shm)"
        )
    return lack_of_files(error)


def check_files(more: int, what: str) -> None:
    """Refuse to go on if this process may not open `more` files.

    Args:
        more: descriptors that will be opened.
        what: who opens them, for the text.

    Raises:
        LimitError: what is needed, what is left, and the limit.
    """
    left = _files_left()
    if more <= left:
        return
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    used = limit - left
    raise LimitError(
        f"{what} opens {more} files and may open {left} (RLIMIT_NOFILE is {limit}, {used} are "
        f"open); raise it with `ulimit -n {2 * (used + more)}`"
    )


def bell_trouble(name: str, error: OSError) -> str:
    """What to say when the FIFO of doorbell `name` could not be made."""
    if why := lack_of_files(error):
        return f"doorbell {name} cannot be made: {why}"
    if error.errno == errno.ENOSPC:
        return (
            f"doorbell {name} cannot be made: /dev/shm has {os.statvfs('/dev/shm').f_favail} files "
            f"and {_mib(free_bytes())} free; {_enlarge(1)}"
        )
    return (
        f"doorbell {name} cannot be made in /dev/shm: {error.strerror}; does the container's "
        "security profile allow mkfifo?"
    )


def _enlarge(more: int) -> str:
    """How /dev/shm gets at least so many more bytes, in whole GiB."""
    status = os.statvfs("/dev/shm")
    size = -(-(status.f_blocks * status.f_frsize + more) // 2**30)
    return f"enlarge it (docker run --shm-size={size}g, mount -o remount,size={size}G /dev/shm)"


def _files_left() -> int:
    """Files that this process may still open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    try:
        return max(0, limit - len(os.listdir("/proc/self/fd")) + 1)  # one was for this look
    except OSError:  # not even one more for it
        return 0


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 or not size else f"{-(-size // 1024)} KiB"
