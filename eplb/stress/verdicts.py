"""The verdicts: one line per promise, with its figure."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import numpy as np

from .measure import Sample
from .setup import Setup
from .stress import FaultRecord, Outcome

LONGEST_STALL = 10.0
"""Seconds without a step that count as a hang."""

NO_WORSE = 1.02
"""PAR with balancing over PAR without it, at most: in a scenario that is all noise they are one."""

_SETTLED = 8  # samples that tell a gain at least


@dataclass(frozen=True)
class Verdict:
    """On one promise; `holds` is None where it could not be judged."""

    promise: str
    holds: bool | None
    figure: str


def verdicts(outcome: Outcome, setup: Setup, policy: str) -> list[Verdict]:
    """All of them; that the stress came to its end is the first."""
    found = [
        Verdict(
            "it runs to its end",
            not outcome.trouble,
            outcome.trouble or f"{outcome.steps} steps" + (", Ctrl-C" * outcome.interrupted),
        ),
        Verdict(
            "no hang",
            outcome.longest_stall < LONGEST_STALL if outcome.steps else None,
            f"longest time without a step {outcome.longest_stall:.2f} s",
        ),
        _right_weights(outcome, setup),
        Verdict(
            "no torn record",
            None if not outcome.read else not outcome.torn,
            f"{outcome.read} records read, {outcome.torn} torn",
        ),
        Verdict(
            "no unaccounted record",
            None if outcome.interrupted or outcome.trouble else not outcome.unaccounted,
            f"{outcome.read} read + {outcome.overwritten} overwritten, "
            f"{outcome.unaccounted} missing",
        ),
        Verdict(
            "the ranks agree",
            None if outcome.interrupted or outcome.trouble else outcome.agree,
            "all boards show one valid placement" if outcome.agree else "their boards differ",
        ),
        _in_step(outcome, setup),
        _gain(outcome, setup, policy),
        *_of_faults(outcome.faults),
        Verdict(
            "nothing is left behind",
            not outcome.left,
            ", ".join(outcome.left) or "no process, no shared memory",
        ),
    ]
    return found


def settled(outcome: Outcome) -> list[Sample]:
    """The samples of the second half of those in which no fault was under way."""
    calm = [sample for sample, is_fault in outcome.samples if not is_fault]
    return calm[len(calm) // 2 :]


def _right_weights(outcome: Outcome, setup: Setup) -> Verdict:
    figure = (
        f"{outcome.commits} commits, all slots compared after each on every rank, "
        f"{outcome.wrong} wrong"
    )
    if setup.weights:
        figure += f"; {outcome.compared} tokens compared, {outcome.differ} differ"
    holds = not (outcome.wrong or outcome.differ)
    return Verdict("no wrong weight", holds if outcome.checked or not holds else None, figure)


def _in_step(outcome: Outcome, setup: Setup) -> Verdict:
    """At a given pace the planner reads all; at full speed it says what it can."""
    figure = f"{outcome.lost} records not read in time, {outcome.most_behind} steps behind at most"
    holds = outcome.lost == 0 if setup.rate and outcome.steps else None
    return Verdict("the planner keeps in step", holds, figure)


def _gain(outcome: Outcome, setup: Setup, policy: str) -> Verdict:
    samples = settled(outcome)
    if len(samples) < _SETTLED:
        return Verdict("the ranks are evener", None, "too few samples without a fault; run longer")
    par = float(np.mean([sample.par.mean() for sample in samples]))
    unmoved = float(np.mean([sample.unmoved.mean() for sample in samples]))
    figure = f"PAR {par:.3f}, {unmoved:.3f} if nothing had moved"
    if setup.scenario == "balanced" and policy == "flashlb":
        commits = samples[-1].epoch - samples[0].epoch  # of a first plan there may have been some
        moved = f"{commits} commits in the second half, PAR {par:.3f}"
        return Verdict("nothing moves without reason", commits == 0, moved)
    if setup.scenario == "adversarial":  # it knows the placement: no balancer wins against it
        return Verdict("the ranks are evener", None, figure + "; not judged against an adversary")
    if policy in ("static", "random"):
        return Verdict("the ranks are evener", None, figure + f"; not what {policy} is for")
    if not outcome.commits:
        return Verdict("the ranks are evener", None, figure + ", and nothing has")
    return Verdict("the ranks are evener", par <= NO_WORSE * unmoved, figure)


def _of_faults(faults: list[FaultRecord]) -> list[Verdict]:
    found = []
    for name, group in groupby(sorted(faults, key=lambda one: one.name), lambda one: one.name):
        ones = list(group)
        bad = [one.trouble for one in ones if one.trouble]
        slowest = max(one.seconds for one in ones)
        times = "once" if len(ones) == 1 else f"{len(ones)} times"
        figure = f"{times}; it was over and balancing went on within {slowest:.1f} s"
        found.append(Verdict(name, not bad, bad[0] if bad else figure))
    return found


def limit(outcome: Outcome, ring_steps: int, cores: int) -> str:
    """What limits the planner, in a sentence."""
    shares, speeds = outcome.shares, [one.steps_per_second for one, _ in outcome.samples]
    if not shares or not speeds or outcome.trouble:
        return "What limits it was not measured."
    loop, busy = shares["loop"], sum(shares.values())
    speed = np.mean(speeds[2:] or speeds)  # the first two are of its start
    used = ", ".join(f"{name} {share:.2f}" for name, share in shares.items())
    if outcome.faults:
        said = f"{speed:.0f} steps/s, with faults; run without them to see what limits it"
    elif outcome.lost and loop > 0.8:
        said = (
            f"the planner's loop limits it: it lost {outcome.lost} records at {speed:.0f} steps/s"
        )
    elif busy > 0.9 * cores:
        said = f"this machine's {cores} cores limit it: all are busy at {speed:.0f} steps/s"
    elif outcome.lost:
        said = (
            f"rings of EPLB_RING_STEPS={ring_steps} are too short for {speed:.0f} steps/s on this "
            f"machine: {outcome.lost} records were lost; set more"
        )
    else:
        said = (
            f"nothing limits it at {speed:.0f} steps/s; its loop, alone on a core, would keep up "
            f"with about {speed / max(loop, 0.001):.0f}"
        )
    depth = f"the rings had to hold {outcome.most_behind} steps"
    return f"{said[0].upper()}{said[1:]}. Cores used: {used}. {depth.capitalize()}."
