"""Scales that all experts of a rank share: equal on all ranks, or no expert may leave its rank.

A quantisation method may take one activation scale for the experts that it finds on a rank, their
maximum. It stays when they move, and on another rank they would be computed with another one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..loaders.vllm_engine import expert_layers
from .derived import shared_scales
from .group import Group, UnsupportedError

Scales = dict[str, float]
"""By a text that names model, layer and tensor."""


def scales_of(states: list[Any], ranks: int) -> Scales:
    """Those of registered models (vLLM's `EplbModelState`s) on this rank, one of `ranks`."""
    found: Scales = {}
    for state in states:
        slots = state.physical_to_logical_map.shape[1] // ranks
        for number, (layer, moved) in enumerate(expert_layers(state.model)):
            for name, scale in shared_scales(layer, moved, slots).items():
                found[f"{state.model_name}: {name} of MoE layer {number}"] = scale
    return found


def agree_on_scales(group: Group, scales: Callable[[], Scales]) -> None:
    """That what the ranks share has one value on all that have it; a collective of all ranks.

    Raises:
        UnsupportedError: on all ranks; names the first scale that differs.
    """
    mine: Scales = {}
    group.together(lambda: mine.update(scales()))
    everyone = group.gather(mine)
    for name, first in everyone[0].items():
        for rank, theirs in enumerate(everyone):
            if repr(theirs.get(name, first)) != repr(first):  # two that are no numbers are equal
                raise UnsupportedError(
                    f"{name}, which the experts of a rank share, is {theirs[name]:g} on EP rank "
                    f"{rank} and {first:g} on EP rank 0: experts that move would be computed with "
                    "another one; quantise with one scale for all experts"
                )
