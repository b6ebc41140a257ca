"""The tables that `make bench-planner` prints besides its targets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from .cells import Record
from .peers import REFERENCE
from .policies import EFFORTS, NAMES
from .scoring import geomean
from .summary import by_family, pairs


def print_policies(console: Console, records: Sequence[Record]) -> None:
    """Each policy over the cells in which its plan is valid."""
    table = _table("Policies: means over their valid cells, PAR at episode and at step level")
    _columns(table, "policy", "cells", "invalid", "ms/layer", "PAR train", "next")
    _columns(table, "step PAR train", "next", "excess train", "next", "slots moved")
    for name in NAMES:
        mine = [r for r in records if r["policy"] == name]
        valid = [r for r in mine if not r["fault"]]
        if not valid:
            continue
        keys = ("par_train", "par_next", "step_par_train", "step_par_next")
        means = [float(np.mean([r[key] for r in valid])) for key in keys]
        excess = [f"{mean - 1:.3f}" for mean in means[:2]]
        cells = [str(len(mine)), str(len(mine) - len(valid))]
        speed = f"{geomean([r['ms'] for r in valid]):.3f}"
        moved = f"{100 * np.mean([r['moved'] for r in valid]):.0f}%"
        table.add_row(name, *cells, speed, *(f"{m:.3f}" for m in means), *excess, moved)
    console.print(table)


def print_families(console: Console, records: Sequence[Record]) -> None:
    """Excess of our efforts as a ratio to the reference's, by family and window."""
    table = _table(f"Excess as a ratio to the {REFERENCE}, geomean over shapes: episodes / steps")
    _columns(table, "family", *(f"{effort} {w}" for effort in EFFORTS for w in ("train", "next")))
    rows: dict[str, list[str]] = defaultdict(list)
    families = list(dict.fromkeys(record["family"] for record in records))
    for effort in EFFORTS:
        found = pairs(records, effort)
        for window in ("train", "next"):
            coarse = by_family(found, f"par_{window}")
            fine = by_family(found, f"step_par_{window}")
            for family in families:
                both = (coarse.get(family), fine.get(family))
                rows[family].append(" / ".join("-" if v is None else f"{v:.2f}" for v in both))
    for family in families:
        table.add_row(family, *rows[family])
    console.print(table)


def print_rolling(console: Console, rolls: Sequence[Record]) -> None:
    """Moves per window after the first plan and PAR on the next window, by family."""
    table = _table("Rolling, plan after plan: % of slots moved per window, PAR on the next window")
    kinds = list(dict.fromkeys((r["policy"], r["lasting"]) for r in rolls))
    names = [f"{name}\n{'picks layers' if own else 'every layer'}" for name, own in kinds]
    _columns(table, "family", *names)
    for family in dict.fromkeys(r["family"] for r in rolls):
        cells = []
        for kind in kinds:
            mine = [
                r
                for r in rolls
                if (r["policy"], r["lasting"]) == kind and r["family"] == family and not r["fault"]
            ]
            moved = 100 * np.mean([r["moved"] for r in mine]) if mine else np.nan
            ratio = np.mean([r["par_next"] for r in mine]) if mine else np.nan
            cells.append(f"{moved:.1f} {ratio:.3f}")
        table.add_row(family, *cells)
    console.print(table)


def print_scale(console: Console, scale: dict[str, list[Record]]) -> None:
    """Cost by ranks and by episodes."""
    for kind, title in (("ranks", "9 slots, 64 episodes"), ("episodes", "(256,32,9)")):
        table = _table(f"Cost of balanced by {kind}, {title}")
        _columns(table, kind, *(str(record[kind]) for record in scale[kind]))
        table.add_row("ms per layer", *(f"{record['ms']:.3g}" for record in scale[kind]))
        console.print(table)


def print_faults(console: Console, records: Sequence[Record], rolls: Sequence[Record]) -> None:
    """Plans that are not valid and policies that failed, by name."""
    cells: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for record in [*records, *rolls]:
        fault = record["fault"] or record.get("invalid", "")
        if record["policy"] == REFERENCE and record.get("unchanged"):
            fault = "today's placement returned for a layer (counted)"
        if fault:
            kind = "rolling" if "lasting" in record else "one plan"
            shape = ",".join(map(str, record["shape"]))
            what = fault.split(": ", 1)[-1] if fault.startswith("invalid") else fault
            cells[record["policy"], kind, what].add(f"({shape}) {record['family']}")
    if not cells:
        return
    table = _table("Plans that are not valid, left out of the ratios, and failures")
    _columns(table, "policy", "in", "what", "cells", "such as")
    for (policy, kind, what), where in sorted(cells.items()):
        table.add_row(policy, kind, what, str(len(where)), ", ".join(sorted(where)[:2]))
    console.print(table)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left")


def _columns(table: Table, *names: str) -> None:
    for name in names:
        table.add_column(name, justify="right" if table.columns else "left")
