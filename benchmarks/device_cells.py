"""What `make bench-device` measures, each part a function that gives its figures.

They run on any device. On the CPU everything is done when a call returns, so their figures mean
nothing there; the tests run them so that they will run where there is a GPU.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from flash_eplb.collectors.heat import HeatCollector
from flash_eplb.device import Device, device_of
from flash_eplb.ipc.heat_ring import HeatRing
from flash_eplb.ipc.placement import MOVE
from flash_eplb.loaders.copies import Copies
from flash_eplb.loaders.digest import digests, row_digest
from flash_eplb.loaders.errand import Errand
from flash_eplb.loaders.stager import Stager
from flash_eplb.loaders.staging import Staging, slot_views
from flash_eplb.loaders.vllm_engine import VllmEngine

Figures = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        steps: of the collector and of a step's time.
        layers, columns: of the heat.
        row: bytes of an expert.
        rows: staging rows, and experts of a round.
        matmul: rows and columns of the matrices that a step multiplies.
        products: of a step.
    """

    steps: int
    layers: int
    columns: int
    row: int
    rows: int
    matmul: int
    products: int


FULL = Sizes(1000, 58, 288, 44 << 20, 8, 4096, 20)
QUICK = Sizes(200, 58, 288, 4 << 20, 8, 2048, 10)


class Load:
    """A step of compute: `products` products of square matrices, one after the other."""

    def __init__(self, sizes: Sizes, device: torch.device):
        self._matrix = torch.full((sizes.matmul, sizes.matmul), 1 / sizes.matmul, device=device)
        self._products = sizes.products

    def issue(self) -> None:
        """Returns at once on a device."""
        for _ in range(self._products):
            self._matrix @ self._matrix


class Clock:
    """Marks in the current stream and the milliseconds between two of them."""

    def __init__(self, device: torch.device):
        self._device = device

    def mark(self) -> Any:
        """An event; on the CPU the time."""
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: Any, second: Any) -> float:
        """Milliseconds; waits for the device."""
        if self._device.type == "cpu":
            return (second - first) * 1e3
        second.synchronize()
        return first.elapsed_time(second)


def collector(sizes: Sizes, device: torch.device, of: Device | None = None) -> Figures:
    """The collector's call in each step, behind a device that is late.

    `ahead`: share of calls that returned before the device had begun with their copy: the host did
    not wait. `right`: whether every token was recorded once.
    """
    layers, columns = sizes.layers, sizes.columns
    ring_slots = 2 * sizes.steps
    memory = np.zeros(HeatRing.size(layers, columns, ring_slots), np.uint8)
    ring = HeatRing(memory, layers, columns, ring_slots)
    counts = torch.zeros((layers, columns), dtype=torch.int32, device=device)
    of = of or device_of(counts)
    heat = HeatCollector(ring, [counts], of)
    load = Load(sizes, device)
    calls, ahead = [], 0
    for step in range(1, sizes.steps + 1):
        load.issue()
        counts += 1
        event = None if of.is_host else of.event()
        if event is not None:
            event.record()
        begun = time.perf_counter()
        heat.collect(step, 1, 0, 0)
        calls.append(time.perf_counter() - begun)
        ahead += event is not None and not event.query()
    for late in (1, 2):  # the first takes what was left, the second sees it come
        _finish(device)
        heat.collect(sizes.steps + late, 0, 0, 0)
    records = ring.read(ring_slots)
    microseconds = np.array(calls) * 1e6
    return {
        "p50_us": float(np.percentile(microseconds, 50)),
        "p99_us": float(np.percentile(microseconds, 99)),
        "ahead": ahead / sizes.steps,
        "merged": heat.merged,
        "right": bool((records.heat.sum(axis=0) == sizes.steps).all()),
    }


class _Nowhere:
    """A transport for rounds within one rank."""

    name = "nowhere"

    def connect(self, epoch: int) -> None:
        return

    def disconnect(self) -> None:
        return

    def exchange(self, moves: Any, leaving: Any, arriving: Any) -> None:
        return


