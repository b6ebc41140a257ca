"""Reference digests: what each expert's weights are, agreed on by all ranks."""

from __future__ import annotations

import numpy as np

from ..loaders.digest import digests
from ..loaders.engine import Engine
from .group import Group, UnsupportedError


def take_reference(group: Group, engine: Engine, experts: int) -> np.ndarray:
    """Digests of all experts of the group, int64 [layers, experts]; a collective of all ranks.

    Args:
        group: whose experts lie by `engine.placement`.
        engine: of this rank.
        experts: logical experts per layer.

    Raises:
        UnsupportedError: on all ranks: a tensor that has no bytes to read, or replicas that differ.
    """
    found: list[list[int]] = []
    group.together(lambda: found.extend(digests(engine.weights)))
    everyone = group.gather(np.array(found, dtype=np.int64))
    return reference_digests(np.stack(everyone, axis=1), engine.placement, experts)


def reference_digests(found: np.ndarray, placement: np.ndarray, experts: int) -> np.ndarray:
    """One digest per (layer, expert), if all its replicas agree.

    Args:
        found: int64 [layers, ranks, slots], the digest of each slot.
        placement: int [layers, ranks, slots].
        experts: logical experts per layer.

    Returns:
        int64 [layers, experts].

    Raises:
        UnsupportedError: replicas whose weights differ; names the first.
    """
    layers, ranks, slots = placement.shape
    reference = np.full((layers, experts), -1, dtype=np.int64)
    for layer in range(layers):
        for rank in range(ranks):
            for slot in range(slots):
                expert = placement[layer, rank, slot]
                digest = found[layer, rank, slot]
                if reference[layer, expert] not in (-1, digest):
                    raise UnsupportedError(
                        f"layer {layer} expert {expert}: the replica on rank {rank} slot {slot} "
                        "has other weights than the first (load_format=dummy makes such replicas: "
                        "update the weights before the first request; and of some models vLLM "
                        "loads none: set num_redundant_experts=0)"
                    )
                reference[layer, expert] = digest
    return reference
