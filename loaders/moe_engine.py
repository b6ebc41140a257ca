"""A small mixture-of-experts engine: what the loader is tested with where no vLLM can run.

Router, top-k, all-to-all over gloo, experts as real matrices, on any number of ranks. All values
are whole numbers that float32 holds exactly, so that sums do not depend on their order and a run on
many ranks, under any placement, gives the very bits of a run on one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .routing import logical_to_physical
from .staging import Stack

_HASH = 2654435769
"""floor(2**32 / golden ratio): the router's column is a hash of the token's row, as in vLLM."""


@dataclass(frozen=True)
class MoeShape:
    """Sizes of the model and of its expert-parallel group; `seed` makes the weights."""

    layers: int
    experts: int
    ranks: int
    slots: int
    hidden: int = 16
    inner: int = 8
    top_k: int = 2
    seed: int = 0


def expert_tensors(shape: MoeShape, layer: int, expert: int) -> list[torch.Tensor]:
    """The weights of one expert: every layer has matrices, a scale and zero points; each third
    layer has biases too, so that layers differ in layout."""
    random = torch.Generator().manual_seed((shape.seed * 1009 + layer) * 4099 + expert)

    def whole(low: int, high: int, *size: int) -> torch.Tensor:
        return torch.randint(low, high + 1, size, generator=random)

    tensors = [
        whole(-2, 2, shape.inner, shape.hidden).float(),
        whole(-2, 2, shape.hidden, shape.inner).to(torch.bfloat16),
        whole(1, 3, 1).float(),
        whole(-1, 1, shape.hidden).to(torch.int8),
    ]
    if layer % 3 == 0:
        tensors.append(whole(-3, 3, shape.hidden).to(torch.float16))
    return tensors


def run_expert(tensors: list[torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """[n, hidden] out of [n, hidden], whole numbers from -8 to 8."""
    inner = (tokens @ tensors[0].T).clamp(0, 63)
    out = (inner @ tensors[1].float().T) * tensors[2] + tensors[3]
    if len(tensors) > 4:
        out = out + tensors[4].float()
    return torch.remainder(out, 17) - 8


def route(shape: MoeShape, layer: int, tokens: torch.Tensor, skew: torch.Tensor) -> torch.Tensor:
    """int64 [n, top_k]: the experts of each token; `skew` [experts] makes some of them hot."""
    random = torch.Generator().manual_seed(shape.seed * 31 + layer)
    router = torch.randint(-3, 4, (shape.experts, shape.hidden), generator=random).float()
    return (tokens @ router.T + skew).topk(shape.top_k, dim=1).indices


def run_alone(shape: MoeShape, tokens: torch.Tensor, skew: torch.Tensor) -> torch.Tensor:
    """The whole model on one process, without placement or replicas: what any run must give."""
    for layer in range(shape.layers):
        chosen = route(shape, layer, tokens, skew)
        total = tokens.clone()
        for expert in chosen.unique().tolist():
            rows, places = (chosen == expert).nonzero(as_tuple=True)
            out = run_expert(expert_tensors(shape, layer, expert), tokens[rows])
            total.index_add_(0, rows, out * (places + 1).unsqueeze(1))
        tokens = torch.remainder(total, 17) - 8
    return tokens


class MoeEngine:
    """One rank of the model; implements `engine.Engine`.

    Args:
        shape: of the model and the group.
        rank: of this process.
        group: the ranks' gloo group, for the all-to-all; None with one rank.
    """

    counts_own_slots = False
    routes_by_source = False

    def __init__(self, shape: MoeShape, rank: int, group: Any = None):
        self.shape = shape
        self.rank = rank
        self._group = group
        physical = np.arange(shape.ranks * shape.slots, dtype=np.int32) % shape.experts
        self.placement = np.tile(physical, (shape.layers, 1)).reshape(
            shape.layers, shape.ranks, shape.slots
        )
        self.weights: list[list[Stack]] = [
            [
                torch.stack(parts)
                for parts in zip(
                    *(
                        expert_tensors(shape, layer, e)
                        for e in self.placement[layer, rank].tolist()
                    ),
                    strict=True,
                )
            ]
            for layer in range(shape.layers)
        ]
        self.buffer: list[Stack] = []
        self.communicators: list[tuple[Any, int]] = []
        self.loads = [torch.zeros((shape.layers, shape.ranks * shape.slots), dtype=torch.int32)]
        width = 1024
        self._table = torch.full((shape.layers, shape.experts, width), -1, dtype=torch.int64)
        self._counts = torch.zeros((shape.layers, shape.experts), dtype=torch.int64)
        for live, value in zip(*self.tables(np.arange(shape.layers), self.placement), strict=True):
            live.copy_(value)

    def replaced(self, layer: int) -> str:
        """See `engine.Engine`: nobody replaces them."""
        return ""

    def tables(
        self, layers: np.ndarray, placement: np.ndarray, columns: np.ndarray | None = None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """See `engine.Engine`."""
        live: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for row, layer in enumerate(layers.tolist()):
            shares = None if columns is None else columns[row]
            least = int(self._counts[layer].max())
            made = logical_to_physical(placement[layer], self.shape.experts, shares, least)
            live += [self._table[layer][:, : made[0].shape[1]], self._counts[layer]]
            values += [torch.from_numpy(part) for part in made]
        return live, values

    def forward(self, tokens: torch.Tensor, skew: torch.Tensor) -> torch.Tensor:
        """[n, hidden] out of this rank's [n, hidden]; all ranks call it together."""
        for layer in range(self.shape.layers):
            chosen = route(self.shape, layer, tokens, skew)
            slots = self._slots(layer, chosen)
            self.loads[0][layer] += torch.bincount(
                slots.ravel(), minlength=self.loads[0].shape[1]
            ).int()
            out = self._experts(layer, tokens, slots)
            factor = torch.arange(1, self.shape.top_k + 1).view(1, -1, 1)
            tokens = torch.remainder(tokens + (out * factor).sum(1), 17) - 8
        return tokens

    def _slots(self, layer: int, chosen: torch.Tensor) -> torch.Tensor:
        """The physical expert of each (token, choice)."""
        rows = torch.arange(len(chosen)).unsqueeze(1)
        column = ((rows * _HASH) & 0xFFFFFFFF) % self._counts[layer][chosen]
        return self._table[layer][chosen, column]

    def _experts(self, layer: int, tokens: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """[n, top_k, hidden]: each token sent to its slots, computed there, and sent back."""
        shape = self.shape
        flat = slots.ravel()
        order = flat.argsort(stable=True)
        sent = tokens.repeat_interleave(shape.top_k, 0)[order]
        leaving = torch.bincount(flat // shape.slots, minlength=shape.ranks)
        arriving = self._exchange_counts(leaving)
        there = self._all_to_all(flat[order].float().unsqueeze(1), leaving, arriving)[:, 0].long()
        work = self._all_to_all(sent, leaving, arriving)
        done = torch.empty_like(work)
        for slot in (there % shape.slots).unique().tolist():
            mine = there % shape.slots == slot
            done[mine] = run_expert([part[slot] for part in self.weights[layer]], work[mine])
        back = self._all_to_all(done, arriving, leaving)
        out = torch.empty_like(back)
        out[order] = back
        return out.view(len(tokens), shape.top_k, shape.hidden)

    def _exchange_counts(self, leaving: torch.Tensor) -> torch.Tensor:
        if self._group is None:
            return leaving
        arriving = torch.empty_like(leaving)
        self._group.alltoall_base(arriving, leaving, [], []).wait()
        return arriving

    def _all_to_all(
        self, rows: torch.Tensor, leaving: torch.Tensor, arriving: torch.Tensor
    ) -> torch.Tensor:
        if self._group is None:
            return rows
        out = rows.new_empty((int(arriving.sum()), rows.shape[1]))
        options = (arriving.tolist(), leaving.tolist())
        self._group.alltoall_base(out, rows.contiguous(), *options).wait()
        return out
