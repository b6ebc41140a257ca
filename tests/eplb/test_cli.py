import os
import re
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from flash_eplb import __version__
from flash_eplb.eplb.cli import app
from flash_eplb.ipc.doorbell import Doorbell
from flash_eplb.ipc.liveness import owner_is_alive
from flash_eplb.ipc.names import bell_name, planner_name
from flash_eplb.ipc.rank_segment import RankSegment
from flash_eplb.ipc.segment import take_name
from flash_eplb.ipc.shape import GroupShape, ModelShape
from flash_eplb.ipc.status import Field, State

pytestmark = pytest.mark.usefixtures("environment")


def eplb(*arguments):
    return CliRunner().invoke(app, arguments)


def run_eplb(*arguments, **variables):
    """The command in a process of its own, for it sets up logging; `variables` are its setting."""
    command = [sys.executable, "-m", "flash_eplb.eplb.cli", *arguments]
    return subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, timeout=50
    )


def test_a_wrong_session_is_refused():
    result = eplb("status", "--session", "../x")
    assert result.exit_code == 2
    assert "EPLB_SESSION='../x': allowed is" in result.stderr


def test_a_policy_that_is_not_there_ends_the_planner_before_it_attaches(session):
    for command in (["planner", "--session", session], ["warmup"]):
        found = run_eplb(*command, EPLB_POLICY="flashbl")
        assert found.returncode == 2
        assert found.stdout == ""
        assert found.stderr.startswith("eplb: EPLB_POLICY='flashbl' names no policy; known are ")
        assert len(found.stderr.splitlines()) == 1


def python_path(folder):
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def install_policy(folder, code):
    """A package in `folder` whose entry point `mine` is `Mine` of `code`."""
    (folder / "mine.py").write_text(code)
    info = folder / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[flash_eplb.policies]\nmine = mine:Mine\n")
    return {"PYTHONPATH": python_path(folder), "EPLB_POLICY": "mine"}


def test_a_policy_that_does_not_load_ends_the_planner_with_one_sentence(session, tmp_path):
    found = run_eplb("planner", "--session", session, **install_policy(tmp_path, "import nothing_"))
    assert found.returncode == 2
    assert found.stderr == (
        "eplb: EPLB_POLICY='mine': the entry point mine = mine:Mine of the package mine does not "
        "load: ModuleNotFoundError: No module named 'nothing_'\n"
    )


def test_the_traceback_of_a_policy_is_there_for_its_author(session, tmp_path):
    variables = install_policy(tmp_path, "import nothing_") | {"EPLB_LOG_LEVEL": "DEBUG"}
    found = run_eplb("planner", "--session", session, **variables)
    assert "mine.py" in found.stderr
    assert "Traceback" in found.stderr


@pytest.mark.parametrize(
    ("command", "where"),
    [(command, "warmup") for command in ("planner", "warmup", "replay", "plan")]
    + [("replay", "plan"), ("plan", "plan")],
)
def test_ctrl_c_is_never_lost_in_a_policy(session, tmp_path, command, where):
    code = """
import os, signal, time

def interrupted(*_):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
    except KeyboardInterrupt:
        raise SystemError from None  # as of numba

class Mine:
    def __init__(self, *_): ...
    def plan(self, heat, placement): return placement

"""
    code += "warmup = interrupted" if where == "warmup" else "Mine.plan = interrupted"
    np.save(tmp_path / "heat.npy", np.ones((200, 1, 4), int))
    arguments = {
        "replay": [tmp_path / "heat.npy", "--ranks=2", "--slots-per-rank=2"],
        "plan": [tmp_path / "heat.npy", "--ranks=2", "--slots-per-rank=2"],
        "planner": ["--session", session],
    }.get(command, [])
    found = run_eplb(command, *arguments, **install_policy(tmp_path, code))
    assert found.returncode == 130
    assert "eplb:" not in found.stderr


