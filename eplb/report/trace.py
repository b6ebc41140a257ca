"""A recording as Chrome trace events, which Perfetto and chrome://tracing show as a time line.

One process per rank with tracks for steps, rounds, transfers and commits, and one for the planner.
Times are microseconds of recording (`Clock`). Spans of a track never overlap.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from ...planners.recording import RecordedStep, Recording
from .clock import Clock

MOST_STEP_SPANS = 200_000
"""Spans of steps in a trace, of all ranks together; beyond that the oldest steps are left out."""

STEPS, ROUNDS, TRANSFERS, COMMITS = range(1, 5)
PLANNING, DELIVERY = range(1, 3)
_RANK_TRACKS = {STEPS: "steps", ROUNDS: "rounds", TRANSFERS: "transfers", COMMITS: "commits"}
_PLANNER_TRACKS = {PLANNING: "planning", DELIVERY: "plans under way"}
_NOTE = (
    "A step's span runs from the record of the step before it to its own, as the latest rank wrote "
    "them; it is the same on every rank. Planning is drawn up to the moment when its plan was sent."
)

Event = dict[str, Any]
Watched = Callable[[Iterable[RecordedStep], int], Iterable[RecordedStep]]


class Trace(NamedTuple):
    """A trace: `content` as JSON takes it, and how many of the recorded `steps` it `holds`."""

    content: dict[str, Any]
    steps: int
    holds: int


class _Span(NamedTuple):
    """A step between two records: seconds, and what is told of it."""

    begin: float
    end: float
    name: str
    told: dict[str, int]


def trace_of(recording: Recording, watched: Watched) -> Trace:
    """The trace of a recording.

    Args:
        recording: to be read.
        watched: sees each step pass.

    Raises:
        RecordingError: a chunk is damaged.
    """
    clock = Clock()
    kept: deque[_Span] = deque(maxlen=max(1, MOST_STEP_SPANS // max(1, recording.ranks)))
    count = 0
    for span in _spans(watched(recording.steps(), len(recording)), clock):
        kept.append(span)
        count += 1
    since = kept[0].begin if kept else 0.0
    events = chain(
        _names(recording.ranks),
        _of_steps(kept, recording.ranks),
        _of_transfers(recording.table("transfers"), clock, since),
        _of_plans(recording.table("plans"), recording.table("outcomes"), clock, since),
    )
    content = {
        "traceEvents": list(events),
        "displayTimeUnit": "ms",
        "otherData": {"note": _NOTE, "session": str(recording.header.get("session", ""))},
    }
    return Trace(content, count, len(kept))


def _spans(steps: Iterable[RecordedStep], clock: Clock) -> Iterator[_Span]:
    before: RecordedStep | None = None
    begin = 0.0
    for step in steps:
        end = clock.see(step.run, step.time_ns)
        if before is not None and before.run == step.run:
            told = {"tokens": step.tokens, "epoch": step.epoch, "steps recorded as one": step.span}
            told["steps not recorded before it"] = step.step - step.span - before.step
            yield _Span(begin, end, f"step {step.step}", told)
        before, begin = step, end


def _span(rank: int, track: int, name: str, begin: float, end: float, **told: int) -> Event:
    """A span, or an instant if it has no length."""
    ts, duration = 1e6 * begin, max(0.0, 1e6 * (end - begin))
    event = {"name": name, "pid": rank, "tid": track, "ts": round(ts, 3), "args": told}
    if duration < 0.001:
        return event | {"ph": "i", "s": "t"}
    return event | {"ph": "X", "dur": round(round(ts + duration, 3) - round(ts, 3), 3)}


def _names(ranks: int) -> Iterator[Event]:
    """Process 0 is the planner, rank n is process n + 1."""
    for pid in range(ranks + 1):
        name = f"EP rank {pid - 1}" if pid else "planner"
        yield {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}}
        yield {"name": "process_sort_index", "ph": "M", "pid": pid, "args": {"sort_index": pid}}
        for tid, track in (_RANK_TRACKS if pid else _PLANNER_TRACKS).items():
            yield {
                "name": "thread_name", "ph": "M", "pid": pid, "tid": tid, "args": {"name": track},
            }  # fmt: skip


def _of_steps(spans: Iterable[_Span], ranks: int) -> Iterator[Event]:
    for span in spans:
        for rank in range(ranks):
            yield _span(rank + 1, STEPS, span.name, span.begin, span.end, **span.told)


def _of_transfers(table: np.ndarray, clock: Clock, since: float) -> Iterator[Event]:
    """Of each round and rank: from vote to vote, its transfer, its commit or abort."""
    names = ("start_ns", "begin_ns", "staged_ns", "commit_ns", "end_ns")
    when = np.stack([clock.seconds(table["run"], table[name]) for name in names], axis=1)
    for row, (start, begin, staged, commit, end) in zip(table, when, strict=True):
        if not start >= since:
            continue
        pid = int(row["rank"]) + 1
        name = f"plan {row['plan']} round {row['sequence']}"
        told = {
            "rows": int(row["rows"]),
            "received bytes": int(row["received_bytes"]),
            "from step": int(row["start_step"]),
            "to step": int(row["end_step"]),
        }
        ended = "committed" if row["committed"] else "aborted"
        yield _span(pid, ROUNDS, f"{name}, {ended}", start, end, **told)
        if row["begin_ns"]:
            done = staged if row["staged_ns"] else commit
            yield _span(pid, TRANSFERS, name, begin, done, **told)
        yield _span(pid, COMMITS, name if row["committed"] else f"{name} aborted", commit, end)


def _of_plans(
    plans: np.ndarray, outcomes: np.ndarray, clock: Clock, since: float
) -> Iterator[Event]:
    """Of each plan: what planning took, and from when it was sent to its end."""
    ended = clock.seconds(outcomes["run"], outcomes["time_ns"])
    known = {
        (run, plan): (when, "committed" if committed else "given up")
        for run, plan, when, committed in zip(
            outcomes["run"], outcomes["plan"], ended, outcomes["committed"], strict=True
        )
    }
    begun_ns = plans["sent_ns"] - (1e9 * plans["seconds"]).astype(np.int64)
    when = [clock.seconds(plans["run"], times) for times in (begun_ns, plans["sent_ns"])]
    for row, begun, sent in zip(plans, *when, strict=True):
        if not sent >= since:
            continue
        name = f"plan {row['plan']}"
        told = {key: int(row[key]) for key in ("layers", "moves", "rounds")}
        yield _span(0, PLANNING, name, begun if begun >= since else sent, sent, **told)
        end, how = known.get((row["run"], row["plan"]), (sent, "its end is not recorded"))
        yield _span(0, DELIVERY, f"{name}, {how}", sent, end, **told)
