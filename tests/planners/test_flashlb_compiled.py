"""Kernels: compiled once by the warm-up, cached, and free of the GIL."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from heats import initial, window, zipf

from flash_eplb.planners import flashlb
from flash_eplb.planners.routing import weigh_layer

KERNELS = """
import importlib
import pkgutil
from flash_eplb import planners
from flash_eplb.planners import flashlb

modules = [importlib.import_module(f"flash_eplb.planners.{module.name}")
           for module in pkgutil.iter_modules(planners.__path__)]
kernels = {f for module in modules for f in vars(module).values() if hasattr(f, "signatures")}
"""

PLANS = """
from itertools import cycle, product
import numpy as np

def compiled():
    return {kernel: len(kernel.signatures) for kernel in kernels}

flashlb.warmup()
before = compiled()
rng = np.random.default_rng(0)
shapes = cycle([(16, 4, 5), (12, 4, 3), (128, 16, 9), (2, 2, 1), (3, 1, 3), (2, 70, 1)])
spread = lambda x: np.repeat(x, 2, axis=2)[:, :, ::2]
layouts = cycle([np.ascontiguousarray, np.asfortranarray, spread])
counts = cycle(["uint8", ">i4", "int64", "float16", "float32", "float64", "longdouble"])
for effort, routing, threads in product(
    flashlb.EFFORTS, ("uniform", "weighted", "by_source"), (1, 2)
):
    experts, ranks, slots = next(shapes)
    planner = flashlb.FlashLB(
        ranks, slots, ranks_per_node=np.int64(2), effort=effort, routing=routing, threads=threads,
        min_excess=0, min_gain=np.float32(0), move_price=np.float64(0.01), half_life=np.int64(8),
    )
    today = (np.arange(3 * ranks * slots) % experts).reshape(3, ranks, slots)
    for episodes in (1, 6, 6, 40):
        heat = rng.poisson(100 / np.arange(1, experts + 1), (episodes, 3, experts)).clip(0, 255)
        heat = next(layouts)(heat.astype(next(counts)))
        for every, limit in ((False, None), (True, np.int64(5)), (np.True_, 12)):
            given = next(layouts)(today)
            heat.flags.writeable = given.flags.writeable = False
            plan = planner.plan(heat, given, every, limit)
            assert plan.rounds(1) == [] or plan.rounds(np.int64(3)) and len(plan.changed)
            today = plan.placement
after = compiled()
assert before == after, {k: k.signatures for k in kernels if before[k] != after[k]}
"""


def run(script):
    subprocess.run([sys.executable, "-c", KERNELS + script], check=True)


@pytest.fixture(scope="module", autouse=True)
def cached():
    flashlb.warmup()


def test_nothing_is_compiled_after_the_warm_up():
    run(PLANS)


def test_another_process_compiles_nothing_at_all():
    run("flashlb.warmup(); assert not any(k.stats.cache_misses for k in kernels)")
    run("flashlb.warmup(); assert sum(len(k.stats.cache_hits) for k in kernels) > 5")


def test_every_kernel_frees_the_gil():
    run("held = [k for k in kernels if not k.targetoptions.get('nogil')]; assert not held, held")


def test_other_threads_run_while_a_kernel_does():
    # What they see of its half-made result they can have seen only while it ran.
    rng = np.random.default_rng(1)
    heat = window(rng, zipf(rng, 1, 128), 2048).astype(np.float64)
    placement = initial(1, 64, 6, 128)[0]
    columns = np.zeros(placement.shape, np.int16)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(weigh_layer, heat, 0, placement, 1024, False, columns)
        seen = set()
        while not future.done():
            seen.add(columns.tobytes())
        future.result()
    assert len(seen - {columns.tobytes(), bytes(columns.nbytes)}) > 1
