"""The adaptors for vLLM-Ascend's two model runners, behind the `Engine` interface.

Runner V1 keeps its state in its MoE layers and in a `VllmEplbAdaptor`; the ranks route by a table
with one replica per expert. Runner V2 has vLLM's own state, and beside it a routing table per
layer. In both a rank counts the tokens that arrived at its own slots.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .routing import chosen_replicas
from .staging import Stack
from .vllm_engine import VllmEngine


class AscendEngine:
    """Runner V1: the layers of one rank, as a `VllmEplbAdaptor` has found them.

    The layers count into memory of ours from now on, one block for all of them, so that it is read
    and zeroed at once. A layer that would keep the counts of many steps apart adds them up instead.

    Args:
        adaptor: its `moe_layers`, tensors of experts, buffers and routing tables are used.
        rank: EP rank.
    """

    counts_own_slots = True
    routes_by_source = True

    def __init__(self, adaptor: Any, rank: int):
        layers = list(adaptor.moe_layers)
        maps = [layer.global_expert_map for layer in layers]
        self.placement = np.stack([_placement(table.cpu().numpy()) for table in maps])
        self.weights: list[list[Stack]] = [
            _stacks(adaptor.expert_param_per_layer[number]) for number in range(len(layers))
        ]
        first = adaptor.expert_weight_key_per_layer[0]
        self.buffer: list[Stack] = _stacks(adaptor.buffer_tensor_list[first])
        self.communicators: list[tuple[Any, int]] = []
        self.loads = [_count_into_one_block(layers)]
        self._rank = rank
        self._tables = [layer.get_log2phy_map() for layer in layers]
        self._maps = maps

    def tables(
        self, layers: np.ndarray, placement: np.ndarray, columns: np.ndarray | None = None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """See `engine.Engine`: this rank's replica of each expert, and where all of them are."""
        live: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for row, number in enumerate(layers.tolist()):
            table, where = self._tables[number], self._maps[number]
            shares = None if columns is None else columns[row]
            chosen = chosen_replicas(placement[number], where.shape[1], shares)[self._rank]
            live += [table, where]
            for part, like in ((chosen, table), (_slots(placement[number], where.shape), where)):
                values.append(torch.from_numpy(part).to(like.device, like.dtype))
        return live, values

    def replaced(self, layer: int) -> str:
        """See `engine.Engine`: it cannot tell."""
        return ""


class AscendV2Engine(VllmEngine):
    """Runner V2: vLLM's state, whose layers route by a table of their own.

    Args:
        model_states: vLLM's `EplbModelState`s.
        ranks: EP ranks.
        rank: this one.
        build_table: vLLM-Ascend's `build_expert_replica_routing_table`.
    """

    counts_own_slots = True

    def __init__(self, model_states: list[Any], ranks: int, rank: int, build_table: Any):
        super().__init__(model_states, ranks)
        self.weights = [[_listed(stack) for stack in layer] for layer in self.weights]
        self.buffer = [_listed(stack) for stack in self.buffer]
        slots = self.placement.shape[2]
        mine = slice(rank * slots, (rank + 1) * slots)
        self.loads = [load[:, mine] for load in self.loads]  # elsewhere nothing is counted
        self._rank = rank
        self._build_table = build_table

    def tables(
        self, layers: np.ndarray, placement: np.ndarray, columns: np.ndarray | None = None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """See `engine.Engine`: vLLM's maps, and what each layer routes by."""
        live, values = super().tables(layers, placement, columns)
        for turn, number in enumerate(layers.tolist()):
            table, counts = values[3 * turn : 3 * turn + 2]
            state, layer = self._where[number]
            route = state.model.moe_layers[layer].eplb_state.expert_replica_routing_table
            live.append(route)
            values.append(self._build_table(table, counts, self._rank))
        return live, values


def _stacks(experts: list[list[torch.Tensor]]) -> list[Stack]:
    """The tensors of [slots][tensors], as one stack for each of them."""
    return [list(stack) for stack in zip(*experts, strict=True)]


def _listed(stack: Stack) -> list[torch.Tensor]:
    """One tensor per slot: on an NPU their layout is not ours to cut into bytes."""
    return list(stack) if isinstance(stack, list) else list(stack.unbind(0))


def _placement(where: np.ndarray) -> np.ndarray:
    """int32 [ranks, slots], the expert in each slot, from [ranks, experts], the slot or -1.

    Raises:
        ValueError: ranks hold different numbers of experts, or slots are left out.
    """
    slots = int((where >= 0).sum(axis=1).max())
    placement = np.full((len(where), slots), -1, np.int32)
    for rank, row in enumerate(where):
        held = np.flatnonzero(row >= 0)
        if sorted(row[held].tolist()) != list(range(slots)):
            raise ValueError(
                f"the expert map puts {len(held)} experts of rank {rank} into the slots "
                f"{sorted(row[held].tolist())}; every rank has the slots 0 to {slots - 1}"
            )
        placement[rank, row[held]] = held
    return placement


def _slots(placement: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """int32 [ranks, experts]: the slot of each expert, -1 where a rank does not hold it."""
    where = np.full(shape, -1, np.int32)
    for rank, held in enumerate(placement):
        where[rank, held] = np.arange(len(held), dtype=np.int32)
    return where


def _count_into_one_block(layers: list[Any]) -> torch.Tensor:
    """[layers, slots] into which all layers count from now on.

    A layer in multi-stage mode counts step by step into [steps, slots]: of one step, that is all.
    """
    first = layers[0].moe_load
    block = torch.zeros((len(layers), first.shape[-1]), dtype=first.dtype, device=first.device)
    for layer, row in zip(layers, block, strict=True):
        if layer.moe_load.dim() > 1:
            layer.num_iter = 1
            row = row.unsqueeze(0)
        layer.moe_load = row
    return block
