import json
import subprocess
import sys
from pathlib import Path

import pytest

CYCLES = Path(__file__).with_name("engine_cycles.py")


@pytest.mark.soak
@pytest.mark.parametrize("how", ["stop", "kill"])
def test_engines_that_come_and_go_leave_nothing_behind(session, amount, how):
    command = [sys.executable, CYCLES, session, str(amount(100, 5000)), how]
    run = subprocess.run(command, capture_output=True, text=True, timeout=amount(200, 3600))
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["after"] == found["before"]
    assert found["before"]["mappings"] == found["before"]["children"] == 0
    assert found["left"] == []
