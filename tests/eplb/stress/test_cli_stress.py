"""`eplb stress` as a user runs it, and with something broken, which it must find."""

import json
import os
import re
import signal
import time

import numpy as np
import pytest
from typer.testing import CliRunner

from flash_eplb.eplb.cli import app
from flash_eplb.eplb.stress.faults import FAULTS
from flash_eplb.ipc.names import planner_name, rank_name
from flash_eplb.ipc.segment import take_name
from flash_eplb.ipc.session import segment_names
from flash_eplb.planners.expert_map import encode_map
from flash_eplb.planners.recording import Recording
from flash_eplb.planners.replay import linear_placement


def verdict_of(out, promise):
    """(what, figure) of the line of a promise."""
    return re.search(rf"│ {promise} +│ (\S+(?: judged)?) +│ (.*?) *│", out).groups()


def promises(out):
    return dict(re.findall(r"│ ([a-z-][a-z -]*?) +│ (holds|BROKEN|not judged) +│", out))


def survived(stress, file, *arguments, **variables):
    """The figures of a stress in which nothing was broken."""
    rate = ("--steps-per-second", 200)
    code, out, complaints = stress(*arguments, *rate, "--json", file, timeout=2000, **variables)
    assert "BROKEN" not in promises(out).values(), out + complaints
    assert (code, complaints) == (0, "")
    figures = json.loads(file.read_text())
    assert figures["checked"] >= figures["commits"] > len({f["name"] for f in figures["faults"]})
    assert {v["promise"]: v["holds"] for v in figures["verdicts"]}["no wrong weight"] is True
    return figures


@pytest.mark.soak
def test_every_fault_is_survived(stress, tmp_path, amount):
    faults, seconds = amount(("all", 3), ("random", 900))
    arguments = ("--faults", faults, "--seconds", seconds)
    figures = survived(stress, tmp_path / "figures.json", *arguments)
    if faults == "all":
        assert [fault["name"] for fault in figures["faults"]] == list(FAULTS)
        assert figures["damaged"] == 1
        assert figures["refused"] >= 4 * 4  # noise, a wrong bit, an expert gone, one doubled
    assert {fault["name"] for fault in figures["faults"]} == set(FAULTS)
    assert figures["aborted"] >= 1
    assert figures["read"] > 2000


@pytest.mark.soak
@pytest.mark.parametrize("routing", ["uniform", "weighted"])
def test_real_rows_survive_faults(stress, tmp_path, amount, routing):
    faults, seconds = amount(("bit-flips,rank-killed", 3), ("random", 900))
    arguments = ("--weights", "--faults", faults, "--seconds", seconds, "--scenario", "burst")
    shape = ("--layers", 3, "--experts", 16, "--ranks", 3)
    variables = {"EPLB_ROUTING": routing}
    figures = survived(stress, tmp_path / "figures.json", *arguments, *shape, **variables)
    if routing == "uniform":  # else other columns may do, and no row is on its way
        assert figures["damaged"] >= 1
    assert figures["compared"] > 0


def test_as_fast_as_it_goes_for_some_steps(stress, tmp_path):
    file = tmp_path / "figures.json"
    arguments = ("--scenario", "antiphase", "--steps", 3000, "--steps-per-second", 0)
    folder = tmp_path / "recording"
    code, out, complaints = stress(*arguments, "--json", file, EPLB_RECORD=str(folder))
    assert (code, complaints) == (0, ""), out
    figures = json.loads(file.read_text())
    assert figures["steps"] >= 3000
    assert "Cores used: loop" in out
    recording = Recording(folder)
    assert len(list(recording.steps())) > 100
    assert len(recording.table("plans")) == figures["plans"]
    transfers = recording.table("transfers")
    assert len(transfers) == 4 * figures["commits"]
    assert (transfers["start_ns"] < transfers["staged_ns"]).all()
    assert (transfers["staged_ns"] < transfers["commit_ns"]).all()


def test_verdicts_are_whole_where_the_terminal_is_narrow(stress):
    code, out, complaints = stress("--steps", 1, COLUMNS="40", FORCE_COLOR="1")
    assert (code, complaints) == (0, ""), out
    shown = re.sub("\x1b[^m]*m", "", out).split("Verdicts")[1]
    assert "│ the planner keeps in step │ holds" in shown
    assert "│ no process, no shared memory" in shown


