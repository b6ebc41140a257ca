"""The demo: the same prompts through a real vLLM without and with the balancer.

1. Without us: the reference tokens.
2. With us but without a planner: the placement stays; the PAR that is measured is 'before'.
3. The planner starts; the topics shift twice more; the PAR of the last pass is 'after'.

Ends with a table, and with exit code 0 only if every token is the same and plans were committed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ...ipc.status import Field
from ..child import command_of
from ..choice import fail, par_text
from .checkpoint import TinyMoE, write_checkpoint
from .observer import Observer
from .server import ServerError, VllmServer, environment
from .traffic import Tokens, batches, complete, differences

TOKENS = 40
BATCHES_PER_TOPIC = 3
PASSES = 4
LEAST_COMMITS = 5
SETTINGS: dict[str, Any] = {
    "enabled": 1,
    "session": f"demo-{os.getpid()}",  # two demos may run at once
    "episode_steps": 4,
    "min_episodes": 4,
    "plan_interval": 4,
    "window_episodes": 10,
    "max_moves": 4,  # several small plans: one big one would leave nothing to see afterwards
    "min_excess": 0.01,
    "min_gain": 0.005,
    "vote_steps": 4,
    "staging_rows": 16,
}


@dataclass
class Outcome:
    """What the demo measured."""

    differing: int = 0
    compared: int = 0
    steps: int = 0
    plans: int = 0
    rounds: int = 0
    moved: int = 0
    received: int = 0
    par: list[float] = field(default_factory=list)
    timings: np.ndarray = field(default_factory=lambda: np.ones((1, 2)))

    def failures(self) -> list[str]:
        """Promises that were broken, in words."""
        broken = []
        if self.differing or not self.compared:
            broken.append(f"{self.differing} of {self.compared} tokens differ")
        if self.plans < LEAST_COMMITS:
            broken.append(f"only {self.plans} plans were committed, expected {LEAST_COMMITS}")
        if not self.par[-1] < self.par[0]:
            broken.append(f"PAR did not fall: {self.par[0]:.3f} -> {self.par[-1]:.3f}")
        return broken


class Progress:
    """Plain lines with the seconds since the start; the same on a terminal and in a log."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._last = 0.0

    def say(self, text: str) -> None:
        """Print a line."""
        self._last = time.monotonic()
        print(f"[{self._last - self._begin:4.0f} s] {text}", flush=True)

    def waiting(self, seconds: float) -> None:
        """Print that a server is still starting, every ten seconds."""
        if time.monotonic() - self._last > 10:
            self.say(f"... vLLM is loading ({seconds:.0f} s)")


def _reference(model: Path, work: list[Tokens], logs: Path, progress: Progress) -> list[Tokens]:
    progress.say(f"starting vLLM without flash_eplb (log: {logs / 'without.log'})")
    with VllmServer(model, logs / "without.log", progress.waiting, enabled=0) as server:
        progress.say(f"generating {sum(map(len, work))} reference completions")
        return [complete(server.url, server.model, batch, TOKENS) for batch in work]


def _balanced(
    model: Path,
    work: list[Tokens],
    logs: Path,
    progress: Progress,
    outcome: Outcome,
    record: str,
) -> list[list[Tokens]]:
    progress.say(f"starting vLLM with flash_eplb (log: {logs / 'with.log'})")
    passes = []
    observer = Observer(str(SETTINGS["session"]))
    planner = None
    try:
        with VllmServer(model, logs / "with.log", progress.waiting, **SETTINGS) as server:
            for number in range(PASSES):
                if number == 1:
                    progress.say(f"starting `eplb planner` (log: {logs / 'planner.log'})")
                    planner = _start_planner(logs / "planner.log", record)
                    _wait_for(logs / "planner.log", "serving an engine", planner)
                first = observer.steps
                passes.append(_one_pass(server, work, observer, progress, number))
                outcome.par.append(observer.par(first, observer.steps))
            _read(observer, outcome)
    finally:
        if planner is not None:
            planner.terminate()
            planner.wait(timeout=30)
        observer.close()
    outcome.plans = (logs / "planner.log").read_text().count(" committed")
    return passes