@pytest.mark.parametrize(("per_node", "near"), [("0", 2), ("1", 1), ("8", 2)])
def test_a_policy_that_cannot_be_made_for_the_engine_ends_the_planner(
    session, tmp_path, per_node, near
):
    code = "def Mine(ranks, slots, near): raise ValueError(f'{ranks} {slots} {near}: too few')"
    shape = GroupShape((ModelShape("m", 1),), 4, 2, 3, (0, 1), (8,), 1, 8)
    ranks = [RankSegment.create(session, shape, rank, 1) for rank in range(2)]
    bell = Doorbell.create(bell_name(session))
    for rank in ranks:
        rank.publish()
    variables = install_policy(tmp_path, code) | {"EPLB_RANKS_PER_NODE": per_node}
    found = run_eplb("planner", "--session", session, **variables)
    assert found.returncode == 2
    assert found.stderr.splitlines()[-1] == (
        "eplb: EPLB_POLICY='mine' cannot be made for 2 ranks x 3 slots: "
        f"ValueError: 2 3 {near}: too few"
    )
    assert "Traceback" not in found.stderr
    assert not owner_is_alive(planner_name(session))
    for rank in ranks:
        rank.close()
    bell.close()


def test_the_size_of_a_node_reaches_the_planner(environment):
    environment.setattr("flash_eplb.eplb.logs.configure", lambda level: None)
    environment.setattr("flash_eplb.eplb.cli.compile_kernels", lambda choice: None)

    class Seen:
        def __init__(self, *arguments, **_):
            made.append(arguments[-1])

        async def run(self): ...

        def stop(self): ...

    environment.setattr("flash_eplb.planners.planner.Planner", Seen)
    made = []
    for value in ("0", "8"):
        environment.setenv("EPLB_RANKS_PER_NODE", value)
        assert eplb("planner").exit_code == 0
    assert made == [None, 8]


def test_settings_that_the_policy_does_not_take_are_said(session, tmp_path):
    # The planner ends at once, for the policy's warm-up fails.
    code = "class Mine: ...\ndef warmup(): raise OSError('no cache')"
    variables = install_policy(tmp_path, code)
    found = run_eplb("planner", "--session", session, **variables, EPLB_MAX_MOVES="9")
    assert found.returncode == 2
    first, *_, last = found.stderr.splitlines()
    assert first == "eplb: EPLB_MAX_MOVES does nothing with EPLB_POLICY=mine"
    assert last.startswith("eplb: EPLB_POLICY='mine' cannot be used: mine.warmup() failed with ")
    assert "MIN_GAIN" not in found.stderr


@pytest.mark.parametrize("module", ["typer", "pydantic_core"])
def test_ctrl_c_while_it_is_being_loaded_ends_it_without_a_word(module):
    code = f"""
import os, signal, sys

class Finder:
    def find_spec(name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder)
from flash_eplb.eplb.__main__ import main
main()
"""
    command = [sys.executable, "-c", code, "version"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize("command", [["planner"], ["replay", "x.npy"], ["stress"]])
def test_a_cap_with_which_the_policy_moves_nothing_is_refused(environment, tmp_path, command):
    environment.setattr("flash_eplb.eplb.logs.configure", lambda level: None)
    environment.chdir(tmp_path)
    np.save("x.npy", np.ones((9, 2, 4), int))
    environment.setenv("EPLB_POLICY", "swap")
    environment.setenv("EPLB_MAX_MOVES", "1")
    shape = ["--ranks", "2", "--slots-per-rank", "3"] if "replay" in command else []
    found = eplb(*command, *shape)
    assert (found.exit_code, found.stderr) == (
        2,
        "eplb: EPLB_MAX_MOVES is 1; swap moves two experts at once: give 2 or more, or another "
        "EPLB_POLICY than swap\n",
    )


def test_whatever_one_of_our_policies_refuses_ends_the_planner_at_its_start(environment):
    def few(self, *_, threads, **__):
        raise ValueError(f"threads is {threads}; give 1")

    environment.setattr("flash_eplb.eplb.logs.configure", lambda level: None)
    environment.setattr("flash_eplb.planners.flashlb.FlashLB.__init__", few)
    environment.setenv("EPLB_PLANNER_THREADS", "9")
    found = eplb("planner")
    assert (found.exit_code, found.stderr) == (
        2,
        "eplb: EPLB_PLANNER_THREADS is 9; give 1, or another EPLB_POLICY than flashlb\n",
    )


@pytest.mark.parametrize("most", [8, 12, 16])
def test_a_planner_that_may_open_too_few_files_says_so_in_one_sentence(session, most):
    command = f'ulimit -n {most}; exec "$0" -m flash_eplb.eplb.cli planner --session {session}'
    found = subprocess.run(
        ["sh", "-c", command, sys.executable], capture_output=True, text=True, timeout=50
    )
    assert found.returncode == 1
    assert re.fullmatch(
        rf"eplb: the planner opens 16 files and may open \d+ \(RLIMIT_NOFILE is {most}, \d+ are "
        r"open\); raise it with `ulimit -n \d+`\n",
        found.stderr,
    )


def test_status_without_an_engine_is_one_sentence(session):
    result = eplb("status", "--session", session)
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"eplb: no engine in session {session!r}: ")
    own = line.partition("; engines run in ")[0]  # of others on this host
    assert own.endswith("; it appears with its first request, so send it one")


