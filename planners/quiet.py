"""Why a plan changes nothing, in words for the log: a planner that is silent must not look idle."""

from __future__ import annotations


def why_quiet(layers: int, uneven: int, winning: int, sure: int, min_gain: float) -> str:
    """What became of the layers of a window that led to no plan.

    Args:
        layers: of the model.
        uneven: those that are not as even as they may be, or as their last plan promised.
        winning: those of them for which a placement wins `min_gain` and what its moves cost.
        sure: those of them for which chance does not explain that.
        min_gain: PAR.
    """
    if not uneven:
        return f"each of {layers} is even enough, or as even as its last plan promised"
    left = [
        (uneven - winning, f"would win less than {min_gain:g} or than moves cost"),
        (winning - sure, "no more than chance may, on the heat so far"),
        (sure, "more, by moves that do not fit EPLB_MAX_MOVES"),
    ]
    return f"{uneven} of {layers} uneven: " + ", ".join(f"{n} {what}" for n, what in left if n)
