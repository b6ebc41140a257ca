"""Ranks in processes of their own vote at speeds of their own; a script, because it forks, and a
process with threads must not.

Usage: ballot_race.py RANKS VOTES [closing]

Prints what a rank read that is not the lowest of what all have cast; nothing if all was right.

With "closing" there are VOTES boxes, in each of which a rank gives up a vote sooner or later;
prints those in which not all ranks have acted on the same votes.
"""

import itertools
import math
import multiprocessing
import random
import sys
import time
from multiprocessing import shared_memory

import numpy as np

from flash_eplb.ipc.ballot_box import CLOSED, COMPLETE, WORDS, BallotBox


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


def votes_until_closed(box, rank, ranks, dice):
    """How many votes this rank acts on until one is closed."""
    for number in itertools.count(1):
        box.cast(rank, number, words_of(rank, number))
        looks = dice.randrange(30) if dice.random() < 0.3 / ranks else math.inf
        while (missing := box.tally(number)[0]) != COMPLETE:
            if missing == CLOSED or (looks <= 0 and box.close(number)):
                return number - 1
            looks -= 1
            if dice.random() < 0.2:
                time.sleep(0)


def run_closing_rank(memory, ranks, rank, boxes, acted):
    dice = random.Random(ranks * 100 + rank)
    every = np.frombuffer(memory.buf, np.uint8)[: BallotBox.size(ranks) * boxes]
    parts = [BallotBox(body, ranks) for body in np.split(every, boxes)]
    acted.put([votes_until_closed(box, rank, ranks, dice) for box in parts])


def main():
    ranks, votes = map(int, sys.argv[1:3])
    closing = sys.argv[3:] == ["closing"]
    context = multiprocessing.get_context("fork")
    boxes = votes if closing else 1
    memory = shared_memory.SharedMemory(create=True, size=boxes * BallotBox.size(ranks))
    memory.buf[:] = bytes(len(memory.buf))
    told = context.SimpleQueue()
    run = run_closing_rank if closing else run_rank
    processes = [
        context.Process(target=run, args=(memory, ranks, rank, votes, told), daemon=True)
        for rank in range(ranks)
    ]
    try:
        for process in processes:
            process.start()
        answers = [told.get() for _ in processes]
        print(compared(answers) if closing else "".join(answers), end="")
    finally:
        for process in processes:
            process.kill()
            process.join()
        memory.unlink()


def compared(acted):
    """Where the ranks have not acted on equally many votes, of a list of each, box by box."""
    assert max(map(max, acted)) > 1, "hardly a vote was complete"
    boxes = enumerate(zip(*acted, strict=True))
    return "".join(f"box {number}: {found}\n" for number, found in boxes if len(set(found)) > 1)


if __name__ == "__main__":
    main()
