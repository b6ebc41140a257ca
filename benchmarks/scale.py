"""Cost of a plan against ranks and episodes, and its peak memory in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from . import heat, scoring
from .cells import Record
from .policies import flash_lb

SLOTS, EPISODES = 9, 64
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
WINDOWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
EPISODE_SHAPE = (256, 32)
TOO_LONG = 30.0  # seconds for one plan; larger shapes are left out and said so


def by_ranks(repeats: int, most: int) -> list[Record]:
    """Milliseconds of one layer's `balanced` plan for each number of ranks up to `most`."""
    return _series([(experts_of(r), r, EPISODES) for r in RANKS if r <= most], repeats)


def by_episodes(repeats: int, most: int) -> list[Record]:
    """The same at one shape for each number of episodes up to `most`."""
    return _series([(*EPISODE_SHAPE, count) for count in WINDOWS if count <= most], repeats)


def experts_of(ranks: int) -> int:
    """Experts that go with a number of ranks: one slot of each rank is spare, up to 1,024."""
    return min(1024, 8 * ranks)


def growth(records: list[Record]) -> float:
    """Exponent of the cost over n log n, n in slots: 1 is n log n, 2 its square.

    The steeper of two fits, over all ranks and over the upper half: at few ranks a fixed cost
    would hide the growth.
    """
    slots = np.array([record["ranks"] * SLOTS for record in records], float)
    x, y = np.log(slots * np.log(slots)), np.log([record["ms"] for record in records])
    halves = [(x, y), (x[len(x) // 2 :], y[len(y) // 2 :])]
    return max(float(np.polyfit(a, b, 1)[0]) for a, b in halves)


def peak_memory(layers: int, experts: int, ranks: int) -> Record:
    """MiB that a plan adds to a fresh process which holds the heat, and MiB of that heat."""
    command = [sys.executable, "-m", "benchmarks.scale", str(layers), str(experts), str(ranks)]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def _series(shapes: list[tuple[int, int, int]], repeats: int) -> list[Record]:
    records: list[Record] = []
    for experts, ranks, count in shapes:
        window, start = _heat(1, experts, ranks, count)
        times: list[float] = []
        for _ in range(repeats):
            policy = flash_lb(ranks, SLOTS, "balanced")
            begin = time.perf_counter()
            policy.plan(window, start, every_layer=True)
            times.append(time.perf_counter() - begin)
            if sum(times) > TOO_LONG / 3:
                break
        ms = 1e3 * float(np.median(times))
        records.append({"experts": experts, "ranks": ranks, "episodes": count, "ms": ms})
        if max(times) > TOO_LONG:
            break
    return records


def _heat(layers: int, experts: int, ranks: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    steps = heat.families()["drift"](experts, layers, count * heat.EPISODE_STEPS, 0)
    return heat.episodes(steps), scoring.initial(layers, ranks, SLOTS, experts)


def _memory_of_plan(layers: int, experts: int, ranks: int) -> Record:
    """Uses VmHWM, not ru_maxrss: a child starts with the latter of its parent."""
    small = _heat(1, 64, 8, EPISODES)
    flash_lb(8, SLOTS, "balanced").plan(*small, every_layer=True)  # loads the compiled kernels
    window, start = _heat(layers, experts, ranks, EPISODES)
    policy = flash_lb(ranks, SLOTS, "balanced")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmHWM")
    policy.plan(window, start, every_layer=True)
    return {
        "layers": layers,
        "experts": experts,
        "ranks": ranks,
        "mib": (_status("VmHWM") - before) / 1024,
        "heat_mib": window.nbytes / 2**20,
    }


def _status(field: str) -> int:
    """A field of /proc/self/status in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise KeyError(field)


if __name__ == "__main__":
    print(json.dumps(_memory_of_plan(*map(int, sys.argv[1:]))))
