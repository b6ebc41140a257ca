"""The tables and targets of `make bench-ipc`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from .ipc_bells import BARE, BELL, PIPE, Wakes
from .ipc_measure import QUANTILES, Cell
from .ipc_peers import MANAGER_ARRAY, MANAGER_TENSOR, MEMCPY, OURS, PEERS
from .targets import Target, at_least, at_most, not_run

TARGET_SIZE = "67 KB"
HOW = (
    "How: the writer calls every 100 us (or as soon as the last call is over) and yields "
    "meanwhile, while the reader, one other process, takes what comes into arrays of its own. "
    "p50 and p99: medians of the rounds' percentiles; p99.9: of all calls. The ring and memcpy "
    "take turns, 500 calls each, in the same shared memory and as many buffers; memcpy has no "
    "reader, the ring's keeps polling. Throughput: back to back until the reader has the records; "
    "of memcpy, what was written; medians of the rounds. The ring, iceoryx2 and the Manager dict "
    "overwrite what the reader is too slow for (lost); the queues wait for it. Queue's put leaves "
    "a copy to a thread, which pickles and sends it later. The Manager dict is read every 10 ms "
    "while the writer is timed; a new torch tensor at each call is what vLLM-Ascend puts there."
)


def print_size(console: Console, cells: Sequence[Cell]) -> None:
    """The peers at one size."""
    size = cells[0].size
    ours = _named(cells, OURS)
    table = Table(
        title=f"{size.label}: {size.layers} x {size.columns} int32, ring of {size.slots}",
        title_justify="left",
    )
    table.add_column("peer")
    for column in ("calls", "p50 us", "p99", "p99.9", "p50 / ours", "records/s", "MB/s", "lost"):
        table.add_column(column, justify="right")
    for cell in cells:
        if cell.fault:
            table.add_row(cell.peer, "not run")
            continue
        times = [f"{cell.time(q):.2f}" for q in QUANTILES]
        lost = "-" if cell.lost != cell.lost else f"{100 * cell.lost:.0f}%"
        speed = [f"{cell.rate:,.0f}", f"{cell.rate * size.nbytes / 1e6:,.0f}", lost]
        ratio = f"{cell.time(50) / ours.time(50):.2f}"
        table.add_row(cell.peer, f"{cell.calls:,}", *times, ratio, *speed)
    console.print(table)
    for cell in cells:
        if cell.fault:
            console.print(f"{cell.peer}: not run: {cell.fault}", style="yellow", markup=False)


def print_wakes(console: Console, wakes: Sequence[Wakes]) -> None:
    """The doorbell beside pipes and a socket."""
    table = Table(title="Wake-up of a uvloop loop in another process", title_justify="left")
    table.add_column("way")
    for column in ("rings", "p50 us", "p99", "p99.9"):
        table.add_column(column, justify="right")
    for wake in wakes:
        rings = sum(map(len, wake.rounds))
        table.add_row(wake.way, f"{rings:,}", *(f"{wake.time(q):.1f}" for q in QUANTILES))
    console.print(table)


def targets(sizes: Sequence[Sequence[Cell]], wakes: Sequence[Wakes], why: str) -> list[Target]:
    """All targets; `why` the wake-ups are missing, if they are."""
    rows = _limit_targets(next(c for c in sizes if c[0].size.label == TARGET_SIZE))
    for peer in PEERS:
        rows.append(_ahead(sizes, peer, "writer's p50", lambda peer, ours: _p50_ratio(peer, ours)))
        rows.append(_ahead(sizes, peer, "records/s", lambda peer, ours: ours.rate / peer.rate))
    for peer in (MANAGER_TENSOR, MANAGER_ARRAY):
        rows += [_manager_target(cells, peer) for cells in sizes]
    return [*rows, *(_bell_target(wakes, way, why) for way in (PIPE, BARE))]


def _limit_targets(cells: Sequence[Cell]) -> list[Target]:
    """Against memcpy: the medians of the rounds' ratios."""
    ours, memcpy = _named(cells, OURS), _named(cells, MEMCPY)
    rows = []
    for quantile, limit in ((50, 1.25), (99, 2.0)):
        ratio = float(np.median(ours.per_round(quantile) / memcpy.per_round(quantile)))
        name = f"{TARGET_SIZE}: writer's p{quantile} / memcpy's"
        rows.append(at_most(name, ratio, limit))
    return rows


def _ahead(sizes: Sequence[Sequence[Cell]], peer: str, what: str, ratio: Callable) -> Target:
    """How far ahead of a peer, at the size where it is least."""
    both = [(_named(cells, peer), _named(cells, OURS)) for cells in sizes]
    name = f"ahead of {peer}, {what}"
    for theirs, _ in both:
        if theirs.fault:
            return not_run(f"{name}: least of all sizes", ">= 1", theirs.fault)
    ratios = {ours.size.label: ratio(theirs, ours) for theirs, ours in both}
    least = min(ratios, key=lambda label: ratios[label])
    return at_least(f"{name}: least of all sizes ({least})", ratios[least], 1.0)


def _manager_target(cells: Sequence[Cell], peer: str) -> Target:
    theirs, ours = _named(cells, peer), _named(cells, OURS)
    name = f"{ours.size.label}: {peer}: its p50 / ours"
    if theirs.fault:
        return not_run(name, ">= 40", theirs.fault)
    return at_least(name, _p50_ratio(theirs, ours), 40.0)


def _bell_target(wakes: Sequence[Wakes], peer: str, why: str) -> Target:
    name = f"doorbell's p50 / {peer}"
    if why:
        return not_run(name, "<= 1", why)
    bell, pipe = (next(w for w in wakes if w.way == way) for way in (BELL, peer))
    ratios = [np.median(a) / np.median(b) for a, b in zip(bell.rounds, pipe.rounds, strict=True)]
    return at_most(name, float(np.median(ratios)), 1.0)


def _p50_ratio(theirs: Cell, ours: Cell) -> float:
    return theirs.time(50) / ours.time(50)


def _named(cells: Sequence[Cell], peer: str) -> Cell:
    return next(cell for cell in cells if cell.peer == peer)


def records(sizes: Sequence[Sequence[Cell]], wakes: Sequence[Wakes]) -> dict[str, Any]:
    """All figures, as they go into `ipc-cells.json`."""
    cells = []
    for cell in (cell for cells in sizes for cell in cells):
        record = {"peer": cell.peer, "size": cell.size.label, "bytes": cell.size.nbytes}
        record |= {"slots": cell.size.slots, "calls": cell.calls, "fault": cell.fault}
        record |= {"records_per_s": cell.rate, "lost": cell.lost, **_quantiles(cell)}
        cells.append(record | {"p50_rounds_us": _rounded(cell.per_round(50))})
    bells = [{"way": w.way, "rings": sum(map(len, w.rounds)), **_quantiles(w)} for w in wakes]
    return {"records": cells, "wakes": bells}


def _quantiles(measured: Cell | Wakes) -> dict[str, float]:
    return {f"p{quantile}_us": measured.time(quantile) for quantile in QUANTILES}


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 3) for value in values]