def test_status_names_the_sessions_that_have_an_engine(session):
    shape = GroupShape((ModelShape("m", 1),), 4, 2, 3, (0, 1), (8,), 1, 8)
    rank = RankSegment.create(session, shape, 0, 1)
    rank.publish()
    alive = eplb("status", "--session", f"{session}-x").stderr
    rank.close()
    assert re.search(rf"engines run in .*{session!r}.*: is EPLB_SESSION another here\?$", alive)
    assert repr(session) not in eplb("status", "--session", f"{session}-x").stderr


def test_status_shows_each_rank(session):
    shape = GroupShape((ModelShape("m", 1),), 4, 2, 3, (0, 1), (8,), 1, 8)
    ranks = [RankSegment.create(session, shape, rank, 1) for rank in range(2)]
    for number, rank in enumerate(ranks):
        rank.status[Field.STEP] = 4711 + number
        rank.publish()
    result = eplb("status", "--session", session)
    assert result.exit_code == 0
    assert "4711" in result.stdout
    assert "4712" in result.stdout
    assert result.stdout.endswith("planner: none, experts stay where they are\n")
    planner = take_name(session, planner_name(session), b"", 0, 1)
    planner.publish()
    assert eplb("status", "--session", session).stdout.endswith("planner: running\n")
    os.utime("/dev/shm" + planner.name, (0, 0))
    last = eplb("status", "--session", session).stdout.splitlines()[-1]
    assert last.startswith(f"planner (pid {os.getpid()}) has shown no life for ")
    planner.close()
    for rank in ranks:
        rank.close()


def test_status_names_a_rank_that_is_missing(session):
    shape = GroupShape((ModelShape("m", 1),), 4, 2, 3, (0, 1), (8,), 1, 8)
    first = RankSegment.create(session, shape, 0, 1)
    first.publish()
    result = eplb("status", "--session", session)
    first.close()
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(
        f"eplb: the engine of session {session!r} is not complete: EP rank 1 has no shared memory "
    )


def test_status_of_many_ranks_fits_80_columns(session, environment):
    environment.setenv("COLUMNS", "80")
    environment.setenv("FORCE_COLOR", "1")  # rich takes what it writes to for a terminal
    shape = GroupShape((ModelShape("m", 1),), 4, 12, 3, (0,), (8,), 1, 8)
    ranks = [RankSegment.create(session, shape, rank, 1) for rank in range(12)]
    for number, rank in enumerate(ranks):
        rank.status[Field.STEP] = 12345678
        rank.status[Field.STATE] = State.STAGING
        rank.status[Field.MOVED_ROWS] = 1000 + number
        rank.status[Field.RECEIVED_BYTES] = 5 << 33
        rank.publish()
    ranks[3].status[Field.DAMAGED] = 2
    ranks[3].status[Field.HEAT_MERGED] = 7
    result = eplb("status", "--session", session)
    for rank in ranks:
        rank.close()
    assert result.exit_code == 0
    out = re.sub("\x1b\\[[0-9;]*m", "", result.stdout)
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    rows = [line.split() for line in out.splitlines() if "12345678" in line]
    assert rows == [
        [str(n), "12345678", "0", "staging", "0", "0", "0", str(1000 + n), "40960.0"]
        for n in range(12)
    ]
    assert out.splitlines()[-2] == "EP rank 3: heat_merged 7, damaged 2"


