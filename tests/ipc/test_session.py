import os
import threading

import pytest

from flash_eplb.ipc.doorbell import Doorbell
from flash_eplb.ipc.liveness import SegmentError, SegmentInUseError, owner_is_alive
from flash_eplb.ipc.names import bell_name, lock_name, planner_name, rank_name
from flash_eplb.ipc.segment import Segment, take_name
from flash_eplb.ipc.session import (
    clean_session,
    dead_names,
    remove_dead,
    segment_names,
    session_lock,
    sessions,
    sweep,
)

OWNER = """
import sys
from flash_eplb.ipc.doorbell import Doorbell
from flash_eplb.ipc.names import bell_name, rank_name
from flash_eplb.ipc.segment import take_name

session, *names = sys.argv[1:]
segments = [take_name(session, name, b"", 100, 5) for name in names]
for segment in segments:
    segment.publish()
bell = Doorbell.create(bell_name(session)) if rank_name(session, 0) in names else None
print("ready", flush=True)
sys.stdin.read()
if bell is not None:
    bell.close()
for segment in segments:
    segment.close()
"""

# The same without what takes a second to import: an owner is who holds the lock.
LIGHT_OWNER = """
import fcntl
import os
import sys
from flash_eplb.ipc.doorbell import Doorbell
from flash_eplb.ipc.names import bell_name, rank_name

session, *names = sys.argv[1:]
for name in names:
    fcntl.flock(os.open("/dev/shm" + name, os.O_RDWR | os.O_CREAT, 0o600), fcntl.LOCK_EX)
bell = Doorbell.create(bell_name(session)) if rank_name(session, 0) in names else None
print("ready", flush=True)
sys.stdin.read()
if bell is not None:
    bell.close()
for name in names:
    os.unlink("/dev/shm" + name)
"""

HOLDER = """
import sys
from flash_eplb.ipc.session import session_lock

with session_lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def own(session, start):
    """`own(*names)` is a living process that owns these segments, and the bell with rank 0's."""

    def own_names(*names, code=LIGHT_OWNER):
        script = start(code, session, *names)
        script.line()
        return script

    return own_names


def lock_file(session):
    return f"/dev/shm/eplb.{session}.lock"


def has_bell(session):
    try:
        Doorbell.open(bell_name(session)).close()
    except SegmentError:
        return False
    return True


def test_a_free_name_is_taken(session):
    name = rank_name(session, 3)
    segment = take_name(session, name, b"header", 100, 5)
    assert segment_names(session) == [name]
    assert session in sessions()
    assert (segment.header, segment.generation) == (b"header", 5)
    assert not os.path.exists(lock_file(session))
    segment.close()
    assert segment_names(session) == []
    assert session not in sessions()


def test_a_living_owners_name_is_refused_with_its_pid(session, own):
    name = rank_name(session, 0)
    script = own(name, code=OWNER)
    with pytest.raises(SegmentInUseError) as error:
        take_name(session, name, b"", 10, 6)
    assert str(error.value) == (
        f"session {session!r} is in use: {name} belongs to the living process {script.pid}; "
        "stop it or choose another EPLB_SESSION"
    )
    assert script.is_running()
    assert Segment.open(name).generation == 5
    assert has_bell(session)


def test_an_owner_that_has_not_published_yet_is_refused_too(session):
    name = planner_name(session)
    segment = take_name(session, name, b"", 10, 5)
    with pytest.raises(SegmentInUseError, match=f"belongs to the living process {os.getpid()};"):
        take_name(session, name, b"", 10, 6)
    segment.close()


def test_a_dead_owners_name_is_taken_over_and_all_that_it_left_removed(session, own):
    names = [rank_name(session, 0), rank_name(session, 1)]
    own(*names, code=OWNER).kill()
    assert segment_names(session) == names
    assert has_bell(session)
    segment = take_name(session, names[1], b"", 10, 6)
    assert segment_names(session) == [names[1]]
    assert segment.generation == 6
    assert not has_bell(session)
    segment.close()


def test_the_living_are_never_touched(session, own):
    living = own(rank_name(session, 0), rank_name(session, 2))
    dead = own(rank_name(session, 1), planner_name(session))
    assert dead_names(session) == []
    with session_lock(session):
        assert remove_dead(session) == []
    dead.kill()
    gone = [planner_name(session), rank_name(session, 1)]
    assert dead_names(session) == gone
    with session_lock(session):
        assert remove_dead(session) == gone
        assert remove_dead(session) == []
    assert living.is_running()
    assert segment_names(session) == [rank_name(session, 0), rank_name(session, 2)]
    assert owner_is_alive(rank_name(session, 0))
    assert has_bell(session)


