"""Recorded heat as commands take it: what it starts from, and what is missing from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from ..planners.heat_file import HeatFile
    from ..planners.recording import Recording

LINEAR = "vLLM's placement at its start"


def start_of(source: Recording | HeatFile, ranks: int, slots: int) -> tuple[np.ndarray, str]:
    """The placement that an engine starts from, int32 [layers, ranks, slots], and whose it is.

    Args:
        source: of the heat.
        ranks: EP ranks; 0 for those recorded.
        slots: per rank; 0 for those recorded.

    Raises:
        ValueError: so many slots are not enough or too many, or neither the source nor the
            arguments tell the shape.
    """
    from ..planners.recording import Recording, RecordingError
    from ..planners.replay import linear_placement

    if isinstance(source, Recording):
        ranks, slots = ranks or source.ranks, slots or source.slots
        if (ranks, slots) == (source.ranks, source.slots):
            placement = source.first_placement()
            if placement is not None:
                return placement, "the first recorded placement"
    options = {"--ranks": ranks, "--slots-per-rank": slots}
    missing = [option for option, value in options.items() if not value]
    if missing:
        what = "slots" if ranks else "ranks"
        raise RecordingError(f"a file of counts tells no {what}: give {' and '.join(missing)}")
    return linear_placement(source.layers, source.experts, ranks, slots), LINEAR


def losses_of(source: Recording | HeatFile) -> list[str]:
    """What is not in the source, in sentences; known when its steps have been read."""
    notes = []
    unplaced, dropped = getattr(source, "unplaced", 0), getattr(source, "dropped", 0)
    missing = getattr(source, "missing", [])
    if unplaced:
        notes.append(f"{unplaced} steps are left out: their placement was not recorded.")
    if dropped:
        notes.append(f"{dropped} steps are not in the recording: its disk was too slow.")
    if missing:
        notes.append(f"{len(missing)} chunks are missing, from {missing[0]:06}.npz on.")
    return notes
