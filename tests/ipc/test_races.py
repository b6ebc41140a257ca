import subprocess
import sys
from pathlib import Path

import pytest

RACES = Path(__file__).with_name("races.py")


@pytest.mark.soak
def test_of_those_who_race_for_a_dead_owners_names_one_starts_and_keeps_them(session, amount):
    command = [sys.executable, RACES, session, str(amount(50, 5000))]
    run = subprocess.run(command, capture_output=True, text=True, timeout=amount(200, 3600))
    print(run.stdout)
    assert run.returncode == 0, run.stderr
