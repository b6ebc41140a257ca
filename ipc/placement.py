"""Placements and the moves between them: what every process checks before it trusts one."""

from __future__ import annotations

import numpy as np
from numba import njit

MOVE = np.dtype(
    [
        ("layer", "<i4"),
        ("expert", "<i4"),
        ("source_rank", "<i4"),
        ("source_slot", "<i4"),
        ("rank", "<i4"),
        ("slot", "<i4"),
    ]
)
"""One slot that receives an expert's weights: `rank` and `slot` are the destination."""


class PlacementError(ValueError):
    """A placement that loses or doubles an expert, or a move that does not fit its placement."""


def check_placement(placement: np.ndarray, experts: int) -> None:
    """Refuse a placement unless each layer holds every expert, and no rank holds one twice.

    Args:
        placement: int[layers, ranks, slots], the logical expert in each slot.
        experts: number of logical experts per layer.

    Raises:
        PlacementError: naming the layer, the rank or the expert, and what is wrong.
    """
    placement = _as_slots(placement)
    _check_range(placement, experts)
    slots = np.ascontiguousarray(placement, np.int32)
    if not _are_complete(slots, np.ones(len(slots), np.bool_), experts):
        _check_twice(placement)
        _check_missing(placement, experts)


@njit(cache=True)
def try_moves(placement, moves, experts, rows):
    """(whether all is right, the placement after `moves`): `apply_moves` and `check_placement` in
    one, for who needs no words; right only if no rank receives more than `rows`, either.

    Args:
        placement: int32[layers, ranks, slots], a valid placement.
        moves: int32[n, 6], the fields of MOVE[n].
        experts: number of logical experts per layer.
        rows: slots that may be written on a rank.
    """
    layers, ranks, slots = placement.shape
    after = placement.copy()
    changed = np.zeros(layers, np.bool_)
    received = np.zeros(ranks, np.int64)
    for layer, expert, source_rank, source_slot, rank, slot in moves:
        if not (0 <= layer < layers and 0 <= source_rank < ranks and 0 <= rank < ranks):
            return False, after
        if not (0 <= source_slot < slots and 0 <= slot < slots):
            return False, after
        if placement[layer, source_rank, source_slot] != expert:
            return False, after
        held = placement[layer, rank, slot]
        if held == expert or after[layer, rank, slot] != held:  # it is there, or written twice
            return False, after
        after[layer, rank, slot] = expert
        changed[layer] = True
        received[rank] += 1
        if received[rank] > rows:
            return False, after
    return _are_complete(after, changed, experts), after


@njit(cache=True)
def _are_complete(placement, changed, experts):
    """Whether in the changed layers every expert has a slot and stands on no rank twice."""
    layers, ranks, slots = placement.shape
    latest = np.full(experts, -1, np.int64)  # layer * ranks + rank where an expert was seen last
    for layer in range(layers):
        if not changed[layer]:
            continue
        found = 0
        for rank in range(ranks):
            here = layer * ranks + rank
            for slot in range(slots):
                expert = placement[layer, rank, slot]
                if latest[expert] == here:
                    return False
                found += latest[expert] < layer * ranks
                latest[expert] = here
        if found < experts:
            return False
    return True


def apply_moves(placement: np.ndarray, moves: np.ndarray) -> np.ndarray:
    """Return a copy of `placement` after `moves`, all of which take effect at once.

    Every source is read from `placement` as given, before any slot is written, so a move may take
    its expert from a slot that another move of the same call overwrites.

    Args:
        placement: int[layers, ranks, slots].
        moves: MOVE[n].

    Raises:
        PlacementError: a move is out of range, its source slot does not hold its expert, its
            destination holds that expert already, or two moves write the same slot.
    """
    placement = _as_slots(placement)
    if moves.dtype != MOVE or moves.ndim != 1:
        raise PlacementError(f"moves are {moves.dtype}{list(moves.shape)}; they must be MOVE[n]")
    _check_fields(placement.shape, moves)
    source = (moves["layer"], moves["source_rank"], moves["source_slot"])
    target = (moves["layer"], moves["rank"], moves["slot"])
    _check_sources(moves, placement[source])
    _check_targets(moves, placement[target], np.ravel_multi_index(target, placement.shape))
    moved = placement.copy()
    moved[target] = moves["expert"]
    return moved


def _as_slots(placement: np.ndarray) -> np.ndarray:
    placement = np.asarray(placement)
    if placement.ndim != 3 or placement.dtype.kind not in "iu":
        raise PlacementError(
            f"placement is {placement.dtype}{list(placement.shape)}; "
            "it must be int[layers, ranks, slots]"
        )
    return placement


def _check_range(placement: np.ndarray, experts: int) -> None:
    if placement.size == 0 or (placement.min() >= 0 and placement.max() < experts):
        return
    layer, rank, slot = np.argwhere((placement < 0) | (placement >= experts))[0]
    raise PlacementError(
        f"layer {layer}: rank {rank} slot {slot} holds expert {placement[layer, rank, slot]}; "
        f"experts are 0..{experts - 1}"
    )


def _check_twice(placement: np.ndarray) -> None:
    ordered = np.sort(placement, axis=-1)
    same = ordered[..., 1:] == ordered[..., :-1]
    if not same.any():
        return
    layer, rank, slot = np.argwhere(same)[0]
    raise PlacementError(
        f"layer {layer}: expert {ordered[layer, rank, slot]} stands twice on rank {rank}"
    )


def _check_missing(placement: np.ndarray, experts: int) -> None:
    layers = placement.shape[0]
    held = np.zeros((layers, experts), dtype=bool)
    held[np.arange(layers)[:, None, None], placement] = True
    if held.all():
        return
    layer, expert = np.argwhere(~held)[0]
    raise PlacementError(f"layer {layer}: expert {expert} has no slot")


def _check_fields(shape: tuple[int, ...], moves: np.ndarray) -> None:
    layers, ranks, slots = shape
    limits = {
        "layer": layers,
        "source_rank": ranks,
        "source_slot": slots,
        "rank": ranks,
        "slot": slots,
    }
    for field, limit in limits.items():
        values = moves[field]
        bad = np.flatnonzero((values < 0) | (values >= limit))
        if bad.size:
            raise PlacementError(
                f"move {bad[0]}: {field} is {values[bad[0]]}; it must be in 0..{limit - 1}"
            )


def _check_sources(moves: np.ndarray, held: np.ndarray) -> None:
    bad = np.flatnonzero(held != moves["expert"])
    if bad.size:
        move = moves[bad[0]]
        raise PlacementError(
            f"move {bad[0]}: layer {move['layer']} rank {move['source_rank']} "
            f"slot {move['source_slot']} holds expert {held[bad[0]]}, not expert {move['expert']}"
        )


def _check_targets(moves: np.ndarray, held: np.ndarray, slots: np.ndarray) -> None:
    idle = np.flatnonzero(held == moves["expert"])
    if idle.size:
        raise PlacementError(
            f"move {idle[0]}: {_target(moves[idle[0]])} holds expert {held[idle[0]]} already"
        )
    order = np.argsort(slots, kind="stable")
    clash = np.flatnonzero(slots[order][1:] == slots[order][:-1])
    if clash.size:
        first, second = order[clash[0]], order[clash[0] + 1]
        raise PlacementError(f"moves {first} and {second} both write {_target(moves[first])}")


def _target(move: np.void) -> str:
    return f"layer {move['layer']} rank {move['rank']} slot {move['slot']}"
