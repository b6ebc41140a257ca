"""Routing tables: which slots a logical expert's tokens go to, in the forms of the engines."""

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


def chosen_replicas(
    placement: np.ndarray, experts: int, columns: np.ndarray | None = None
) -> np.ndarray:
    """The replica of each expert to which each rank sends, where a rank has but one.

    A slot's share of its expert's columns is its share of the ranks that send, rounded so that
    every rank is counted once. A rank that holds a replica sends to itself, if that replica has
    senders at all; the others go to replicas in the order of their ranks.

    Args:
        placement: int [ranks, slots] of one layer.
        experts: logical experts.
        columns: int [ranks, slots], as of `logical_to_physical`.

    Returns:
        int32 [ranks that send, experts] of physical ids.
    """
    ranks, slots = placement.shape
    logical = placement.ravel()
    shares = np.ones(logical.size, np.int64) if columns is None else columns.ravel()
    chosen = np.empty((ranks, experts), np.int32)
    order = np.argsort(logical, kind="stable")
    ends = np.cumsum(np.bincount(logical, minlength=experts))
    for expert, held in enumerate(np.split(order, ends[:-1])):
        chosen[:, expert] = held[0]
        if len(held) > 1:
            left = _apportioned(ranks, shares[held])
            at_home = held[left > 0]
            chosen[at_home // slots, expert] = at_home
            left[left > 0] -= 1
            others = np.setdiff1d(np.arange(ranks), at_home // slots)
            chosen[others, expert] = np.repeat(held, left)
    return chosen


def _apportioned(ranks: int, shares: np.ndarray) -> np.ndarray:
    """`ranks` in whole numbers by `shares`; of equal remainders the first ones are rounded up."""
    whole, rest = np.divmod(ranks * shares.astype(np.int64), shares.sum())
    whole[np.argsort(-rest, kind="stable")[: ranks - whole.sum()]] += 1
    return whole
