import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from single_steps import FIRST, NOT_PERMITTED

STEPS = Path(__file__).with_name("single_steps.py")


pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(
        platform.machine() != "x86_64", reason="elsewhere a step may end an exclusive access"
    ),
]


@pytest.fixture
def step(session, amount):
    """`step(which, times)` runs `single_steps.py`; what it printed."""

    def run_steps(which, times):
        command = [sys.executable, STEPS, session, str(times), which]
        run = subprocess.run(command, capture_output=True, text=True, timeout=amount(200, 3600))
        if run.returncode == NOT_PERMITTED:
            pytest.skip("a process may not trace its child here (ptrace)")
        assert run.returncode == 0, run.stderr
        return [json.loads(line) for line in run.stdout.splitlines()]

    return run_steps


def passed_through(before):
    """Records, the newest, epoch on the board, steps, commits, generation, rounds; in one go."""
    now = before + 1
    return [
        [before, before, before, before, before, before, 0],
        [now, now, before, before, before, before, 0],
        [now, now, None, before, before, before, 0],
        [now, now, now, before, before, before, 0],
        [now, now, now, now, before, before, 0],
        [now, now, now, now, now, before, 0],
        [now, now, now, now, now, now, 0],
        [now, now, now, now, now, now, 1],
    ]


def test_after_every_single_instruction_a_survivor_finds_the_old_or_the_new(step, amount):
    goes = amount(1, 30)
    found = step("writers", goes)
    assert found == [passed_through(number - 1) for number in range(FIRST, FIRST + goes)]


def test_a_reader_that_is_overtaken_between_two_instructions_sees_nothing_torn(step, amount):
    ((records, boards),) = step("readers", amount(4, 120))
    assert records > 0
    assert boards > 0
