import errno
import os
import re
import resource
from types import SimpleNamespace

import pytest

from flash_eplb.ipc import limits
from flash_eplb.ipc.doorbell import Doorbell
from flash_eplb.ipc.limits import LimitError, check_files, check_memory, queue_trouble
from flash_eplb.ipc.names import bell_name

MIB = 2**20


@pytest.fixture
def free(monkeypatch):
    """`free(n)`: /dev/shm has `n` MiB free."""

    def set_free(mib):
        found = SimpleNamespace(f_bavail=mib * 256, f_frsize=4096)
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


def test_the_limit_of_a_users_queues_is_told_apart_from_that_of_files(limit, name):
    limit(resource.RLIMIT_MSGQUEUE, 100)
    with pytest.raises(LimitError) as error:
        Doorbell.create(name)
    assert str(error.value) == (
        f"message queue {name} cannot be made: it takes 388 bytes, and the queues of this user may "
        "take 100 (RLIMIT_MSGQUEUE); raise it with `ulimit -q 819200`, or remove leftovers with "
        "`eplb clean`"
    )


def test_a_queue_takes_the_bytes_that_are_told(start, session):
    # As a user of its own: the queues of others would count, too.
    script = start(BARE_USER, session, limits.QUEUE_BYTES - 1, limits.QUEUE_BYTES)
    assert script.line() == "LimitError"
    assert script.line() == "made"


BARE_USER = """
import os
import resource
import sys
from flash_eplb.ipc.doorbell import Doorbell
from flash_eplb.ipc.limits import LimitError
from flash_eplb.ipc.names import bell_name

if os.geteuid() == 0:
    os.setuid(54321)
for bytes_ in map(int, sys.argv[2:]):
    resource.setrlimit(resource.RLIMIT_MSGQUEUE, (bytes_, 819200))
    try:
        Doorbell.create(bell_name(sys.argv[1])).close()
        print("made", flush=True)
    except LimitError:
        print("LimitError", flush=True)
"""


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError("Insufficient space for a new queue"), r"fs\.mqueue\.queues_max is \w+\)"),
        (OSError(errno.ENOSPC, "x"), r"raise it with `sysctl fs\.mqueue\.queues_max=1024`"),
        (OSError(errno.EMFILE, "x"), r"RLIMIT_NOFILE is \d+\); raise it with `ulimit -n \d+`"),
        (OSError(errno.ENOSYS, "Function not implemented"), "does the kernel have POSIX message"),
    ],
)
def test_each_trouble_with_queues_has_its_remedy(error, text):
    assert re.search(text, queue_trouble("/eplb.x.bell", error))


def test_queues_that_could_be_made_leave_nothing(name):
    Doorbell.create(name).close()
