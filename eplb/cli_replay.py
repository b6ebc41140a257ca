"""The command `eplb replay`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .choice import (
    BY_SETTING,
    choose,
    ended_by_ctrl_c,
    fail,
    keeping_kernels,
    load,
    one_sentence,
    options_of,
    pace_of,
    par_text,
    policy_of,
    refusal,
    saying_that_it_compiles,
)
from .heat_source import losses_of, start_of
from .output import check_apart, table_console, target_of, write_figures
from .progress import watched

if TYPE_CHECKING:
    import numpy as np

    from ..planners.heat_file import HeatFile
    from ..planners.recording import Recording
    from ..planners.replay import Outcome, Replay
    from .config import Config

_ROWS = 8
_BY = "--policy "


def replay(
    path: Annotated[str, typer.Argument(help="Folder of EPLB_RECORD, or .npy, .npz or .pt file.")],
    policy: Annotated[
        list[str] | None, typer.Option(help="Policy; give it again for more.")
    ] = None,
    ranks: Annotated[int, typer.Option(help="EP ranks; 0: those recorded.")] = 0,
    slots_per_rank: Annotated[int, typer.Option(help="Slots per rank; 0: those recorded.")] = 0,
    delay: Annotated[int, typer.Option(help="Steps from a plan to its first round.")] = 16,
    round_steps: Annotated[int, typer.Option(help="Steps from one round to the next.")] = 8,
    moe_share: Annotated[float, typer.Option(help="Share of MoE layers in a step's time.")] = 0.6,
    json_file: Annotated[str, typer.Option("--json", help="Write the figures here, too.")] = "",
) -> None:
    """Play recorded heat through policies as a planner would have, and compare them.

    Episodes, window and all else are those of the EPLB_ variables.

    Example: eplb replay recording --policy flashlb --policy static
    """
    _check(ranks, slots_per_rank, delay, round_steps, moe_share)
    config = load()
    target = target_of("--json", json_file)
    check_apart({"the heat": Path(path), "--json": target})
    names = list(dict.fromkeys(policy or [config.policy, "static"]))
    with ended_by_ctrl_c():
        by = _BY if policy else BY_SETTING
        choices = {name: choose(name, by) for name in names}
        with one_sentence():
            from ..planners.heat_file import open_heat
            from ..planners.replay import Delay, step_time

            source = open_heat(path)
            start, origin = start_of(source, ranks, slots_per_rank)
        rows = config.staging_rows or _rows_of(source)
        timing = Delay(delay, round_steps, rows)
        with saying_that_it_compiles():
            replays = {
                name: _replay(config, choice, start, source.experts, timing, by)
                for name, choice in choices.items()
            }
        replayed = list(replays.values())
        if "static" not in replays:
            static = choose("static")
            replayed.append(_replay(config, static, start, source.experts, timing, by, True))
        with one_sentence():
            _play(source, replayed)
    outcomes = {name: found.outcome() for name, found in replays.items()}
    base = outcomes.get("static") or replayed[-1].outcome()
    if not base.steps:
        fail(f"{path} has no step with tokens whose placement is known; there is nothing to replay")
    times = {name: step_time(found, base, moe_share) for name, found in outcomes.items()}
    try:
        _show(outcomes, times)
        for note in [
            *_notes(source, config, start, origin, timing, moe_share),
            *_too_short(base, config),
        ]:
            typer.echo(note)
    finally:  # also where nobody reads the table to its end
        if target:
            found = _as_json(path, outcomes, times, start, timing, moe_share, config)
            write_figures(target, found)


def _check(ranks: int, slots: int, delay: int, round_steps: int, moe_share: float) -> None:
    least = (
        ("--ranks", ranks, 0),
        ("--slots-per-rank", slots, 0),
        ("--delay", delay, 0),
        ("--round-steps", round_steps, 1),
    )
    for name, value, bound in least:
        if value < bound:
            fail(f"{name} is {value}; it must be at least {bound}")
    if not 0 <= moe_share <= 1:
        fail(f"--moe-share is {moe_share}; it must be from 0 to 1")
    if bool(ranks) != bool(slots):
        fail("--ranks and --slots-per-rank go together; give both or none")


def _rows_of(source: Any) -> int:
    return int(getattr(source, "header", {}).get("staging_rows") or _ROWS)


def _replay(
    config: Config,
    choice: Any,
    start: np.ndarray,
    experts: int,
    timing: Any,
    by: str,
    quiet: bool = False,
) -> Replay:
    from ..planners.policy import PolicyError
    from ..planners.replay import Replay

    ranks, slots = start.shape[1:]
    try:
        options = {} if quiet else options_of(config, choice, by)
        with keeping_kernels():
            choice.warm_up()
        policy = policy_of(config, choice, ranks, slots, options)
    except PolicyError as error:
        raise refusal(error, by) from None
    per_node = config.ranks_per_node or None
    return Replay(policy, start, experts, pace_of(config), timing, per_node)


def _play(source: Recording | HeatFile, replays: list[Replay]) -> None:
    """Every step to every policy, with a bar on a terminal."""
    for counts in watched(source.counts(), len(source), "replaying"):
        for each in replays:
            each.add(counts)


def _show(outcomes: dict[str, Outcome], times: dict[str, float]) -> None:
    table = Table(title="Replay", box=SIMPLE_HEAD, padding=0)  # which 80 columns hold
    table.add_column("policy", overflow="fold")
    headings = (
        "PAR of\nsteps,\nmean",
        "p95",
        "PAR of\nepisodes,\nmean",
        "p95",
        "plans",
        "slots\nmoved",
        "of all,\nper plan",
        "planning,\nms",
        "step\ntime",
    )
    for heading in headings:
        folds = heading == "plans"  # which may tell of refused ones
        table.add_column(heading, justify="right", no_wrap=not folds, overflow="fold")
    for name, found in outcomes.items():
        table.add_row(
            name,
            *map(par_text, (*found.step_par, *found.episode_par)),
            f"{found.plans}" + (f" ({found.refused} refused)" if found.refused else ""),
            str(found.moves),
            f"{found.moved_per_plan:.1%}",
            f"{found.planning_ms[0]:.1f}",
            f"{times[name] - 1:+.1%}",
        )
    console = table_console(140)
    console.print(table)
    _show_over_time(console, outcomes)


def _show_over_time(console: Console, outcomes: dict[str, Outcome]) -> None:
    """PAR of episodes from the first to the last, all policies by one scale."""
    import numpy as np

    from ..planners.replay import stretches
    from .strip import strip

    name_width = max(map(len, outcomes))
    width = max(20, min(100, console.width - name_width - 4))
    lines = {
        name: np.array(stretches(found.episode_par_over_time, width)) - 1
        for name, found in outcomes.items()
    }
    highest = max((float(line.max()) for line in lines.values() if len(line)), default=0.0)
    if highest <= 0:
        return
    console.print(f"PAR of episodes over time; a full block is {1 + highest:.3f}, none is 1")
    for name, line in lines.items():
        console.print(Text(f"  {name:{name_width}}  "), strip(line, highest), sep="")


def _notes(
    source: Any, config: Config, start: np.ndarray, origin: str, timing: Any, moe_share: float
) -> list[str]:
    from ..planners.replay import step_time_model

    layers, ranks, slots = start.shape
    notes = [
        f"{layers} layers, {source.experts} experts on {ranks} ranks x {slots} slots, starting "
        f"from {origin}; episodes of {config.episode_steps} steps, plans on "
        f"{config.window_episodes} of them every {config.plan_interval}; a plan's first round "
        f"commits after {timing.first} steps, each further one of {timing.rows} rows per rank "
        f"after {timing.each}.",
        step_time_model(moe_share, "the placement at the start"),
    ]
    return [*notes, *losses_of(source)]


def _too_short(base: Outcome, config: Config) -> list[str]:
    """That no policy came to plan, and what would let it."""
    if base.episodes >= config.min_episodes:
        return []
    return [
        f"No policy has planned: {base.steps} steps with tokens are {base.episodes} episodes of "
        f"EPLB_EPISODE_STEPS={config.episode_steps}, and the first plan comes after "
        f"EPLB_MIN_EPISODES={config.min_episodes}, which takes "
        f"{config.episode_steps * config.min_episodes} steps; record longer, or lower one of them."
    ]


def _as_json(
    path: str,
    outcomes: dict[str, Outcome],
    times: dict[str, float],
    start: np.ndarray,
    timing: Any,
    moe_share: float,
    config: Config,
) -> dict[str, Any]:
    layers, ranks, slots = start.shape
    found = {name: each.as_json() | {"step_time": times[name]} for name, each in outcomes.items()}
    return {
        "path": path,
        "layers": layers,
        "ranks": ranks,
        "slots_per_rank": slots,
        "delay": timing.first,
        "round_steps": timing.each,
        "staging_rows": timing.rows,
        "moe_share": moe_share,
        "settings": config.model_dump(mode="json"),
        "policies": found,
    }
