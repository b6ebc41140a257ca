"""The benchmark's figure: speed, excess, moves and scale on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .cells import Record
from .peers import REFERENCE
from .policies import EFFORTS, GREEDY, NAMES
from .scoring import geomean
from .summary import by_family, pairs

COLOURS = {
    name: f"C{i}" for i, name in enumerate(name for name in NAMES if name not in (REFERENCE,))
} | {REFERENCE: "black"}


def draw(
    records: Sequence[Record], rolls: Sequence[Record], scale: dict[str, list[Record]], path: Path
) -> None:
    """Write the figure to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 2, figsize=(15, 15), layout="constrained")
    _times(axes[0, 0], records)
    _pars(axes[0, 1], records)
    _families(axes[1, 0], records, "par_train", "training window")
    _families(axes[1, 1], records, "par_next", "next window")
    _moves(axes[2, 0], rolls)
    _scale(axes[2, 1], scale)
    for axis in axes.flat:
        axis.grid(alpha=0.3, axis="y")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _times(axis, records: Sequence[Record]) -> None:
    """Milliseconds per layer by shape, a line for each policy."""
    shapes = list(dict.fromkeys(tuple(record["shape"]) for record in records))
    shapes.sort(key=lambda shape: shape[1] * shape[2])
    for name in NAMES:
        points = []
        for shape in shapes:
            mine = [r for r in records if r["policy"] == name and tuple(r["shape"]) == shape]
            points.append(geomean([r["ms"] for r in mine if r.get("ms")]))
        axis.plot(range(len(shapes)), points, "o-", color=COLOURS[name], label=name)
    axis.set_xticks(range(len(shapes)), [",".join(map(str, s)) for s in shapes], rotation=30)
    axis.set(yscale="log", ylabel="ms per layer", title="Time, geomean over families")
    axis.set_xlabel("experts, ranks, slots per rank")
    axis.legend(fontsize=8)


def _pars(axis, records: Sequence[Record]) -> None:
    """Excess of single steps and of episodes on the next window, by policy."""
    keys = {"par_next": "episodes", "step_par_next": "single steps"}
    names = [name for name in NAMES if any(r["policy"] == name for r in records)]
    common = _common(records, [name for name in names if name in (*EFFORTS, REFERENCE)])
    for i, (key, label) in enumerate(keys.items()):
        heights = []
        for name in names:
            mine = [r for r in common if r["policy"] == name and not r["fault"]]
            heights.append(float(np.mean([r[key] for r in mine])) - 1 if mine else np.nan)
        bars = axis.bar(np.arange(len(names)) + 0.4 * i - 0.2, heights, 0.4, label=label)
        axis.bar_label(bars, fmt="%.3f", fontsize=7)
    counts = [sum(r["policy"] == name and not r["fault"] for r in common) for name in names]
    ticks = [
        f"{name.replace(' ', chr(10), 1)}\n{n} cells" for name, n in zip(names, counts, strict=True)
    ]
    axis.set_xticks(range(len(names)), ticks, fontsize=8)
    axis.set(ylabel="PAR - 1, mean over valid cells", title="Excess on the next window")
    axis.legend(fontsize=8)


def _families(axis, records: Sequence[Record], key: str, window: str) -> None:
    """Excess ratio to the reference by family for our efforts."""
    families = list(dict.fromkeys(record["family"] for record in records))
    for i, effort in enumerate(EFFORTS):
        found = by_family(pairs(records, effort), key)
        heights = [found.get(family, np.nan) for family in families]
        place = np.arange(len(families)) + 0.27 * (i - 1)
        axis.bar(place, heights, 0.27, color=COLOURS[effort], label=effort)
    axis.axhline(1, color="black", lw=1)
    axis.set_xticks(range(len(families)), families, rotation=30, ha="right", fontsize=8)
    axis.set(ylabel=f"excess / excess of {REFERENCE}", title=f"Excess, {window}")
    axis.legend(fontsize=8)


def _moves(axis, rolls: Sequence[Record]) -> None:
    """Share of slots moved per window after the first plan."""
    families = list(dict.fromkeys(record["family"] for record in rolls))
    shown = [
        ("balanced", True, "balanced"),
        (REFERENCE, False, f"{REFERENCE}, every layer"),
        (REFERENCE, True, f"{REFERENCE}, layers it picks"),
    ]
    for i, (policy, lasting, label) in enumerate(shown):
        heights = []
        for family in families:
            mine = [
                r["moved"]
                for r in rolls
                if (r["policy"], r["lasting"], r["family"]) == (policy, lasting, family)
                and not r["fault"]
            ]
            heights.append(100 * float(np.mean(mine)) if mine else np.nan)
        axis.bar(np.arange(len(families)) + 0.27 * (i - 1), heights, 0.27, label=label)
    axis.set_xticks(range(len(families)), families, rotation=30, ha="right", fontsize=8)
    axis.set(ylabel="% of slots per window", title="Moves, rolling, after the first plan")
    axis.legend(fontsize=8)


def _scale(axis, scale: dict[str, list[Record]]) -> None:
    """Cost of one layer against ranks, with n log n through the middle, and against episodes."""
    ranks = scale.get("ranks", [])
    if ranks:
        count = np.array([r["ranks"] for r in ranks], float)
        cost = np.array([r["ms"] for r in ranks])
        slots = 9 * count
        line = slots * np.log(slots)
        axis.plot(count, cost, "o-", label="ranks, at 9 slots and 64 episodes")
        axis.plot(count, line * cost[len(cost) // 2] / line[len(cost) // 2], "k--", label="n log n")
    episodes = scale.get("episodes", [])
    if episodes:
        counts = [r["episodes"] for r in episodes]
        label = "episodes, at (256,32,9)"
        axis.plot(counts, [r["ms"] for r in episodes], "s-", label=label)
    axis.set(xscale="log", yscale="log", ylabel="ms per layer", xlabel="ranks or episodes")
    axis.set_title("Cost of balanced")
    if ranks or episodes:
        axis.legend(fontsize=8)


def _common(records: Sequence[Record], names: Sequence[str]) -> list[Record]:
    """The cells in which all of `names` are valid."""
    valid = [
        {(tuple(r["shape"]), r["family"]) for r in records if r["policy"] == n and not r["fault"]}
        for n in names
        if n != GREEDY
    ]
    cells = set.intersection(*valid) if valid else set()
    return [r for r in records if (tuple(r["shape"]), r["family"]) in cells]
