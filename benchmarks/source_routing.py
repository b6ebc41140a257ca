"""Routing where each rank sends an expert's tokens to one replica: planned, or by a modulo.

On vLLM-Ascend's model runner V1 a rank has one replica per expert; upstream takes the one with
number `rank % replicas`. FlashLB plans once knowing that and once as if each token could choose;
the second plan is then routed by the modulo. Both are scored on a window that neither has seen. All
ranks are taken to send alike.
"""

from __future__ import annotations

import numpy as np

from flash_eplb.planners.flashlb import FlashLB

from .heat import Case, episodes, synthetic, traces
from .scoring import geomean, initial
from .targets import at_most, print_targets, write_targets

SHAPES = ((8, 9), (16, 5), (16, 9), (32, 9))  # ranks, slots
LAYERS = 8


def cells() -> list[tuple[str, Case, int, int]]:
    """(name, heat, ranks, slots) of what fits together."""
    made = [
        synthetic(name, experts, LAYERS, seed=1)
        for name in ("zipf-0.8", "zipf-1.2", "drift")
        for experts in (64, 128, 256)
    ]
    return [
        (f"{case.name}, {case.experts} experts on {ranks} x {slots}", case, ranks, slots)
        for case in (*made, *recorded())
        for ranks, slots in SHAPES
        if case.experts < ranks * slots <= 2 * case.experts
    ]


def recorded() -> list[Case]:
    """The real loads, where they are."""
    try:
        return traces()
    except OSError as error:
        print(f"real loads: not run, {error}")
        return []


def by_modulo(placement: np.ndarray) -> np.ndarray:
    """int[layers, R, S]: ranks that send to each slot; replicas count from the first rank."""
    layers, ranks, _ = placement.shape
    senders = np.zeros(placement.shape, np.int64)
    for layer in range(layers):
        for expert in np.unique(placement[layer]):
            held = np.argwhere(placement[layer] == expert)
            counts = np.bincount(np.arange(ranks) % len(held), minlength=len(held))
            senders[layer, held[:, 0], held[:, 1]] = counts
    return senders


def excess(heat: np.ndarray, placement: np.ndarray, columns: np.ndarray) -> float:
    """Mean PAR - 1 of `heat` [T, layers, E] when slots share their expert by their columns."""
    ratios = []
    for layer, (held, shares) in enumerate(zip(placement, columns, strict=True)):
        totals = np.bincount(held.ravel(), shares.ravel(), heat.shape[2])
        load = (heat[:, layer][:, held] * (shares / totals[held])).sum(axis=2)
        ratios.append(load.max(axis=1) / np.maximum(load.mean(axis=1), 1e-9))
    return float(np.mean(ratios)) - 1


def main() -> None:
    rows = []
    for name, case, ranks, slots in cells():
        start = initial(case.steps.shape[1], ranks, slots, case.experts)
        seen = episodes(case.train(), case.episode_steps)
        unseen = episodes(case.next(), case.episode_steps)
        plan = FlashLB(ranks, slots, routing="by_source").plan(seen, start, every_layer=True)
        other = FlashLB(ranks, slots).plan(seen, start, every_layer=True).placement
        planned = excess(unseen, plan.placement, plan.columns)
        modulo = excess(unseen, other, by_modulo(other))
        token = excess(unseen, other, np.ones(other.shape))
        rows.append((planned, modulo))
        print(
            f"{name}: excess {planned:.4f} planned, {modulo:.4f} by modulo, "
            f"{token:.4f} if each token could choose"
        )
    ratios = [planned / modulo for planned, modulo in rows]
    targets = [
        at_most("excess, planned / by modulo, geometric mean", geomean(ratios), 0.9),
        at_most("the same, worst cell", max(ratios), 1.0),
    ]
    print_targets(targets, "routing by source")
    write_targets(targets, "source_routing")


if __name__ == "__main__":
    main()
