"""A rank's process is killed in the middle of its loader's work."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("dying_rank.py")
IS_DEAD = "EP rank 1 is dead, so vote "
IN_UPDATE = {
    "an update begins": IS_DEAD,
    "experts are to change slots": "by peer",  # as torch says it
    "an update ends": "EP rank 0 has waited 0.5 s for EP ranks [1] in vain; no expert moves",
}


def test_the_other_rank_steps_on_and_holds_what_its_board_shows(session):
    """Wherever it is: no step waits for the dead one, and no half of a commit is left."""
    run = subprocess.run(
        [sys.executable, SCRIPT, session], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr[-5000:]
    figures = json.loads(run.stdout)
    print(figures)
    assert len(figures) == 9
    for point, (survivor, exit_code) in figures.items():
        assert exit_code == -9, point
        assert IN_UPDATE.get(point, IS_DEAD) in survivor["why"], point
        assert survivor["is_whole"], point
        assert survivor["longest"] < 4, point  # seconds; a transfer would take 5
    early = ["a stager begins", "experts were exchanged"]
    assert [figures[point][0]["epoch"] for point in early] == [0, 0]
    assert all(figures[point][0]["epoch"] > 0 for point in figures if point not in early)
