"""One cell of the benchmark: a shape, a heat family and a policy; planned, timed and scored."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from . import scoring
from .heat import Case, episodes
from .peers import Policy
from .policies import Entry

Shape = tuple[int, int, int]  # experts, ranks, slots per rank
Record = dict[str, Any]


def measure(entries: Sequence[Entry], shape: Shape, case: Case, repeats: int) -> list[Record]:
    """Plan the case's first window with every policy and score it on that window and the next.

    The policies take turns within each repeat, so that noise of the machine hits all alike.
    """
    experts, ranks, slots = shape
    heat = episodes(case.train(), case.episode_steps)
    start = scoring.initial(heat.shape[1], ranks, slots, experts)
    records = [_record(entry.name, shape, case.name, heat.shape[1]) for entry in entries]
    planned: list[np.ndarray | None] = [None] * len(entries)
    times: list[list[float]] = [[] for _ in entries]
    for _ in range(repeats):
        for i, entry in enumerate(entries):
            if records[i]["fault"]:
                continue
            try:
                policy = entry.fresh(ranks, slots)
                planned[i] = policy.plan(heat, start)
                times[i].append(policy.seconds)
            except Exception as error:
                records[i]["fault"] = f"raised {type(error).__name__}: {error}"[:200]
    for record, placement, seconds in zip(records, planned, times, strict=True):
        if placement is not None and not record["fault"]:
            record["ms"] = 1e3 * float(np.median(seconds)) / heat.shape[1]
            _score(record, case, start, placement)
    return records


def roll(entry: Entry, shape: Shape, case: Case, lasting: bool) -> Record:
    """Plan window after window from the last plan; score each plan on the window after it.

    Args:
        entry: the policy.
        shape: of the model.
        case: heat with rolling windows.
        lasting: one object for all windows, which picks the layers; otherwise a fresh object for
            each window plans every layer.
    """
    experts, ranks, slots = shape
    windows = [episodes(window, case.episode_steps) for window in case.windows()]
    placement = scoring.initial(windows[0].shape[1], ranks, slots, experts)
    record = _record(entry.name, shape, case.name, len(placement)) | {"lasting": lasting}
    make = entry.lasting if lasting and entry.lasting else entry.fresh
    moves, ratios = [], []
    try:
        policy = make(ranks, slots)
        for now, after in pairwise(windows):
            policy = policy if lasting else make(ranks, slots)
            planned = _applied(policy, now, placement, record)
            moves.append(scoring.moved(placement, planned, experts) / placement.size)
            ratios.append(scoring.par(after, planned))
            placement = planned
    except Exception as error:
        record["fault"] = f"raised {type(error).__name__}: {error}"[:200]
        return record
    # the first plan leaves a placement that nobody chose; what counts is how much follows
    return record | {"moved": float(np.mean(moves[1:])), "par_next": float(np.mean(ratios))}


def _applied(policy: Policy, heat, placement: np.ndarray, record: Record) -> np.ndarray:
    """The next placement; as in vLLM-Ascend's worker a layer with an invalid plan stays."""
    planned = np.array(policy.plan(heat, placement))
    wrong = scoring.faults(planned, placement.shape, heat.shape[2])
    if -1 in wrong:
        raise ValueError(f"the plan {wrong[-1]}")
    for layer, what in wrong.items():
        planned[layer] = placement[layer]
        record["invalid"] = what
    return planned


def _record(policy: str, shape: Shape, family: str, layers: int) -> Record:
    return {"policy": policy, "shape": shape, "family": family, "layers": layers, "fault": ""}


def _score(record: Record, case: Case, start: np.ndarray, placement: np.ndarray) -> None:
    experts = case.experts
    wrong = scoring.faults(placement, start.shape, experts)
    if wrong:
        record["fault"] = f"invalid in {len(wrong)} layers: {next(iter(wrong.values()))}"
        return
    for window, steps in (("train", case.train()), ("next", case.next())):
        sums = episodes(steps, case.episode_steps)
        record[f"par_{window}"] = scoring.par(sums, placement)
        record[f"step_par_{window}"] = scoring.par(steps, placement)
    record["moved"] = scoring.moved(start, placement, experts) / start.size
    record["unchanged"] = int((placement == start).all(axis=(1, 2)).sum())
