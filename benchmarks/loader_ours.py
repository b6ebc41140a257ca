"""Ours: the real worker and adaptor for vLLM, with a plan queue that the driver fills."""

from __future__ import annotations

import logging
import time
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from flash_eplb.eplb.config import Config
from flash_eplb.eplb.worker import Group, Worker
from flash_eplb.ipc.flags import FLAG_DECODE
from flash_eplb.loaders.routing import logical_to_physical
from flash_eplb.loaders.staging import slot_views
from flash_eplb.loaders.vllm_engine import VllmEngine

from .loader_rank import READY, REST, SENT_AT, Rank, Sample

NAME = "flash_eplb"
TOKENS = 64
COPIES = 5
SCATTERED = 256 << 10  # bytes of a row from which on its tensors are copied one by one
COLD = 64 << 20  # bytes to copy from before the same ones come again: more than the L2 cache
STEPS_AT_REST = 1000  # of a cell without plans


class Step(NamedTuple):
    """One step: when it began and ended, and what of it was ours, also of the processor's time;
    all in nanoseconds."""

    begin: int
    end: int
    ours: int
    cpu: int


class Ours:
    """One rank's worker, stepping beside a synthetic load."""

    def __init__(self, rank: Rank):
        logging.getLogger("flash_eplb").setLevel(logging.ERROR)
        cell = rank.scenario.cell
        self._rank = rank
        self.weights = rank.new_weights()
        self._spare = rank.new_weights() if cell.row_bytes >= SCATTERED else []
        self.staging = cell.staging_rows * cell.row_bytes
        everyone = dist.group.WORLD
        assert everyone is not None
        group = Group(rank.rank, rank.size, everyone, rank.store, tuple(range(rank.size)))
        config = Config(session=rank.session)
        engine = VllmEngine([_model_state(rank, self.weights)], rank.size)
        self._worker = Worker(config, group, engine, engine.models, cell.experts)
        self._step()  # all ranks agree to balance
        if self._worker.refused:
            raise RuntimeError(self._worker.refused)

    def _step(self, compute: bool = True) -> Step:
        clock = time.monotonic_ns
        begin = clock()
        self._worker.forward(TOKENS)
        between = clock()
        if compute:
            self._rank.compute()
        cpu = time.thread_time_ns()
        over = clock()
        self._worker.step(is_dummy=False, phase=FLAG_DECODE)
        end = clock()
        return Step(begin, end, between - begin + end - over, time.thread_time_ns() - cpu)

    def move(self, number: int) -> Sample:
        """The driver sends plan `number` when all ranks have rested."""
        rank = self._rank
        if not rank.scenario.plans:
            rest = [self._step() for _ in range(STEPS_AT_REST)]
            hot = [self._step(compute=False) for _ in range(STEPS_AT_REST)]
            return Sample(np.nan, np.nan, np.nan, rest=_ours(rest), hot=_ours(hot))
        rest = [self._step() for _ in range(REST)]
        target = self._worker.epoch + len(rank.scenario.rounds[number])
        rank.words[READY + rank.rank] = number + 1
        steps = []
        while self._worker.epoch < target:
            steps.append(self._step())
        sample = _sample(rest, steps, rank.words[SENT_AT])
        sample.memcpy = self._memcpy(rank.scenario.largest_round(number, rank.rank))
        return sample

    def _memcpy(self, rows: int) -> float:
        """Microseconds to copy `rows` rows to memory not used lately.

        Large rows go tensor by tensor into slots of a layer, as they must; small ones in one
        piece, so that calls cost nothing either way.
        """
        width = self._rank.scenario.cell.row_bytes
        turns = _scattered(self._spare, rows) if self._spare else _contiguous(rows * width)
        times = []
        for pairs in turns:
            self._rank.compute()
            began = time.monotonic_ns()
            for target, source in pairs:
                target.copy_(source)
            times.append(time.monotonic_ns() - began)
        return float(np.median(times)) / 1e3


Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def _contiguous(nbytes: int) -> list[Pairs]:
    """Source and target for each turn, in more memory than a cache holds."""
    memory = torch.ones((max(COPIES, COLD // (2 * nbytes)), 2, nbytes), dtype=torch.uint8)
    return [[(target, source)] for target, source in memory[:COPIES]]


def _scattered(spare: list[list[torch.Tensor]], rows: int) -> list[Pairs]:
    """Rows of a staging buffer, and the slots of the layers of `spare` by turns."""
    width = sum(len(view) for view in slot_views(spare[0], 0))
    staged = torch.ones((rows, width), dtype=torch.uint8)
    turns: list[Pairs] = []
    for turn in range(COPIES):
        pairs: Pairs = []
        for row in range(rows):
            layer, start = spare[(turn + row) % len(spare)], 0
            for live in slot_views(layer, (turn * rows + row) % len(layer[0])):
                pairs.append((live, staged[row, start : start + len(live)]))
                start += len(live)
        turns.append(pairs)
    return turns


def _sample(rest: list[Step], steps: list[Step], sent: int) -> Sample:
    """Steps that were over before the plan was sent count as rest."""
    rest = rest + [step for step in steps if step.end <= sent]
    moving = [step for step in steps if step.end > sent]
    ours = _ours(moving)
    return Sample(
        stall=sum(ours),
        longest=max(ours),
        total=(moving[-1].end - sent) / 1e3,
        steps=len(moving),
        idle=float(np.median(_ours(rest))) * len(moving),
        cpu=sum(step.cpu for step in moving) / 1e3,
        resting=_mean_period(rest),
        moving=_mean_period(moving),
        rest=_ours(rest),
    )


def _ours(steps: list[Step]) -> list[float]:
    return [step.ours / 1e3 for step in steps]


def _mean_period(steps: list[Step]) -> float:
    return float(np.mean([step.end - step.begin for step in steps])) / 1e3


def _model_state(rank: Rank, weights: list[list[torch.Tensor]]) -> SimpleNamespace:
    """What vLLM keeps of a model, as far as its adaptor looks at it."""
    cell, start = rank.scenario.cell, rank.scenario.start
    flat = torch.from_numpy(start.reshape(cell.layers, -1).astype(np.int64))
    table = torch.full((cell.layers, cell.experts, 1024), -1, dtype=torch.int64)
    counts = torch.zeros((cell.layers, cell.experts), dtype=torch.int64)
    for layer in range(cell.layers):
        columns, count = logical_to_physical(start[layer], cell.experts)
        table[layer, :, : columns.shape[1]] = torch.from_numpy(columns)
        counts[layer] = torch.from_numpy(count)
    return SimpleNamespace(
        model=SimpleNamespace(expert_weights=weights),
        model_name="bench",
        expert_load_pass=torch.zeros(flat.shape, dtype=torch.int32),
        physical_to_logical_map=flat,
        logical_to_physical_map=table,
        logical_replica_count=counts,
    )
