"""Owner and observer in different PID namespaces that share /dev/shm, as in two containers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from forks import wait_until

from flash_eplb.ipc.liveness import SegmentInUseError, owner_is_alive
from flash_eplb.ipc.names import rank_name
from flash_eplb.ipc.segment import Segment, take_name
from flash_eplb.ipc.session import remove_dead, segment_names, session_lock

UNSHARE = ["unshare", *["--user", "--map-root-user"] * (os.geteuid() != 0), "--pid", "--fork"]

# Does what the script in its first argument says, in a PID namespace of its own.
INSIDE = f"""
import os
import sys

command = [*{UNSHARE!r}, "--kill-child", sys.executable, "-c", *sys.argv[1:]]
os.execvp(command[0], command)
"""

OWNER = """
import os
import sys
from flash_eplb.ipc.segment import take_name

session, name = sys.argv[1:]
segment = take_name(session, name, b"", 100, 5)
segment.publish()
print(os.getpid(), flush=True)
sys.stdin.read()
segment.close()
"""

# Answers each line with what it finds, and takes the name as soon as the owner is dead.
OBSERVER = """
import os
import sys
from flash_eplb.ipc.liveness import SegmentInUseError, owner_is_alive
from flash_eplb.ipc.segment import take_name
from flash_eplb.ipc.session import remove_dead, session_lock

session, name = sys.argv[1:]
print(os.getpid(), flush=True)
taken = None
for _ in sys.stdin:
    alive = owner_is_alive(name)
    with session_lock(session):
        removed = remove_dead(session)
    try:
        taken = take_name(session, name, b"", 100, 6)
        taken.publish()
        print(alive, removed, "taken", flush=True)
    except SegmentInUseError:
        print(alive, removed, "in use", flush=True)
if taken is not None:
    taken.close()
"""


def _lacks() -> str:
    """Why no process can be put into a PID namespace here; empty if one can."""
    if shutil.which("unshare") is None:
        return "there is no unshare(1), of util-linux"
    tried = subprocess.run([*UNSHARE, "--kill-child", "true"], capture_output=True, text=True)
    if tried.returncode:
        who = "root" if os.geteuid() == 0 else "a user without privileges"
        return f"{who} may make no PID namespace here: {tried.stderr.strip()}"
    return ""


LACKS = _lacks()
pytestmark = pytest.mark.skipif(bool(LACKS), reason=LACKS)


@pytest.fixture
def start_inside(start):
    """`start` in a PID namespace of its own, in which a process is the first."""

    def start_one(code, *arguments):
        script = start(INSIDE, code, *arguments)
        assert script.line() == "1"
        return script

    return start_one


def test_the_life_and_death_of_an_owner_inside_are_told_from_outside(session, start_inside):
    name = rank_name(session, 0)
    owner = start_inside(OWNER, session, name)
    found = Segment.open(name)
    assert found.pid == 1  # which says nothing out here
    assert found.owner_is_alive()
    assert owner_is_alive(name)
    with session_lock(session):
        assert remove_dead(session) == []
    with pytest.raises(SegmentInUseError):
        take_name(session, name, b"", 10, 6)
    owner.kill()
    wait_until(lambda: not owner_is_alive(name), "dead")
    assert not found.owner_is_alive()
    found.close()
    take_name(session, name, b"", 10, 6).close()
    assert segment_names(session) == []


def test_the_life_and_death_of_an_owner_outside_are_told_from_inside(session, start_inside, start):
    name = rank_name(session, 0)
    owner = start(OWNER, session, name)
    owner.line()
    observer = start_inside(OBSERVER, session, name)
    observer.say("look")
    assert observer.line() == "True [] in use"
    assert owner_is_alive(name)
    owner.kill()
    observer.say("look")
    assert observer.line() == f"False ['{name}'] taken"
    assert owner_is_alive(name)
    assert Segment.open(name).pid == 1
    assert observer.end() == 0
    assert segment_names(session) == []


def test_owners_in_two_namespaces_keep_each_other_out(session, start_inside):
    name = rank_name(session, 0)
    first = start_inside(OWNER, session, name)
    second = start_inside(OBSERVER, session, name)
    second.say("look")
    assert second.line() == "True [] in use"
    assert first.end() == 0
    second.say("look")
    assert second.line() == "False [] taken"
