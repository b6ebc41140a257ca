import contextlib
import errno
import os
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

from flash_eplb.ipc.doorbell import Doorbell
from flash_eplb.ipc.limits import LimitError, check_files, check_memory, no_room
from flash_eplb.ipc.liveness import SegmentError
from flash_eplb.ipc.names import bell_name, lock_name, planner_name
from flash_eplb.ipc.segment import take_name

MIB = 2**20


@pytest.fixture
def free(monkeypatch):
    """`free(n, of)`: /dev/shm has `n` MiB free of so many."""

    def set_free(mib, of=64):
        found = SimpleNamespace(f_bavail=mib * 256, f_blocks=of * 256, f_frsize=4096)
        monkeypatch.setattr(os, "statvfs", lambda path: found)

    return set_free


@pytest.fixture
def limit():
    """`limit(which, soft)` until the end of the test."""
    before = []

    def set_limit(which, soft):
        before.append((which, resource.getrlimit(which)))
        resource.setrlimit(which, (soft, before[-1][1][1]))

    yield set_limit
    for which, values in reversed(before):
        resource.setrlimit(which, values)


@pytest.fixture
def name(session):
    return bell_name(session)


@pytest.mark.parametrize(("ranks", "mib"), [(1, 11), (4, 44), (4, 45)])
def test_segments_that_fit_pass(free, ranks, mib):
    free(mib)
    check_memory(ranks, MIB, MIB // 10, 100)


def test_segments_that_do_not_fit_are_refused_with_what_would(free):
    free(31)
    with pytest.raises(LimitError) as error:
        check_memory(4, MIB, MIB // 10, 100)
    assert str(error.value) == (
        "4 ranks need 44.0 MiB of shared memory, /dev/shm has 31.0 MiB free; lower EPLB_RING_STEPS "
        "from 100 to 67 or less, or enlarge it (docker run --shm-size=1g, mount -o "
        "remount,size=1G /dev/shm)"
    )
    check_memory(4, MIB, MIB // 10, 67)


def test_where_no_ring_would_fit_only_more_memory_is_advised(free):
    free(4)
    with pytest.raises(LimitError, match=r"has 4\.0 MiB free; enlarge it \(docker run"):
        check_memory(4, MIB, MIB // 10, 100)


@pytest.mark.parametrize(
    ("free_mib", "of", "size"), [(4, 64, 1), (64, 1024, 2), (60, 20 * 1024, 21), (0, 1000, 2)]
)
def test_what_is_advised_suffices_and_takes_no_memory_away(free, free_mib, of, size):
    free(free_mib, of)
    with pytest.raises(LimitError, match=f"--shm-size={size}g, .*size={size}G /dev/shm"):
        check_memory(8, MIB, MIB // 10, 100)


def test_files_that_may_be_opened_pass():
    check_files(1, "the planner")


def test_too_few_files_are_refused_with_the_numbers(limit):
    used = len(os.listdir("/proc/self/fd")) - 1
    limit(resource.RLIMIT_NOFILE, used + 10)
    check_files(10, "the planner")
    with pytest.raises(LimitError) as error:
        check_files(11, "the planner")
    assert str(error.value) == (
        f"the planner opens 11 files and may open 10 (RLIMIT_NOFILE is {used + 10}, {used} are "
        f"open); raise it with `ulimit -n {2 * (used + 11)}`"
    )


def test_a_doorbell_for_which_no_file_is_left_names_the_limit(name, limit):
    used = os.dup(0)  # the lowest number that is free
    os.close(used)
    limit(resource.RLIMIT_NOFILE, used)
    with pytest.raises(LimitError) as error:
        Doorbell.create(name)
    assert str(error.value) == (
        f"doorbell {name} cannot be made: no more files may be opened (RLIMIT_NOFILE is {used}); "
        f"raise it with `ulimit -n {2 * used}`"
    )


@contextlib.contextmanager
def files_left(count):
    """This process may open `count` more files within the block, which is given the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(map(int, os.listdir("/proc/self/fd"))) + 16
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    held = []
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.dup(0))
        for _ in range(count):
            os.close(held.pop())
        yield most
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("count", range(4))
def test_a_segment_for_which_no_file_is_left_names_the_limit_and_leaves_nothing(session, count):
    name = planner_name(session)
    with files_left(count) as most, pytest.raises(SegmentError) as error:
        take_name(session, name, b"", 10, 1)
    lock = f"the lock of session {session!r} (/dev/shm{lock_name(session)})"
    what = f"shared memory {name}" if count else lock
    assert str(error.value) == (
        f"{what} cannot be {'made' if count > 2 else 'opened'}: no more files may be "
        f"opened (RLIMIT_NOFILE is {most}); raise it with `ulimit -n {2 * most}`"
    )
    assert not os.path.exists(f"/dev/shm{name}")
    with files_left(4):
        segment = take_name(session, name, b"", 10, 1)
    segment.close()


NO_INODES = """
import sys
from flash_eplb.ipc.liveness import SegmentError
from flash_eplb.ipc.segment import take_name

try:
    take_name("s", "/eplb.s.planner", b"", 10, 1)
except SegmentError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("inodes", "what"),
    [
        (1, "the lock of session 's' (/dev/shm/eplb.s.lock) cannot be opened"),
        (2, "shared memory /eplb.s.planner cannot be made"),
    ],
)
def test_where_no_inode_is_left_that_is_said_and_not_that_memory_lacks(inodes, what):
    mount = f"mount -t tmpfs -o size=8m,nr_inodes={inodes} tmpfs /dev/shm"
    can = ["unshare", "--mount", "sh", "-c", mount]
    if (tried := subprocess.run(can, capture_output=True, text=True, check=False)).returncode:
        pytest.skip(f"no file system can be mounted here: {tried.stderr.strip()}")
    command = ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$0" -c "$1"']
    run = subprocess.run(
        [*command, sys.executable, NO_INODES], capture_output=True, text=True, check=False
    )
    assert not run.returncode, run.stderr
    assert run.stdout == (
        f"{what}: /dev/shm has no inodes left (`df -i /dev/shm`); remove files there or allow more "
        f"(mount -o remount,nr_inodes={2 * inodes} /dev/shm)\n"
    )


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.ENOSPC, r"/dev/shm has \d+ files and [\d.]+ MiB free; enlarge it \(docker run"),
        (errno.EPERM, r" in /dev/shm: Operation not permitted; .* allow mkfifo\?"),
    ],
)
def test_each_trouble_with_the_doorbell_has_its_remedy(monkeypatch, name, number, text):
    def refuse(path, mode):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "mkfifo", refuse)
    with pytest.raises(LimitError, match=f"^doorbell {name} cannot be made.*{text}"):
        Doorbell.create(name)


