"""Two users of one host in one session: each is told so, and neither touches the other's."""

import json
import os

import pytest

SCRIPT = """
import json
import os
import sys

import numpy as np
from flash_eplb.ipc.doorbell import Doorbell
from flash_eplb.ipc.liveness import SegmentError, owner_is_alive
from flash_eplb.ipc.names import bell_name, rank_name
from flash_eplb.ipc.segment import Segment, take_name
from flash_eplb.ipc.session import dead_names, remove_dead, session_lock

session = sys.argv[1]
name, bell = rank_name(session, 0), bell_name(session)
# Whatever is imported or compiled late, now: the other users cannot read our files.
with session_lock(session):
    segment = Segment.create(name, b"", 10, 1)
    segment.publish()
Segment.open(name)
segment.close()
Doorbell.create(bell).close()


def as_user(user, action):
    if os.fork():
        assert os.wait()[1] == 0
        return
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    action()
    sys.stdout.flush()
    os._exit(0)


def leave():
    segment = take_name(session, name, b"", 10, 1)
    segment.publish()
    Doorbell.create(bell)
    os.close(os.open(f"/dev/shm/eplb.{session}x.lock", os.O_CREAT, 0o600))


def outcome(action):
    try:
        return repr(action())
    except SegmentError as error:
        return f"SegmentError: {error}"


def enter(lock):
    with session_lock(lock):
        pass


def meet():
    print(json.dumps({
        "alive": outcome(lambda: owner_is_alive(name)),
        "open": outcome(lambda: Segment.open(name)),
        "dead": outcome(lambda: dead_names(session)),
        "remove": outcome(lambda: remove_dead(session)),
        "take": outcome(lambda: take_name(session, name, b"", 10, 1)),
        "create": outcome(lambda: Segment.create(name, b"", 10, 1)),
        "open bell": outcome(lambda: Doorbell.open(bell)),
        "create bell": outcome(lambda: Doorbell.create(bell)),
        "lock": outcome(lambda: enter(session + "x")),
    }))


def clean():
    os.unlink(f"/dev/shm/eplb.{session}x.lock")
    print(json.dumps(remove_dead(session)))


as_user(65533, leave)
as_user(65534, meet)
as_user(65533, clean)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_another_users_leftovers_are_named_and_left_alone(session, start):
    script = start(SCRIPT, session)
    said = json.loads(script.line())
    assert said["dead"] == said["remove"] == "[]"
    for what in ("alive", "open", "take"):
        assert said[what] == (
            f"SegmentError: shared memory /eplb.{session}.rank.0 belongs to user id 65533, not to "
            "65534; choose another EPLB_SESSION"
        )
    assert "exists already" in said["create"]
    assert said["open bell"] == (
        f"SegmentError: doorbell /eplb.{session}.bell cannot be opened: Permission denied"
    )
    assert said["create bell"] == (
        f"SegmentError: doorbell /eplb.{session}.bell cannot be replaced: Operation not permitted; "
        "choose another EPLB_SESSION"
    )
    assert said["lock"].startswith(f"SegmentError: the lock of session '{session}x' ")
    assert json.loads(script.line()) == [f"/eplb.{session}.bell", f"/eplb.{session}.rank.0"]
    assert script.end() == 0
