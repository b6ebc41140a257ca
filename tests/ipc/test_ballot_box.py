"""Votes of ranks that run at speeds of their own."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flash_eplb.ipc.ballot_box import WORDS, BallotBox

RACE = Path(__file__).with_name("ballot_race.py")


@pytest.mark.soak
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_all_ranks_read_the_lowest_of_what_all_have_cast(ranks, amount):
    votes = amount(6000 // ranks, 300_000)
    run = subprocess.run(
        [sys.executable, RACE, str(ranks), str(votes)],
        capture_output=True,
        text=True,
        timeout=amount(120, 7200),
        check=False,
    )
    assert (run.returncode, run.stdout) == (0, ""), run.stderr


def test_a_vote_that_is_not_cast_names_its_rank():
    body = np.zeros(BallotBox.size(3), np.uint8)
    box = BallotBox(body, 3)
    assert box.tally(1) == (0, [])
    box.cast(0, 1, [1] * WORDS)
    box.cast(2, 1, [-1] * WORDS)
    assert box.tally(1) == (1, [])
    box.cast(1, 1, [5] * WORDS)
    assert box.tally(1) == (-1, [-1] * WORDS)
    box.cast(0, 2, [0] * WORDS)  # the others still read the first one
    assert box.tally(1) == (-1, [-1] * WORDS)
    assert box.tally(2) == (1, [])
