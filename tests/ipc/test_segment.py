import gc
import os
import re
import struct

import numpy as np
import pytest

from flash_eplb.ipc.liveness import SegmentError, owner_is_alive
from flash_eplb.ipc.segment import LAYOUT, Segment
from flash_eplb.ipc.session import session_lock

OWNER = """
import sys
from flash_eplb.ipc.segment import Segment

segment = Segment.create(sys.argv[1], b"header", 100, 5)
segment.publish()
print("ready", flush=True)
sys.stdin.read()
segment.close()
"""

FORKING_OWNER = """
import os
import sys
from flash_eplb.ipc.segment import Segment

segment = Segment.create(sys.argv[1], b"header", 100, 5)
segment.publish()
child = os.fork()
if child == 0:
    segment.close()  # a child closes its copy and removes nothing
    print(os.getpid(), flush=True)
    sys.stdin.read()
    os._exit(0)
sys.stdin.read()
os.waitpid(child, 0)
segment.close()
"""


def remove(name):
    os.unlink("/dev/shm" + name)


@pytest.fixture
def name(session):
    return f"/eplb.{session}.rank.0"


@pytest.fixture
def owned(name):
    """A published segment with the header b"header" and 100 bytes, all zero."""
    segment = Segment.create(name, b"header", 100, 5)
    segment.publish()
    yield segment
    segment.close()


def overwrite(name, place, content):
    with open("/dev/shm" + name, "r+b") as file:
        file.seek(place)
        file.write(content)


def refusal(name, **options):
    """The one sentence with which `open` refuses the segment."""
    with pytest.raises(SegmentError) as error:
        Segment.open(name, **options)
    text = str(error.value)
    assert name in text
    assert "\n" not in text
    return text


def test_what_the_owner_writes_others_read(owned, name):
    owned.body[:] = np.arange(100)
    other = Segment.open(name)
    assert (other.header, other.generation, other.pid) == (b"header", 5, os.getpid())
    assert other.body[:100].tolist() == list(range(100))
    owned.body[7] = 200
    assert other.body[7] == 200
    other.close()


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 10_000])
@pytest.mark.parametrize("header", [b"", b"x", b"x" * 1000])
def test_the_body_is_zero_aligned_and_long_enough(name, size, header):
    segment = Segment.create(name, header, size, 0)
    assert len(segment.body) >= size
    assert not segment.body.any()
    assert segment.body.ctypes.data % 64 == 0
    segment.publish()
    other = Segment.open(name)
    assert other.header == header
    assert len(other.body) == len(segment.body)
    other.close()
    segment.close()


def test_others_cannot_write_unless_they_ask_to(owned, name):
    reader = Segment.open(name)
    with pytest.raises(ValueError, match="read-only"):
        reader.body[0] = 1
    reader.close()
    writer = Segment.open(name, writable=True)
    writer.body[0] = 1
    assert owned.body[0] == 1
    writer.close()


def test_only_the_user_may_open_it(owned, name):
    assert os.stat("/dev/shm" + name).st_mode & 0o777 == 0o600


def test_an_absent_segment_is_refused(name):
    assert "cannot be opened: No such file or directory" in refusal(name)
    assert not owner_is_alive(name)


def test_an_unpublished_segment_is_refused(name):
    segment = Segment.create(name, b"header", 100, 5)
    assert "is not ready" in refusal(name)
    early = Segment.open(name, published=False)
    assert early.generation == 5
    early.close()
    segment.publish()
    Segment.open(name).close()
    segment.close()


def test_another_layout_is_refused_with_both_numbers(owned, name):
    overwrite(name, 8, struct.pack("<I", LAYOUT + 1))
    assert f"has layout {LAYOUT + 1}, this version reads {LAYOUT};" in refusal(name)
    assert f"has layout {LAYOUT + 1}" in refusal(name, published=False)


def test_another_magic_is_refused(owned, name):
    overwrite(name, 0, b"NOT OURS")
    for published in (True, False):
        assert "is not flash_eplb's: it has another magic; remove it" in refusal(
            name, published=published
        )


@pytest.mark.parametrize("place", [12, 13, 14, 15, 32, 33, 34, 35, *range(36, 42)])
def test_a_damaged_header_is_refused(owned, name, place):
    damaged = bytes([owned.bytes[place] ^ 0x40])
    overwrite(name, place, damaged)
    assert "has a damaged header" in refusal(name)


@pytest.mark.parametrize("size", [0, 1, 35])
def test_a_segment_cut_within_its_preamble_is_refused(owned, name, size):
    os.truncate("/dev/shm" + name, size)
    assert f"is not ready: {size} bytes long" in refusal(name)


@pytest.mark.parametrize("size", [36, 41])
def test_a_segment_cut_within_its_header_is_refused(owned, name, size):
    os.truncate("/dev/shm" + name, size)
    assert "has a damaged header" in refusal(name)


def test_a_symbolic_link_is_refused(owned, name, session):
    link = f"/eplb.{session}.link"
    os.symlink("/dev/shm" + name, "/dev/shm" + link)
    assert "cannot be opened" in refusal(link)
    with pytest.raises(SegmentError):
        owner_is_alive(link)
    remove(link)


