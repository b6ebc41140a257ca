"""The adaptor for vLLM: its experts and EPLB tables behind the `Engine` interface."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .routing import logical_to_physical
from .staging import Stack, row_bytes


class VllmEngine:
    """The models of an `EplbState`, their layers concatenated in the order of registration.

    Args:
        model_states: vLLM's `EplbModelState`s.
        ranks: EP ranks.
    """

    counts_own_slots = False
    routes_by_source = False

    def __init__(self, model_states: list[Any], ranks: int):
        self.weights: list[list[Stack]] = [
            list(layer) for state in model_states for layer in state.model.expert_weights
        ]
        # A model's buffer has the layout of its first layer; the largest model's serves best.
        self.buffer: list[Stack] = max(
            (list(getattr(state, "expert_buffer", None) or []) for state in model_states),
            key=lambda buffer: row_bytes([buffer])[0],
        )
        self.loads: list[torch.Tensor] = [state.expert_load_pass for state in model_states]
        self._where = [
            (state, layer)
            for state in model_states
            for layer in range(state.physical_to_logical_map.shape[0])
        ]
        moved = [(getattr(state, "communicator", None), layer) for state, layer in self._where]
        self.communicators: list[tuple[Any, int]] = moved if all(c for c, _ in moved) else []
        self._lying = [
            _lying(*pair) for state in model_states for pair in expert_layers(state.model)
        ]
        maps = [state.physical_to_logical_map.cpu().numpy() for state in model_states]
        physical = np.concatenate(maps).astype(np.int32)
        self.placement = physical.reshape(len(physical), ranks, -1)

    @property
    def models(self) -> list[tuple[str, int]]:
        """(name, layers) of each model."""
        names: dict[int, list[Any]] = {}
        for state, _ in self._where:
            names.setdefault(id(state), [state.model_name, 0])[1] += 1
        return [(str(name), count) for name, count in names.values()]

    def replaced(self, layer: int) -> str:
        """See `engine.Engine`: a parameter that got other memory (`data`, `register_parameter`)."""
        for module, name, address in self._lying[layer]:
            tensor = getattr(module, name, None)
            if not isinstance(tensor, torch.Tensor) or tensor.data_ptr() != address:
                return name
        return ""

    def tables(
        self, layers: np.ndarray, placement: np.ndarray, columns: np.ndarray | None = None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """See `engine.Engine`: vLLM's three maps of each layer, unused columns as -1."""
        live: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for row, number in enumerate(layers.tolist()):
            state, layer = self._where[number]
            counts = state.logical_replica_count[layer]
            shares = None if columns is None else columns[row]
            table, wanted = logical_to_physical(
                placement[number], len(counts), shares, least=int(counts.max())
            )
            live += [
                state.logical_to_physical_map[layer][:, : table.shape[1]],
                counts,
                state.physical_to_logical_map[layer],
            ]
            flat = placement[number].ravel().astype(np.int64)
            values += [torch.from_numpy(part).to(counts.device) for part in (table, wanted, flat)]
        return live, values


def expert_layers(model: Any) -> list[tuple[Any, list[Stack]]]:
    """(vLLM's layer of routed experts, None if it is not known; what it has handed out)."""
    layers = list(getattr(model, "moe_layers", ()))
    if len(layers) != len(model.expert_weights):
        layers = [None] * len(model.expert_weights)
    held = [getattr(layer, "routed_experts", layer) for layer in layers]
    return list(zip(held, map(list, model.expert_weights), strict=True))


def _lying(layer: Any, handed_out: list[Stack]) -> list[tuple[Any, str, int]]:
    """(owner, name, address) of the layer's own parameters that begin where a stack does."""
    if not isinstance(layer, torch.nn.Module):
        return []
    starts = {stack[0].data_ptr() for stack in handed_out if len(stack)}
    return [
        (module, name, parameter.data_ptr())
        for module in layer.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.data_ptr() in starts
    ]
