"""Ranks in processes of their own vote at speeds of their own; a script, because it forks, and a
process with threads must not.

Usage: ballot_race.py RANKS VOTES

Prints what a rank read that is not the lowest of what all have cast; nothing if all was right.
"""

import multiprocessing
import random
import sys
import time
from multiprocessing import shared_memory

import numpy as np

from flash_eplb.ipc.ballot_box import WORDS, BallotBox


def words_of(rank, number):
    """What a rank casts; every word tells rank and number."""
    return [(rank * 7919 + number * 104729 + 31 * word) % 10007 - 5000 for word in range(WORDS)]


def run_rank(memory, ranks, rank, votes, failures):
    box = BallotBox(np.frombuffer(memory.buf, np.uint8), ranks)
    dice = random.Random(ranks * 100 + rank)
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
            failures.put(f"rank {rank} vote {number}: {lowest}")
            return
    failures.put("")


def main():
    ranks, votes = map(int, sys.argv[1:])
    context = multiprocessing.get_context("fork")
    memory = shared_memory.SharedMemory(create=True, size=BallotBox.size(ranks))
    memory.buf[:] = bytes(len(memory.buf))
    failures = context.SimpleQueue()
    processes = [
        context.Process(target=run_rank, args=(memory, ranks, rank, votes, failures), daemon=True)
        for rank in range(ranks)
    ]
    try:
        for process in processes:
            process.start()
        for _ in processes:
            print(failures.get(), end="")
    finally:
        for process in processes:
            process.kill()
            process.join()
        memory.unlink()


if __name__ == "__main__":
    main()
