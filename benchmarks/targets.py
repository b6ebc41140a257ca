"""Targets of a benchmark: what was asked and what was measured, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).resolve().parents[1] / "build" / "bench"


@dataclass(frozen=True)
class Target:
    """One row of the table.

    Attributes:
        name: what is measured.
        measured: the figure, or "not run" with why.
        target: what it has to be.
        met: whether it is; false where it was not run.
    """

    name: str
    measured: float | str
    target: str
    met: bool

    @property
    def missing(self) -> bool:
        """Whether it was not run."""
        return isinstance(self.measured, str) and self.measured.startswith("not run")

    def text(self) -> str:
        """`measured` for the table."""
        return self.measured if isinstance(self.measured, str) else f"{self.measured:.4g}"


def at_most(name: str, measured: float, limit: float) -> Target:
    """Met when `measured` is not above `limit`; never when it is nan."""
    return Target(name, float(measured), f"<= {limit:.4g}", bool(measured <= limit))


def at_least(name: str, measured: float, limit: float) -> Target:
    """Met when `measured` is not below `limit`; never when it is nan."""
    return Target(name, float(measured), f">= {limit:.4g}", bool(measured >= limit))


def not_run(name: str, target: str, why: str) -> Target:
    """A target that could not be measured."""
    return Target(name, f"not run: {why}", target, False)


def print_targets(targets: Sequence[Target], title: str, console: Console | None = None) -> None:
    """The table, and how many targets are met."""
    met = sum(target.met for target in targets)
    table = Table(title=f"{title}: {met} of {len(targets)} targets met", title_justify="left")
    table.add_column("what", overflow="fold")
    for column in ("measured", "target", "met"):
        table.add_column(column, justify="right", no_wrap=True)
    for target in targets:
        verdict = "[green]yes[/]" if target.met else "[red]no[/]"
        measured = "not run" if target.missing else target.text()
        table.add_row(target.name, measured, target.target, verdict)
    console = console or Console()
    console.print(table)
    for target in targets:
        if target.missing:
            console.print(f"{target.name}: {target.measured}", style="yellow", markup=False)


def write_targets(targets: Sequence[Target], name: str) -> Path:
    """Write `build/bench/NAME.json`, a list of objects with the keys of `Target`."""
    return write_json([asdict(target) for target in targets], name)


def write_json(content: Any, name: str) -> Path:
    """Write `build/bench/NAME.json`; nan becomes null."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(_plain(content), indent=1) + "\n")
    return path


def _plain(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_plain(value) for value in content]
    if hasattr(content, "item"):  # a numpy scalar
        content = content.item()
    if isinstance(content, float) and content != content:
        return None
    return content
