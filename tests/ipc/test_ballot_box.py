"""Votes of ranks that run at speeds of their own."""

import multiprocessing
import random
import time
from multiprocessing import shared_memory

import numpy as np
import pytest

from flash_eplb.ipc.ballot_box import WORDS, BallotBox

CONTEXT = multiprocessing.get_context("fork")


def words_of(rank, number):
    """What a rank casts; every word tells rank and number."""
    return [(rank * 7919 + number * 104729 + 31 * word) % 10007 - 5000 for word in range(WORDS)]


def run_rank(name, ranks, rank, votes, seed, failures):
    memory = shared_memory.SharedMemory(name)
    box = BallotBox(np.frombuffer(memory.buf, np.uint8), ranks)
    dice = random.Random(seed * 100 + rank)
    for number in range(1, votes + 1):
        box.cast(rank, number, words_of(rank, number))
        if dice.random() < 0.02:
            time.sleep(dice.random() * 0.0005)
        while True:
            missing, lowest = box.tally(number)
            if missing < 0:
                break
            if dice.random() < 0.3:
                time.sleep(0)
        every = [words_of(other, number) for other in range(ranks)]
        if lowest != [min(column) for column in zip(*every, strict=True)]:
            failures.put((rank, number, lowest))
            return
    failures.put(None)


@pytest.mark.soak
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_all_ranks_read_the_lowest_of_what_all_have_cast(ranks, amount):
    memory = shared_memory.SharedMemory(create=True, size=BallotBox.size(ranks))
    memory.buf[:] = bytes(len(memory.buf))
    failures = CONTEXT.SimpleQueue()
    arguments = [
        (memory.name, ranks, rank, amount(6000 // ranks, 300_000), ranks, failures)
        for rank in range(ranks)
    ]
    processes = [CONTEXT.Process(target=run_rank, args=one) for one in arguments]
    try:
        for process in processes:
            process.start()
        assert [failures.get() for _ in processes] == [None] * ranks
    finally:
        for process in processes:
            process.join(5)
            process.kill()
        memory.close()
        memory.unlink()


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
