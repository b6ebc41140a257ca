"""What a stress shows while it runs: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ..strip import strip
from .setup import Setup
from .stress import Outcome
from .verdicts import Verdict

_PLAIN_SECONDS = 5.0
_HISTORY = 60


class PlainView:
    """A line now and then."""

    def __init__(self, console: Console, setup: Setup):
        self._console = console
        self._last = 0.0
        self._doing = ""

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, outcome: Outcome, doing: str) -> None:
        """See `stress.Show`."""
        changed, self._doing = doing != self._doing, doing
        if changed and doing:
            self._print(outcome, doing)
        elif time.monotonic() - self._last >= _PLAIN_SECONDS and outcome.samples:
            self._print(outcome, "")

    def _print(self, outcome: Outcome, doing: str) -> None:
        self._last = time.monotonic()
        words = [_line(outcome)] if outcome.samples else []
        self._console.print("  ".join([*words, *([doing] if doing else [])]), highlight=False)


def _line(outcome: Outcome) -> str:
    sample = outcome.samples[-1][0]
    return (
        f"{sample.seconds:5.0f} s  {sample.steps_per_second:6.0f} steps/s  "
        f"PAR {sample.par.mean():.3f} ({sample.unmoved.mean():.3f} unmoved)  "
        f"{outcome.commits} commits  {outcome.moves} moves  {outcome.aborted} dropped  "
        f"{_errors(outcome)} errors"
    )


def _errors(outcome: Outcome) -> int:
    bad = sum(bool(fault.trouble) for fault in outcome.faults)
    return outcome.wrong + outcome.differ + outcome.torn + outcome.unaccounted + bad


class LiveView:
    """The terminal's whole width, redrawn with each sample."""

    def __init__(self, console: Console, setup: Setup):
        self._setup = setup
        self._console = console
        self._live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        return self

    def __exit__(self, *arguments: object) -> None:
        self._live.__exit__(*arguments)  # type: ignore[arg-type]

    def show(self, outcome: Outcome, doing: str) -> None:
        """See `stress.Show`."""
        self._live.update(self._page(outcome, doing), refresh=True)

    def _page(self, outcome: Outcome, doing: str) -> Group:
        setup = self._setup
        title = (
            f"{setup.scenario}: {setup.layers} layers x {setup.experts} experts on {setup.ranks} "
            f"ranks x {setup.slots} slots"
        )
        head = Text(title, style="bold")
        if not outcome.samples:
            return Group(head, Text(doing or "waiting for the first steps", style="dim"))
        now = Text("now         ", style="dim") + Text(doing)
        return Group(head, self._figures(outcome), now, *self._strips(outcome))

    def _figures(self, outcome: Outcome) -> Table:
        sample = outcome.samples[-1][0]
        cells = [
            ("seconds", f"{sample.seconds:.0f}"),
            ("steps/s", f"{sample.steps_per_second:.0f}"),
            ("PAR", f"{sample.par.mean():.3f}"),
            ("unmoved", f"{sample.unmoved.mean():.3f}"),
            ("planner behind", f"{sample.behind} steps"),
            ("plans", f"{outcome.plans}"),
            ("commits", f"{outcome.commits}"),
            ("moves", f"{outcome.moves}"),
            ("dropped", f"{outcome.aborted}"),
            ("refused", f"{outcome.refused}"),
            ("errors", f"{_errors(outcome)}"),
            ("faults", f"{len(outcome.faults)}"),
        ]
        endless = self._console.options.update(width=10_000)
        grids = (_grid(cells, across) for across in (4, 3, 2))
        fitting = (
            grid
            for grid in grids
            if Measurement.get(self._console, endless, grid).maximum <= self._console.width
        )
        return next(fitting, _grid(cells, 1))

    def _strips(self, outcome: Outcome) -> list[Text]:
        width = max(10, self._console.width - 12)
        par = outcome.samples[-1][0].par - 1
        layers = [Text("per layer   ", style="dim") + strip(par[:width])]
        layers += [
            Text(" " * 12) + strip(par[begin : begin + width])
            for begin in range(width, len(par), width)
        ]
        past = [sample.par.mean() - 1 for sample, _ in outcome.samples[-min(_HISTORY, width) :]]
        return [*layers, Text("over time   ", style="dim") + strip(np.array(past))]


def _grid(cells: list[tuple[str, str]], across: int) -> Table:
    """Names and values, so many of them in a row."""
    table = Table.grid(padding=(0, 2), pad_edge=False)
    for begin in range(0, len(cells), across):
        row = cells[begin : begin + across]
        table.add_row(*(part for name, value in row for part in (Text(name, "dim"), value)))
    return table


def show_verdicts(console: Console, found: list[Verdict], notes: list[str]) -> None:
    """The last words: a line per promise."""
    table = Table(title="Verdicts", title_justify="left")
    table.add_column("promise", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("figure")
    words = {True: "[green]holds[/]", False: "[bold red]BROKEN[/]", None: "[yellow]not judged[/]"}
    for verdict in found:
        table.add_row(verdict.promise, words[verdict.holds], verdict.figure)
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)
