"""Recordings for tests, and what was put into them."""

import time

import numpy as np

from flash_eplb.planners.chunk import RANK_TRANSFER
from flash_eplb.planners.plan import make_plan
from flash_eplb.planners.recorder import Recorder
from flash_eplb.planners.step_heat import StepHeat

LAYERS, EXPERTS, RANKS, SLOTS = 2, 6, 2, 4
HEADER = {"layers": LAYERS, "experts": EXPERTS, "ranks": RANKS, "slots": SLOTS, "session": "s"}
FIRST = np.tile(np.arange(8, dtype=np.int32) % EXPERTS, (LAYERS, 1)).reshape(LAYERS, RANKS, SLOTS)
SECOND = make_plan(FIRST, FIRST[:, ::-1]).placement  # as it is aligned


def physical(number):
    """int64 [layers, columns] that tells the number of its step."""
    return np.arange(LAYERS * RANKS * SLOTS, dtype=np.int64).reshape(LAYERS, -1) + 100 * number


def logical(heat, placement):
    found = np.zeros((LAYERS, EXPERTS), np.int64)
    for layer in range(LAYERS):
        for tokens, expert in zip(heat[layer], placement[layer].ravel(), strict=True):
            found[layer, expert] += tokens
    return found


def step(number, epoch=0, span=1):
    return StepHeat(number, epoch, physical(number), span, 1000 * number, 7 * number, 4)


def transfers(number, plan):
    """How the one round of `plan` went on each rank, committed before step `number`."""
    begun = 1000 * (number - 2)
    rows = [(plan.moves["rank"] == rank).sum() for rank in range(RANKS)]
    times = (number - 2, begun, begun, begun + 500, number - 1, begun + 600, begun + 700)
    made = [(rank, 5, 1, 1, *times, rows[rank], 64 * rows[rank], 1) for rank in range(RANKS)]
    return np.array(made, RANK_TRANSFER)


def record(folder, steps, first=1, most_bytes=1 << 30, header=HEADER):
    """Steps under FIRST, the later half under SECOND, with the plan that leads there."""
    recorder = Recorder(folder, header, most_bytes)
    recorder.placement(0, FIRST)
    for number in range(first, first + steps):
        late = number - first >= steps // 2
        if late and number - first == steps // 2:
            measured = {"par_before": [1.5, 1.3], "par_after": [1.1, 1.2]}
            plan = make_plan(FIRST, SECOND, **measured)
            recorder.plan(1, 0, plan, plan.rounds(8), 0.25)
            recorder.placement(1, SECOND)
            recorder.ended(1, True)
            recorder.transfers(transfers(number, plan))
            recorder.lost(3)
        recorder.step(step(number, int(late)))
        while recorder._waiting.full() and recorder._thread.is_alive():
            time.sleep(0.001)
    recorder.close()


def stopped(caplog):
    """The one line that says that a recording has stopped."""
    (line,) = (r.getMessage() for r in caplog.records if "has stopped" in r.getMessage())
    return line