def test_its_figures_are_written_though_nobody_reads_on(start_stress, tmp_path):
    file = tmp_path / "figures.json"
    process = start_stress("--seconds", 60, "--json", file)
    while "commits" not in process.stdout.readline():
        pass
    process.stdout.close()  # as `| tee`, which Ctrl-C ends, too
    assert process.wait(60) == 130
    assert json.loads(file.read_text())["interrupted"]
    assert process.stderr.read() == ""


def test_a_recording_that_fails_is_said_though_every_promise_holds(stress, tmp_path):
    python = """
import errno, os, sys

def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

if any("planner_process" in word for word in sys.orig_argv):
    from flash_eplb.planners import recorder

    recorder.write_chunk = full
"""
    folder = tmp_path / "recording"
    code, out, complaints = stress("--steps", 100, python=python, EPLB_RECORD=str(folder))
    assert code == 0, out
    assert complaints.startswith(f"eplb: recording to EPLB_RECORD={folder} has stopped, planning")
    assert "No space left on device" in complaints


def test_a_map_of_another_shape_is_said_once(stress, tmp_path):
    path = tmp_path / "map.json"
    path.write_text(encode_map(linear_placement(4, 64, 4, 18)))
    arguments = ("--layers", 3, "--seconds", 1, "--faults", "planner-killed")  # each says it
    code, out, complaints = stress(*arguments, EPLB_INITIAL_PLACEMENT=str(path))
    assert code == 0, out
    assert complaints.count("EPLB_INITIAL_PLACEMENT") == 1
    assert complaints.startswith(f"eplb: EPLB_INITIAL_PLACEMENT={path} is for 4 layers, 64 experts")
    assert "and this engine has 3 layers, 64 experts on 4 ranks x 18 slots" in complaints


@pytest.mark.parametrize(
    ("code", "end", "words"),
    [
        (
            "class Mine:\n"
            "    def __init__(self, ranks, slots, near): pass\n"
            "    def plan(self, heat, placement): raise ValueError('too warm')",
            0,
            r"eplb: the policy failed; .*\nTraceback (.|\n)*\nValueError: too warm\n",
        ),
        (
            "class Mine:\n"
            "    def __init__(self, ranks): pass\n"
            "    def plan(self, heat, placement): pass",
            1,
            r"eplb: what the processes said is in .*\n",
        ),
    ],
)
def test_how_a_policy_of_one_s_own_failed_is_said(stress, tmp_path, code, end, words):
    (tmp_path / "mine.py").write_text(code)
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[flash_eplb.policies]\nmine = mine:Mine\n")
    found, out, complaints = stress("--steps", 200, EPLB_POLICY="mine")
    assert found == end, out
    assert re.fullmatch(words, complaints)
    said = "EPLB_POLICY='mine' cannot be made for 4 ranks x 18 slots: TypeError: "
    assert (said in re.sub(r"[│\s]+", " ", out)) == bool(end)


def test_recorded_heat_is_replayed(stress, tmp_path):
    path = tmp_path / "heat.npy"
    random = np.random.default_rng(3)
    np.save(path, random.poisson(random.random((1, 2, 12)) ** 4 * 90, (40, 2, 12)))
    arguments = (f"replay:{path}", "--ranks", 3, "--slots", 6, "--seconds", 10)
    code, out, complaints = stress("--scenario", *arguments, "--steps-per-second", 200)
    assert (code, complaints) == (0, ""), out
    assert verdict_of(out, "the ranks are evener")[0] == "holds"


def test_no_clock_runs_while_the_planner_compiles_its_kernels(stress):
    python = (
        "import time\n"
        "from flash_eplb.planners import engine_loop\n"
        "warmup = engine_loop.warmup\n"
        "def slow():\n"
        "    time.sleep(12)\n"
        "    warmup()\n"
        "engine_loop.warmup = slow"
    )
    arguments = ("--seconds", 2, "--patience", 8, "--ranks", 2, "--experts", 8)
    code, out, complaints = stress(*arguments, python=python)
    assert (code, complaints) == (0, ""), out
    first = "compiling the planner's kernels: a minute or two the first time"
    assert out.splitlines()[:2] == [first, "starting the engine"]