@pytest.mark.parametrize("command", ["version", "config", "--help"])
def test_an_output_that_cannot_be_written_is_one_sentence(command):
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            [sys.executable, "-m", "flash_eplb.eplb.cli", command],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert found.returncode == 1
    assert found.stderr == "eplb: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize("command", ["version", "config", "--help"])
def test_a_reader_that_has_gone_ends_a_command_without_a_word(command):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "flash_eplb.eplb.cli", command]
    found = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (found.returncode, found.stderr) == (1, "")


@pytest.mark.parametrize("option", ["--folder", "--record"])
def test_the_demo_refuses_a_file_in_the_place_of_a_folder(tmp_path, option):
    (tmp_path / "taken").touch()
    result = eplb("demo", "--folder", str(tmp_path), option, str(tmp_path / "taken"))
    assert result.exit_code == 2
    assert result.stderr == (
        f"eplb: {option} {tmp_path}/taken: it is no folder; give one, or a path where one can be "
        "made\n"
    )


def test_version():
    result = eplb("version")
    assert (result.exit_code, result.stdout) == (0, f"{__version__}\n")


@pytest.mark.parametrize(
    "command",
    [
        "planner",
        "config",
        "status",
        "clean",
        "plan",
        "replay",
        "record",
        "report",
        "demo",
        "warmup",
        "version",
    ],
)
def test_every_command_explains_itself(command):
    result = eplb(command, "--help")
    assert result.exit_code == 0
    assert command in result.stdout


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        (
            {"EPLB_SAVE_PLACEMENT": "/nope/x/map.json"},
            "EPLB_SAVE_PLACEMENT=/nope/x/map.json: /nope/x is no folder; give the path of a file "
            "in one that is there",
        ),
        (
            {"EPLB_SAVE_PLACEMENT": "/tmp"},
            "EPLB_SAVE_PLACEMENT=/tmp: is a folder; give the path of a file in one that is there",
        ),
        (
            {"EPLB_RECORD": "/etc/passwd"},
            "EPLB_RECORD=/etc/passwd: it is no folder; give one, or a path where one can be made",
        ),
        (
            {"EPLB_SAVE_PLACEMENT": "/proc/map.json"},
            "EPLB_SAVE_PLACEMENT=/proc/map.json: No such file or directory; give the path of a "
            "file that can be written",
        ),
        (
            {"EPLB_RECORD": "/proc/a/recording"},
            "EPLB_RECORD=/proc/a/recording: nothing can be made in /proc: No such file or "
            "directory; give another folder",
        ),
    ],
)
def test_a_place_that_nothing_can_be_written_to_ends_the_planner(session, variables, text):
    found = run_eplb("planner", "--session", session, **variables)
    assert (found.returncode, found.stderr) == (2, f"eplb: {text}\n")


def test_a_placement_is_not_saved_into_a_pipe(session, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    found = run_eplb("planner", "--session", session, EPLB_SAVE_PLACEMENT=str(pipe))
    assert (found.returncode, found.stderr) == (
        2,
        f"eplb: EPLB_SAVE_PLACEMENT={pipe}: it is no regular file; give the path of a file that "
        "can be written\n",
    )


def test_status_and_record_with_too_few_files_say_so(session, tmp_path):
    shape = GroupShape((ModelShape("m", 1),), 4, 2, 3, (0, 1), (8,), 1, 8)
    ranks = [RankSegment.create(session, shape, rank, 1) for rank in range(2)]
    for rank in ranks:
        rank.publish()
    used = os.dup(0)
    os.close(used)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    eplb("status", "--session", session)  # what it imports takes files for a moment
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 5, limits[1]))
    try:
        shown = eplb("status", "--session", session)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert shown.exit_code == 1
    assert shown.stderr.startswith("eplb: eplb status opens 10 files and may open ")
    for rank in ranks:
        rank.close()