def test_the_bell_goes_with_the_segment_of_rank_0(session, own):
    living = own(rank_name(session, 1))
    own(rank_name(session, 0)).kill()
    with session_lock(session):
        assert remove_dead(session) == [bell_name(session), rank_name(session, 0)]
    assert not has_bell(session)
    assert living.is_running()
    assert owner_is_alive(rank_name(session, 1))


def test_other_sessions_are_left_alone(session, own):
    other = f"{session}x"
    segment = take_name(other, rank_name(other, 0), b"", 10, 1)
    own(rank_name(session, 0)).kill()
    assert {session, other} <= set(sessions())
    with session_lock(session):
        remove_dead(session)
    assert owner_is_alive(rank_name(other, 0))
    segment.close()


def test_a_leftover_that_no_segment_is_can_be_removed(session):
    path = f"/dev/shm/eplb.{session}.rank.0"
    for content in (b"", bytes(7), bytes(100)):  # an owner died before it had published
        leave_file(path, content)
        assert dead_names(session) == [rank_name(session, 0)] * (len(content) != 7)
        os.unlink(path)
    leave_file(path, b"")
    take_name(session, rank_name(session, 0), b"", 10, 1).close()
    assert not os.path.exists(path)


def leave_file(path, content, mode=0o600):
    with open(path, "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(content)


@pytest.mark.parametrize(
    "kind", ["notes.csv", "rank", "rank.", "rank.0.txt", "rank.x", "planner.2", "bell.0", "bells"]
)
def test_a_file_whose_name_is_none_of_ours_stays(session, kind):
    path = f"/dev/shm/eplb.{session}.{kind}"
    leave_file(path, b"")
    assert session not in sessions()
    assert dead_names(session) == segment_names(session) == []
    take_name(session, planner_name(session), b"", 10, 1).close()
    os.unlink(path)


@pytest.mark.parametrize("entry", ["eplb..rank.0", "eplb.a b.rank.1", f"eplb.{'a' * 33}.planner"])
def test_a_name_of_a_session_that_none_can_be_is_none_of_ours(entry):
    leave_file(f"/dev/shm/{entry}", b"")
    try:
        assert not {"", "a b", "a" * 33} & set(sessions())
    finally:
        os.unlink(f"/dev/shm/{entry}")


@pytest.mark.parametrize(
    ("content", "mode", "why"),
    [
        (b"my notes", 0o600, "it has another magic; remove it or choose another EPLB_SESSION"),
        (b"1\n", 0o600, "it has another magic; remove it or choose another EPLB_SESSION"),
        (b"", 0o640, "its mode is 0640, ours is 0600; remove it"),
    ],
)
def test_a_file_of_our_name_that_is_not_ours_stays_and_is_named(session, content, mode, why):
    name = rank_name(session, 0)
    leave_file(f"/dev/shm{name}", content, mode)
    assert dead_names(session) == []
    with pytest.raises(SegmentError) as error:
        take_name(session, name, b"", 10, 1)
    assert str(error.value) == (
        f"shared memory {name} exists already, and flash_eplb has not made it: {why}"
    )
    os.unlink(f"/dev/shm{name}")


def test_a_lock_that_was_left_is_listed_but_one_that_is_held_is_not(session):
    leave_file(lock_file(session), b"")
    assert dead_names(session) == [lock_name(session)]
    assert clean_session(session) == [lock_name(session)]
    with session_lock(session):
        assert dead_names(session) == []


def test_another_users_segments_are_neither_dead_nor_taken(session, own, monkeypatch):
    name = rank_name(session, 0)
    own(name).kill()
    with monkeypatch.context() as patch:
        user = os.geteuid()
        patch.setattr(os, "geteuid", lambda: user + 1)
        assert dead_names(session) == []
        assert remove_dead(session) == []
        with pytest.raises(SegmentError, match=f"belongs to user id {user}, not to {user + 1}"):
            take_name(session, name, b"", 10, 1)
    assert segment_names(session) == [name]
    assert has_bell(session)
    with session_lock(session):
        remove_dead(session)


def test_an_owner_that_ends_leaves_a_name_that_is_another_engines_by_now(session):
    names = rank_name(session, 0), bell_name(session)
    old = take_name(session, names[0], b"", 10, 1), Doorbell.create(names[1])
    for name in names:
        os.unlink(f"/dev/shm{name}")  # rm, or systemd's RemoveIPC at a logout
    new = take_name(session, names[0], b"", 10, 2), Doorbell.create(names[1])
    for end in reversed(old):
        end.close()
    assert owner_is_alive(names[0])
    assert has_bell(session)
    for end in reversed(new):
        end.close()
    assert segment_names(session) == []
    assert not has_bell(session)


def test_an_owner_that_ends_removes_its_name_under_the_lock_only(session, start, monkeypatch):
    monkeypatch.setattr("flash_eplb.ipc.session._CLOSING_SECONDS", 0.0)
    name = rank_name(session, 0)
    segment = take_name(session, name, b"", 10, 1)
    holder = start(HOLDER, session)
    holder.line()
    segment.close()
    assert segment_names(session) == [name]
    holder.end()
    assert not owner_is_alive(name)
    with session_lock(session):
        assert remove_dead(session) == [name]


def test_a_lock_whose_name_was_removed_meanwhile_is_not_removed_again(session):
    with session_lock(session):
        os.unlink(lock_file(session))
        with open(lock_file(session), "wb"):  # another process's by now
            pass
    assert os.path.exists(lock_file(session))
    os.unlink(lock_file(session))


def test_the_lock_exists_only_while_it_is_held(session):
    assert not os.path.exists(lock_file(session))
    with session_lock(session):
        assert os.path.exists(lock_file(session))
        assert segment_names(session) == []
    assert not os.path.exists(lock_file(session))


def test_the_lock_is_let_go_after_an_error(session):
    with pytest.raises(KeyError), session_lock(session):
        raise KeyError
    with session_lock(session, timeout=0):
        pass


def test_a_lock_that_is_held_is_waited_for_and_then_given_up(session, start):
    holder = start(HOLDER, session)
    holder.line()
    with (
        pytest.raises(SegmentError, match=r"was held for 0 s; is a process of this session"),
        session_lock(session, timeout=0),
    ):
        pytest.fail("two held it at once")
    assert holder.end() == 0
    with session_lock(session, timeout=0):
        pass


def test_a_holder_that_is_killed_leaves_a_free_lock(session, start):
    holder = start(HOLDER, session)
    holder.line()
    holder.kill()
    assert os.path.exists(lock_file(session))
    with session_lock(session, timeout=0):
        pass
    assert not os.path.exists(lock_file(session))


def test_the_lock_of_another_session_does_not_matter(session):
    with session_lock(session), session_lock(f"{session}x", timeout=0):
        pass


def test_a_lock_that_cannot_be_opened_is_refused_in_one_sentence(session):
    os.symlink("/dev/null", lock_file(session))
    with pytest.raises(SegmentError, match=r"cannot be opened: .*; choose another EPLB_SESSION"):
        take_name(session, rank_name(session, 0), b"", 10, 1)
    os.unlink(lock_file(session))


def test_one_at_a_time_holds_the_lock(session):
    inside = 0
    most = []

    def work():
        nonlocal inside
        for _ in range(20):
            with session_lock(session):
                inside += 1
                most.append(inside)
                threading.Event().wait(0.0001)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 80
    assert not os.path.exists(lock_file(session))


def test_of_many_that_want_a_name_one_gets_it(session):
    name = planner_name(session)
    segments, refusals = [], []

    def work():
        try:
            segments.append(take_name(session, name, b"", 10, 1))
        except SegmentInUseError as error:
            refusals.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(segments), len(refusals)) == (1, 7)
    assert owner_is_alive(name)
    segments[0].close()


def test_a_sweep_removes_what_killed_workers_left(session, own):
    script = own(rank_name(session, 0), rank_name(session, 1))
    script.kill()
    sweep(session, patience=0)
    assert segment_names(session) == []
    assert not has_bell(session)


def test_a_sweep_waits_for_those_that_are_about_to_die(session, own):
    script = own(rank_name(session, 0))
    thread = threading.Thread(target=sweep, args=(session, 60))
    thread.start()
    script.kill()
    thread.join()
    assert segment_names(session) == []


def test_a_sweep_leaves_the_living(session, own):
    script = own(rank_name(session, 0))
    sweep(session, patience=0)
    assert owner_is_alive(rank_name(session, 0))
    assert has_bell(session)
    assert script.is_running()


def test_a_sweep_of_nothing_makes_nothing(session):
    sweep(session, patience=60)
    assert segment_names(session) == []
