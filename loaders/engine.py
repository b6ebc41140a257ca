"""The adaptor interface: what the loader needs to know of a serving engine."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from .staging import Stack


class Engine(Protocol):
    """A serving engine's experts on one rank.

    Attributes:
        weights: per layer, every tensor that belongs to an expert (weights, scales, biases), each
            as one tensor [slots, ...] or as a list of one per slot. The loader reads them while
            transfers run and writes whole rows at a commit, between two steps.
        placement: int32 [layers, ranks, slots], the engine's placement at the start.
        buffer: the same for n experts of a layer, which the engine has allocated and leaves to the
            loader; empty if there are none.
        communicators: per layer, the engine's own object that moves experts (vLLM's
            `EplbCommunicator`) and the layer's number there; empty if there is none.
        loads: per model, integers [layers of the model, ranks * slots]: this step's heat, counted
            by the engine on its device and set to zero by the collector; [..., slots] if it
            `counts_own_slots`.
        counts_own_slots: see `GroupShape`.
        routes_by_source: see `GroupShape`.
    """

    weights: list[list[Stack]]
    placement: np.ndarray
    buffer: list[Stack]
    communicators: list[tuple[Any, int]]
    loads: list[torch.Tensor]
    counts_own_slots: bool
    routes_by_source: bool

    def tables(
        self, layers: np.ndarray, placement: np.ndarray, columns: np.ndarray | None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What must change for the engine to route by `placement` in `layers`.

        A slot gets `columns` (int [len(layers), ranks, slots]) of its expert's routing columns, and
        its share of them is its share of the expert's tokens; None is one column each.

        Called from a stager's thread while steps run: it only reads. The loader copies the values
        between two steps, together with the weights. Tables are changed in place: captured graphs
        hold their addresses.

        Args:
            layers: int [n], their numbers, ascending.
            placement: int [layers, ranks, slots], of all layers.
            columns: see above.

        Returns:
            (parts of the live tables, the values that they get), one for one.
        """
        ...

    def replaced(self, layer: int) -> str:
        """Name of a tensor of the layer that the engine computes with and that no longer is in the
        memory of `weights`; "" if there is none, or it cannot tell. From a stager's thread."""
        ...
