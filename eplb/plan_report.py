"""What `eplb plan` says of placements: a table, what it assumes, and the same as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from .choice import par_text
from .heat_source import losses_of
from .output import table_console

if TYPE_CHECKING:
    from ..planners.heat_file import HeatFile
    from ..planners.policy import Choice
    from ..planners.recording import Recording
    from ..planners.replay import Outcome
    from .config import Config

MIB = 1 << 20
_HEADINGS = (
    "slots\nper rank", "step\nPAR", "held\nout", "episode\nPAR", "held\nout", "step\ntime",
)  # fmt: skip
_MEASURED = ("steps", "episodes", "peak")
_PARS = ("step_par_mean", "step_par_p95", "episode_par_mean", "episode_par_p95")


@dataclass(frozen=True)
class Row:
    """A placement and how it did.

    Attributes:
        label: of the row.
        ranks, slots: of the placement; slots per rank.
        whole: planned on all episodes, and measured on them.
        held_out: planned on the first half of them, and measured on the rest; None if there is
            only one.
    """

    label: str
    ranks: int
    slots: int
    whole: Outcome
    held_out: Outcome | None = None

    def pars(self) -> list[str]:
        """PAR of steps and of episodes, each on the whole and held out."""
        found = (self.whole, self.held_out)
        steps = [each.step_par[0] if each else None for each in found]
        episodes = [each.episode_par[0] if each else None for each in found]
        return ["-" if par is None else par_text(par) for par in (*steps, *episodes)]

    def step_time(self, start: Row, moe_share: float) -> float:
        """Relative to the start's; of the steps held out, if there are any."""
        from ..planners.replay import step_time

        return step_time(self.held_out or self.whole, start.held_out or start.whole, moe_share)


@dataclass(frozen=True)
class Report:
    """Rows, the first of which is the start, and what they are of.

    Attributes:
        source: of the heat.
        rows: start first.
        episodes: of the whole recording.
        origin: of the start's placement, in words.
        config: the settings.
        choice: the policy.
        moe_share: as of `step_time`.
    """

    source: Recording | HeatFile
    rows: list[Row]
    episodes: int
    origin: str
    config: Config
    choice: Choice
    moe_share: float

    def show(self, layer_bytes: float | None) -> None:
        """Print all.

        Args:
            layer_bytes: bytes of one expert of all layers, 0 if they are not known; None leaves
                memory out.
        """
        table = Table(title="Plan")
        table.add_column("", no_wrap=True)
        for heading in _HEADINGS:
            table.add_column(heading, justify="right", no_wrap=True)
        if layer_bytes is not None:
            table.add_column("memory per rank", justify="right")
        for row in self.rows:
            time = f"{row.step_time(self.rows[0], self.moe_share) - 1:+.1%}"
            memory = [] if layer_bytes is None else [self._memory(row, layer_bytes)]
            table.add_row(row.label, str(row.slots), *row.pars(), time, *memory)
        table_console(140).print(table)
        notes = [self._about(), self._about_halves(), self._about_time()]
        if layer_bytes is not None:
            notes.append(self._about_memory(layer_bytes))
        for note in [*notes, *losses_of(self.source)]:
            typer.echo(note)

    def as_json(self, path: str, layer_bytes: float) -> dict[str, Any]:
        """All figures, as JSON takes them.

        Args:
            path: of the heat.
            layer_bytes: as of `show`.
        """
        return {
            "path": path,
            "layers": self.source.layers,
            "experts": self.source.experts,
            "ranks": self.rows[0].ranks,
            "episodes": self.episodes,
            "start": self.origin,
            "moe_share": self.moe_share,
            "layer_bytes": layer_bytes or None,
            "settings": self.config.model_dump(mode="json"),
            "rows": [self._row_as_json(row) for row in self.rows],
        }

    def _row_as_json(self, row: Row) -> dict[str, Any]:
        found = {
            "label": row.label,
            "slots_per_rank": row.slots,
            "redundant_per_rank": row.slots - self._fewest(),
            "step_time": row.step_time(self.rows[0], self.moe_share),
        }
        for name, outcome in (("whole", row.whole), ("held_out", row.held_out)):
            figures = outcome.as_json() if outcome else {}
            found[name] = {key: figures[key] for key in (*_MEASURED, *_PARS)} if figures else None
        return found

    def _fewest(self) -> int:
        """Slots per rank that hold all experts once."""
        return -(-self.source.experts // self.rows[0].ranks)

    def _memory(self, row: Row, layer_bytes: float) -> str:
        extra = row.slots - self._fewest()
        text = f"{extra} x {self.source.layers}"
        return f"{text} = {extra * layer_bytes / MIB:,.1f} MiB" if layer_bytes else text

    def _about(self) -> str:
        config, source, start = self.config, self.source, self.rows[0]
        names = getattr(source, "header", {}).get("models", [])
        models = f" of {' and '.join(names)}, in this order" if len(names) > 1 else ""
        effort = f", effort {config.effort}" if "effort" in self.choice.options else ""
        return (
            f"{source.layers} layers{models}, {source.experts} experts on {start.ranks} ranks; "
            f"start: {self.origin}, {start.slots} slots per rank. Policy {self.choice.name}"
            f"{effort}, {self.episodes} episodes of {config.episode_steps} steps."
        )

    def _about_halves(self) -> str:
        half = self.episodes // 2
        if not half:
            return (
                "Nothing is held out, for there is one episode: what is measured on the heat that "
                "a plan was made from is too good to be kept."
            )
        return (
            f"Held out: planned on the first {half} episodes and measured on what came after them, "
            "which is what a map can be expected to keep; the other columns are planned and "
            "measured on the whole recording."
        )

    def _about_time(self) -> str:
        from ..planners.replay import step_time_model

        where = ", on the steps held out," if self.rows[0].held_out else ""
        return step_time_model(self.moe_share, f"the placement at the start{where}")

    def _about_memory(self, layer_bytes: float) -> str:
        experts, ranks, fewest = self.source.experts, self.rows[0].ranks, self._fewest()
        rest = fewest * ranks - experts
        spare = f", {rest} of them redundant over all ranks already" if rest else ""
        known = "" if layer_bytes else "; --expert-mb gives it in MiB"
        return (
            f"+n: {fewest} slots per rank, the fewest that hold {experts} experts{spare}, and n "
            f"more. Memory: slots beyond the fewest x layers{known}."
        )


def layer_bytes_of(source: Recording | HeatFile) -> int:
    """Bytes of one expert of all layers as recorded; 0 if they were not."""
    return sum(getattr(source, "header", {}).get("row_bytes", ()))
