"""Commands that compile the planner's kernels, and where those are kept."""

import threading

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from flash_eplb.eplb.cli import app

pytestmark = pytest.mark.usefixtures("environment")


@pytest.fixture
def eplb(tmp_path, monkeypatch):
    """`eplb(command)`, on some heat if it takes any."""
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.ones((99, 2, 4), int))

    def run(command):
        heat = ["x.npy", "--ranks", "2", "--slots-per-rank", "3"] if command != "warmup" else []
        return CliRunner().invoke(app, [command, *heat])

    return run


@pytest.mark.parametrize(
    ("command", "module"),
    [("warmup", "engine_loop"), ("warmup", "flashlb"), ("plan", "flashlb"), ("replay", "flashlb")],
)
def test_a_disk_without_room_for_kernels_is_not_taken_for_the_output(
    environment, eplb, command, module
):
    def full():
        raise OSError(28, "No space left on device")

    environment.setenv("NUMBA_CACHE_DIR", "/full")
    environment.setattr(f"flash_eplb.planners.{module}.warmup", full)
    found = eplb(command)
    assert (found.exit_code, found.stderr) == (
        1,
        "eplb: compiled kernels cannot be kept in /full: No space left on device; make room there, "
        "or set NUMBA_CACHE_DIR to a folder with 30 MiB\n",
    )


@pytest.mark.parametrize("command", ["warmup", "plan", "replay"])
def test_a_command_that_compiles_for_long_says_so(environment, eplb, command):
    echo, said = typer.echo, threading.Event()

    def told(text, **options):
        echo(text, **options)
        said.set()

    environment.setenv("FORCE_COLOR", "1")  # rich takes what it writes to for a terminal
    environment.setattr("typer.echo", told)
    environment.setattr("flash_eplb.eplb.choice.LONG", 0.01)
    environment.setattr("flash_eplb.planners.flashlb.warmup", lambda: said.wait(20))
    found = eplb(command)
    assert found.exit_code == 0
    assert found.stderr.count("compiling") == 1
    assert found.stderr.startswith(
        "eplb: compiling kernels, which takes a minute or two the first time\n"
    )
