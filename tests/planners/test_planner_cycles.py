import json
import subprocess
import sys
from pathlib import Path

import pytest

CYCLES = Path(__file__).with_name("planner_cycles.py")


@pytest.fixture
def cycle(session, amount):
    """What the survivor of 100 cycles, or of thousands, tells of them."""

    def run_cycles(how):
        command = [sys.executable, CYCLES, session, str(amount(100, 3000)), how]
        run = subprocess.run(command, capture_output=True, text=True, timeout=amount(250, 3600))
        assert run.returncode == 0, run.stderr
        found = json.loads(run.stdout)
        assert found["after"] == found["before"]
        assert found["before"]["children"] == 0
        assert found["left"] == []
        return found

    return run_cycles


@pytest.mark.soak
@pytest.mark.parametrize("how", ["stop", "kill"])
def test_planners_that_come_and_go_leave_nothing_with_an_engine_that_lives_on(cycle, how):
    assert cycle(how)["rounds"] > 10


@pytest.mark.soak
def test_engines_that_come_and_go_leave_nothing_with_a_planner_that_lives_on(cycle):
    cycle("engines")
