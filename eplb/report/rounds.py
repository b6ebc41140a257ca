"""The rounds of a recording, out of what every rank has logged of them."""

from __future__ import annotations

import numpy as np

from ...planners.recording import Recording
from .clock import Clock

ROUND = np.dtype(
    [
        ("end", "<f8"),
        ("transfer", "<f8"),
        ("commit", "<f8"),
        ("rows", "<i8"),
        ("received_bytes", "<i8"),
        ("committed", "?"),
    ]
)
"""A round on all ranks: when it ended (seconds of recording), seconds from the begin of its first
transfer to the end of the last (nan if a rank has not staged it), seconds of the longest commit,
slots written, bytes between ranks, whether it was committed."""


def rounds_of(recording: Recording, clock: Clock) -> np.ndarray:
    """`ROUND` records, oldest first; those from before the first step of their run are left out.

    A planner that starts finds the latest rounds of the one before it in the logs.
    """
    logged = recording.table("transfers")
    seconds = clock.seconds(logged["run"], logged["start_ns"])
    logged = logged[~np.isnan(seconds)]
    names = logged[["run", "generation", "sequence"]]
    _, first, which = np.unique(names, return_index=True, return_inverse=True)
    found = np.zeros(len(first), ROUND)
    begin = _over(np.minimum, which, logged["begin_ns"], np.iinfo(np.int64).max)
    staged = _over(np.maximum, which, logged["staged_ns"], 0)
    unstaged = _over(np.maximum, which, logged["staged_ns"] == 0, False)
    found["transfer"] = np.where(unstaged, np.nan, (staged - begin) / 1e9)
    found["commit"] = _over(np.maximum, which, logged["end_ns"] - logged["commit_ns"], 0) / 1e9
    ended = _over(np.maximum, which, logged["end_ns"], 0)
    found["end"] = clock.seconds(logged["run"][first], ended)
    for name in ("rows", "received_bytes"):
        np.add.at(found[name], which, logged[name])
    found["committed"] = _over(np.minimum, which, logged["committed"] == 1, True)
    return np.sort(found, order="end")


def _over(ufunc: np.ufunc, which: np.ndarray, values: np.ndarray, start: object) -> np.ndarray:
    """`ufunc` over the values of each round."""
    count = int(which.max()) + 1 if len(which) else 0
    found = np.full(count, start, values.dtype)
    ufunc.at(found, which, values)
    return found
