"""What every policy checks before it plans: its settings, the heat and today's placement."""

from __future__ import annotations

import math

import numpy as np

from ..ipc.placement import PlacementError, check_placement


def checked_heat(heat: np.ndarray) -> np.ndarray:
    """`heat` as float64[episodes, layers, experts], a copy.

    Args:
        heat: tokens[episodes, layers, experts], any real numeric dtype.

    Raises:
        ValueError: another shape or dtype, no episode, or a value that is negative or not finite.
    """
    heat = _array("heat", heat)
    if heat.ndim != 3 or heat.shape[0] == 0 or heat.dtype.kind not in "iuf":
        raise ValueError(
            f"heat is {heat.dtype} of shape {heat.shape}; it must be real numbers "
            "[episodes, layers, experts] of at least one episode"
        )
    with np.errstate(over="ignore"):
        values = heat.astype(np.float64, order="C")
    if values.size and not (values.min() >= 0 and values.max() < math.inf):  # nan fails both
        fit = np.isfinite(values) & (values >= 0)
        where = tuple(int(i) for i in np.argwhere(~fit)[0])
        raise ValueError(f"heat{list(where)} is {heat[where]}; it must be finite and at least 0")
    return values


def checked_placement(
    placement: np.ndarray, heat: np.ndarray, ranks: int, slots_per_rank: int
) -> np.ndarray:
    """`placement` as int32[layers, ranks, slots_per_rank], a copy.

    Args:
        placement: int[layers, ranks, slots_per_rank], the logical expert in each slot.
        heat: [episodes, layers, experts]; only its shape counts.
        ranks: EP ranks.
        slots_per_rank: slots of each layer on each rank.

    Raises:
        ValueError: another shape than heat, ranks and slots ask for.
        PlacementError: it loses an expert or holds one twice on a rank.
    """
    placement = _array("placement", placement)
    shape = (heat.shape[1], ranks, slots_per_rank)
    if placement.shape != shape:
        raise ValueError(
            f"placement has shape {placement.shape}; it must be {shape}, "
            "[layers of heat, ranks, slots_per_rank]"
        )
    try:
        check_placement(placement, heat.shape[2])
    except PlacementError as error:
        raise PlacementError(f"placement: {error}") from None
    return np.array(placement, dtype=np.int32, order="C")


def _array(name: str, value: np.ndarray) -> np.ndarray:
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} is no array: {error}; give rows of one length") from None


def whole(name: str, value: int, least: int, most: int | None = None) -> int:
    """`value` as an int of at least `least`, and at most `most` if that is given.

    Raises:
        ValueError: it is not one; the text names the setting `name`.
    """
    fits = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not fits or value < least or (most is not None and value > most):
        above = "" if most is None else f" and at most {most}"
        raise ValueError(
            f"{name} is {value!r}; it must be a whole number of at least {least}{above}"
        )
    return int(value)


def optional(name: str, value: int | None, least: int) -> int | None:
    """`value` as `whole` has it, or None.

    Raises:
        ValueError: it is neither; the text names the setting `name`.
    """
    return None if value is None else whole(name, value, least)


def amount(name: str, value: float) -> float:
    """`value` as a finite float of at least 0.

    Raises:
        ValueError: it is not one; the text names the setting `name`.
    """
    real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not real or not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value!r}; it must be a finite number of at least 0")
    return float(value)


def shares(heat: np.ndarray) -> np.ndarray:
    """Heat over its maximum in each episode and layer: the same PAR, and no sum overflows.

    Args:
        heat: float64[episodes, layers, experts], checked.
    """
    peak = heat.max(axis=2, keepdims=True, initial=0.0)
    return heat / np.where(peak > 0, peak, 1.0)


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """`value`, one of `allowed`.

    Raises:
        ValueError: it is none of them; the text names the setting `name`.
    """
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
    return value


def tamed(heat: np.ndarray) -> np.ndarray:
    """`heat`, scaled by a power of two where its sums or ratios would leave float64.

    Args:
        heat: float64[episodes, layers, experts], checked.
    """
    peak = heat.max(initial=0.0)
    return heat if peak == 0 or 1e-100 < peak < 1e100 else np.ldexp(heat, -np.frexp(peak)[1])