def staging(sizes: Sizes, device: torch.device) -> Figures:
    """Steps alone, and beside a stager that copies and proves rows all the time."""
    weights = [experts(sizes, device)]
    reference = np.array(digests(weights), np.int64)
    rows = Staging(weights, sizes.rows)
    stager = Stager(weights, rows, _Nowhere(), 0, reference)
    moves = np.array([(0, n, 0, n, 0, n) for n in range(sizes.rows)], MOVE)
    load, clock = Load(sizes, device), Clock(device)
    staged = 0

    def begin(number: int) -> None:
        nonlocal staged
        if not stager.busy:
            result = stager.result
            assert result is None or not result.error, result.error
            staged += result is not None
            stager.begin(Errand(number + 1, moves, 0, tuple(range(sizes.rows))))

    _step_times(sizes.steps // 10 + 1, load, clock, lambda number: None)
    alone = _step_times(sizes.steps, load, clock, lambda number: None)
    begun = time.perf_counter()
    beside = _step_times(sizes.steps, load, clock, begin)
    while stager.busy:
        time.sleep(0.0005)
    taken = time.perf_counter() - begun
    stager.close()
    return {
        "alone_ms": alone,
        "beside_ms": beside,
        "inflation": beside / alone,
        "staged_gb_s": (staged + 1) * sizes.rows * sizes.row / taken / 1e9,
    }


def _step_times(steps: int, load: Load, clock: Clock, before: Callable[[int], None]) -> float:
    """Median milliseconds of a step on the device."""
    marks = [clock.mark()]
    for number in range(steps):
        before(number)
        load.issue()
        marks.append(clock.mark())
        if number % 4 == 3:
            clock.between(marks[-4], marks[-3])  # as an engine, never far ahead of its device
    times = [clock.between(first, second) for first, second in itertools.pairwise(marks)]
    return float(np.median(times))


def commit(sizes: Sizes, device: torch.device) -> Figures:
    """A full round's rows over live slots: what it takes the host, and the device."""
    weights = experts(sizes, device)
    rows = Staging([weights], sizes.rows)
    live = [view for slot in range(sizes.rows) for view in slot_views(weights, slot)]
    staged = [view for row in range(sizes.rows) for view in rows.views(row, 0)]
    copies = Copies(live, staged)
    clock = Clock(device)
    host, on_device = [], []
    for _ in range(30):
        _finish(device)
        first, begun = clock.mark(), time.perf_counter()
        copies.run()
        host.append(time.perf_counter() - begun)
        on_device.append(clock.between(first, clock.mark()))
    milliseconds = float(np.median(on_device))
    return {
        "host_us": float(np.median(host) * 1e6),
        "device_ms": milliseconds,
        "gb_s": sizes.rows * sizes.row / milliseconds / 1e6,
    }


def digest(sizes: Sizes, device: torch.device) -> Figures:
    """One expert's digest beside a copy of it, each in bytes of the expert per second."""
    weights = experts(sizes, device)
    views = slot_views(weights, 0)
    copies = [view.clone() for view in views]
    clock = Clock(device)

    def speed(action: Callable[[], Any]) -> float:
        action()
        times = []
        for _ in range(20):
            _finish(device)
            first = clock.mark()
            action()
            times.append(clock.between(first, clock.mark()))
        return sizes.row / float(np.median(times)) / 1e6

    found = speed(lambda: row_digest(views))
    copied = speed(lambda: Copies(copies, views).run())
    return {"digest_gb_s": found, "copy_gb_s": copied, "ratio": found / copied}


def graph(device: torch.device) -> Figures:
    """A router captured once (on the CPU: run each time), and the tables of a commit under it.

    `right`: whether it routes by the new placement after the commit, and did not before.
    """
    experts, ranks, slots = 8, 2, 5
    state = SimpleNamespace(
        model_name="m",
        model=SimpleNamespace(expert_weights=[[torch.zeros((slots, 4), device=device)]]),
        expert_load_pass=torch.zeros((1, ranks * slots), dtype=torch.int32, device=device),
        physical_to_logical_map=torch.arange(ranks * slots, device=device)[None] % experts,
        logical_to_physical_map=torch.full((1, experts, 1024), -1, device=device),
        logical_replica_count=torch.zeros((1, experts), dtype=torch.int64, device=device),
    )
    engine = VllmEngine([state], ranks)
    layers = np.array([0])
    Copies(*engine.tables(layers, engine.placement)).run()
    wanted = engine.placement[:, ::-1].copy()
    tokens = torch.arange(64, device=device)
    routed = torch.zeros_like(tokens)

    def route() -> None:
        expert = tokens % experts
        column = (tokens // experts) % state.logical_replica_count[0][expert]
        routed.copy_(state.logical_to_physical_map[0][expert, column])

    def is_routed_by(placement: np.ndarray) -> bool:
        found = placement.reshape(-1)[routed.cpu().numpy()]
        return bool((found == np.arange(64) % experts).all())

    replay = _captured(route, device)
    replay()
    before = is_routed_by(engine.placement)
    Copies(*engine.tables(layers, wanted)).run()
    stale = is_routed_by(wanted)
    replay()
    return {"right": before and not stale and is_routed_by(wanted)}


def _captured(action: Callable[[], None], device: torch.device) -> Callable[[], None]:
    if device.type == "cpu":
        return action
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        action()
    stream.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        action()
    return captured.replay


def experts(sizes: Sizes, device: torch.device) -> list[torch.Tensor]:
    """A layer's tensors for `rows` experts of `row` bytes: most of it weights, the rest scales."""
    source = torch.Generator().manual_seed(1)
    scales = max(4, sizes.row // 128)
    widths = (sizes.row - scales, scales)
    return [
        torch.randint(256, (1, width), generator=source, dtype=torch.uint8)
        .repeat(sizes.rows, 1)
        .add_(torch.arange(sizes.rows, dtype=torch.uint8)[:, None])
        .to(device)
        for width in widths
    ]


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.cuda.synchronize()