def test_another_users_segment_is_refused(owned, name, monkeypatch):
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert f"belongs to user id {user}, not to {user + 1}; choose another EPLB_SESSION" in refusal(
        name
    )
    with pytest.raises(SegmentError, match=f"belongs to user id {user}"):
        owner_is_alive(name)


def test_a_name_that_exists_is_not_taken(owned, name):
    owned.body[0] = 1
    with pytest.raises(SegmentError, match="exists already; run `eplb clean`"):
        Segment.create(name, b"", 10, 0)
    assert owner_is_alive(name)
    assert Segment.open(name).body[0] == 1


@pytest.mark.parametrize("times", [2, 10**6])
def test_more_than_there_is_room_for_is_refused_and_leaves_nothing(name, times):
    room = os.statvfs("/dev/shm")
    size = times * room.f_blocks * room.f_frsize
    with pytest.raises(SegmentError) as error:
        Segment.create(name, b"header", size, 0)
    text = str(error.value)
    needs = re.match(rf"shared memory {name} needs (\S+) MiB, /dev/shm has ", text)
    assert float(needs[1]) == pytest.approx(size / 2**20, abs=0.2)  # and a header
    assert " MiB free" in text
    assert "lower EPLB_RING_STEPS or enlarge it" in text
    assert not os.path.exists("/dev/shm" + name)
    assert not owner_is_alive(name)


def test_a_mapping_that_fails_leaves_no_descriptor_and_no_name(name, monkeypatch):
    def fail(*_):
        raise OSError(12, "Cannot allocate memory")

    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr("flash_eplb.ipc.segment.mmap.mmap", fail)
    with pytest.raises(SegmentError, match="Cannot allocate memory"):
        Segment.create(name, b"", 10, 1)
    # others may be closed meanwhile, by threads of earlier tests
    assert set(os.listdir("/proc/self/fd")) <= before
    assert not os.path.exists("/dev/shm" + name)


def test_pages_are_reserved(name):
    segment = Segment.create(name, b"", 1_000_000, 0)
    assert os.stat("/dev/shm" + name).st_blocks * 512 >= 1_000_000
    segment.close()


def test_the_owner_lives_for_itself_and_for_others_in_its_process(owned, name):
    other = Segment.open(name)
    assert owned.owner_is_alive()
    assert other.owner_is_alive()
    assert owner_is_alive(name)
    owned.close()
    assert not other.owner_is_alive()
    assert not owner_is_alive(name)
    other.close()


def test_a_killed_owner_is_dead(name, start):
    script = start(OWNER, name)
    script.line()
    segment = Segment.open(name)
    assert segment.pid == script.pid
    assert segment.owner_is_alive()
    assert owner_is_alive(name)
    assert owner_is_alive(name)  # asking does not free the lock
    script.kill()
    assert not segment.owner_is_alive()
    assert not owner_is_alive(name)
    segment.close()
    remove(name)


def test_an_owner_that_ends_removes_its_segment(name, start):
    script = start(OWNER, name)
    script.line()
    assert owner_is_alive(name)
    assert script.end() == 0
    assert not os.path.exists("/dev/shm" + name)


def test_a_forked_child_does_not_keep_the_lock(name, start):
    script = start(FORKING_OWNER, name)
    child = int(script.line())
    segment = Segment.open(name)
    assert segment.owner_is_alive()
    script.kill()
    os.kill(child, 0)  # it still runs
    assert not segment.owner_is_alive()
    assert not owner_is_alive(name)
    segment.close()
    remove(name)


def test_a_successor_of_the_same_name_is_another_segment(name, start):
    script = start(OWNER, name)
    script.line()
    old = Segment.open(name)
    script.kill()
    remove(name)
    new = Segment.create(name, b"", 0, 6)
    assert owner_is_alive(name)
    assert not old.owner_is_alive()
    old.close()
    assert new.owner_is_alive()
    new.close()


def test_close_removes_the_name_and_may_be_called_twice(owned, name):
    other = Segment.open(name)
    owned.close()
    assert not os.path.exists("/dev/shm" + name)
    owned.close()
    other.close()
    other.close()


def test_closing_another_end_leaves_the_segment(owned, name):
    Segment.open(name, writable=True).close()
    assert owner_is_alive(name)


def test_a_view_outlives_its_segment(owned, name):
    other = Segment.open(name)
    view = other.body[:100]
    owned.body[3] = 9
    other.close()
    owned.close()
    gc.collect()
    assert view[3] == 9


def descriptors(session):
    """Descriptors of this process that belong to segments of the session."""
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            continue
        if target.startswith(f"/dev/shm/eplb.{session}."):
            yield int(number)


def test_no_descriptor_stays_open(name, session):
    segment = Segment.create(name, b"header", 100, 5)
    refusal(name)
    segment.publish()
    for _ in range(3):
        Segment.open(name)  # given up without being closed
        owner_is_alive(name)
    with pytest.raises(SegmentError):
        Segment.create(name, b"", 0, 0)
    assert list(descriptors(session))
    segment.close()
    with pytest.raises(SegmentError):
        Segment.create(name, b"", 2**60, 0)
    gc.collect()
    assert list(descriptors(session)) == []


def test_all_descriptors_close_on_exec(owned, name, session):
    other = Segment.open(name)
    with session_lock(session):
        found = list(descriptors(session))
        assert len(found) >= 3
        assert not any(os.get_inheritable(number) for number in found)
    other.close()
