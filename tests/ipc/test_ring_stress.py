import re
import subprocess
import sys
from pathlib import Path

import pytest

STRESS = Path(__file__).with_name("ring_stress.py")
LINE = re.compile(
    r"(?P<ring>.{9})  (?P<reader>\w+) +written +(\d+)  read +(\d+)  lost +(\d+)  torn (\d+)  "
    r"out of order (\d+)  lost too early (\d+)  exact"
)


@pytest.mark.soak
def test_no_record_is_torn_and_none_is_lost_in_silence(session, amount):
    records = amount(200_000, 100_000_000)
    run = subprocess.run(
        [sys.executable, STRESS, str(records), session],
        capture_output=True,
        text=True,
        timeout=amount(250, 3 * 3600),
    )
    print(run.stdout)
    assert run.returncode == 0, run.stderr
    found = [LINE.fullmatch(line) for line in run.stdout.splitlines()]
    assert all(found)
    assert len({match["ring"] for match in found}) == 4
    assert len({match["reader"] for match in found}) == 4
    counted = [tuple(map(int, match.groups()[2:])) for match in found]
    for written, read, lost, *faults in counted:
        assert read + lost == written
        assert read > 0
        assert faults == [0, 0, 0]
    assert sum(lost for _, _, lost, *_ in counted) > records
    assert sum(written for written, *_ in counted) == 4 * records
