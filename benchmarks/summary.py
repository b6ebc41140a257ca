"""The table of targets, from the measured cells; ratios are to the FlashLB reference."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from .cells import Record
from .peers import REFERENCE, VLLM
from .policies import EFFORTS, GREEDY
from .scale import growth
from .scoring import excess_ratio, geomean
from .targets import Target, at_least, at_most, not_run

SLOW_DRIFT = ("antiphase", "trace-decode")  # moves are held to a tenth here, to a third elsewhere
Pair = tuple[Record, Record]  # ours, the reference; the same shape and family
LIMITS: dict[
    str, tuple[float, float | None, float | None]
] = {  # speed-up, excess on the training window, on the next one
    "fast": (20.0, None, None),
    "balanced": (5.0, 0.62, 0.78),
    "thorough": (1.0, 0.55, 0.75),
}


def pairs(records: Iterable[Record], policy: str, against: str = REFERENCE) -> list[Pair]:
    """Valid cells of `policy` with the valid cells of `against` at the same shape and family."""
    by_cell: dict[tuple, dict[str, Record]] = defaultdict(dict)
    for record in records:
        if not record["fault"]:
            by_cell[(tuple(record["shape"]), record["family"])][record["policy"]] = record
    return [(c[policy], c[against]) for c in by_cell.values() if policy in c and against in c]


def ratios(found: Sequence[Pair], key: str) -> list[float]:
    """Excess of ours over theirs in each cell."""
    return [excess_ratio(ours[key], theirs[key]) for ours, theirs in found]


def by_family(found: Sequence[Pair], key: str) -> dict[str, float]:
    """Geometric mean over shapes of the excess ratio, by family."""
    cells = defaultdict(list)
    for pair, ratio in zip(found, ratios(found, key), strict=True):
        cells[pair[0]["family"]].append(ratio)
    return {family: geomean(values) for family, values in cells.items()}


def cell_targets(records: Sequence[Record]) -> list[Target]:
    """Speed and excess of each effort."""
    rows: list[Target] = []
    for effort in EFFORTS:
        found = pairs(records, effort)
        if not found:
            why = f"no cell in which its plan and that of {REFERENCE} are valid"
            target = ", ".join(f"{limit:g}" for limit in LIMITS[effort] if limit)
            rows.append(not_run(f"{effort}: speed and excess", target, why))
            continue
        rows += _effort_targets(effort, found)
    return rows


def valid_target(records: Sequence[Record]) -> Target:
    """A cell left out of the ratios for a fault of ours must not go unseen."""
    ours = [record for record in records if record["policy"] in (*EFFORTS, GREEDY)]
    wrong = sum(bool(record["fault"] or record.get("invalid")) for record in ours)
    return at_most(f"ours: plans not valid or not made, of {len(ours)}", wrong, 0)


def _effort_targets(effort: str, found: list[Pair]) -> list[Target]:
    speed, train, after = LIMITS[effort]
    times = [theirs["ms"] / ours["ms"] for ours, theirs in found]
    name = f"{effort}: times faster, geomean of {len(found)} cells"
    rows = [at_least(name, geomean(times), speed)]
    if effort == "thorough":
        cell = _cell(found[int(np.argmin(times))][0])
        rows.append(at_least(f"thorough: times faster, slowest cell {cell}", min(times), 1.0))
    if train is None or after is None:
        worst = ratios(found, "par_train")
        cell = _cell(found[int(np.argmax(worst))][0])
        above = sum(ratio > 1 for ratio in worst)
        name = f"{effort}: excess train, worst cell {cell}; {above} cells above 1"
        return [*rows, at_most(name, max(worst), 1.0)]
    for cells, which in _subsets(found):
        for key, window, limit in (("par_train", "train", train), ("par_next", "next", after)):
            name = f"{effort}: excess {window}, geomean{which}"
            rows.append(at_most(name, _mean(cells, key), limit))
    if effort == "balanced":
        worst_of = by_family(found, "par_next")
        family = max(worst_of, key=worst_of.__getitem__)
        name = f"{effort}: excess next, worst family ({family})"
        rows.append(at_most(name, worst_of[family], 1.03))
    return rows


def _subsets(found: list[Pair]) -> list[tuple[list[Pair], str]]:
    """All cells, and those in which the reference planned all layers.

    Where its search finds no room for a replica it returns today's placement. Such a plan is
    valid, but a few of them, many times worse than ours, would decide the mean.
    """
    planned = [pair for pair in found if not pair[1]["unchanged"]]
    if not planned or len(planned) == len(found):
        return [(found, "")]
    which = f" without {len(found) - len(planned)} cells in which the reference gave up a layer"
    return [(found, ""), (planned, which)]


def rolling_targets(rolls: Sequence[Record], effort: str = "balanced") -> list[Target]:
    """Moves and next-window excess of plans that follow one another, by family.

    Ours picks its layers; the reference plans every layer of every window.
    """
    whole = [r for r in rolls if r["policy"] == REFERENCE and not r["lasting"]]
    found = pairs([r for r in rolls if r["policy"] == effort and r["lasting"]] + whole, effort)
    rows = []
    for family in dict.fromkeys(ours["family"] for ours, _ in found):
        cells = [pair for pair in found if pair[0]["family"] == family]
        mine, other = (float(np.mean([pair[i]["moved"] for pair in cells])) for i in (0, 1))
        name = f"rolling, {family}: {effort}"
        if family.startswith("zipf"):
            rows.append(at_most(f"{name}, share of slots moved per window", mine, 0.0))
        else:
            limit = 0.1 if family in SLOW_DRIFT else 1 / 3
            ratio = mine / other if other else float("nan" if mine else 0)
            rows.append(at_most(f"{name}, moves", ratio, limit))
        rows.append(at_most(f"{name}, excess next", _mean(cells, "par_next"), 1.0))
    return rows or [not_run("rolling: moves", "<= 0.1 or 0.33", "no valid cell")]


def stationary_target(records: Sequence[Record]) -> Target:
    """Layers picked after the first plan, over all shapes and exponents."""
    if not records:
        return not_run("stationary Zipf: layers picked later", "<= 0", "no shape")
    windows = records[0]["windows"] - 1
    picked = sum(record["picked"] for record in records)
    name = f"stationary Zipf: layers picked in {windows} windows after the first plan"
    return at_most(name, picked, 0)


def whole_target(record: Record) -> Target:
    """A whole plan of a large model against the reference's whole call."""
    experts, ranks, slots = record["shape"]
    name = f"whole plan, {record['layers']} layers, ({experts},{ranks},{slots}): times faster"
    return at_least(name, record["reference"] / record["balanced"], 10.0)


