"""Routing tables: which slots a logical expert's tokens go to, in vLLM's form."""

from __future__ import annotations

import numpy as np


def logical_to_physical(placement: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Tables of one layer with uniform routing.

    Args:
        placement: int [ranks, slots].
        experts: logical experts.

    Returns:
        (int64 [experts, most replicas] of physical ids, -1 where unused;
        int64 [experts] of replica counts).
    """
    logical = placement.ravel()
    counts = np.bincount(logical, minlength=experts)
    order = np.argsort(logical, kind="stable")
    first = np.cumsum(counts) - counts
    column = np.arange(len(logical)) - first[logical[order]]
    table = np.full((experts, counts.max()), -1, dtype=np.int64)
    table[logical[order], column] = order
    return table, counts.astype(np.int64)
