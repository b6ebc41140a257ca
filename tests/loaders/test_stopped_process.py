"""A rank's whole process is stopped for more than ten seconds, as by a debugger or a full host."""

import json
import re
import subprocess
import sys
from pathlib import Path

GROUP = Path(__file__).with_name("moe_group.py")
RANKS = 8
VOTE_STEPS = 2


def test_steps_and_balancing_resume_after_a_process_was_stopped(session):
    """Each rank proves all its slots after every commit, before and after the stop."""
    plans, rows, moves, seed, seconds = 4, 2, 40, 11, 13.5
    arguments = [session, *map(str, (plans, rows, moves, seed, seconds))]
    run = subprocess.run(
        [sys.executable, GROUP, *arguments], capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr[-5000:]
    figures = json.loads(run.stdout)
    print(figures)
    assert figures["meanwhile"] <= figures["stopped_at"] + 2 * VOTE_STEPS  # the others wait for it
    assert figures["steps"] > figures["meanwhile"] + 20
    assert figures["moved"] == figures["counted"] >= 0.8 * plans * moves
    assert figures["commits"] > figures["committed_before"]
    assert figures["aborted"] == 0
    waited = re.findall(r"EP rank (\d+) has waited 10 s for the vote of EP rank 3", run.stderr)
    assert sorted(waited) == [str(rank) for rank in range(RANKS) if rank != 3]
