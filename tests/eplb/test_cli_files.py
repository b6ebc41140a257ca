"""Files that a call names more than once."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "planners"))
from recordings import record

from flash_eplb.eplb.cli import app

pytestmark = pytest.mark.usefixtures("environment")

SHAPE = ["--ranks", "2", "--slots-per-rank", "3"]


@pytest.fixture
def eplb(tmp_path, monkeypatch):
    """`eplb(*arguments)` in a folder with a recording and an array of heat."""
    monkeypatch.chdir(tmp_path)
    record(tmp_path / "recording", 40)
    np.save("heat.npy", np.ones((99, 2, 4), int))
    return lambda *arguments: CliRunner().invoke(app, arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "heat.npy", *SHAPE, "-o", "heat.npy"], "the heat and -o name one file, heat.npy"),
        (["plan", "heat.npy", "-o", "a", "--json", "./a"], "-o and --json name one file, a"),
        (["replay", "heat.npy", "--json", "heat.npy"], "the heat and --json name one file, heat"),
        (["report", "recording", "-o", "a", "--trace", "recording/../a"], "-o and --trace name on"),
        (["report", "recording", "-o", "link", "--trace", "a"], "-o and --trace name one file, a"),
    ],
)
def test_no_file_is_written_over_another_of_the_call(eplb, arguments, said):
    os.symlink("a", "link")
    found = eplb(*arguments)
    assert (found.exit_code, found.stdout) == (2, "")
    assert found.stderr.startswith(f"eplb: {said}")
    assert found.stderr.endswith("; give each its own\n")
    assert sorted(os.listdir()) == ["heat.npy", "link", "recording"]
    assert np.load("heat.npy").shape == (99, 2, 4)


def test_what_is_no_file_may_be_named_twice(eplb):
    found = eplb("report", "recording", "-o", "/dev/null", "--trace", "/dev/null")
    assert (found.exit_code, found.stderr) == (0, "")
