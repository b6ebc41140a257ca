"""What both scenarios share: experts that tell who they are, heat, and a planner's hand."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from flash_eplb.ipc.liveness import SegmentError
from flash_eplb.ipc.placement import MOVE
from flash_eplb.planners.delivery import Delivery, Progress
from flash_eplb.planners.group import Group
from flash_eplb.planners.plan import PlannedRound, make_plan

LAYERS, EXPERTS, TOP_K, TOKENS = 3, 8, 2, 24
STEPS = 4000  # within which a plan must be committed


def expert_tensor(layer: int, expert: int, name: str) -> torch.Tensor:
    """The tensor `name` of an expert: its bytes are those of no other."""
    seed = zlib.crc32(f"{layer}/{expert}/{name}".encode())
    random = torch.Generator().manual_seed(seed)
    is_scale = "scale" in name or "bias" in name
    size, kind = ((5,), torch.float32) if is_scale else ((6, 5), torch.int8)
    return torch.randint(-100, 100, size, generator=random).to(kind)


def random_placement(seed: int, before: np.ndarray) -> np.ndarray:
    """Another valid placement with as many slots; equal on all ranks."""
    rng = np.random.default_rng(seed)
    layers, ranks, slots = before.shape
    placed = np.empty_like(before)
    for layer in range(layers):
        while True:
            rest = rng.integers(0, EXPERTS, ranks * slots - EXPERTS)
            cells = rng.permutation(np.concatenate([np.arange(EXPERTS), rest]))
            cells = cells.reshape(ranks, slots)
            if all(len(set(held)) == slots for held in cells.tolist()):
                break
        placed[layer] = cells
    return placed


def chosen_experts(seed: int, layer: int) -> torch.Tensor:
    """int64 [tokens, top_k], the experts of a rank's tokens; some experts are hot."""
    rng = np.random.default_rng([seed, layer])
    odds = np.arange(1, EXPERTS + 1) ** 1.5
    hot = np.roll(odds / odds.sum(), layer)
    rows = [rng.choice(EXPERTS, TOP_K, replace=False, p=hot) for _ in range(TOKENS)]
    return torch.tensor(np.array(rows))


def arrivals(physical: torch.Tensor, ranks: int, slots: int) -> torch.Tensor:
    """int64 [slots]: tokens of all ranks that came to this rank's slots."""
    counts = torch.bincount(physical.ravel(), minlength=ranks * slots)
    dist.all_reduce(counts)
    return counts.view(ranks, slots)[dist.get_rank()]


class Hand:
    """On rank 0: sends plans as the planner does. On the other ranks it does nothing."""

    def __init__(self, session: str):
        self._session = session
        self._group: Group | None = None
        self._delivery: Delivery | None = None
        self._plans = 0
        self._sequence = 1

    def send(self, worker: Any, wanted: np.ndarray) -> None:
        if dist.get_rank():
            return
        if self._group is None:
            self._group = Group.attach(self._session)
            for rank in self._group.ranks:
                rank.plans.take_over(7)
        self._plans += 1
        rounds = make_plan(worker.placement, wanted).rounds(self._group.free_rows())
        self._delivery = Delivery(
            self._group, rounds, 7, self._plans, self._sequence, worker.epoch, 10**6
        )
        self._sequence = self._delivery.next_sequence

    def reroute(self, worker: Any, columns: np.ndarray) -> None:
        """Other routing columns for all layers, int16 [layers, ranks, slots]; nothing moves."""
        if dist.get_rank():
            return
        assert self._group is not None
        self._plans += 1
        layers = np.arange(len(columns))
        part = PlannedRound(np.empty(0, MOVE), worker.placement, columns, layers)
        self._delivery = Delivery(
            self._group, [part], 7, self._plans, self._sequence, worker.epoch, 10**6
        )
        self._sequence = self._delivery.next_sequence

    def turn(self) -> None:
        if self._delivery is not None:
            progress = self._delivery.advance()
            assert progress is not Progress.FAILED, self._delivery.reason
            if progress is Progress.DONE:
                self._delivery = None

    def close(self) -> None:
        if self._group is not None:
            self._group.close()


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether the same experts stand on every rank, in whatever slots."""
    return np.array_equal(np.sort(one), np.sort(other))


def attach_heat(session: str) -> Group | None:
    """The group for reading heat, on rank 0."""
    if dist.get_rank():
        return None
    try:
        return Group.attach(session)
    except SegmentError as error:
        raise AssertionError(f"no group in session {session}") from error


def counted(seeds: list[int]) -> np.ndarray:
    """int64 [steps, layers, experts]: tokens of all ranks, whose batches of a step had `seeds`."""
    tokens = torch.zeros((len(seeds), LAYERS, EXPERTS), dtype=torch.int64)
    for turn, seed in enumerate(seeds):
        for layer in range(LAYERS):
            chosen = chosen_experts(seed, layer)
            tokens[turn, layer] = torch.bincount(chosen.ravel(), minlength=EXPERTS)
    dist.all_reduce(tokens)
    return tokens.numpy()


def check_heat(group: Group, placement: np.ndarray, tokens: np.ndarray) -> None:
    """The last steps of heat that the planner reads are `tokens`."""
    steps = list(group.read_heat())[-len(tokens) :]
    for wanted, step in zip(tokens, steps, strict=True):
        for layer, flat in enumerate(placement.reshape(LAYERS, -1)):
            heat = np.bincount(flat, step.heat[layer], EXPERTS)
            assert np.array_equal(heat, wanted[layer]), (wanted[layer], heat)
