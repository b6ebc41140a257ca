"""Votes of ranks that run at speeds of their own."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flash_eplb.ipc.ballot_box import CLOSED, COMPLETE, WORDS, BallotBox

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


@pytest.mark.soak
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_all_ranks_act_on_the_same_votes_though_any_may_give_one_up(ranks, amount):
    boxes = amount(1000 // ranks, 50_000)
    run = subprocess.run(
        [sys.executable, RACE, str(ranks), str(boxes), "closing"],
        capture_output=True,
        text=True,
        timeout=amount(120, 7200),
        check=False,
    )
    assert (run.returncode, run.stdout) == (0, ""), run.stderr


def cast_all(box, number):
    for rank in range(3):
        box.cast(rank, number, [number] * WORDS)


@pytest.fixture
def box():
    return BallotBox(np.zeros(BallotBox.size(3), np.uint8), 3)


def test_a_vote_that_a_rank_gave_up_is_closed_to_all_though_it_is_cast_later(box):
    cast_all(box, 1)
    assert box.tally(1) == (COMPLETE, [1] * WORDS)
    for rank in (0, 1):
        box.cast(rank, 2, [2] * WORDS)
    assert box.tally(2) == (2, [])
    assert box.close(2)
    assert box.tally(2) == (CLOSED, [])  # who waits need not wait for rank 2
    assert box.tally(1) == (COMPLETE, [1] * WORDS)  # and rank 2 may be as late as this
    box.cast(2, 2, [2] * WORDS)
    assert box.tally(2) == (CLOSED, [])
    assert box.close(2)


def test_a_vote_that_a_rank_may_have_acted_on_is_not_closed(box):
    for number in range(1, 6):
        cast_all(box, number)
        assert box.tally(number) == (COMPLETE, [number] * WORDS)
        assert not box.close(number)
        assert box.tally(number) == (COMPLETE, [number] * WORDS)


def test_of_complete_and_closed_what_comes_first_stands(box):
    cast_all(box, 1)  # all ballots are there, but nobody has seen so
    assert box.close(1)
    assert box.tally(1) == (CLOSED, [])


def test_a_vote_that_is_not_cast_names_its_rank():
    body = np.zeros(BallotBox.size(3), np.uint8)
    box = BallotBox(body, 3)
    assert box.tally(1) == (0, [])
    box.cast(0, 1, [1] * WORDS)
    box.cast(2, 1, [-1] * WORDS)
    assert box.tally(1) == (1, [])
    box.cast(1, 1, [5] * WORDS)
    assert box.tally(1) == (COMPLETE, [-1] * WORDS)
    box.cast(0, 2, [0] * WORDS)  # the others still read the first one
    assert box.tally(1) == (COMPLETE, [-1] * WORDS)
    assert box.tally(2) == (1, [])
