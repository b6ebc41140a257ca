"""What takes many windows or many layers: stationary heat, and a whole plan of a large model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from . import heat, scoring
from .cells import Record, Shape
from .policies import Entry, flash_lb

EXPONENTS = (0.4, 0.8, 1.2, 1.5)
STAGING_ROWS = 8
WHOLE_SHAPE, WHOLE_LAYERS = (256, 32, 9), 58


def stationary(shape: Shape, windows: int, effort: str = "balanced") -> list[Record]:
    """Moves and picked layers after the first plan on heat that never changes, by exponent."""
    experts, ranks, slots = shape
    records = []
    for exponent in EXPONENTS:
        tokens = heat.stationary(exponent, experts, 2, windows, seed=0)
        placement = scoring.initial(tokens.shape[2], ranks, slots, experts)
        policy, moves, picked = flash_lb(ranks, slots, effort), [], []
        for window in tokens:
            plan = policy.plan(window, placement)
            moves.append(scoring.moved(placement, plan.placement, experts))
            picked.append(len(plan.layers))
            placement = plan.placement
        records.append(
            {"shape": shape, "exponent": exponent, "windows": windows, "first": moves[0]}
            | {"moves": sum(moves[1:]), "picked": sum(picked[1:])}
        )
    return records


def greedy_apart(ours: Entry, theirs: Entry, shapes: Sequence[Shape]) -> tuple[float, int]:
    """Greatest difference in PAR, as a share, and the layers compared.

    On heat whose totals are all different: vLLM's sort is not stable, so ties fall either way.
    Layers in which it puts an expert twice on a rank are left out.
    """
    apart, compared = 0.0, 0
    for shape in shapes:
        experts, ranks, slots = shape
        rng = np.random.default_rng([5, *shape])
        skew = rng.uniform(0.1, 1.0, (1, 40, 1))
        tokens = np.exp(skew * rng.standard_normal((1, 40, experts)))
        window = (1e5 * tokens).astype(np.int64)  # sums that vLLM's float32 holds exactly
        start = scoring.initial(40, ranks, slots, experts)
        planned = theirs.fresh(ranks, slots).plan(window, start)
        good = [n for n in range(40) if n not in scoring.faults(planned, start.shape, experts)]
        other = scoring.pars(window, planned)[:, good]
        mine = scoring.pars(window, ours.fresh(ranks, slots).plan(window, start))[:, good]
        apart = max(apart, float(np.abs(mine / other - 1).max(initial=0)))
        compared += len(good)
    return apart, compared


def whole_plan(reference: Entry | None, repeats: int) -> Record:
    """Seconds for all layers of a large model: ours with its rounds, the reference's whole call.

    The reference's call ends with its relabelling; it leaves transfers to its caller.
    """
    experts, ranks, slots = WHOLE_SHAPE
    tokens = heat.families()["drift"](experts, WHOLE_LAYERS, heat.WINDOW_STEPS, 0)
    window = heat.episodes(tokens)
    start = scoring.initial(WHOLE_LAYERS, ranks, slots, experts)

    def ours() -> float:
        policy = flash_lb(ranks, slots, "balanced")
        return _seconds(lambda: policy.plan(window, start, every_layer=True).rounds(STAGING_ROWS))

    def theirs() -> float:
        assert reference is not None
        policy = reference.fresh(ranks, slots)
        policy.plan(window, start)
        return policy.seconds

    times: list[tuple[float, float]] = []
    for _ in range(repeats):
        times.append((ours(), theirs() if reference else float("nan")))
    mine, other = np.median(times, axis=0)
    return {"shape": WHOLE_SHAPE, "layers": WHOLE_LAYERS, "balanced": mine, "reference": other}


def stationary_shapes(shapes: Sequence[Shape]) -> list[Shape]:
    """The smallest and the middle of the shapes, by slots; the rest says nothing more."""
    by_size = sorted(shapes, key=lambda shape: shape[1] * shape[2])
    return list(dict.fromkeys([by_size[0], by_size[len(by_size) // 2]]))


def _seconds(action: Callable[[], object]) -> float:
    from time import perf_counter

    start = perf_counter()
    action()
    return perf_counter() - start
