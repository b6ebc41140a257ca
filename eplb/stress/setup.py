"""What a stress is told to do, as its processes hand it on."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ...ipc.shape import GroupShape, ModelShape
from ..config import Config
from .figures import Figures, Layout

MODEL = "synthetic"


class Setup(msgspec.Struct, frozen=True):
    """Of one stress; the settings of the balancer are in the environment.

    Attributes:
        folder: in which the processes meet: figures and logs.
        session: of the engine, EPLB_SESSION.
        layers, experts, ranks, slots: the shape.
        scenario: a name of `collectors/synthetic.py`, or `replay:FILE`.
        seed: of all that is random.
        tokens: of a rank's full step.
        top_k: experts per token.
        rate: steps per second; 0: as fast as they go.
        weights: whether ranks have real rows and move them.
        hosts: processes that the ranks are spread over.
    """

    folder: str
    session: str
    layers: int
    experts: int
    ranks: int
    slots: int
    scenario: str
    seed: int
    tokens: int
    top_k: int
    rate: float
    weights: bool
    hosts: int

    def ranks_of(self, host: int) -> range:
        """The ranks that a process runs."""
        return range(host * self.ranks // self.hosts, (host + 1) * self.ranks // self.hosts)

    def group_shape(self, config: Config) -> GroupShape:
        """Of an engine whose rows are one word."""
        return GroupShape(
            models=(ModelShape(MODEL, self.layers),),
            experts=self.experts,
            ranks=self.ranks,
            slots=self.slots,
            counting=tuple(range(self.ranks)),
            row_bytes=(8,) * self.layers,
            staging_rows=config.staging_rows or 64,
            ring_slots=config.ring_steps,
        )

    def figures(self, create: bool = False) -> Figures:
        """The file that the processes share."""
        layout = Layout(self.hosts, self.ranks, self.layers, self.experts, self.slots)
        return Figures(Path(self.folder) / "figures", layout, create)

    def encoded(self) -> str:
        """As an argument of a command."""
        return msgspec.json.encode(self).decode()


def decoded(argument: str) -> Setup:
    """What `Setup.encoded` gave."""
    return msgspec.json.decode(argument, type=Setup)
