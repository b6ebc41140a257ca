"""What is moved: the size of a group, its experts' bytes, and one sequence of plans for all."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from flash_eplb.loaders.staging import default_rows
from flash_eplb.planners.plan import Plan, PlannedRound, make_plan

WARM_UPS = 1  # plans that are carried out and checked but not timed


@dataclass(frozen=True)
class Cell:
    """Sizes of one group and of its plans; an expert's row is `row_bytes` in four tensors.

    Attributes:
        slots: per rank.
        writes: slots that a plan gives another expert, about.
        plans: timed ones; 0 measures steps at rest only.
    """

    label: str
    row_bytes: int
    ranks: int
    layers: int
    slots: int
    writes: int
    plans: int

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.label}, {self.ranks} ranks"

    @property
    def staging_rows(self) -> int:
        """What `EPLB_STAGING_ROWS` comes to by default."""
        return default_rows(self.row_bytes)

    @property
    def experts(self) -> int:
        """Logical experts per layer: an eighth of the slots are replicas."""
        return self.ranks * self.slots * 7 // 8

    @property
    def part_bytes(self) -> tuple[int, int, int, int]:
        """Of w13, w2 and their scales."""
        scale = max(8, self.row_bytes // 64)
        w2 = (self.row_bytes - 2 * scale) // 3 // 16 * 16
        return self.row_bytes - 2 * scale - w2, w2, scale, scale


class Scenario:
    """A cell's plans: every contender carries out the same ones in the same order."""

    def __init__(self, cell: Cell):
        self.cell = cell
        random = np.random.default_rng(cell.row_bytes + cell.ranks)
        physical = np.arange(cell.ranks * cell.slots, dtype=np.int32) % cell.experts
        self.start = np.tile(physical, (cell.layers, 1)).reshape(cell.layers, cell.ranks, -1)
        self.plans: list[Plan] = []
        self.rounds: list[list[PlannedRound]] = []
        before = self.start
        for _ in range(cell.plans + WARM_UPS if cell.plans else 0):
            plan = make_plan(before, _shuffled(before, cell, random))
            self.plans.append(plan)
            self.rounds.append(plan.rounds(cell.staging_rows))
            before = plan.placement

    def writes(self, number: int, rank: int) -> int:
        """Slots of `rank` that plan `number` gives another expert."""
        plan = self.plans[number]
        return int((plan.before[:, rank] != plan.placement[:, rank]).sum())

    def arriving(self, number: int, rank: int) -> int:
        """Bytes that must reach `rank` for plan `number`: what it does not hold, once."""
        plan = self.plans[number]
        pairs = zip(plan.before[:, rank].tolist(), plan.placement[:, rank].tolist(), strict=True)
        return sum(len(set(after) - set(before)) for before, after in pairs) * self.cell.row_bytes

    def largest_round(self, number: int, rank: int) -> int:
        """Rows that the fullest round of plan `number` brings to `rank`."""
        return max(int((part.moves["rank"] == rank).sum()) for part in self.rounds[number])


def _shuffled(before: np.ndarray, cell: Cell, random: np.random.Generator) -> np.ndarray:
    """Another valid placement: experts change places, replicas come and go."""
    wanted = before.copy()
    counts = [Counter(layer.ravel().tolist()) for layer in wanted]
    done = 0
    while done < cell.writes:
        layer = int(random.integers(cell.layers))
        a, b = random.choice(cell.ranks, 2, replace=False)
        i, j = random.integers(cell.slots, size=2)
        x, y = int(wanted[layer, a, i]), int(wanted[layer, b, j])
        if x == y or x in wanted[layer, b]:
            continue
        if counts[layer][y] > 1 and random.random() < 0.5:
            wanted[layer, b, j] = x  # a replica more of x, one less of y
            counts[layer].update({x: 1, y: -1})
            done += 1
        elif y not in wanted[layer, a]:
            wanted[layer, a, i], wanted[layer, b, j] = y, x
            done += 2
    return wanted


class Experts:
    """The bytes of every expert: a pattern of random words, plus a number of the expert's own."""

    dtypes = (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)

    def __init__(self, cell: Cell):
        self._cell = cell

    @cached_property
    def _patterns(self) -> list[torch.Tensor]:
        random = np.random.default_rng(0)
        words = [size // 8 for size in self._cell.part_bytes]
        return [torch.from_numpy(random.integers(0, 2**62, count)) for count in words]

    def weights(self, held: np.ndarray) -> list[list[torch.Tensor]]:
        """Tensors [slots, n] of each layer; `held` is int[layers, slots]."""
        layers = []
        for layer, experts in enumerate(held):
            ids = torch.from_numpy(self._ids(layer, experts))
            parts = zip(self._patterns, self.dtypes, strict=True)
            layers.append([(words + ids[:, None]).view(dtype) for words, dtype in parts])
        return layers

    def wrong(self, weights: list[list[torch.Tensor]], held: np.ndarray) -> int:
        """Slots that do not hold every byte of the expert that `held` names."""
        wrong = 0
        room = [torch.empty_like(words) for words in self._patterns]
        for layer, tensors in enumerate(weights):
            for slot, number in enumerate(self._ids(layer, held[layer]).tolist()):
                wrong += not all(
                    torch.equal(tensor[slot].view(torch.int64), torch.add(words, number, out=out))
                    for tensor, words, out in zip(tensors, self._patterns, room, strict=True)
                )
        return wrong

    def _ids(self, layer: int, experts: np.ndarray) -> np.ndarray:
        return experts.astype(np.int64) + layer * self._cell.experts + 1
