"""The tables and targets of `make bench-loader`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from .loader_cells import WARM_UPS
from .loader_ours import NAME as OURS
from .loader_rank import Sample
from .loader_run import Result
from .targets import Target, at_least, at_most, not_run

SMALL = 64 << 10
HOW = (
    "How: every contender carries out the same plans on the same ranks, in turn, with weights of "
    "its own, over gloo; after each plan every byte of every slot is compared. A step is a "
    "matmul, a wait of 2 ms as for a device, and an all_reduce. Stall: main-thread time per "
    "plan. Ours: all of forward() and step() in every step from the plan's sending to its last "
    "commit; 'cpu' is the processor's time in it; 'above rest', which the targets look at, "
    "subtracts what as many steps at rest cost (their median), because the peers' bookkeeping of "
    "every step is not counted either. vLLM: the whole call. vLLM-Ascend: before and after the "
    "forward pass, a layer per step. Per plan the slowest rank counts; figures are medians over "
    "plans. Total: from sending to the last commit. memcpy: the rows of the plan's fullest round "
    "to memory not used lately, in one piece, or, where a row has 256 KB or more, tensor by "
    "tensor into its slots as they lie. Wire: expert bytes received, over the fewest that "
    "suffice. Step: its mean time at rest, and while experts move. torch_gloo is what vLLM "
    "chooses here; it waits for a device after it has gathered its sends, which fails where "
    "there is none, so that wait is patched away. torch_nccl, its other way for CPU tensors, "
    "sends them as they are. vLLM-Ascend runs its adaptor, loader and updator; its planner's "
    "answer is made beforehand. Ranks, transfer threads and the driver share this machine's "
    "{cores} cores; its load was {before:.1f} before the run and {after:.1f} at its end: where "
    "others used it before, main threads have waited for cores, which 'cpu' leaves out."
)


class Figures:
    """One contender in one cell; per plan the slowest rank counts, then the median over plans."""

    def __init__(self, result: Result, name: str):
        self.result, self.name = result, name
        self.fault = result.faults.get(name, "")
        self._plans = [] if self.fault else list(zip(*result.samples[name], strict=True))[WARM_UPS:]

    def per_plan(self, field: str) -> np.ndarray:
        """Of the slowest rank, in each timed plan."""
        return np.array([max(getattr(s, field) for s in ranks) for ranks in self._plans])

    def median(self, field: str) -> float:
        """Over the timed plans; nan if there are none."""
        return float(np.median(self.per_plan(field))) if self._plans else np.nan

    @property
    def above_rest(self) -> float:
        """The stall less what as many steps at rest cost."""
        return self.median("above_rest")

    @property
    def over_memcpy(self) -> float:
        """The longest single stall above rest, as a multiple of the rows' memcpy."""
        return self._median(lambda s: (s.longest - s.idle / s.steps) / s.memcpy)

    @property
    def inflation(self) -> float:
        """A step while experts move, as a multiple of one at rest."""
        return self._median(lambda s: s.moving / s.resting)

    def _median(self, figure: Any) -> float:
        plans = [max(figure(sample) for sample in ranks) for ranks in self._plans]
        return float(np.median(plans)) if plans else np.nan

    @property
    def wire(self) -> float:
        """Bytes received over those that have to arrive, in the worst plan."""
        scenario = self.result.scenario
        ratios = [
            sum(sample.received for sample in ranks)
            / sum(scenario.arriving(number, rank) for rank in range(len(ranks)))
            for number, ranks in enumerate(self._plans, WARM_UPS)
        ]
        return max(ratios, default=np.nan)

    def idle(self, field: str = "rest") -> np.ndarray:
        """Main-thread times of all steps at rest, of all ranks; or of the `hot` ones."""
        plans: list[tuple[Sample, ...]] = self._plans or list(
            zip(*self.result.samples[self.name], strict=True)
        )
        return np.concatenate([getattr(sample, field) for ranks in plans for sample in ranks])


