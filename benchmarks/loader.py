"""`make bench-loader`: what moving experts costs the main thread, ours beside its peers."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import asdict

from rich.console import Console

from .loader_cells import Cell
from .targets import print_targets, write_json, write_targets

KB, MB = 1 << 10, 1 << 20
FULL = (
    Cell("4 KB", 4 * KB, ranks=2, layers=8, slots=16, writes=64, plans=15),
    Cell("64 KB", 64 * KB, ranks=2, layers=8, slots=16, writes=64, plans=15),
    Cell("1 MB", 1 * MB, ranks=2, layers=4, slots=16, writes=32, plans=15),
    Cell("4 MB", 4 * MB, ranks=2, layers=4, slots=8, writes=32, plans=9),
    Cell("4 KB", 4 * KB, ranks=4, layers=8, slots=8, writes=64, plans=15),
    Cell("64 KB", 64 * KB, ranks=4, layers=8, slots=8, writes=64, plans=15),
    Cell("1 MB", 1 * MB, ranks=4, layers=4, slots=8, writes=32, plans=9),
)
QUICK = (
    Cell("64 KB", 64 * KB, ranks=2, layers=8, slots=16, writes=64, plans=4),
    Cell("1 MB", 1 * MB, ranks=2, layers=4, slots=16, writes=32, plans=4),
)
AT_REST = Cell(
    "at rest, 58 layers x 288 slots", 256, ranks=2, layers=58, slots=144, writes=0, plans=0
)
SINGLE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def main() -> None:
    """Measure, print and write; see `--help`."""
    options = _options()
    _without_threads()
    console = Console(stderr=options.json, width=None if sys.stdout.isatty() else 130)
    started = time.perf_counter()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        _run(options, console)
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
    console.print(f"took {(time.perf_counter() - started) / 60:.1f} minutes")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-loader", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two cells: under a minute")
    parser.add_argument("--json", action="store_true", help="the targets as JSON on stdout")
    return parser.parse_args()


def _without_threads() -> None:
    """The ranks are forked, with all that is imported: start anew if numpy would start threads."""
    if any(os.environ.get(name) != value for name, value in SINGLE.items()):
        module = [sys.executable, "-m", "benchmarks.loader", *sys.argv[1:]]
        os.execve(sys.executable, module, {**os.environ, **SINGLE, "VLLM_LOGGING_LEVEL": "ERROR"})


def _run(options: argparse.Namespace, console: Console) -> None:
    load = os.getloadavg()[0]
    console.print("importing vLLM and vLLM-Ascend", style="dim")
    from . import loader_ours, loader_report, loader_vllm  # after _without_threads
    from .loader_run import Makers, RankError, measure

    makers: Makers = {
        loader_ours.NAME: loader_ours.Ours,
        loader_vllm.STAGED: lambda rank: loader_vllm.VllmSync(rank, staged=True),
        loader_vllm.DIRECT: lambda rank: loader_vllm.VllmSync(rank, staged=False),
    }
    left_out = _add_ascend(makers)
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not be forked"
    results = []
    only_ours: Makers = {loader_ours.NAME: loader_ours.Ours}
    try:
        for number, cell in enumerate(QUICK if options.quick else FULL):
            results.append(measure(cell, makers, loader_ours.NAME, number))
            loader_report.print_cell(console, results[-1])
        at_rest = measure(AT_REST, only_ours, loader_ours.NAME, len(results))
    except RankError as error:
        raise SystemExit(f"bench-loader: {error}") from None
    loader_report.print_rest(console, [*results, at_rest])
    how = loader_report.HOW.format(
        cores=len(os.sched_getaffinity(0)), before=load, after=os.getloadavg()[0]
    )
    console.print(how, style="dim", markup=False, highlight=False)
    if left_out:
        console.print(f"left out: {left_out}", style="yellow", markup=False)
    targets = loader_report.targets(results, at_rest, (loader_vllm.STAGED, loader_vllm.DIRECT))
    print_targets(targets, "Loader", console)
    suffix = "-quick" if options.quick else ""
    paths = [
        write_targets(targets, f"loader{suffix}"),
        write_json(loader_report.records(results, at_rest), f"loader-cells{suffix}"),
    ]
    console.print("written: " + ", ".join(map(str, paths)), highlight=False)
    if options.json:
        print(json.dumps([asdict(target) for target in targets], indent=1))


def _add_ascend(makers: dict) -> str:
    """Why it is left out, or ""."""
    try:
        from . import loader_ascend

        loader_ascend.modules()
    except Exception as error:
        return f"vLLM-Ascend's D2D loader: {type(error).__name__}: {error}"
    makers[loader_ascend.NAME] = loader_ascend.Ascend
    return ""


def _terminate(*_: object) -> None:
    raise SystemExit(143)


if __name__ == "__main__":
    main()