@pytest.mark.parametrize("name_of", [planner_name, lambda session: rank_name(session, 0)])
def test_a_session_in_which_somebody_lives_is_refused(session, environment, name_of):
    segment = take_name(session, name_of(session), b"", 10, 1)
    environment.setenv("EPLB_SESSION", session)
    result = CliRunner().invoke(app, ["stress", "--seconds", "1"])
    segment.close()
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        f"eplb: session {session!r} is in use: {name_of(session)} belongs to a living process, "
        "which a stress would meddle with; set EPLB_SESSION to another name, or unset it\n"
    )


def test_ctrl_c_ends_it_with_what_was_seen(start_stress, session):
    process = start_stress("--seconds", 600)
    while "steps/s" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    process.send_signal(signal.SIGINT)
    out, complaints = process.communicate(timeout=60)
    assert (process.returncode, complaints) == (130, "")
    assert "Ctrl-C" in out
    assert "BROKEN" not in out
    assert segment_names(session) == []


def test_killed_it_leaves_no_process_and_no_memory(start_stress, session):
    process = start_stress("--seconds", 600)
    while "steps/s" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    process.kill()
    deadline = time.monotonic() + 60
    while segment_names(session):
        assert time.monotonic() < deadline, segment_names(session)
        time.sleep(0.1)


BROKEN = {
    "no wrong weight": (
        "from flash_eplb.eplb.stress import rows\nrows.RowResult.commit = lambda self: None",
        (),
    ),
    "no torn record": (
        "from flash_eplb.ipc import heat_ring\n"
        "push, kept = heat_ring.HeatRing.push, []\n"
        "def mixed(self, *fields):\n"
        "    counts = fields[5].copy()\n"
        "    if kept and len(kept[0]) > 1: counts[0] = kept[0][0]\n"
        "    kept[:] = [fields[5].copy()]\n"
        "    push(self, *fields[:5], counts)\n"
        "heat_ring.HeatRing.push = mixed",
        (),
    ),
    "it runs to its end": (
        "import time\n"
        "from flash_eplb.eplb.stress import rank\n"
        "step = rank.RowRank.step\n"
        "def hangs(self, *arguments):\n"
        "    if self._step > 300: time.sleep(600)\n"
        "    step(self, *arguments)\n"
        "rank.RowRank.step = hangs",
        ("--seconds", 20),
    ),
    "the planner keeps in step": (
        "import time\n"
        "from flash_eplb.planners import engine_loop\n"
        "turn = engine_loop.EngineLoop.turn\n"
        "def slow(self):\n"
        "    turn(self)\n"
        "    if self._plans: time.sleep(1.5)\n"
        "engine_loop.EngineLoop.turn = slow",
        (),
    ),
    "planner-killed": (
        "from flash_eplb.ipc import plan_queue\n"
        "from flash_eplb.planners import planner\n"
        "planner.Planner._check_own = lambda self, group: None\n"
        "take_over = plan_queue.PlanQueue.take_over\n"
        "def once(self, generation):\n"
        "    if not self.generation: take_over(self, generation)\n"
        "plan_queue.PlanQueue.take_over = once",
        ("--faults", "planner-killed"),
    ),
    "corrupt-plans": (
        "from flash_eplb.ipc import round\n"
        "def trusting(one, shape, placement):\n"
        "    after = placement.copy()\n"
        "    for m in one.move_array(): after[m['layer'], m['rank'], m['slot']] = m['expert']\n"
        "    return after\n"
        "round.check_round = trusting",
        ("--faults", "corrupt-plans,rank-slow"),
    ),
    "bit-flips": (
        "from flash_eplb.eplb.stress import rows\n"
        "flip = rows.RowStager._flip\n"
        "def unseen(self, arrived):\n"
        "    flip(self, arrived.copy())\n"
        "rows.RowStager._flip = unseen",
        ("--faults", "bit-flips"),
    ),
}


SHORT = ("no wrong weight", "it runs to its end", "corrupt-plans")
"""Broken in `make test`; `make soak` breaks all."""


@pytest.mark.soak
def test_a_broken_promise_is_found(stress, amount):
    for promise in amount(SHORT, BROKEN):
        python, more = BROKEN[promise]
        arguments = ("--seconds", 5, "--steps-per-second", 200, "--patience", 6, *more)
        code, out, complaints = stress(*arguments, python=python)
        assert verdict_of(out, promise)[0] == "BROKEN", out + complaints
        assert code == 1
        folder = re.search(r"what the processes said is in (\S+)", complaints)[1]
        assert "host-0.log" in os.listdir(folder)
