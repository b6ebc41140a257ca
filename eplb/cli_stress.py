"""The command `eplb stress`."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .child import command_of
from .choice import choose, fail, initial_of, load, one_sentence, options_of
from .output import check_paths, table_console, target_of, write_figures

if TYPE_CHECKING:
    from .config import Config
    from .stress.setup import Setup
    from .stress.stress import Outcome
    from .stress.verdicts import Verdict

_MANY = ("all", "random")  # words of --faults
_ROOM = 16 << 20  # bytes of the private /dev/shm beside the engine's segments
_UNSHARE = ("unshare", *(() if os.geteuid() == 0 else ("--user", "--map-root-user")), "--mount")


def stress(
    context: typer.Context,
    scenario: Annotated[str, typer.Option(help="See --list; or replay:FILE.")] = "drift",
    layers: Annotated[int, typer.Option(help="Mixture-of-experts layers.")] = 4,
    experts: Annotated[int, typer.Option(help="Experts per layer.")] = 64,
    ranks: Annotated[int, typer.Option(help="EP ranks.")] = 4,
    slots: Annotated[int, typer.Option(help="Slots per rank; 0: two redundant ones.")] = 0,
    tokens: Annotated[int, typer.Option(help="Tokens of a rank's full step.")] = 1024,
    top_k: Annotated[int, typer.Option(help="Experts per token.")] = 8,
    steps_per_second: Annotated[float, typer.Option(help="0: as fast as they go.")] = 100,
    seconds: Annotated[float, typer.Option(help="How long, at least.")] = 30,
    steps: Annotated[int, typer.Option(help="How long in steps, instead.")] = 0,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    weights: Annotated[bool, typer.Option(help="Real rows that travel over gloo.")] = False,
    faults: Annotated[
        str, typer.Option(help="Names with commas, all (each once) or random (until the end).")
    ] = "",
    patience: Annotated[float, typer.Option(help="Seconds to resume in after a fault.")] = 60,
    json_file: Annotated[str, typer.Option("--json", help="Write the figures here, too.")] = "",
    show_list: Annotated[bool, typer.Option("--list", help="Scenarios and faults.")] = False,
    outside: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Run synthetic ranks, a real planner and real shared memory, and check every promise.

    The balancer's settings are those of the EPLB_ variables.

    Example: eplb stress --scenario burst --seconds 60 --faults all
    """
    from .stress.scenario import REPLAY

    if show_list:
        _list()
        return
    names = _faults(faults)
    if "shm-full" in names:
        _be_private(outside)
    if scenario.startswith(REPLAY):
        layers, experts = _recorded_shape(context, scenario.removeprefix(REPLAY))
        scenario = REPLAY + os.path.abspath(scenario.removeprefix(REPLAY))
    given = (layers, experts, ranks, slots, tokens, top_k, steps_per_second, seconds, steps, seed)
    _check(*given, patience)
    target = target_of("--json", json_file)
    config = load(session=os.environ.get("EPLB_SESSION", f"stress-{os.getpid()}"))
    options_of(config, choose(config.policy))
    check_paths(config)
    initial_of(config)
    folder, code = _new_folder(), 0
    try:
        setup = _setup(
            folder, config, scenario, (layers, experts, ranks, slots), tokens, top_k,
            steps_per_second, seed, weights,
        )  # fmt: skip
        if "shm-full" in names:
            _mount_private(setup, config)
        _check_session(config.session)
        _check_limits(setup, config)
        code = _run(setup, config, names, faults == "random", seconds, steps, patience, target)
    finally:
        _say_undone(folder)
        if code == 1:
            typer.echo(f"eplb: what the processes said is in {folder}", err=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    raise typer.Exit(code)


def _new_folder() -> str:
    """In which the processes meet; the command ends with 2 if there is no place for it."""
    try:
        return tempfile.mkdtemp(prefix="eplb-stress-")
    except OSError as error:
        fail(f"{error.strerror}; set TMPDIR to a folder in which the stress can write its files")


def _faults(text: str) -> list[str]:
    """The faults that --faults names; the command ends with 2 where there is no such one."""
    from .stress.faults import FAULTS

    if text in _MANY:
        return list(FAULTS)
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name in _MANY:
            fail(f"--faults is {text!r}; {name} stands for all of them: give it alone")
        if name not in FAULTS:
            fail(f"--faults names {name!r}; there are {', '.join(FAULTS)}, or all, or random")
    return names


def _recorded_shape(context: typer.Context, path: str) -> tuple[int, int]:
    """(layers, experts) of recorded heat; the command ends with 2 if it was told others."""
    from .stress.scenario import recorded

    with one_sentence():
        _, *found = recorded(path).shape
    for option, value in zip(("layers", "experts"), found, strict=True):
        source = context.get_parameter_source(option)
        is_given = source is not None and source.name == "COMMANDLINE"
        if is_given and context.params[option] != value:
            fail(f"--{option} is {context.params[option]}, but {path} has {value}; leave it out")
    return found[0], found[1]


def _say_undone(folder: str) -> None:
    """Say once what planners could not read or write of what the settings of their files ask for,
    and how their policy failed; each that a fault makes begin anew says it again."""
    said: dict[str, None] = {}
    told = r".* ERROR .*( EPLB_(RECORD|(SAVE|INITIAL)_PLACEMENT)=|\bthe policy )"
    for path in sorted(Path(folder).glob("planner_process-*.log")):
        for entry in re.split(r"^(?=\d{4}-)", path.read_text(errors="replace"), flags=re.M):
            if re.match(told, entry):
                said[entry.partition("] ")[2].rstrip()] = None
    for text in said:
        typer.echo(f"eplb: {text}", err=True)


def _check(
    layers: int,
    experts: int,
    ranks: int,
    slots: int,
    tokens: int,
    top_k: int,
    rate: float,
    seconds: float,
    steps: int,
    seed: int,
    patience: float,
) -> None:
    bounds = (
        ("--layers", layers, 1, 1024),
        ("--experts", experts, 2, 1024),
        ("--ranks", ranks, 2, 1024),
        ("--slots", slots, 0, 1024),
        ("--tokens", tokens, 1, 10**6),
        ("--top-k", top_k, 1, experts),
        ("--steps-per-second", rate, 0, 10**6),
        ("--seconds", seconds, 1, 10**7),
        ("--seed", seed, 0, 2**63 - 1),
        ("--steps", steps, 0, 10**9),
        ("--patience", patience, 1, 10**5),
    )
    for name, value, low, high in bounds:
        if not low <= value <= high:
            fail(f"{name} is {value}; it must be from {low} to {high}")


def _setup(
    folder: str,
    config: Config,
    scenario: str,
    shape: tuple[int, int, int, int],
    tokens: int,
    top_k: int,
    rate: float,
    seed: int,
    weights: bool,
) -> Setup:
    """What was asked for; the command ends with 2 where it does not fit together."""
    from ..collectors.synthetic import SCENARIOS
    from ..ipc.shape import ShapeError, check_shape
    from .stress.scenario import REPLAY
    from .stress.setup import Setup

    layers, experts, ranks, slots = shape
    if not scenario.startswith(REPLAY) and scenario not in SCENARIOS:
        fail(f"--scenario is {scenario!r}; there are {', '.join(SCENARIOS)} and replay:FILE")
    slots = slots or min(experts, -(-experts // ranks) + 2)
    hosts = ranks if weights else min(ranks, max(2, os.cpu_count() or 2))
    setup = Setup(
        folder, config.session, layers, experts, ranks, slots, scenario, seed, tokens, top_k,
        rate, weights, hosts,
    )  # fmt: skip
    try:
        check_shape(setup.group_shape(config))
    except ShapeError as error:
        fail(f"{error}; change --experts, --ranks or --slots")
    if weights and ranks > 16:
        fail(f"--weights starts a process for each rank; --ranks is {ranks}, at most 16")
    return setup


def _bytes(setup: Setup, config: Config) -> tuple[int, int]:
    """Of a rank's segment without its ring, and of a step in the ring."""
    from ..ipc.rank_segment import segment_bytes, step_bytes

    shape = setup.group_shape(config)
    return segment_bytes(shape) - shape.ring_slots * step_bytes(shape), step_bytes(shape)


def _check_session(session: str) -> None:
    """End the command with 2 if an engine or a planner lives there, which would meet ours."""
    from ..ipc.liveness import SegmentError, owner_is_alive
    from ..ipc.session import segment_names, session_lock

    try:
        with session_lock(session):
            pass
    except SegmentError as error:  # said now, not when all is to be removed
        fail(str(error))
    for name in segment_names(session):
        try:
            living = owner_is_alive(name)
        except SegmentError as error:
            fail(str(error))
        if living:
            fail(
                f"session {session!r} is in use: {name} belongs to a living process, which a "
                "stress would meddle with; set EPLB_SESSION to another name, or unset it"
            )


def _check_limits(setup: Setup, config: Config) -> None:
    from ..ipc.limits import LimitError, check_files, check_memory

    try:
        check_memory(setup.ranks, *_bytes(setup, config), config.ring_steps)
        check_files(2 * setup.ranks + 32, "the stress")
    except LimitError as error:
        fail(str(error))


def _be_private(outside: str) -> None:
    """Start this command again where what it mounts is seen by nobody else.

    Args:
        outside: the mount namespace that it was started in, if this is that again; else empty.
    """
    here = os.readlink("/proc/self/ns/mnt")
    if outside == here:
        fail(f"shm-full needs another mount namespace than {here}; name the other --faults")
    if outside:
        return
    if (
        not shutil.which(_UNSHARE[0])
        or subprocess.run([*_UNSHARE, "true"], capture_output=True).returncode
    ):
        fail(
            "shm-full needs a mount namespace of its own and `unshare --mount` is refused here; "
            "run as root, in a container with CAP_SYS_ADMIN, or name the other --faults"
        )
    again = command_of("cli", *sys.argv[1:], "--outside", here)
    os.execvp(_UNSHARE[0], [*_UNSHARE, *again])


def _mount_private(setup: Setup, config: Config) -> None:
    """A small /dev/shm of this command's own, in the mount namespace that it was started in."""
    fixed, step = _bytes(setup, config)
    size = setup.ranks * (fixed + config.ring_steps * step + 8192) + _ROOM
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm"]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        fail(
            f"shm-full needs a /dev/shm of its own: {mounted.stderr.strip()}; name the other "
            "--faults"
        )


def _run(
    setup: Setup,
    config: Config,
    names: list[str],
    at_random: bool,
    seconds: float,
    steps: int,
    patience: float,
    target: Path | None,
) -> int:
    """Run it, say what is true; the exit code."""
    from .stress.stress import Stress
    from .stress.verdicts import limit, verdicts
    from .stress.view import LiveView, PlainView, show_verdicts

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    with (LiveView if console.is_terminal else PlainView)(console, setup) as view:

        def show(outcome: Outcome, doing: str) -> None:
            try:
                view.show(outcome, doing)
            except (BrokenPipeError, SystemExit):  # rich makes the latter of the former
                running.stop()  # nobody reads on: of `| tee` Ctrl-C has ended tee, too

        try:
            running = Stress(
                setup, config, {"EPLB_SPAWN_PLANNER": "0"}, names, at_random, seconds, steps,
                patience, show,
            )  # fmt: skip
        except OSError as error:
            fail(
                f"{setup.folder} has no room for the stress's figures: {error.strerror}; make "
                "room, or set TMPDIR to another folder"
            )
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: running.stop())
        outcome = running.run()
    found = verdicts(outcome, setup, config.policy)
    notes = [limit(outcome, config.ring_steps, os.cpu_count() or 1)]
    try:
        show_verdicts(table_console(140), found, notes)
    finally:  # also where nobody reads them
        if target:
            write_figures(target, _as_json(setup, config, outcome, found, notes))
    if any(verdict.holds is False for verdict in found):
        return 1
    return 130 if outcome.interrupted else 0


def _as_json(
    setup: Setup, config: Config, outcome: Outcome, found: list[Verdict], notes: list[str]
) -> dict[str, Any]:
    import msgspec

    asked = msgspec.structs.asdict(setup)
    del asked["folder"]
    figures = asdict(outcome)
    figures["samples"] = [
        {
            "seconds": sample.seconds,
            "steps_per_second": sample.steps_per_second,
            "par": sample.par.tolist(),
            "unmoved": sample.unmoved.tolist(),
            "epoch": sample.epoch,
            "fault": is_fault,
        }
        for sample, is_fault in outcome.samples
    ]
    return {
        "asked": asked,
        "settings": config.model_dump(mode="json"),
        "verdicts": [asdict(verdict) for verdict in found],
        "notes": notes,
        **figures,
    }


def _list() -> None:
    from ..collectors.synthetic import SCENARIOS
    from .stress.faults import FAULTS

    for title, rows in (("Scenarios", SCENARIOS), ("Faults", FAULTS)):
        table = Table(title=title, title_justify="left", show_header=False)
        for name, (_, meaning) in rows.items():
            table.add_row(name, meaning)
        Console().print(table)
