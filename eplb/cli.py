"""The command `eplb`."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from .. import __version__
from . import cli_metrics, cli_plan, cli_record, cli_replay, cli_report, cli_stress
from . import config as settings
from .choice import (
    SETTINGS_OF,
    UNWRITABLE,
    choose,
    ended_by_ctrl_c,
    fail,
    initial_of,
    keeping_kernels,
    load,
    options_of,
    pace_of,
    policy_of,
    reaching,
    refusal,
    saying_that_it_compiles,
)
from .output import check_folder, check_paths, table_console

if TYPE_CHECKING:
    from ..planners.policy import Choice, Policy
    from ..planners.recorder import MakeRecorder

log = logging.getLogger("flash_eplb.planner")

app = typer.Typer(
    name="eplb",
    help="An expert-parallel load balancer that runs beside vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

__all__ = ["SETTINGS_OF", "app", "compile_kernels", "main"]

_COUNTERS = {
    "committed": "committed",
    "aborted": "aborted",
    "refused": "refused",
    "moved\nrows": "moved_rows",
}
"""Columns of `eplb status`, with the word of a rank's status that each shows."""

_RARE = ("stale", "mismatches", "heat_merged", "heat_dropped", "quarantined_rows", "damaged")
"""Words that it shows where they are not zero."""

_PLAIN = 160
"""Columns of a table where there is no terminal."""

_OF_DEMO = ("vllm", "transformers")
"""What the demo needs beside our own dependencies."""

_FILES = 16
"""Files that a planner opens before it has found an engine, those of its event loop among them."""

Session = Annotated[str | None, typer.Option(help="Session of the engine (EPLB_SESSION).")]


@app.command()
def planner(
    session: Session = None,
    exit_with_engine: Annotated[
        bool, typer.Option(help="End when the engine is gone instead of waiting for the next.")
    ] = False,
    parent: Annotated[
        int, typer.Option(hidden=True, help="Wait for no engine when this process is dead.")
    ] = 0,
) -> None:
    """Plan for the engine of a session. Start it beside `vllm serve`; end it with Ctrl-C.

    Example: EPLB_SESSION=a eplb planner
    """
    from ..ipc.liveness import SegmentError
    from ..planners.recorder import recorder_of
    from .logs import configure

    config = load(session=session)
    configure(config.log_level)
    record = recorder_of(
        config.record, config.record_mb, config.session, config.model_dump(mode="json")
    )
    try:
        with ended_by_ctrl_c():
            run_planner(config, record, exit_with_engine, parent)
    except SegmentError as error:
        typer.echo(f"eplb: {error}", err=True)
        raise typer.Exit(1) from None


def run_planner(
    config: settings.Config, record: MakeRecorder, exit_with_engine: bool, parent: int = 0
) -> None:
    """Plan, on uvloop, until SIGINT or SIGTERM comes or, if so asked, the engine is gone.

    The command ends with 2 if policy or initial placement cannot be used.

    Raises:
        SegmentError: another planner is there, or a limit is in the way.
    """
    import uvloop

    from ..ipc.limits import check_files
    from ..planners.expert_map import SavedPlacement
    from ..planners.planner import Planner
    from ..planners.policy import PolicyError

    check_files(_FILES, "the planner")
    choice = choose(config.policy)
    options = options_of(config, choice)
    check_paths(config)
    initial = initial_of(config)

    def make_policy(ranks: int, slots: int, **of_engine: str) -> Policy:
        return policy_of(config, choice, ranks, slots, options | of_engine)

    async def serve() -> None:
        planner = Planner(
            config.session,
            make_policy,
            pace_of(config),
            exit_with_engine,
            config.ranks_per_node or None,
            make_recorder=record,
            initial=initial,
            saved=SavedPlacement(config.save_placement),
            parent=parent,
        )
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, planner.stop)
        await planner.run()

    try:
        log.info("compiling kernels, policy %s (a minute the first time)", choice.name)
        compile_kernels(choice)
        uvloop.run(serve())
    except PolicyError as error:
        raise refusal(error) from None


def compile_kernels(choice: Choice | None = None) -> None:
    """Compile, or load from the cache, all kernels of the planner and its policy.

    The command ends with 1 where there is no room to keep them.

    Args:
        choice: the policy; None for the default one.
    """
    from ..kernel_cache import notice
    from ..planners import engine_loop
    from ..planners.policy import DEFAULT, choose_policy

    if text := notice():
        log.warning(text)
    with keeping_kernels():
        engine_loop.warmup()
        (choice or choose_policy(DEFAULT)).warm_up()


