"""`eplb record` beside a planner, as processes of their own."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "planners"))
from fake_engine import FakeEngine
from planner_runs import OTHER, PACE, SKEWED, run, until
from recordings import record as write

from flash_eplb.eplb.cli import app
from flash_eplb.planners.flashlb import FlashLB
from flash_eplb.planners.planner import Planner
from flash_eplb.planners.recorder import recorder_of
from flash_eplb.planners.recording import Recording

pytestmark = pytest.mark.usefixtures("environment")


class Record:
    """A running `eplb record`."""

    def __init__(self, folder, session, *options):
        command = [sys.executable, "-m", "flash_eplb.eplb.cli", "record", "-o", str(folder)]
        self.process = subprocess.Popen(
            [*command, "--session", session, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.first = self.process.stdout.readline().strip()

    def end(self, number=None):
        """Send it signal `number` and wait for its end: (exit code, last line, errors)."""
        if number is not None:
            self.process.send_signal(number)
        said, errors = self.process.communicate(timeout=60)
        return self.process.returncode, said.strip(), errors


@pytest.fixture
def recording(session, tmp_path):
    """`recording(*options)` starts `eplb record` for the session."""
    started = []

    def start(*options):
        started.append(Record(tmp_path / "seen", session, *options))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


@pytest.fixture
def engine(session):
    made = FakeEngine(session, ring=4096)  # eight seconds: nothing is lost on a busy machine
    yield made
    made.close()


def of(recording, name):
    """The rows of a table without their run."""
    return [row.tolist()[1:] for row in recording.table(name)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_sees_what_the_planner_beside_it_sees(session, engine, recording, tmp_path, number):
    seen = recording()
    assert seen.first == (
        f"recording session {session!r} into {tmp_path / 'seen'}: 2 layers, 8 experts on 2 ranks x "
        "5 slots; end it with Ctrl-C"
    )
    made = recorder_of(str(tmp_path / "planned"), 10, session, {})

    async def scenario():
        planner = Planner(session, FlashLB, PACE, make_recorder=made)
        task = asyncio.create_task(planner.run())
        await until(engine, lambda: engine.epoch >= 1)
        await until(engine, lambda: engine.epoch >= 2, demand=OTHER)
        await until(engine, lambda: not engine.steps % 40, demand=OTHER)
        await asyncio.sleep(0.1)
        planner.stop()
        await task

    run(scenario())
    status = [rank.status.snapshot() for rank in engine.ranks]
    code, last, errors = seen.end(number)
    assert (code, errors) == (0, "")
    assert [rank.status.snapshot() for rank in engine.ranks] == status
    ours, theirs = Recording(tmp_path / "seen"), Recording(tmp_path / "planned")
    steps = {step.step: step for step in ours.steps()}
    for step in theirs.steps():
        assert (steps[step.step].heat == step.heat).all()
        assert steps[step.step].epoch == step.epoch
        placement = steps[step.step].placement
        assert placement is None or (placement == step.placement).all()
    shown = {epoch for _, epoch in ours.placements()}
    assert {0, engine.epoch} <= shown
    unknown = {step.epoch for step in steps.values()} - shown
    assert sorted(of(ours, "transfers")) == sorted(of(theirs, "transfers"))
    assert len(of(ours, "transfers")) == 2 * engine.epoch
    assert of(ours, "plans") == of(ours, "outcomes") == []
    assert len(of(theirs, "plans")) >= 1
    assert last == (
        f"{tmp_path / 'seen'}: {engine.steps} steps recorded, 0 records lost, "
        f"{len(unknown)} epochs unknown, {engine.epoch} rounds; ended by a signal"
    )


def test_it_ends_with_the_engine(session, engine, recording, tmp_path):
    seen = recording()
    maps = Path(f"/proc/{seen.process.pid}/maps").read_text().splitlines()
    mapped = [line.split()[1] for line in maps if f"eplb.{session}.rank" in line]
    assert mapped == ["r--s", "r--s"]
    for _ in range(20):
        engine.step(SKEWED)
    engine.close()
    code, last, _ = seen.end()
    assert code == 0
    assert last.endswith("0 epochs unknown, 0 rounds; the engine has ended")
    assert len(Recording(tmp_path / "seen")) == 20
    assert not [name for name in os.listdir("/dev/shm") if f"eplb.{session}." in name]


@pytest.mark.usefixtures("engine")
def test_it_ends_after_the_seconds_that_it_was_given(recording):
    code, last, _ = recording("--seconds", "0.2").end()
    assert code == 0
    assert last.endswith(
        "0 steps recorded, 0 records lost, 0 epochs unknown, 0 rounds; the time is over"
    )


def test_a_recorder_that_is_killed_disturbs_nobody(session, engine, recording):
    seen = recording()

    async def scenario():
        planner = Planner(session, FlashLB, PACE)
        task = asyncio.create_task(planner.run())
        await until(engine, lambda: engine.epoch >= 1)
        seen.end(signal.SIGKILL)
        await until(engine, lambda: engine.epoch >= 2, demand=OTHER)
        planner.stop()
        await task

    run(scenario())
    again = recording()
    assert again.first.startswith("recording session")
    assert again.end(signal.SIGTERM)[0] == 0


def invoke(*arguments):
    return CliRunner().invoke(app, ["record", *map(str, arguments)])


def test_without_an_engine_it_is_one_sentence(session, tmp_path):
    result = invoke("-o", tmp_path / "seen", "--session", session)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"eplb: no engine in session {session!r}: shared memory /eplb.")
    assert list(tmp_path.iterdir()) == []


def test_an_output_without_a_name_is_refused():
    result = invoke("-o", "")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "eplb: -o is empty; name the folder of the recording\n"


@pytest.mark.parametrize("seconds", ["-1", "nan"])
def test_seconds_below_none_are_refused(tmp_path, seconds):
    result = invoke("-o", tmp_path / "seen", "--seconds", seconds)
    assert result.exit_code == 2
    assert result.stderr == f"eplb: --seconds is {float(seconds)}; it must be at least 0\n"


def test_a_file_in_the_place_of_the_folder_is_refused_before_all_else(tmp_path):
    (tmp_path / "seen").write_text("mine")
    result = invoke("-o", tmp_path / "seen")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        f"eplb: -o {tmp_path}/seen: it is no folder; give one, or a path where one can be made\n"
    )


@pytest.mark.usefixtures("engine")
def test_a_folder_that_cannot_be_used_ends_it_with_one_sentence(recording, tmp_path):
    write(tmp_path / "seen", 4)
    begun = time.monotonic()
    code, last, errors = recording().end()
    assert (code, last) == (2, "")
    (line,) = errors.splitlines()
    assert line.startswith(f"eplb: recording to -o {tmp_path / 'seen'} has stopped: ")
    assert "it holds a recording of 2 layers, 6 experts" in line
    assert time.monotonic() - begun < 60
