"""The command `eplb record`."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .choice import fail, load, reaching
from .output import check_folder

if TYPE_CHECKING:
    from ..planners.follower import Follower
    from ..planners.group import Group

_LOOK = 0.005  # seconds: a step of a small engine; rounds are committed some steps apart
_LOOK_AT_RANKS = 1.0


def record(
    output: Annotated[str, typer.Option("--output", "-o", help="Folder of the recording.")],
    session: Annotated[
        str | None, typer.Option(help="Session of the engine (EPLB_SESSION).")
    ] = None,
    seconds: Annotated[float, typer.Option(help="End after so long; 0: never.")] = 0.0,
) -> None:
    """Record a running engine from outside, without touching it or its planner.

    Writes heat, placements and how rounds went, as EPLB_RECORD does, until Ctrl-C, SIGTERM, or the
    engine's end; plans are known to the planner alone.

    Example: eplb record -o recording --seconds 60
    """
    from ..ipc.rank_segment import warmup_reader
    from ..planners.follower import Follower
    from ..planners.group import Group
    from ..planners.recorder import recorder_of

    if not output:
        fail("-o is empty; name the folder of the recording")
    if not seconds >= 0:
        fail(f"--seconds is {seconds}; it must be at least 0")
    config = load(session=session)
    check_folder("-o ", output)
    warmup_reader()
    with reaching(config.session):
        group = Group.attach(config.session, writable=False, who="eplb record")
    ending = _Ending(seconds)
    settings = config.model_dump(mode="json")
    made = recorder_of(output, config.record_mb, config.session, settings, ending.stop)
    recorder = made(group.shape)
    shape = group.shape
    follower = Follower(group, recorder)
    follower.look()  # what is so now is seen before anything is said
    typer.echo(
        f"recording session {config.session!r} into {output}: {shape.layers} layers, "
        f"{shape.experts} experts on {shape.ranks} ranks x {shape.slots} slots; end it with Ctrl-C"
    )
    why = _follow(follower, group, ending)
    recorder.close()
    group.close()
    if ending.error:
        fail(f"recording to -o {output} has stopped: {ending.error}")
    typer.echo(
        f"{output}: {follower.steps} steps recorded, {follower.lost} records lost, "
        f"{follower.unknown_epochs} epochs unknown, {follower.rounds} rounds; {why}"
    )


class _Ending:
    """When to end, and why."""

    def __init__(self, seconds: float):
        self.error = ""
        self.told = threading.Event()
        self.deadline = time.monotonic() + seconds if seconds else float("inf")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: self.told.set())

    def stop(self, folder: Path, error: Exception) -> None:
        """Nothing more can be recorded."""
        self.error = str(error)
        self.told.set()


def _follow(follower: Follower, group: Group, ending: _Ending) -> str:
    """Look again and again; returns in words why it ended."""
    looked = time.monotonic()
    why = ""
    while not why:
        if ending.told.wait(_LOOK):
            why = "ended by a signal"
        now = time.monotonic()
        if now >= ending.deadline:
            why = "the time is over"
        if now - looked > _LOOK_AT_RANKS:
            looked = now
            if not group.is_alive():
                why = "the engine has ended"
        follower.look()
    follower.end()
    return why
