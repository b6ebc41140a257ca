"""`make bench-ipc`: our heat ring and doorbell against their peers, in one run."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict

from rich.console import Console

from . import ipc_bells, ipc_report
from .ipc_ends import Size
from .ipc_measure import Amount, Cell, SizeBench
from .ipc_run import Run, running
from .targets import print_targets, write_json, write_targets

# the ring's slots: as many as EPLB_RING_STEPS by default, but at most about 16 MiB
SIZES = (
    Size("2 KB", 8, 64, 256),
    Size("67 KB", 58, 288, 256),
    Size("600 KB", 58, 2592, 28),
)
FULL = Amount(rounds=5, calls=4000, records=4000)
QUICK = Amount(rounds=3, calls=500, records=1000)
QUEUE_DEPTH = 28


def main() -> None:
    """Measure, print and write; see `--help`."""
    options = _options()
    console = Console(stderr=options.json, width=None if sys.stdout.isatty() else 130)
    started = time.perf_counter()
    try:
        with running(QUEUE_DEPTH) as run:
            sizes, wakes, why = _measure(run, options.quick, console)
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
    ipc_report.print_wakes(console, wakes)
    console.print(ipc_report.HOW, style="dim", markup=False, highlight=False)
    targets = ipc_report.targets(sizes, wakes, why)
    print_targets(targets, "IPC", console)
    suffix = "-quick" if options.quick else ""
    paths = [
        write_targets(targets, f"ipc{suffix}"),
        write_json(ipc_report.records(sizes, wakes), f"ipc-cells{suffix}"),
    ]
    console.print("written: " + ", ".join(map(str, paths)), highlight=False)
    console.print(f"took {(time.perf_counter() - started) / 60:.1f} minutes")
    if options.json:
        print(json.dumps([asdict(target) for target in targets], indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-ipc", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few calls: about half a minute")
    parser.add_argument("--json", action="store_true", help="the targets as JSON on stdout")
    return parser.parse_args()


def _measure(
    run: Run, quick: bool, console: Console
) -> tuple[list[list[Cell]], list[ipc_bells.Wakes], str]:
    """The cells by size, the wake-ups, and why these are missing."""
    sizes = []
    for size in SIZES:
        sizes.append(SizeBench(run, size, QUICK if quick else FULL).measure())
        ipc_report.print_size(console, sizes[-1])
    try:
        rounds, rings = (4, 250) if quick else (20, 500)
        return sizes, ipc_bells.measure(run, rounds, rings), ""
    except Exception as error:
        return sizes, [], f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main()
