"""Ranks of the small engine in processes of their own, and random plans for them.

Usage: moe_group.py SESSION PLANS STAGING_ROWS MOVES_PER_PLAN SEED [SECONDS]

With SECONDS, one rank's process is stopped for that long in the middle of a round, after the first
plan.
Prints one JSON object: what was moved and checked. After every commit each rank compares the digest
of each of its slots with that of the expert which the placement names, and now and then the outputs
with those of a run on one process.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from flash_eplb.eplb.config import Config
from flash_eplb.eplb.group import Group as WorkerGroup
from flash_eplb.eplb.worker import Worker
from flash_eplb.ipc.liveness import SegmentError
from flash_eplb.ipc.status import Field, State
from flash_eplb.loaders import transport, vote
from flash_eplb.loaders.digest import row_digest
from flash_eplb.loaders.moe_engine import MoeEngine, MoeShape, expert_tensors, run_alone
from flash_eplb.loaders.staging import slot_views
from flash_eplb.planners.delivery import Delivery, Progress
from flash_eplb.planners.group import Group
from flash_eplb.planners.plan import make_plan

SHAPE = MoeShape(layers=12, experts=64, ranks=8, slots=10, hidden=16, inner=8)
COMPARE_EVERY = 40  # commits
END_EVERY = 8  # steps
STOPPED_RANK = 3
TOKENS = 12


class Rank:
    """One rank's process: steps until `stop` is set, checks after every commit."""

    def __init__(self, rank: int, port: int, session: str, rows: int, stop, seed: int):  # type: ignore[no-untyped-def]
        torch.set_num_threads(1)
        self.random = random.Random(seed * 100 + rank)
        self.tokens = torch.Generator().manual_seed(seed * 100 + rank)
        self.stop = stop
        self.rank = rank
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=SHAPE.ranks)
        everyone = dist.group.WORLD
        self.engine = MoeEngine(SHAPE, rank, dist.new_group(backend="gloo"))
        group = WorkerGroup(rank, SHAPE.ranks, everyone, store, tuple(range(SHAPE.ranks)))
        config = Config(session=session, staging_rows=rows, vote_steps=2, episode_steps=1)
        self.worker = Worker(config, group, self.engine, [("moe", SHAPE.layers)], SHAPE.experts)
        self.expected = np.array(
            [
                [row_digest(_bytes(expert_tensors(SHAPE, layer, e))) for e in range(SHAPE.experts)]
                for layer in range(SHAPE.layers)
            ]
        )
        self.compared = self.commits = 0

    def run(self) -> dict[str, int]:
        self._delay(transport.PeerToPeer, "exchange")
        self._delay(vote.Vote, "issue")
        stopping = torch.zeros(1, dtype=torch.int64)
        while True:
            self.worker.forward(TOKENS)
            self.worker.step(is_dummy=False)
            if self.worker.epoch > self.commits:
                self.commits = self.worker.epoch
                self._check_slots()
                if self.commits % COMPARE_EVERY == 0:
                    self._compare_outputs()
            stopping[0] = int(self.stop.is_set())
            if self.worker._step % END_EVERY == 0:  # all ranks end at the same step
                dist.all_reduce(stopping, op=dist.ReduceOp.MIN)
                if stopping[0]:
                    break
        self._compare_outputs()
        assert not self.worker.refused, self.worker.refused
        return {"commits": self.commits, "compared": self.compared}

    def _delay(self, owner: type, name: str) -> None:
        """Let calls of a method sleep now and then, each rank at its own times."""
        original, chance = getattr(owner, name), self.random

        def delayed(*args, **kwargs):  # type: ignore[no-untyped-def]
            if chance.random() < 0.1:
                time.sleep(chance.random() * 0.004)
            return original(*args, **kwargs)

        setattr(owner, name, delayed)

    def _check_slots(self) -> None:
        placement = self.worker._loader.placement
        for layer, tensors in enumerate(self.engine.weights):
            for slot, expert in enumerate(placement[layer, self.rank]):
                found = row_digest(slot_views(tensors, slot))
                assert found == self.expected[layer, expert], (layer, slot, expert)

    def _compare_outputs(self) -> None:
        tokens = torch.randint(-8, 9, (TOKENS, SHAPE.hidden), generator=self.tokens).float()
        skew = torch.zeros(SHAPE.experts)
        assert torch.equal(self.engine.forward(tokens, skew), run_alone(SHAPE, tokens, skew))
        self.compared += TOKENS