def test_without_message_queues_there_is_a_doorbell_all_the_same(limit, name):
    limit(resource.RLIMIT_MSGQUEUE, 0)
    Doorbell.create(name).close()


def test_a_shared_memory_that_cannot_be_written_is_not_blamed_on_the_session(session, monkeypatch):
    def refuse(path, *_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr(os, "access", lambda path, mode: path != "/dev/shm")
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(SegmentError) as error:
        take_name(session, planner_name(session), b"", 10, 1)
    assert str(error.value) == (
        f"the lock of session {session!r} (/dev/shm{lock_name(session)}) cannot be opened: "
        "Read-only file system: this user cannot make files in /dev/shm; let all write there "
        "(mount -o remount,rw,mode=1777 /dev/shm)"
    )


def test_a_lack_of_little_is_told_in_figures_that_are_not_zero(free, session, monkeypatch):
    free(0, of=1)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert no_room(planner_name(session), 1500, full) == (
        f"shared memory {planner_name(session)} needs 2 KiB, /dev/shm has 0.0 MiB free (No space "
        "left on device); enlarge it (docker run --shm-size=1g, mount -o remount,size=1G /dev/shm)"
    )
    assert "; lower EPLB_RING_STEPS or enlarge it " in no_room(planner_name(session), 2**20, full)
