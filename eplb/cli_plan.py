"""The command `eplb plan`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from . import config as settings
from .choice import (
    choose,
    ended_by_ctrl_c,
    fail,
    keeping_kernels,
    load,
    one_sentence,
    options_of,
    policy_of,
    refusal,
    saying_that_it_compiles,
)
from .heat_source import losses_of, start_of
from .output import check_apart, target_of, write_figures, write_text
from .plan_report import MIB, Report, Row, layer_bytes_of

if TYPE_CHECKING:
    import numpy as np

    from ..planners.heat_file import HeatFile
    from ..planners.policy import Choice, Policy
    from ..planners.recording import Counts, Recording
    from .config import Config

_MOST_REDUNDANT = 4096
_FREE: dict[str, Any] = {"max_moves": None, "max_layers": None, "routing": "uniform"}


def plan(
    path: Annotated[str, typer.Argument(help="Folder of EPLB_RECORD, or .npy, .npz or .pt file.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Write the expert map here.")] = "",
    redundant: Annotated[
        str, typer.Option(help="Redundant experts per rank to compare: 0..8, or 0,2,4.")
    ] = "",
    ranks: Annotated[int, typer.Option(help="EP ranks; 0: those recorded.")] = 0,
    slots_per_rank: Annotated[int, typer.Option(help="Slots per rank; 0: those recorded.")] = 0,
    moe_share: Annotated[float, typer.Option(help="Share of MoE layers in a step's time.")] = 0.6,
    expert_mb: Annotated[
        float, typer.Option(help="MiB of one expert's weights in a layer; 0: as recorded.")
    ] = 0,
    json_file: Annotated[str, typer.Option("--json", help="Write the figures here, too.")] = "",
) -> None:
    """Plan an initial placement from recorded heat, or see what redundant experts would win.

    The policy, episodes and all else are those of the EPLB_ variables.
    EPLB_EFFORT is thorough unless it is set; EPLB_INITIAL_PLACEMENT loads the map.

    Example: eplb plan recording -o map.json

    Example: eplb plan recording --redundant 0..8
    """
    numbers = _numbers(redundant)
    _check(ranks, slots_per_rank, moe_share, expert_mb, bool(numbers), output)
    given = settings.source("effort") != "default"
    config = load(effort=None if given else "thorough")
    map_file, figures_file = target_of("-o", output), target_of("--json", json_file)
    check_apart({"the heat": Path(path), "-o": map_file, "--json": figures_file})
    with one_sentence(), ended_by_ctrl_c():
        choice = choose(config.policy)
        from ..planners.expert_map import encode_map
        from ..planners.heat_file import open_heat

        source = open_heat(path)
        trials = _trials(source, ranks, slots_per_rank, numbers)
        placements, rows, episodes = _run(source, trials, config, choice)
    layer_bytes = expert_mb * MIB * source.layers or layer_bytes_of(source)
    report = Report(source, rows, episodes, trials[0].origin, config, choice, moe_share)
    try:
        report.show(layer_bytes if numbers else None)
    finally:  # also where nobody reads the table to its end
        if figures_file:
            write_figures(figures_file, report.as_json(path, layer_bytes))
        if map_file:
            write_text("-o", map_file, encode_map(placements[0]))
    if map_file:
        typer.echo(f"Written: {map_file}; EPLB_INITIAL_PLACEMENT={map_file} loads it.")


def _numbers(text: str) -> list[int]:
    """The redundant experts that `0..8` or `0,2,4` names, rising; none for an empty text."""
    found: set[int] = set()
    for part in text.split(",") if text else []:
        match = re.fullmatch(r"\s*([0-9]{1,4})(?:\s*\.\.\s*([0-9]{1,4}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last <= _MOST_REDUNDANT:
            fail(
                f"--redundant is {text}; it must be numbers of redundant experts per rank from 0 "
                f"to {_MOST_REDUNDANT}, such as 0..8 or 0,2,4"
            )
        found.update(range(first, last + 1))
    return sorted(found)


def _check(
    ranks: int, slots: int, moe_share: float, expert_mb: float, compares: bool, output: str
) -> None:
    for name, value in (("--ranks", ranks), ("--slots-per-rank", slots)):
        if value < 0:
            fail(f"{name} is {value}; it must be at least 0")
    if not 0 <= moe_share <= 1:
        fail(f"--moe-share is {moe_share}; it must be from 0 to 1")
    if not 0 <= expert_mb <= 1e6:
        fail(f"--expert-mb is {expert_mb}; it must be from 0 to 1000000")
    if compares and output:
        fail(
            "--redundant and -o do not go together: choose a number first, then write the map with "
            "--slots-per-rank"
        )
    if compares and slots:
        fail("--redundant and --slots-per-rank do not go together: the former chooses the slots")


class _Trial(NamedTuple):
    """What is to be planned, or just measured: where it starts, and whose placement that is."""

    label: str
    start: np.ndarray
    origin: str


def _trials(
    source: Recording | HeatFile, ranks: int, slots: int, numbers: list[int]
) -> list[_Trial]:
    """The start, and then what is planned: the map, or one for each number of redundant experts."""
    recorded = int(getattr(source, "ranks", 0))
    if not numbers:
        start, origin = start_of(source, ranks, slots)
        return [_Trial("start", start, origin), _Trial("map", start, origin)]
    ranks = ranks or recorded
    if not ranks:
        fail("a file of counts tells no ranks: give --ranks")
    fewest = -(-source.experts // ranks)
    most = source.experts - fewest
    if numbers[-1] > most:
        fail(
            f"--redundant is up to {numbers[-1]}; it must be at most {most}: a rank of {ranks} has "
            f"{fewest} of {source.experts} experts without redundant ones, and holds none twice"
        )
    first = _Trial("start", *start_of(source, ranks, 0 if ranks == recorded else fewest))
    planned = (_Trial(f"+{n}", *start_of(source, ranks, fewest + n)) for n in numbers)
    return [first, *planned]


def _maker(config: Config, choice: Choice) -> Callable[[int, int], Policy]:
    """What makes the policy for (ranks, slots), warmed up, without limits to its moves."""
    from ..planners.policy import PolicyError

    options = options_of(config, choice, **_FREE)
    for name in _FREE:
        if name in choice.options and settings.source(name) != "default":
            typer.echo(f"eplb: {settings.PREFIX}{name.upper()} does nothing here", err=True)
    try:
        with saying_that_it_compiles(), keeping_kernels():
            choice.warm_up()
    except PolicyError as error:
        raise refusal(error) from None
    return lambda ranks, slots: policy_of(config, choice, ranks, slots, options)


def _run(
    source: Recording | HeatFile, trials: list[_Trial], config: Config, choice: Choice
) -> tuple[list[np.ndarray], list[Row], int]:
    """The placements planned on the whole recording, a row for each trial, and the episodes."""
    from ..planners.offline import Trial, all_episodes, measure
    from ..planners.recording import RecordingError

    make = _maker(config, choice)
    steps = config.episode_steps
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        try:
            heat = all_episodes(_tracked(progress, "reading", source), steps)
        except RecordingError as error:
            raise RecordingError("; ".join([str(error), *losses_of(source)])) from error
        half = len(heat) // 2
        parts = [heat, heat[:half]] if half else [heat]
        planned = _plan_all(progress, parts, trials, config, make)
        placements = [[trials[0].start] * len(parts), *planned]
        found = measure(
            _tracked(progress, "measuring", source),
            [Trial(one, half * n) for each in placements for n, one in enumerate(each)],
            source.experts,
            steps,
        )
    rows = []
    for number, trial in enumerate(trials):
        outcomes = found[len(parts) * number :][: len(parts)]
        rows.append(Row(trial.label, *trial.start.shape[1:], *outcomes))
    return [each[0] for each in planned], rows, len(heat)


def _tracked(progress: Progress, name: str, source: Recording | HeatFile) -> Iterator[Counts]:
    task = progress.add_task(name, total=len(source))
    for counts in source.counts():
        yield counts
        progress.advance(task)


def _plan_all(
    progress: Progress,
    parts: list[np.ndarray],
    trials: list[_Trial],
    config: Config,
    make: Callable[[int, int], Policy],
) -> list[list[np.ndarray]]:
    """For each trial but the start: a placement for each of `parts`, episodes of heat."""
    from ..planners.offline import plan_offline
    from ..planners.policy import PolicyError

    task = progress.add_task("planning", total=len(trials[1:]) * len(parts) * parts[0].shape[1])
    planned = []
    for number, trial in enumerate(trials[1:], 1):
        try:
            found = [
                plan_offline(
                    config.policy,
                    partial(make, *trial.start.shape[1:]),
                    heat,
                    trial.start,
                    2 * config.planner_threads,
                    partial(progress.advance, task),
                )
                for heat in parts
            ]
        except PolicyError as error:
            raise refusal(error) from None
        planned.append(found)
        if not progress.console.is_terminal:
            typer.echo(f"planned {trial.label}: {number} of {len(trials) - 1}", err=True)
    return planned
