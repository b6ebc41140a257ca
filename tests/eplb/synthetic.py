"""A recording of a made-up engine that is large enough to be looked at."""

import numpy as np

from flash_eplb.planners import recorder as recorder_module
from flash_eplb.planners.chunk import RANK_TRANSFER
from flash_eplb.planners.plan import make_plan
from flash_eplb.planners.recorder import Recorder
from flash_eplb.planners.replay import linear_placement
from flash_eplb.planners.step_heat import StepHeat


def greedy(placement, heat, random):
    """Another valid placement: in a few layers the slots of two ranks change places."""
    wanted = placement.copy()
    for layer in random.choice(len(wanted), max(1, len(wanted) // 4), replace=False):
        load = heat[layer].reshape(len(placement[0]), -1).sum(axis=1)
        high, low = int(load.argmax()), int(load.argmin())
        hot = set(wanted[layer, high]) - set(wanted[layer, low])
        cold = set(wanted[layer, low]) - set(wanted[layer, high])
        if hot and cold:
            one, other = random.choice(sorted(hot)), random.choice(sorted(cold))
            ranks = wanted[layer]
            ranks[high][ranks[high] == one], ranks[low][ranks[low] == other] = other, one
    return wanted


def record(folder, layers=4, experts=16, ranks=4, slots=5, steps=640, every=64, seed=0):
    """`steps` steps of 20 ms whose topics change, with a plan every `every` of them.

    Of the plans the fourth is given up, and its round aborted; every 97th step is a dummy.
    """
    random = np.random.default_rng(seed)
    topics = random.permuted(np.tile(np.arange(1, experts + 1.0) ** -0.9, (3, layers, 1)), axis=2)
    placement = linear_placement(layers, experts, ranks, slots)
    header = {"layers": layers, "experts": experts, "ranks": ranks, "slots": slots}
    more = {"session": "made", "models": ["made-up"], "settings": {"episode_steps": 16}}
    recorder = Recorder(folder, header | more, 1 << 30)
    clock, epoch, plans, pending = recorder._header["clock_ns"], 0, 0, None
    recorder.placement(0, placement)
    for number in range(1, steps + 1):
        now = clock + number * 20_000_000
        if pending is not None and number == pending[0] + 8:
            _, plan, committed = pending
            if committed:
                placement, epoch = plan.placement, epoch + 1
                recorder.placement(epoch, placement)
            recorder.transfers(_ended(plan, plans, number, now, ranks, committed))
            recorder._filling.outcomes.append((plans, committed, now + 1_000_000))
            pending = None
        if number % 97 == 0:
            continue
        topic = topics[number * 3 // (steps + 1)]
        counts = np.apply_along_axis(
            np.bincount, 1, placement.reshape(layers, -1), minlength=experts
        )
        rate = 400 * np.take_along_axis(topic / counts, placement.reshape(layers, -1), axis=1)
        heat = random.poisson(rate).astype(np.int64)
        while recorder._waiting.full():
            pass
        recorder.step(StepHeat(number, epoch, heat, 1, now, int(heat[0].sum()), 4))
        if number % every == 0:
            plan = make_plan(placement, greedy(placement, heat, random))
            if plan:
                plans += 1
                recorder.plan(plans, epoch, plan, plan.rounds(64), 0.012)
                *row, _ = recorder._filling.plans.pop()
                recorder._filling.plans.append((*row, now + 3_000_000))
                pending = number, plan, plans != 4
    recorder.close()


def _ended(plan, number, step, now, ranks, committed):
    """The one round of `plan`: 80 ms of transfer, half a millisecond of commit."""
    rows = [int((plan.moves["rank"] == rank).sum()) * committed for rank in range(ranks)]
    begin = now - 100_000_000
    made = [
        (rank, 5, number, number, step - 6, begin, begin + 1000, committed * (now - 20_000_000),
         step, now - 500_000 * committed, now, rows[rank], 4096 * rows[rank], committed)
        for rank in range(ranks)
    ]  # fmt: skip
    return np.array(made, RANK_TRANSFER)


def small_chunks(monkeypatch):
    """Several chunks for a short recording."""
    monkeypatch.setattr(recorder_module, "CHUNK_STEPS", 100)