def _bytes(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return slot_views([tensor.unsqueeze(0) for tensor in tensors], 0)


def random_placement(placement: np.ndarray, moves: int, chance: random.Random) -> np.ndarray:
    """Another valid placement: about `moves` slots get another expert, replicas come and go."""
    wanted = placement.copy()
    layers, ranks, slots = wanted.shape
    counts = np.array([np.bincount(layer.ravel(), minlength=SHAPE.experts) for layer in wanted])
    done = 0
    while done < moves:
        layer = chance.randrange(layers)
        a, b = chance.sample(range(ranks), 2)
        i, j = chance.randrange(slots), chance.randrange(slots)
        x, y = wanted[layer, a, i], wanted[layer, b, j]
        if x in wanted[layer, b] or x == y:
            continue
        if counts[layer, y] > 1 and chance.random() < 0.5:
            wanted[layer, b, j] = x  # a replica more of x, one less of y
            counts[layer, x] += 1
            counts[layer, y] -= 1
            done += 1
        elif y not in wanted[layer, a]:
            wanted[layer, a, i], wanted[layer, b, j] = y, x
            done += 2
    return wanted


def stop_for(seconds: float, pid: int, group: Group) -> dict[str, int]:
    """Stop a rank's process in the middle of a round; how far the ranks came before and meanwhile,
    and what was committed. Empty if it stopped elsewhere, and goes on: between rounds, or where the
    others would wait for it not in their votes but in the engine's own collective."""
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(0.05)
        status = group.ranks[STOPPED_RANK].status
        before = status[Field.STEP]
        if status[Field.STATE] != State.STAGING or not 1 <= before % END_EVERY <= 4:
            return {}
        # Its part of the engine's collective may be done here and still be owed to another rank.
        if min(rank.status[Field.STEP] for rank in group.ranks) % END_EVERY == 0:
            return {}
        time.sleep(seconds)
        meanwhile = max(rank.status[Field.STEP] for rank in group.ranks)
        committed = max(rank.status[Field.EPOCH] for rank in group.ranks)
    finally:
        os.kill(pid, signal.SIGCONT)
    return {"stopped_at": before, "meanwhile": meanwhile, "committed_before": committed}


def drive(
    session: str, plans: int, rows: int, moves: int, seed: int, pid: int, seconds: float
) -> dict[str, int]:
    """Send random plans, one after the other, and wait for each to be committed; stop process
    `pid` on the way, if `seconds` is not 0."""
    stop: dict[str, int] = {}
    group, chance = attached(session), random.Random(seed)
    for rank in group.ranks:
        rank.plans.take_over(5)
    sequence, moved, most_rows = 1, 0, 0
    for number in range(1, plans + 1):
        board = group.committed()
        while board is None:
            time.sleep(0.001)
            board = group.committed()
        plan = make_plan(board[1], random_placement(board[1], moves, chance))
        columns = np.array([chance.randint(1, 5) for _ in range(plan.columns.size)], np.int16)
        plan = replace(plan, columns=columns.reshape(plan.columns.shape))
        rounds = plan.rounds(rows)
        for part in rounds:
            most_rows = max(most_rows, int(np.bincount(part.moves["rank"]).max()))
        delivery = Delivery(group, rounds, 5, number, sequence, board[0], 10**6)
        sequence = delivery.next_sequence
        while (progress := delivery.advance()) is Progress.UNDER_WAY:
            assert group.is_alive(), "a rank has died"
            is_staging = group.ranks[STOPPED_RANK].status[Field.STATE] == State.STAGING
            if seconds and number > 1 and is_staging and not stop:
                stop = stop_for(seconds, pid, group)
            time.sleep(0.0005)
        assert progress is Progress.DONE, delivery.reason
        moved += len(plan.moves)
    counted = sum(rank.status[Field.MOVED_ROWS] for rank in group.ranks)
    aborted = sum(rank.status[Field.ABORTED] for rank in group.ranks)
    steps = min(rank.status[Field.STEP] for rank in group.ranks)
    group.close()
    return {
        "moved": moved,
        "counted": counted,
        "aborted": aborted,
        "most_rows": most_rows,
        "steps": steps,
        **stop,
    }


def attached(session: str) -> Group:
    deadline = time.monotonic() + 120
    while True:
        try:
            return Group.attach(session)
        except SegmentError:
            assert time.monotonic() < deadline, "the ranks do not come"
            time.sleep(0.05)


def main() -> None:
    import multiprocessing

    session, (plans, rows, moves, seed) = sys.argv[1], map(int, sys.argv[2:6])
    seconds = float(sys.argv[6]) if len(sys.argv) > 6 else 0.0
    context = multiprocessing.get_context("fork")
    stop, results = context.Event(), context.SimpleQueue()
    port = context.Value("i", 0)

    def one(rank: int) -> None:
        while not port.value:
            time.sleep(0.01)
        try:
            results.put(Rank(rank, port.value, session, rows, stop, seed).run())
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    processes = [context.Process(target=one, args=(rank,)) for rank in range(SHAPE.ranks)]
    for process in processes:
        process.start()
    # Not before: the store has a thread, and a process with threads must not be forked.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port.value = store.port
    try:
        pid = processes[STOPPED_RANK].pid
        assert pid is not None
        figures = drive(session, plans, rows, moves, seed, pid, seconds)
        stop.set()
        ranks = [results.get() for _ in processes]
        for process in processes:
            process.join(60)
        figures["commits"] = min(rank["commits"] for rank in ranks)
        figures["compared"] = sum(rank["compared"] for rank in ranks)
        print(json.dumps(figures))
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


if __name__ == "__main__":
    main()