def _one_pass(
    server: VllmServer, work: list[Tokens], observer: Observer, progress: Progress, number: int
) -> list[Tokens]:
    answers = []
    for index, batch in enumerate(work):
        first = observer.steps
        answers.append(complete(server.url, server.model, batch, TOKENS))
        progress.say(
            f"pass {number + 1}/{PASSES}, topic {index // BATCHES_PER_TOPIC}: "
            f"{observer.steps} steps, PAR {par_text(observer.par(first, observer.steps))}, "
            f"{observer.commits()} rounds committed, {observer.total(Field.MOVED_ROWS)} slots moved"
        )
    return answers


def _start_planner(log: Path, record: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            command_of("cli", "planner"),
            env=environment(**SETTINGS, record=record),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _wait_for(log: Path, text: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until `process` has logged `text`; ServerError if it ends or takes two minutes."""
    deadline = time.monotonic() + 120
    while text not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            raise ServerError(f"the planner did not come up:\n{log.read_text()[-2000:]}")
        time.sleep(0.1)


def _read(observer: Observer, outcome: Outcome) -> None:
    outcome.steps = observer.steps
    outcome.rounds = observer.commits()
    outcome.moved = observer.total(Field.MOVED_ROWS)
    outcome.received = observer.total(Field.RECEIVED_BYTES)
    outcome.timings = observer.timings()


def _table(outcome: Outcome) -> Table:
    spent, period = outcome.timings[:, 0], np.median(outcome.timings[:, 1])
    table = Table(title="2 EP ranks, 4 layers, 16 experts in 20 slots")
    table.add_column("what")
    table.add_column("measured", justify="right")
    table.add_row("steps", str(outcome.steps))
    table.add_row("plans committed", str(outcome.plans))
    table.add_row("rounds committed", str(outcome.rounds))
    table.add_row("slots moved", str(outcome.moved))
    table.add_row("bytes between ranks", f"{outcome.received / 2**20:.1f} MiB")
    table.add_row("PAR before (no planner)", par_text(outcome.par[0]))
    table.add_row("PAR after (last pass)", par_text(outcome.par[-1]))
    for percent in (50, 99):
        value = float(np.percentile(spent, percent))
        share = value / period
        table.add_row(f"our step(), p{percent}", f"{value / 1000:.0f} us, {share:.2%} of a step")
    table.add_row("tokens compared", str(outcome.compared))
    table.add_row("tokens that differ", str(outcome.differing))
    table.caption = "PAR = max / mean of the ranks' tokens,\nper layer and 16 steps, then averaged"
    return table


def _interrupt(progress: Progress) -> None:
    """Stop once, whatever the signal; a second one does not disturb the cleaning up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    progress.say("interrupted")
    raise KeyboardInterrupt


def run(folder: str, record: str = "") -> int:
    """Run the demo; returns the exit code.

    Args:
        folder: for its files.
        record: for the recording of its planner; empty: none.
    """
    from ..cli import compile_kernels

    progress = Progress()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: _interrupt(progress))
    logs = Path(folder)
    logs.mkdir(parents=True, exist_ok=True)
    progress.say("writing a tiny Qwen3-MoE checkpoint with skewed routing")
    try:
        model = write_checkpoint(logs / "tiny-moe")
    except OSError as error:
        fail(f"--folder {folder}: {error.strerror or error}; give another folder")
    progress.say("compiling the planner's kernels (once)")
    compile_kernels()
    work = batches(TinyMoE(), BATCHES_PER_TOPIC)
    outcome = Outcome()
    try:
        reference = _reference(model, work, logs, progress)
        passes = _balanced(model, work, logs, progress, outcome, record)
    except (ServerError, OSError) as error:
        progress.say(f"FAILED: {error}")
        return 1
    except KeyboardInterrupt:
        progress.say("everything was stopped")
        return 130
    for answers in passes:
        differing, compared = differences(reference, answers)
        outcome.differing += differing
        outcome.compared += compared
    Console(width=None if sys.stdout.isatty() else 100).print(_table(outcome))
    if record:
        progress.say(f"recorded in {record}; draw it with `eplb report {record}`")
    failures = outcome.failures()
    progress.say("FAILED: " + "; ".join(failures) if failures else "done: all tokens are the same")
    return 1 if failures else 0