def greedy_targets(records: Sequence[Record], apart: float, layers: int) -> list[Target]:
    """Ours of DeepSeek's greedy against vLLM's default, wherever the latter's plan is valid."""
    name = f"{GREEDY}: PAR against {VLLM}, difference"
    rows = [at_most(f"{name} in {layers} layers without ties, worst, %", 100 * apart, 1e-4)]
    found = pairs(records, GREEDY, VLLM)
    ratios = [a[key] / b[key] - 1 for a, b in found for key in ("par_train", "par_next")]
    if ratios:
        mean = 100 * abs(float(np.mean(ratios)))
        rows.append(at_most(f"{name} in {len(found)} cells, mean, %", mean, 0.1))
    return rows


def _mean(found: Sequence[Pair], key: str) -> float:
    return geomean(ratios(found, key))


def _cell(record: Record) -> str:
    return f"{record['family']} ({','.join(map(str, record['shape']))})"


def scale_target(records: Sequence[Record], most: int) -> Target:
    """Growth of the cost with the slots, up to `most` ranks."""
    name = f"growth of the cost from 8 to {most} ranks, as a power of n log n"
    if records[-1]["ranks"] < most:
        why = f"{records[-1]['ranks']} ranks took {records[-1]['ms']:.0f} ms"
        return not_run(name, "<= 1", why)
    return at_most(name, growth(list(records)), 1.0)


def memory_target(record: Record) -> Target:
    """Peak memory, which only has to be printed."""
    what = "{layers} layers of {experts} experts on {ranks} ranks".format(**record)
    return Target(f"peak memory of balanced, {what}, MiB", record["mib"], "printed", True)