def print_cell(console: Console, result: Result) -> None:
    """All contenders of a cell."""
    cell, scenario = result.cell, result.scenario
    numbers = range(WARM_UPS, len(scenario.plans))
    moved = [sum(scenario.writes(n, rank) for rank in range(cell.ranks)) for n in numbers]
    parts = [len(scenario.rounds[n]) for n in numbers]
    table = Table(
        title=f"{cell.name}: {cell.layers} layers, {cell.ranks * cell.slots} slots; {cell.plans} "
        f"plans of {np.median(moved):.0f} slots, {np.median(parts):.0f} rounds",
        title_justify="left",
    )
    table.add_column("who", no_wrap=True)
    for column in (
        "stall ms",
        "cpu",
        "above rest",
        "/ ours",
        "longest ms",
        "/ memcpy",
        "total ms",
        "wire",
        "MB staged",
        "step ms",
        "moving",
    ):
        table.add_column(column, justify="right")
    ours = Figures(result, OURS)
    for name in result.samples:
        figures = Figures(result, name)
        if figures.fault:
            table.add_row(name, "left out")
            continue
        stalls = figures.median("stall")
        table.add_row(
            name,
            _ms(stalls),
            _ms(figures.median("cpu")),
            _ms(figures.above_rest) if name == OURS else "-",
            f"{(figures.above_rest if name == OURS else stalls) / ours.above_rest:.1f}",
            _ms(figures.median("longest")),
            f"{figures.over_memcpy:.2f}" if name == OURS else "-",
            _ms(figures.median("total")),
            f"{figures.wire:.3f}",
            f"{result.staging[name] / 1e6:.2f}",
            _ms(figures.median("resting")),
            _ms(figures.median("moving")),
        )
    console.print(table)
    for name, fault in result.faults.items():
        console.print(f"{name}: left out: {fault}", style="yellow", markup=False)


def print_rest(console: Console, results: Sequence[Result]) -> None:
    """What a step costs the main thread when nothing moves."""
    table = Table(title="forward() and step() with nothing to do, us", title_justify="left")
    table.add_column("where")
    for column in ("steps", "p50", "p90", "p99"):
        table.add_column(column, justify="right")
    rows = [(result.cell.name, Figures(result, OURS).idle()) for result in results]
    rows.append(("the same, nothing computed between", Figures(results[-1], OURS).idle("hot")))
    for where, times in rows:
        quantiles = [f"{np.percentile(times, q):.1f}" for q in (50, 90, 99)]
        table.add_row(where, f"{len(times):,}", *quantiles)
    console.print(table)


def _ms(microseconds: float) -> str:
    return "-" if np.isnan(microseconds) else f"{microseconds / 1e3:.3g}"


def targets(results: Sequence[Result], at_rest: Result, vllm: Sequence[str]) -> list[Target]:
    """All targets; `vllm` names its ways of moving, the faster of which counts."""
    rows = [_stall_target(result, vllm) for result in results]
    rows += [_longest_target(result) for result in results]
    wire = max(Figures(result, OURS).wire for result in results)
    idle = {r.cell.name: np.median(Figures(r, OURS).idle()) for r in [*results, at_rest]}
    worst = max(idle, key=lambda name: idle[name])
    hot = float(np.median(Figures(at_rest, OURS).idle("hot")))
    return [
        *rows,
        Target("expert bytes received / fewest: worst plan", wire, "= 1", wire == 1),
        at_most("step() with nothing to do, p50 in us: 58 layers x 288 slots", hot, 20.0),
        at_most(
            f"the same in caches that computation has used: worst ({worst})", idle[worst], 20.0
        ),
        not_run("step time while staging / at rest, on a GPU", "<= 1.01", "no GPU is at hand"),
    ]


def _stall_target(result: Result, vllm: Sequence[str]) -> Target:
    limit = 10.0 if result.cell.row_bytes <= SMALL else 4.0
    name = f"{result.cell.name}: vLLM's stall / ours, for the same bytes"
    ran = [peer for peer in vllm if peer not in result.faults]
    if not ran:
        return not_run(name, f">= {limit:g}", result.faults[vllm[0]])
    ours = Figures(result, OURS).per_plan("above_rest")
    ratios = {
        peer: float(np.median(Figures(result, peer).per_plan("stall") / ours)) for peer in ran
    }
    least = min(ratios, key=lambda peer: ratios[peer])
    return at_least(f"{name} ({least})", ratios[least], limit)


def _longest_target(result: Result) -> Target:
    name = f"{result.cell.name}: longest stall / memcpy of a round's rows"
    return at_most(name, Figures(result, OURS).over_memcpy, 1.3)


def records(results: Sequence[Result], at_rest: Result) -> list[dict[str, Any]]:
    """All figures, as they go into `loader-cells.json`; times in microseconds."""
    fields = ("stall", "cpu", "longest", "total", "steps", "idle", "resting", "moving", "memcpy")
    cells = []
    for result in [*results, at_rest]:
        cell = result.cell
        for name in result.samples:
            figures = Figures(result, name)
            record = {"cell": cell.name, "who": name, "fault": figures.fault, **vars(cell)}
            record |= {field: _rounded(figures.per_plan(field)) for field in fields}
            record |= {"wire": figures.wire, "staging": result.staging[name]}
            if name == OURS:
                rest = figures.idle()
                record |= {f"rest_p{q}": float(np.percentile(rest, q)) for q in (50, 90, 99)}
            cells.append(record)
    return cells


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 2) for value in values]
