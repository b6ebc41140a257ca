import os

import pytest
from typer.testing import CliRunner

from flash_eplb.eplb.cli import app
from flash_eplb.ipc.doorbell import Doorbell
from flash_eplb.ipc.liveness import owner_is_alive
from flash_eplb.ipc.names import bell_name, planner_name, rank_name
from flash_eplb.ipc.segment import take_name
from flash_eplb.ipc.session import dead_names, remove_dead, segment_names, sessions

pytestmark = pytest.mark.usefixtures("environment")

OWNER = """
import sys
from flash_eplb.ipc.doorbell import Doorbell
from flash_eplb.ipc.names import bell_name, rank_name
from flash_eplb.ipc.segment import take_name

session = sys.argv[1]
segment = take_name(session, rank_name(session, 0), b"", 100, 5)
bell = Doorbell.create(bell_name(session))
print("ready", flush=True)
sys.stdin.read()
"""


def eplb(*arguments):
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def dead(session, start):
    """`dead(name)` is a session of this name in which a process left a bell and a segment."""

    names = []

    def leave(name):
        names.append(name)
        script = start(OWNER, name)
        script.line()
        script.kill()
        return [bell_name(name), rank_name(name, 0)]

    yield leave
    for name in names:
        remove_dead(name)


@pytest.fixture
def only_ours(session, environment):
    """`eplb clean` finds the sessions whose names begin with `session` and no others."""
    environment.setattr(
        "flash_eplb.ipc.session.sessions",
        lambda: [name for name in sessions() if name.startswith(session)],
    )


def test_an_empty_session_is_not_all_of_them(session, dead, only_ours):
    names = dead(session)
    result = eplb("clean", "--session", "")
    assert result.exit_code == 2
    assert "EPLB_SESSION='': allowed is 1 to 32 letters" in result.stderr
    assert sorted(dead_names(session)) == sorted(names)


def test_clean_removes_what_the_dead_left_and_lists_it_before(session, dead):
    names = dead(session)
    result = eplb("clean", "--session", session, "--dry-run")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [f"would remove {name}" for name in names]
    assert segment_names(session) == names[1:]
    assert dead_names(session) == names
    result = eplb("clean", "--session", session)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [f"removed {name}" for name in names]
    assert dead_names(session) == segment_names(session) == []
    result = eplb("clean", "--session", session)
    assert (result.exit_code, result.stdout) == (0, "nothing to remove\n")


@pytest.mark.usefixtures("only_ours")
def test_clean_removes_all_dead_sessions_and_leaves_the_living_among_them(session, dead):
    others = [f"{session}-{letter}" for letter in "abc"]
    living = take_name(others[1], rank_name(others[1], 0), b"", 10, 1)
    bell = Doorbell.create(bell_name(others[1]))
    names = [name for other in (session, others[0], others[2]) for name in dead(other)]
    result = eplb("clean", "--dry-run")
    assert result.stdout.splitlines() == [f"would remove {name}" for name in names]
    result = eplb("clean")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [f"removed {name}" for name in names]
    assert sessions_of(session) == [others[1]]
    assert owner_is_alive(living.name)
    Doorbell.open(bell_name(others[1])).close()
    bell.close()
    living.close()


def sessions_of(session):
    return [name for name in sessions() if name.startswith(session)]


def test_clean_removes_the_dead_of_a_session_that_lives(session, start):
    living = take_name(session, planner_name(session), b"", 10, 1)
    script = start(OWNER, session)
    script.line()
    assert eplb("clean", "--session", session).stdout == "nothing to remove\n"
    script.kill()
    result = eplb("clean", "--session", session)
    assert result.stdout.splitlines() == [
        f"removed {bell_name(session)}",
        f"removed {rank_name(session, 0)}",
    ]
    assert segment_names(session) == [living.name]
    assert owner_is_alive(living.name)
    living.close()


@pytest.mark.usefixtures("only_ours")
def test_clean_removes_the_lock_of_a_killed_holder(session):
    lock = f"/dev/shm/eplb.{session}.lock"
    os.close(os.open(lock, os.O_CREAT, 0o600))
    assert eplb("clean", "--dry-run").stdout == f"would remove /eplb.{session}.lock\n"
    assert os.path.exists(lock)
    assert eplb("clean").stdout == f"removed /eplb.{session}.lock\n"
    assert not os.path.exists(lock)


def test_clean_removes_a_doorbell_whose_segment_is_gone(session):
    bell = Doorbell.create(bell_name(session))
    assert session in sessions()
    result = eplb("clean", "--session", session, "--dry-run")
    assert result.stdout == f"would remove {bell_name(session)}\n"
    result = eplb("clean", "--session", session)
    assert result.stdout == f"removed {bell_name(session)}\n"
    assert eplb("clean", "--session", session).stdout == "nothing to remove\n"
    bell.close()


def test_clean_never_touches_the_living(session):
    segment = take_name(session, planner_name(session), b"", 10, 1)
    for options in ([], ["--dry-run"]):
        result = eplb("clean", "--session", session, *options)
        assert (result.exit_code, result.stdout) == (0, "nothing to remove\n")
    assert owner_is_alive(planner_name(session))
    segment.close()


def test_clean_takes_the_session_from_its_option_only(session, environment):
    """Without the option it is about all sessions, whatever EPLB_SESSION says."""
    segment = take_name(session, planner_name(session), b"", 10, 1)
    environment.setattr("flash_eplb.ipc.session.sessions", lambda: [session])
    environment.setenv("EPLB_SESSION", "not good")
    result = eplb("clean")
    assert (result.exit_code, result.stdout) == (0, "nothing to remove\n")
    segment.close()


def test_clean_says_which_session_it_cannot_clean_and_goes_on(session, start, environment):
    bad = f"{session}x"
    lock = f"/dev/shm/eplb.{bad}.lock"
    os.symlink("/dev/null", lock)
    script = start(OWNER, session)
    script.line()
    script.kill()
    environment.setattr("flash_eplb.ipc.session.sessions", lambda: [bad, session])
    result = eplb("clean")
    os.unlink(lock)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"eplb: the lock of session '{bad}' ({lock}) cannot be opened")
    assert f"removed {rank_name(session, 0)}" in result.stdout
