"""Reads what `recorder.Recorder` wrote: steps, episodes, placements and plans of a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..ipc.placement import PlacementError, check_placement
from .chunk import (
    STEP_FIELDS,
    TABLES,
    ChunkError,
    chunk_files,
    damaged,
    forbidden,
    read_chunk,
    read_header,
)
from .episodes import add_logical

RecordingError = ChunkError
"""A folder that is no recording, a damaged chunk, or one of another version; the text says what."""

_SHAPE = ("layers", "experts", "ranks", "slots")


class Counts(NamedTuple):
    """Tokens of `span` steps by logical expert: int64 [layers, experts]."""

    heat: np.ndarray
    span: int = 1


class RecordedStep(NamedTuple):
    """A step as the planner read it, or `span` steps up to `step`.

    Attributes:
        run: of the planner that recorded it; plans and epochs count within a run.
        step: number of the (latest) step.
        time_ns: nanoseconds of the monotonic clock.
        tokens: of the batches that were counted.
        flags: of `ipc/flags.py`.
        epoch: rounds committed before it.
        span: steps that `heat` sums up.
        heat: int [layers, ranks * slots], tokens in each physical slot.
        placement: int16 [layers, ranks, slots] under `epoch`; None if it was never seen.
    """

    run: int
    step: int
    time_ns: int
    tokens: int
    flags: int
    epoch: int
    span: int
    heat: np.ndarray
    placement: np.ndarray | None


class Recording:
    """A folder of chunks, read chunk by chunk.

    Args:
        folder: as in EPLB_RECORD.

    Raises:
        RecordingError: it is no recording, a chunk is damaged or of another version, or chunks of
            several engines lie in it.

    Attributes:
        layers, experts, ranks, slots: of the engine.
        header: of the newest chunk: session, models, settings, ...
        missing: numbers of chunks that are gone from between others.
        unplaced: steps that `counts` has left out so far, for their placement was never seen.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        if not folder.is_dir():
            raise RecordingError(f"{folder} is no folder; give the one of EPLB_RECORD")
        try:
            self._files = chunk_files(folder)
        except PermissionError:
            raise forbidden(folder) from None
        if not self._files:
            raise RecordingError(
                f"{folder} is no recording: no chunk (000001.npz, ...) is in it; "
                "set EPLB_RECORD to it in the planner, and wait up to 30 seconds from the first "
                "step for the first one"
            )
        headers = [read_header(path) for path in self._files]
        self.header: dict[str, Any] = headers[-1]
        self.layers, self.experts, self.ranks, self.slots = (self.header[n] for n in _SHAPE)
        for path, header in zip(self._files, headers, strict=True):
            if any(header[name] != self.header[name] for name in _SHAPE):
                raise RecordingError(
                    f"{path} is of another engine than the chunks after it; move it elsewhere"
                )
        numbers = [int(path.stem) for path in self._files]
        self.missing = sorted(set(range(numbers[0], numbers[-1])) - set(numbers))
        self.unplaced = 0
        self._count = -1

    def __len__(self) -> int:
        """Records of heat in all chunks; each is a step, or several as one."""
        if self._count < 0:
            self._count = sum(len(read_chunk(p, ["steps"])[1]["steps"]) for p in self._files)
        return self._count

    @property
    def dropped(self) -> int:
        """Steps that the newest run left out because its disk was too slow."""
        return int(self.header.get("dropped", 0))

    @property
    def lost(self) -> int:
        """Records of single ranks that were overwritten in the newest run before they were read."""
        return int(self.header.get("lost", 0))

    def steps(self) -> Iterator[RecordedStep]:
        """The recorded steps, oldest first.

        Raises:
            RecordingError: a chunk is damaged.
        """
        held: dict[int, np.ndarray] = {}
        run = -1
        names = [*STEP_FIELDS, "heat", "placement_epochs", "placements"]
        for path in self._files:
            header, chunk = read_chunk(path, names)
            self._check(path, chunk)
            if header["run"] != run:
                run, held = header["run"], {}
            held |= zip(chunk["placement_epochs"].tolist(), chunk["placements"], strict=True)
            columns = [chunk[name].tolist() for name in STEP_FIELDS]
            for *fields, heat in zip(*columns, chunk["heat"], strict=True):
                step, time_ns, tokens, flags, epoch, span = fields
                placement = held.get(epoch)
                yield RecordedStep(run, step, time_ns, tokens, flags, epoch, span, heat, placement)

    def counts(self) -> Iterator[Counts]:
        """The steps' tokens by logical expert, oldest first; those without a placement not."""
        self.unplaced = 0
        for step in self.steps():
            if step.placement is None:
                self.unplaced += step.span
                continue
            heat = np.zeros((self.layers, self.experts), np.int64)
            add_logical(heat, step.heat, step.placement.reshape(self.layers, -1))
            yield Counts(heat, step.span)

    def episodes(self, steps: int) -> Iterator[np.ndarray]:
        """int64 [layers, experts] of each episode of at least `steps` steps; the rest is left out.

        Raises:
            ValueError: `steps` is below 1.
        """
        return sum_episodes(self.counts(), steps)

    def placements(self) -> dict[tuple[int, int], np.ndarray]:
        """int16 [layers, ranks, slots] by (run, epoch), in the order in which they were seen."""
        found: dict[tuple[int, int], np.ndarray] = {}
        for path in self._files:
            header, chunk = read_chunk(path, ["placement_epochs", "placements"])
            for epoch, placement in zip(
                chunk["placement_epochs"].tolist(), chunk["placements"], strict=True
            ):
                found[header["run"], epoch] = placement
        return found

    def first_placement(self) -> np.ndarray | None:
        """int32 [layers, ranks, slots] of the first step that `counts` gives; None if none does."""
        known = (step.placement for step in self.steps() if step.placement is not None)
        first = next(known, None)
        return None if first is None else first.astype(np.int32)

    def table(self, name: str) -> np.ndarray:
        """All rows of a table, with the run of each as the first field.

        Args:
            name: "plans", "plan_layers", "plan_moves", "outcomes" or "transfers"; fields in
                `chunk.TABLES`.

        Raises:
            KeyError: there is no such table.
        """
        dtype = np.dtype([("run", "<i8"), *TABLES[name].descr])
        parts = [np.empty(0, dtype)]
        for path in self._files:
            header, chunk = read_chunk(path, [name])
            if chunk[name].dtype != TABLES[name]:
                raise damaged(path, f"{name} are {chunk[name].dtype}")
            rows = np.empty(len(chunk[name]), dtype)
            rows["run"] = header["run"]
            for field in TABLES[name].names or ():
                rows[field] = chunk[name][field]
            parts.append(rows)
        return np.concatenate(parts)

    def _check(self, path: Path, chunk: dict[str, np.ndarray]) -> None:
        count = len(chunk["steps"])
        wanted: dict[str, tuple[int, ...]] = dict.fromkeys(STEP_FIELDS, (count,))
        wanted["heat"] = (count, self.layers, self.ranks * self.slots)
        held = len(chunk["placement_epochs"])
        wanted["placements"] = (held, self.layers, self.ranks, self.slots)
        for name, shape in wanted.items():
            if chunk[name].shape != shape or chunk[name].dtype.kind not in "iu":
                raise damaged(path, f"{name} has shape {chunk[name].shape}, not {shape}")
        if count and (chunk["heat"].min() < 0 or chunk["spans"].min() < 1):
            raise damaged(path, "it counts below nothing")
        try:
            for placement in chunk["placements"]:
                check_placement(placement, self.experts)
        except PlacementError as error:
            raise damaged(path, str(error)) from None


def sum_episodes(counts: Iterator[Counts], steps: int) -> Iterator[np.ndarray]:
    """int64 [layers, experts] of each episode of at least `steps` steps; the rest is left out.

    Raises:
        ValueError: `steps` is below 1.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; an episode has at least 1")
    return _summed(counts, steps)


def _summed(counts: Iterator[Counts], steps: int) -> Iterator[np.ndarray]:
    total, filled = None, 0
    for heat, span in counts:
        total = heat.copy() if total is None else total + heat
        filled += span
        if filled >= steps:
            yield total
            total, filled = None, 0
