"""What commands share: the settings, the policy that they name, and how a command ends."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console

from . import config as settings

if TYPE_CHECKING:
    from ..planners.engine_loop import Pace
    from ..planners.expert_map import ExpertMap
    from ..planners.policy import Choice, Policy

log = logging.getLogger("flash_eplb.planner")

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""How a file refuses what is written to it; of a pipe typer sees to it."""

LONG = 3.0
"""Seconds after which a command that has said nothing says what it waits for."""

BY_SETTING = "EPLB_POLICY="
"""What names a policy, as an error says it, if no option does."""

SETTINGS_OF = {
    "min_excess": "min_excess",
    "min_gain": "min_gain",
    "max_moves": "max_moves",
    "max_layers": "max_layers",
    "effort": "effort",
    "routing": "routing",
    "threads": "planner_threads",
}
"""Settings that are options of policies, by the name of the option."""


def load(**overrides: Any) -> settings.Config:
    """The settings; the command ends with 2 and all wrong values if there are any.

    Names that are no setting, and settings that are there twice, are said in any case.
    """
    for name in settings.unknown_variables():
        typer.echo(f"eplb: {name} is no setting of ours: misspelt?", err=True)
    for text in settings.twice_set():
        typer.echo(f"eplb: {text}; unset the other", err=True)
    try:
        return settings.load_config(**overrides)
    except settings.ConfigError as error:
        typer.echo(f"eplb: {error}", err=True)
        raise typer.Exit(2) from None


def fail(text: str) -> NoReturn:
    """End the command with 2 and a sentence."""
    typer.echo(f"eplb: {text}", err=True)
    raise typer.Exit(2)


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """End the command with 2 and what an unfit file says."""
    try:
        yield
    except (ValueError, OSError, MemoryError) as error:
        fail(str(error))


@contextlib.contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """Ctrl-C ends the process at once, with 130: for work that leaves nothing behind.

    As an exception it may be lost: of one that meets compiled code numba makes a SystemError, which
    looks like a policy's failure, and one that meets a finalizer is ignored.
    """

    def end(*_: object) -> None:
        Console(stderr=True).show_cursor()  # a bar hides it
        os._exit(130)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def keeping_kernels() -> Iterator[None]:
    """End the command with 1 where what is compiled finds no room on the disk."""
    from ..kernel_cache import VARIABLE, place

    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        typer.echo(
            f"eplb: compiled kernels cannot be kept in {place()}: {error.strerror}; make room "
            f"there, or set {VARIABLE} to a folder with 30 MiB",
            err=True,
        )
        raise typer.Exit(1) from None


@contextlib.contextmanager
def saying_that_it_compiles() -> Iterator[None]:
    """Say so on a terminal where that takes long, for until then the command says nothing."""
    text = "eplb: compiling kernels, which takes a minute or two the first time"
    said = threading.Timer(LONG, typer.echo, (text,), {"err": True})
    said.daemon = True
    if Console(stderr=True).is_terminal:
        said.start()
    try:
        yield
    finally:
        said.cancel()


@contextlib.contextmanager
def reaching(session: str) -> Iterator[None]:
    """End the command with 1 and the reason if the engine of `session` cannot be attached to."""
    from ..ipc.limits import LimitError
    from ..ipc.liveness import SegmentAbsentError, SegmentError
    from ..ipc.session import engines
    from ..planners.group import RankMissingError

    try:
        yield
    except LimitError as error:
        typer.echo(f"eplb: {error}", err=True)
        raise typer.Exit(1) from None
    except RankMissingError as error:
        typer.echo(f"eplb: the engine of session {session!r} is not complete: {error}", err=True)
        raise typer.Exit(1) from None
    except SegmentAbsentError as error:
        others = engines()
        meant = f"; engines run in {others}: is EPLB_SESSION another here?" if others else ""
        typer.echo(
            f"eplb: no engine in session {session!r}: {error}; it appears with its first request, "
            f"so send it one{meant}",
            err=True,
        )
        raise typer.Exit(1) from None
    except SegmentError as error:
        typer.echo(f"eplb: no engine in session {session!r}: {error}", err=True)
        raise typer.Exit(1) from None


def choose(name: str, source: str = BY_SETTING) -> Choice:
    """The policy `name`, loaded; the command ends with 2 if there is none.

    Args:
        name: of the policy.
        source: what named it, as an error says it.
    """
    from ..planners.policy import PolicyError, choose_policy

    try:
        return choose_policy(name)
    except PolicyError as error:
        raise refusal(error, source) from None


def options_of(
    config: settings.Config, choice: Choice, source: str = BY_SETTING, **fixed: Any
) -> dict[str, Any]:
    """The settings that a policy may take; says which of those that were set this one does not.

    The command ends with 2 where the policy refuses one of them.

    Args:
        config: the settings.
        choice: the policy.
        source: what named it, as an error says it.
        fixed: options that are not as the settings have them.
    """
    options = {option: getattr(config, name) for option, name in SETTINGS_OF.items()}
    for option in ("max_moves", "max_layers"):
        options[option] = options[option] or None
    options |= fixed
    _check_options(choice, options, source)
    for option, name in SETTINGS_OF.items():
        if option not in choice.options and settings.source(name) != "default":
            variable = settings.PREFIX + name.upper()
            typer.echo(f"eplb: {variable} does nothing with {source}{choice.name}", err=True)
    return options


def _check_options(choice: Choice, options: dict[str, Any], source: str) -> None:
    """End the command with 2 if one of our policies refuses a setting, whatever the engine is."""
    from ..planners.policy import PolicyError

    if not choice.options:
        return  # it takes none, and is its author's to make when an engine is there
    try:
        choice.make(2, 2, 2, **options)
    except PolicyError as error:
        option, _, why = str(error.__cause__).partition(" ")
        variable = settings.PREFIX + SETTINGS_OF.get(option, option).upper()
        fail(f"{variable} {why}, or another {source.rstrip(' =')} than {choice.name}")


def initial_of(config: settings.Config) -> ExpertMap | None:
    """The map of EPLB_INITIAL_PLACEMENT, None without one; ends the command if it is unfit."""
    from ..planners.expert_map import read_map

    with one_sentence():
        return read_map(config.initial_placement) if config.initial_placement else None


def pace_of(config: settings.Config) -> Pace:
    """How a planner paces its episodes and plans by the settings.

    A round goes on for up to four votes beside its timeout: one names it, one starts it, one says
    that it is staged and one commits it.
    """
    from ..planners.engine_loop import Pace

    return Pace(
        episode_steps=config.episode_steps,
        window_episodes=config.window_episodes,
        min_episodes=config.min_episodes,
        plan_interval=config.plan_interval,
        timeout_steps=2 * config.plan_timeout_steps + 4 * config.vote_steps,
        heat_phase=config.heat_phase,
    )


def policy_of(
    config: settings.Config, choice: Choice, ranks: int, slots: int, options: dict[str, Any]
) -> Policy:
    """The chosen policy for a group of `ranks` ranks, with the size of a node by the settings."""
    near = min(config.ranks_per_node or ranks, ranks)
    return choice.make(ranks, slots, near, **options)


def par_text(par: float) -> str:
    """A PAR as commands show it; "-" for nan, where none was measured."""
    return "-" if par != par else f"{par:.3f}"


def refusal(error: Exception, source: str = BY_SETTING) -> typer.Exit:
    """What ends a command whose policy cannot be used; its author finds the traceback in DEBUG."""
    log.debug("the policy cannot be used", exc_info=error)
    typer.echo(f"eplb: {str(error).replace(BY_SETTING, source)}", err=True)
    return typer.Exit(2)
