"""What both scenarios share: experts that tell who they are, heat, and a planner's hand."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from flash_eplb.ipc.placement import MOVE
from flash_eplb.planners.delivery import Delivery, Progress
from flash_eplb.planners.group import Group
from flash_eplb.planners.plan import PlannedRound, make_plan

LAYERS, EXPERTS, TOP_K, TOKENS = 3, 8, 2, 24
REDUNDANT = 4
SETTINGS = {
    "enabled": True,
    "staging_rows": 2,
    "vote_steps": 2,
    "episode_steps": 4,
    "min_episodes": 4,
    "plan_interval": 4,
    "patrol_steps": 3,
}
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


def counted(seeds: list[int]) -> np.ndarray:
    """int64 [steps, layers, experts]: tokens of all ranks, whose batches of a step had `seeds`."""
    tokens = torch.zeros((len(seeds), LAYERS, EXPERTS), dtype=torch.int64)
    for turn, seed in enumerate(seeds):
        for layer in range(LAYERS):
            chosen = chosen_experts(seed, layer)
            tokens[turn, layer] = torch.bincount(chosen.ravel(), minlength=EXPERTS)
    dist.all_reduce(tokens)
    return tokens.numpy()


class Scenario:
    """What both runners' cases do alike; they have a `worker`, a `runner` with `passes`, `step`
    and `check`.

    Args:
        session: of the engine.
        modes: of the case.
    """

    def __init__(self, session: str, modes: list[str]):
        self.session, self.modes, self.hand = session, modes, Hand(session)

    def move_experts(self) -> None:
        """By plans of a real planner, or by two of random placements."""
        if "planner" in self.modes:
            self.steps_until(lambda: self.worker.epoch)
            self.check()
            return
        for plan in range(2):
            wanted = random_placement(10 + plan, self.worker.placement)
            self.hand.send(self.worker, wanted)
            self.steps_until(lambda wanted=wanted: same(self.worker.placement, wanted))
            self.check()

    def steps_until(self, done: Callable[[], Any]) -> None:
        for count in range(STEPS):
            if done():
                return
            self.step(dummy=count % 7 == 3)
        raise AssertionError(f"not reached in {STEPS} steps, epoch {self.worker.epoch}")

    def check_heat(self) -> None:
        """The planner's view of a step is what all ranks' batches sent where."""
        rank, before = dist.get_rank(), self.runner.passes
        group = None if rank else Group.attach(self.session)
        for turn in range(3):  # in one of them only rank 0 has something to do; others send, too
            self.step(dummy=turn == 1 and rank > 0)
        tokens = counted([1000 * (before + turn + 1) + rank for turn in range(3)])
        if group is None:
            return
        steps = list(group.read_heat())[-len(tokens) :]
        for wanted, step in zip(tokens, steps, strict=True):
            for layer, flat in enumerate(self.worker.placement.reshape(LAYERS, -1)):
                heat = np.bincount(flat, step.heat[layer], EXPERTS)
                assert np.array_equal(heat, wanted[layer]), (wanted[layer], heat)
        group.close()


def run_cases(cases: list[str], session: str, run: Callable[[str, str], None]) -> None:
    """Call `run(case, its session)` for each, with the settings of all of them in place."""
    for number, text in enumerate(cases):
        name = f"{session}-{number}"
        planned = {"spawn_planner": "planner" in text, "session": name}
        for setting, value in (SETTINGS | planned).items():  # also of a planner that is spawned
            os.environ[f"EPLB_{setting.upper()}"] = str(value)
        run(text, name)
        dist.barrier()
    print(json.dumps({"rank": dist.get_rank(), "done": cases}))