@app.command("config")
def show_config() -> None:
    """Show every setting: its value, where it comes from and what is allowed.

    Example: EPLB_WINDOW_EPISODES=32 eplb config
    """
    from ..planners.policy import known_policies

    config = load()
    table = Table(title="Settings")
    table.add_column("variable", no_wrap=True)
    for heading in ("value", "source", "allowed", "meaning"):
        table.add_column(heading, overflow="fold")
    for name, field in settings.Config.model_fields.items():
        value = getattr(config, name)
        table.add_row(
            settings.PREFIX + name.upper(),
            str(int(value) if isinstance(value, bool) else value),
            settings.source(name),
            settings.allowed(name),
            field.description or "",
        )
    table_console(_PLAIN).print(table)
    if config.policy not in known_policies():
        typer.echo(f"eplb: EPLB_POLICY={config.policy!r} names no policy: misspelt?", err=True)


@app.command()
def status(session: Session = None) -> None:
    """Show what the ranks of a session are doing, once.

    Example: eplb status --session a
    """
    from ..ipc.liveness import owner_is_alive
    from ..ipc.names import planner_name
    from ..planners.group import Group
    from ..planners.life import silent_planner

    config = load(session=session)
    with reaching(config.session):
        there = owner_is_alive(planner_name(config.session))
        group = Group.attach(config.session, writable=False, who="eplb status")
    _show_ranks(config.session, [rank.status.snapshot() for rank in group.ranks])
    alive = silent_planner(config.session) or "planner: running"
    typer.echo(alive if there else "planner: none, experts stay where they are")
    group.close()


def _show_ranks(session: str, ranks: list[dict[str, int]]) -> None:
    """A row for each rank, which 80 columns hold, and below what else is not zero."""
    from ..ipc.status import state_name

    table = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for heading in ("EP\nrank", "step", "epoch", "state", *_COUNTERS, "received\nMiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for number, words in enumerate(ranks):
        head = number, words["step"], words["epoch"], state_name(words["state"])
        counts = [words[name] for name in _COUNTERS.values()]
        cells = *head, *counts, f"{words['received_bytes'] / 2**20:.1f}"
        table.add_row(*map(str, cells))
    typer.echo(f"session {session}")
    table_console(_PLAIN).print(table, end="")
    for number, words in enumerate(ranks):
        said = [f"{name} {words[name]}" for name in _RARE if words[name]]
        if said:
            typer.echo(f"EP rank {number}: {', '.join(said)}")


@app.command()
def clean(
    session: Annotated[str | None, typer.Option(help="Only this session; default all.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Only list what would be removed.")] = False,
) -> None:
    """Remove what dead processes left in shared memory; the living are never touched.

    Example: eplb clean --dry-run
    """
    from ..ipc.liveness import SegmentError
    from ..ipc.session import clean_session, dead_names, sessions

    chosen = sessions() if session is None else [load(session=session).session]
    found = failed = 0
    for name in chosen:
        try:
            names = dead_names(name) if dry_run else clean_session(name)
        except SegmentError as error:
            typer.echo(f"eplb: {error}", err=True)
            failed += 1
            continue
        for entry in names:
            typer.echo(f"{'would remove' if dry_run else 'removed'} {entry}")
        found += len(names)
    if not found and not failed:
        typer.echo("nothing to remove")
    if failed:
        raise typer.Exit(1)


@app.command()
def demo(
    folder: Annotated[str, typer.Option(help="Where the tiny checkpoint is kept.")] = "build/demo",
    record: Annotated[str, typer.Option(help="Folder that its planner records in.")] = "",
) -> None:
    """Run a real vLLM on the CPU with and without the balancer and compare their tokens.

    Example: eplb demo --record build/demo/recording
    """
    missing = [name for name in _OF_DEMO if importlib.util.find_spec(name) is None]
    if missing:
        fail(
            f"the demo runs a real vLLM on the CPU, and {' and '.join(missing)} cannot be imported "
            "here; `make demo` in a clone sets up what it needs"
        )
    from .demo.run import run

    check_folder("--folder ", folder)
    if record:
        check_folder("--record ", record)
    raise typer.Exit(run(folder, record))


@app.command()
def warmup() -> None:
    """Compile the planner's kernels now, and its policy's, so that its next start takes a second.

    Example: eplb warmup
    """
    from ..planners.policy import PolicyError

    try:
        with ended_by_ctrl_c(), saying_that_it_compiles():
            compile_kernels(choose(load().policy))
    except PolicyError as error:
        raise refusal(error) from None


app.command()(cli_metrics.metrics)
app.command()(cli_record.record)
app.command()(cli_replay.replay)
app.command()(cli_report.report)
app.command()(cli_plan.plan)
app.command()(cli_stress.stress)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Entry point of the command; 1 and a sentence where its output or kernels find no place."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # not every terminal can show a bar
    try:
        try:
            app()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is still to be flushed
        sys.exit(f"eplb: the output cannot be written: {error.strerror}")
    except RuntimeError as error:
        if "cannot cache function" not in str(error):
            raise
        sys.exit(
            "eplb: numba finds no place for compiled kernels; set NUMBA_CACHE_DIR to a folder that "
            "can be written"
        )


if __name__ == "__main__":
    main()
