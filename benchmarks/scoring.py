"""The benchmark's own judgement of a placement: validity, PAR and moves, apart from the package."""

from __future__ import annotations

import numpy as np

# Excesses below this are both taken as this much in a ratio: 0.2% above perfect is as good as
# perfect, and a quotient of two such numbers says nothing.
EXCESS_FLOOR = 0.002


def initial(layers: int, ranks: int, slots: int, experts: int) -> np.ndarray:
    """What vLLM starts with: expert p % experts in physical slot p, int64[layers, ranks, slots].

    No rank holds an expert twice, as a rank's slots are consecutive and at most `experts`.
    """
    one = (np.arange(ranks * slots) % experts).reshape(ranks, slots)
    return np.tile(one, (layers, 1, 1))


def faults(placement: np.ndarray, shape: tuple[int, ...], experts: int) -> dict[int, str]:
    """What is wrong, by layer; empty for a valid placement. Layer -1 stands for all."""
    placement = np.asarray(placement)
    if placement.shape != shape:
        return {-1: f"has shape {placement.shape}, not {shape}"}
    if not np.issubdtype(placement.dtype, np.integer):
        return {-1: f"has dtype {placement.dtype}"}
    found = {}
    for layer, rows in enumerate(placement):
        if rows.min() < 0 or rows.max() >= experts:
            found[layer] = "an expert out of range"
        elif any(len(set(row)) < len(row) for row in rows.tolist()):
            found[layer] = "an expert twice on a rank"
        elif len(np.unique(rows)) < experts:
            found[layer] = "an expert nowhere"
    return found


def shares(rows: np.ndarray, experts: int) -> np.ndarray:
    """Share of each expert's tokens on each rank, float64[experts, ranks], split evenly."""
    ranks = len(rows)
    held = np.zeros((experts, ranks))
    np.add.at(held, (rows, np.arange(ranks)[:, None]), 1.0)
    return held / held.sum(axis=1, keepdims=True)


def pars(heat: np.ndarray, placement: np.ndarray) -> np.ndarray:
    """PAR of each step or episode, float64[count, layers]; 1 where there are no tokens."""
    count, layers, experts = heat.shape
    ratios = np.ones((count, layers))
    for layer in range(layers):
        tokens = heat[:, layer].astype(np.float64)
        loads = tokens @ shares(placement[layer], experts)
        mean = loads.mean(axis=1)
        np.divide(loads.max(axis=1), mean, out=ratios[:, layer], where=mean > 0)
    return ratios


def par(heat: np.ndarray, placement: np.ndarray) -> float:
    """Mean PAR over layers and over steps or episodes."""
    return float(pars(heat, placement).mean())


def moved(before: np.ndarray, after: np.ndarray, experts: int) -> int:
    """Slots whose expert was not on their rank before, so that its weights must be sent there."""
    layers, ranks, _ = before.shape
    held = np.zeros((layers, ranks, experts), bool)
    layer, rank = np.arange(layers)[:, None, None], np.arange(ranks)[None, :, None]
    held[layer, rank, before] = True
    return int((~held[layer, rank, after]).sum())


def excess_ratio(ours: float, theirs: float) -> float:
    """Excess of `ours` over that of `theirs`, both PAR; see EXCESS_FLOOR."""
    return max(ours - 1, EXCESS_FLOOR) / max(theirs - 1, EXCESS_FLOOR)


def geomean(values: list[float]) -> float:
    """Geometric mean; nan of nothing."""
    return float(np.exp(np.mean(np.log(values)))) if values else float("nan")
