"""Writes what a planner sees and does into a folder of chunks. See docs/recording.md.

The planner's loop only appends to lists; a thread of its own compresses and writes. Whatever
happens to it, planning goes on.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from .chunk import (
    FORMAT,
    OUTCOME,
    PLAN,
    PLAN_LAYER,
    PLAN_MOVE,
    RANK_TRANSFER,
    TEMPORARY,
    VERSION,
    ChunkError,
    chunk_files,
    narrowest,
    read_header,
    write_chunk,
)
from .plan import Plan, PlannedRound
from .step_heat import StepHeat

log = logging.getLogger("flash_eplb.planner")

CHUNK_BYTES = 32 << 20
"""Heat in memory (int64) at which a chunk is closed: 250 steps of 58 layers x 288 slots."""

CHUNK_STEPS = 4096
CHUNK_SECONDS = 30.0
_MOST_WAITING = 4  # chunks beside those that come at once; a disk slower than the heat loses some
_CLOSE_SECONDS = 10.0
_EPOCHS_KEPT = 256


OnStop = Callable[[Path, Exception], None]
"""Called once, from the recorder's thread or where that cannot be started, with the folder and what
ended its recording."""


def planning_goes_on(folder: Path, error: Exception) -> None:
    """Say that a planner does not record any more."""
    log.error(
        "recording to EPLB_RECORD=%s has stopped, planning goes on: %s; put that right and restart "
        "the planner to record again",
        folder,
        error,
    )


class NoRecorder:
    """What a planner calls that records nothing; the interface of `Recorder`."""

    def step(self, step: StepHeat) -> None:
        """The heat of a step was read."""

    def placement(self, epoch: int, placement: np.ndarray) -> None:
        """From `epoch` on the slots hold `placement` (int [layers, ranks, slots])."""

    def plan(
        self, number: int, epoch: int, plan: Plan, rounds: list[PlannedRound], seconds: float
    ) -> None:
        """A plan was sent that was made from the placement of `epoch`, in `seconds`."""

    def ended(self, number: int, committed: bool) -> None:
        """All ranks have committed the plan, or it was given up."""

    def transfers(self, ended: np.ndarray) -> None:
        """Rounds have ended: `chunk.RANK_TRANSFER` records, one for each rank."""

    def lost(self, records: int) -> None:
        """So many records of the ranks have been overwritten, so far, before they were read."""

    def close(self) -> None:
        """Write what is left; waits for ten seconds at most."""


@dataclass
class _Filling:
    """What goes into the next chunk."""

    since: float
    steps: list[StepHeat] = field(default_factory=list)
    plans: list[tuple] = field(default_factory=list)
    layers: list[np.ndarray] = field(default_factory=list)
    moves: list[np.ndarray] = field(default_factory=list)
    outcomes: list[tuple] = field(default_factory=list)
    transfers: list[np.ndarray] = field(default_factory=list)
    placements: dict[int, np.ndarray] = field(default_factory=dict)
    dropped: int = 0
    lost: int = 0

    def __bool__(self) -> bool:
        return bool(self.steps or self.placements or self.plans or self.outcomes or self.transfers)


class Recorder(NoRecorder):
    """Records one planner's work for one engine; appends to what the folder holds already.

    It never raises and never waits: what cannot be written ends the recording, and is told. It
    keeps the heat and the placements that it is given, which nobody may change afterwards.

    Args:
        folder: made if it is not there.
        header: layers, experts, ranks and slots of the group, and what else is worth knowing, as
            JSON takes it.
        most_bytes: of all chunks together; the oldest are removed.
        on_stop: told when no more can be recorded.
        at_once: steps that may come at once and are no sign of a slow disk: those of full rings.
    """

    def __init__(
        self,
        folder: str | Path,
        header: dict[str, Any],
        most_bytes: int,
        on_stop: OnStop = planning_goes_on,
        at_once: int = 0,
    ):
        self._on_stop = on_stop
        self._folder = Path(folder)
        self._most_bytes = most_bytes
        self._header = {
            "format": FORMAT,
            "version": VERSION,
            "flash_eplb": __version__,
            "run": time.time_ns(),
            "clock_ns": time.monotonic_ns(),
            **header,
        }
        cell = 8 * header["layers"] * header["ranks"] * header["slots"]
        self._steps = max(1, min(CHUNK_STEPS, CHUNK_BYTES // cell))
        self._known: dict[int, np.ndarray] = {}
        self._dropped = 0
        self._lost = 0
        self._said_slow = False
        self._filling = _Filling(time.monotonic())
        most = _MOST_WAITING + at_once // self._steps
        self._waiting: queue.Queue[_Filling | None] = queue.Queue(most)
        self._failed = False
        self._thread = threading.Thread(target=self._write_all, name="eplb-record", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # there are no more
            self._stop(error)

    def step(self, step: StepHeat) -> None:
        """The heat of a step was read."""
        if self._failed:
            return
        self._filling.steps.append(step)
        if (known := self._known.get(step.epoch)) is not None:
            self._filling.placements[step.epoch] = known
        if len(self._filling.steps) >= self._steps or self._is_old():
            self._hand_over()

    def placement(self, epoch: int, placement: np.ndarray) -> None:
        """From `epoch` on the slots hold `placement` (int [layers, ranks, slots])."""
        known = self._known.get(epoch)
        if self._failed or known is placement:
            return
        if known is not None and np.array_equal(known, placement):
            return
        self._known[epoch] = placement
        self._filling.placements[epoch] = placement
        while len(self._known) > _EPOCHS_KEPT:
            self._known.pop(next(iter(self._known)))

    def plan(
        self, number: int, epoch: int, plan: Plan, rounds: list[PlannedRound], seconds: float
    ) -> None:
        """A plan was sent that was made from the placement of `epoch`, in `seconds`."""
        if self._failed:
            return
        picked, moves = plan.changed, np.concatenate([part.moves for part in rounds])
        before, after = plan.par_before[picked], plan.par_after[picked]
        row = (len(picked), len(moves), len(rounds), before.mean(), after.mean(), seconds)
        self._filling.plans.append((number, epoch, *row, time.monotonic_ns()))
        layers = np.empty(len(picked), PLAN_LAYER)
        layers["plan"], layers["layer"] = number, picked
        layers["par_before"], layers["par_after"] = before, after
        self._filling.layers.append(layers)
        written = np.empty(len(moves), PLAN_MOVE)
        written["plan"] = number
        for name in moves.dtype.names or ():
            written[name] = moves[name]
        self._filling.moves.append(written)

    def ended(self, number: int, committed: bool) -> None:
        """All ranks have committed the plan, or it was given up."""
        if self._failed:
            return
        self._filling.outcomes.append((number, committed, time.monotonic_ns()))
        if self._is_old():
            self._hand_over()

    def transfers(self, ended: np.ndarray) -> None:
        """Rounds have ended: `chunk.RANK_TRANSFER` records, one for each rank."""
        if len(ended) and not self._failed:
            self._filling.transfers.append(ended)

    def lost(self, records: int) -> None:
        """So many records of the ranks have been overwritten, so far, before they were read."""
        self._lost = records

    def close(self) -> None:
        """Write what is left; waits for ten seconds at most."""
        if self._thread.ident is None:
            return
        if self._filling:
            self._hand_over()
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=0 if self._failed else _CLOSE_SECONDS)
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            log.warning("the last chunks of %s are not written: its disk hangs", self._folder)

    def _is_old(self) -> bool:
        return time.monotonic() - self._filling.since > CHUNK_SECONDS

    def _hand_over(self) -> None:
        filled, self._filling = self._filling, _Filling(time.monotonic())
        filled.placements = dict(sorted(filled.placements.items()))
        filled.dropped, filled.lost = self._dropped, self._lost
        try:
            self._waiting.put_nowait(filled)
        except queue.Full:
            if self._failed:
                return
            self._dropped += len(filled.steps)
            if not self._said_slow:
                self._said_slow = True
                log.warning(
                    "%s is too slow for what is recorded, so some of it is left out; "
                    "record to a faster disk",
                    self._folder,
                )

    def _write_all(self) -> None:
        try:
            lock = self._open_folder()
            try:
                files = chunk_files(self._folder)
                number = int(files[-1].stem) + 1 if files else 1
                while (filled := self._waiting.get()) is not None:
                    self._write(number, filled)
                    number += 1
            finally:
                os.close(lock)
        except Exception as error:  # whatever it is, planning goes on
            self._stop(error)

    def _stop(self, error: Exception) -> None:
        self._failed = True
        self._on_stop(self._folder, error)

    def _open_folder(self) -> int:
        """Make the folder ours; returns the descriptor that holds its lock."""
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in self._folder.glob(f"*.npz{TEMPORARY}"):
                path.unlink()
            for path in chunk_files(self._folder)[-1:]:
                self._check_is_like_ours(read_header(path))
        except BaseException as error:
            os.close(lock)
            if isinstance(error, BlockingIOError):
                raise OSError("another process records there; give each a folder") from None
            raise
        return lock

    def _check_is_like_ours(self, found: dict[str, Any]) -> None:
        shapes = [
            f"{header['layers']} layers, {header['experts']} experts, "
            f"{header['ranks']} ranks x {header['slots']} slots"
            for header in (found, self._header)
        ]
        if shapes[0] != shapes[1]:
            raise ChunkError(
                f"it holds a recording of {shapes[0]}, and this engine has {shapes[1]}; give it "
                "another folder"
            )

    def _write(self, number: int, filled: _Filling) -> None:
        arrays = self._arrays(filled)
        path = self._folder / f"{number:06}.npz"
        write_chunk(path, arrays)
        files = chunk_files(self._folder)
        sizes = [file.stat().st_size for file in files]
        total = sum(sizes)
        for file, size in zip(files[:-1], sizes, strict=False):
            if total <= self._most_bytes:
                break
            file.unlink()
            total -= size

    def _arrays(self, filled: _Filling) -> dict[str, np.ndarray]:
        steps = filled.steps
        layers, ranks, slots = (self._header[name] for name in ("layers", "ranks", "slots"))
        heat = np.stack([step.heat for step in steps]) if steps else np.empty((0, 0, 0), np.int64)
        columns = {
            "steps": [step.step for step in steps],
            "time_ns": [step.time for step in steps],
            "tokens": [step.tokens for step in steps],
            "flags": [step.flags for step in steps],
            "epochs": [step.epoch for step in steps],
            "spans": [step.span for step in steps],
        }
        held = list(filled.placements.values())
        return {
            "header": np.array(
                json.dumps({**self._header, "dropped": filled.dropped, "lost": filled.lost})
            ),
            **{name: np.array(values, np.int64) for name, values in columns.items()},
            "heat": narrowest(heat.reshape(len(steps), layers, ranks * slots)),
            "placement_epochs": np.array(list(filled.placements), np.int64),
            "placements": np.array(held, np.int16).reshape(len(held), layers, ranks, slots),
            "plans": np.array(filled.plans, PLAN),
            "plan_layers": np.concatenate([np.empty(0, PLAN_LAYER), *filled.layers]),
            "plan_moves": np.concatenate([np.empty(0, PLAN_MOVE), *filled.moves]),
            "outcomes": np.array(filled.outcomes, OUTCOME),
            "transfers": np.concatenate([np.empty(0, RANK_TRANSFER), *filled.transfers]),
        }


MakeRecorder = Callable[[Any], NoRecorder]
"""Called with the `GroupShape` of the engine that was found."""


def recorder_of(
    folder: str,
    most_mb: int,
    session: str,
    settings: dict[str, Any],
    on_stop: OnStop = planning_goes_on,
) -> MakeRecorder:
    """What makes the recorder of an engine; one that records nothing if `folder` is empty.

    Args:
        folder: EPLB_RECORD.
        most_mb: EPLB_RECORD_MB.
        session: name of the session.
        settings: for the header.
        on_stop: told when no more can be recorded.
    """

    def make(shape: Any) -> NoRecorder:
        if not folder:
            return NoRecorder()
        header = {
            "session": session,
            "models": [model.name for model in shape.models],
            "layers": shape.layers,
            "experts": shape.experts,
            "ranks": shape.ranks,
            "slots": shape.slots,
            "staging_rows": shape.staging_rows,
            "row_bytes": list(shape.row_bytes),
            "settings": settings,
        }
        return Recorder(folder, header, most_mb << 20, on_stop, shape.ring_slots)

    return make
