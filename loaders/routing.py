"""Routing tables: which slots a logical expert's tokens go to, in vLLM's form."""

from __future__ import annotations

import numpy as np


def logical_to_physical(
    placement: np.ndarray, experts: int, columns: np.ndarray | None = None, least: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Tables of one layer.

    The router takes one of an expert's columns by a hash of the token's row, so a slot that stands
    in more columns gets more tokens. A small batch has few rows and reaches few columns: those of
    one slot are spread over the expert's, and do not follow one another.

    Args:
        placement: int [ranks, slots].
        experts: logical experts.
        columns: int [ranks, slots], columns of each slot, at least 1; None for one each.
        least: width of the table at least.

    Returns:
        (int64 [experts, most columns or `least`] of physical ids, -1 where unused;
        int64 [experts] of column counts).
    """
    logical = placement.ravel()
    shares = np.ones(logical.size, np.int64) if columns is None else columns.ravel()
    counts = np.bincount(logical, shares, experts).astype(np.int64)
    slots = np.repeat(np.arange(logical.size), shares)
    turns = np.arange(slots.size) - np.repeat(np.cumsum(shares) - shares, shares)
    order = np.lexsort((slots, (turns + 0.5) / shares[slots], logical[slots]))
    slots = slots[order]
    column = np.arange(slots.size) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.full((experts, max(least, counts.max())), -1, dtype=np.int64)
    table[logical[slots], column] = slots
    return table, counts
