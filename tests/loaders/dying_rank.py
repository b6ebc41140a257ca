"""One of two ranks is killed at a point of its loader's work; what the other one says and holds.

Usage: dying_rank.py SESSION

Prints one JSON object: by point, what the survivor has found (`survive`) and the victim's exit
code. Each point is tried by two processes of their own, in a session of its own.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from cluster import FakeEngine, swap

from flash_eplb.eplb import weight_update
from flash_eplb.eplb.config import Config
from flash_eplb.eplb.group import Group
from flash_eplb.eplb.worker import Worker
from flash_eplb.ipc.liveness import SegmentError
from flash_eplb.ipc.names import rank_name
from flash_eplb.ipc.placement import MOVE
from flash_eplb.ipc.rank_segment import RankSegment
from flash_eplb.ipc.round import Round, encode_round
from flash_eplb.ipc.session import clean_session
from flash_eplb.loaders import copies, loader, stager, transport, vote

SIZES = (2, 4, 2, 3)  # layers, experts, ranks, slots
VICTIM, SURVIVOR = 1, 0
MOVES = swap(1, (2, 0, 2), (3, 1, 0))
CONTEXT = multiprocessing.get_context("fork")

POINTS: dict[str, tuple[object, str, bool]] = {
    "a stager begins": (stager.Stager, "_stage", False),
    "experts were exchanged": (transport.PeerToPeer, "exchange", True),
    "a round is to be committed": (loader.Loader, "_commit", False),
    "weights were written": (copies.Copies, "run", True),
    "a round was committed": (loader.Loader, "_commit", True),
    "a vote is to be cast": (vote.Vote, "issue", False),
    "an update begins": (weight_update.WeightUpdate, "_bring_home", False),
    "experts are to change slots": (weight_update.WeightUpdate, "_reorder", False),
    "an update ends": (weight_update.WeightUpdate, "end", False),
}
"""What is about to be called, or has been, when the victim dies."""


def die_at(owner: object, name: str, after: bool, is_time: Callable[[], bool]) -> None:
    """Let the call of a method kill this process, once it is time."""
    original = getattr(owner, name)

    def dying(*arguments: object, **named: object) -> object:
        if is_time() and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **named)
        if is_time():
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, dying)


class Rank:
    """One rank's process: its steps, and an update of its weights after the first commit."""

    def __init__(self, session: str, rank: int, port: int):
        torch.set_num_threads(1)
        vote._LOOK_SECONDS = 0.05
        weight_update.PATIENCE = 0.5
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        group = Group(rank, 2, dist.group.WORLD, store, (0,))
        config = Config(session=session, staging_rows=2, vote_steps=2, transfer_timeout=5)
        self.engine = FakeEngine(*SIZES, rank)
        self.worker = Worker(config, group, self.engine, [("m", SIZES[0])], SIZES[1])
        self.steps = 0

    def step(self) -> None:
        self.steps += 1
        self.worker.forward(3)
        self.worker.step(is_dummy=False)
        time.sleep(0.001)

    def is_time(self, owner: object) -> bool:
        """Whether the victim may die in a call of `owner`: in its round, or after it."""
        if self.worker.epoch > 0:
            return True
        in_round = self.steps > 1 and self.worker._loader._active is not None
        return in_round and owner is not vote.Vote

    def run(self, updates: bool, most: int = 4000) -> str:
        """Step until balancing stops, or an update fails; returns why."""
        while not self.worker.has_stopped and self.steps < most:
            self.step()
            if updates and self.worker.epoch > 0:
                try:
                    self.worker.begin_update()
                    self.worker.end_update()
                except RuntimeError as error:
                    return str(error)
        return self.worker._loader.stopped


def survive(session: str, port: int, updates: bool) -> dict[str, object]:
    """What the other rank finds: why it has stopped, how long its longest step took, and whether
    its slots hold what its board shows, after some more steps."""
    rank = Rank(session, SURVIVOR, port)
    longest, step = 0.0, rank.step

    def timed() -> None:
        nonlocal longest
        begun = time.monotonic()
        step()
        longest = max(longest, time.monotonic() - begun) if rank.steps > 1 else 0.0

    rank.step = timed  # type: ignore[method-assign]
    why = rank.run(updates)
    for _ in range(20):
        timed()
    placement = rank.worker.placement
    board = RankSegment.open(rank_name(session, SURVIVOR)).board.read()
    assert board is not None
    found = {
        "why": why,
        "longest": round(longest, 3),
        "epoch": rank.worker.epoch,
        "is_whole": bool(
            np.array_equal(rank.engine.experts_in_slots(), placement[:, SURVIVOR])
            and np.array_equal(rank.engine.routed, placement)
            and np.array_equal(board[1], placement)
        ),
    }
    rank.worker.close()
    return found


def send(session: str) -> None:
    """A plan of one round to both ranks, as a planner does, once they are there."""
    ranks: list[RankSegment] = []
    while len(ranks) < 2:
        try:
            ranks.append(RankSegment.open(rank_name(session, len(ranks)), writable=True))
        except SegmentError:
            time.sleep(0.005)
    layers, _, count, slots = SIZES
    moves = MOVES.astype(MOVE).tobytes()
    record = encode_round(Round(9, 1, 1, True, 0, layers, count, slots, moves))
    for rank in ranks:
        rank.plans.take_over(9)
        rank.plans.put(record)


def attempt(session: str, point: str, found) -> None:  # type: ignore[no-untyped-def]
    """Put into `found` what the survivor finds, and how the victim has ended."""
    logging.disable()
    port = CONTEXT.Value("i", 0)
    owner, name, after = POINTS[point]
    updates = owner is weight_update.WeightUpdate

    def one(number: int) -> None:
        while not port.value:
            time.sleep(0.005)
        try:
            if number == SURVIVOR:
                found.put(survive(session, port.value, updates))
                return
            rank = Rank(session, VICTIM, port.value)
            die_at(owner, name, after, lambda: rank.is_time(owner))
            rank.run(updates)
        except BaseException:
            traceback.print_exc()
            if number == SURVIVOR:
                found.put({"why": traceback.format_exc()})

    ranks = [CONTEXT.Process(target=one, args=(number,)) for number in range(2)]
    for rank in ranks:
        rank.start()
    # Not before: the store has a thread, and a process with threads must not be forked.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port.value = store.port
    send(session)
    for rank in ranks:
        rank.join()
    found.put(ranks[VICTIM].exitcode)


def main() -> None:
    figures = {}
    for number, point in enumerate(POINTS):
        found = CONTEXT.SimpleQueue()
        process = CONTEXT.Process(target=attempt, args=(f"{sys.argv[1]}-{number}", point, found))
        process.start()
        figures[point] = found.get(), found.get()
        process.join()
        clean_session(f"{sys.argv[1]}-{number}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
