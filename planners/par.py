"""The objective: how much busier the busiest rank is than the mean rank, episode by episode."""

from __future__ import annotations

import numpy as np
from numba import njit

from ..ipc.placement import check_placement


def rank_load(heat: np.ndarray, placement: np.ndarray) -> np.ndarray:
    """Tokens that each rank receives when an expert's tokens divide evenly among its replicas.

    Args:
        heat: tokens[episodes, experts], any real numeric dtype.
        placement: int[ranks, slots], a valid placement of one layer.

    Returns:
        float64[episodes, ranks].

    Raises:
        ValueError: a shape does not fit, or the placement is not valid.
    """
    heat, placement = np.asarray(heat), np.asarray(placement)
    if heat.ndim != 2 or placement.ndim != 2:
        raise ValueError(
            f"heat has shape {heat.shape} and placement {placement.shape}; "
            "they must be [episodes, experts] and [ranks, slots]"
        )
    return _layer_loads(*_arguments(heat[:, None], placement[None]))[:, 0]


def par(heat: np.ndarray, placement: np.ndarray) -> float | np.ndarray:
    """Peak-average ratio: the mean of `episode_par` over the episodes.

    Args:
        heat: tokens[episodes, experts] with placement int[ranks, slots], or
            tokens[episodes, layers, experts] with placement int[layers, ranks, slots].
        placement: valid in each layer.

    Returns:
        A float for one layer, float64[layers] for the layered form.

    Raises:
        ValueError: a shape does not fit, there is no episode, or the placement is not valid.
    """
    if len(heat) == 0:
        raise ValueError(f"heat has shape {np.shape(heat)}; it must hold at least one episode")
    ratios = episode_par(heat, placement).mean(axis=0)
    return ratios if ratios.ndim else float(ratios)


def episode_par(heat: np.ndarray, placement: np.ndarray) -> np.ndarray:
    """Load of the busiest rank over the mean load of the ranks, in each episode.

    An episode without tokens counts 1.0, the value of a perfect balance.

    Args:
        heat: tokens[episodes, experts] with placement int[ranks, slots], or
            tokens[episodes, layers, experts] with placement int[layers, ranks, slots].
        placement: valid in each layer.

    Returns:
        float64[episodes] for one layer, float64[episodes, layers] for the layered form.

    Raises:
        ValueError: a shape does not fit, or the placement is not valid.
    """
    heat, placement = np.asarray(heat), np.asarray(placement)
    if heat.ndim != placement.ndim or heat.ndim not in (2, 3):
        raise ValueError(
            f"heat has shape {heat.shape} and placement {placement.shape}; they must be "
            "[episodes, experts] and [ranks, slots], both with or both without layers"
        )
    if heat.ndim == 2:
        return episode_par(heat[:, None], placement[None])[:, 0]
    loads = _layer_loads(*_arguments(heat, placement))
    mean = loads.mean(axis=2)
    return np.divide(loads.max(axis=2), mean, out=np.ones_like(mean), where=mean > 0)


def _arguments(heat: np.ndarray, placement: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if heat.shape[1] != placement.shape[0]:
        raise ValueError(
            f"heat has {heat.shape[1]} layers and placement {placement.shape[0]}; "
            "they must be the same"
        )
    check_placement(placement, heat.shape[2])
    return (
        np.require(heat, np.float64, ["C", "W"]),
        np.require(placement, np.int32, ["C", "W"]),
    )


@njit(nogil=True, cache=True)
def _layer_loads(heat, placement):
    episodes, layers, experts = heat.shape
    _, ranks, slots = placement.shape
    loads = np.zeros((episodes, layers, ranks))
    for layer in range(layers):
        replicas = np.zeros(experts)
        for expert in placement[layer].flat:
            replicas[expert] += 1
        for t in range(episodes):
            for rank in range(ranks):
                for slot in range(slots):
                    expert = placement[layer, rank, slot]
                    loads[t, layer, rank] += heat[t, layer, expert] / replicas[expert]
    return loads


@njit(cache=True, nogil=True)
def slot_shares(placement, columns, experts):
    """float64 [layers, ranks, slots]: share of each slot in the tokens of its expert, which is its
    share of the expert's `columns` [layers, ranks, slots]."""
    layers, ranks, slots = placement.shape
    shares = np.zeros(placement.shape)
    for layer in range(layers):
        total = np.zeros(experts)
        for rank in range(ranks):
            for slot in range(slots):
                total[placement[layer, rank, slot]] += columns[layer, rank, slot]
        for rank in range(ranks):
            for slot in range(slots):
                expert = placement[layer, rank, slot]
                shares[layer, rank, slot] = columns[layer, rank, slot] / total[expert]
    return shares
