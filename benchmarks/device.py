"""`make bench-device`: what the balancer costs on a CUDA device, and whether its copies are right.

Without a CUDA device it says so and ends with 2.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from . import device_cells as cells
from .device_cells import FULL, QUICK, Figures, Sizes
from .targets import Target, at_least, at_most, print_targets, write_json, write_targets

TINY = Sizes(steps=20, layers=2, columns=8, row=4096, rows=4, matmul=16, products=1)


def main() -> None:
    """Measure, print and write; see `--help`."""
    options = _options()
    if not options.on_cpu and not torch.cuda.is_available():
        print("bench-device: there is no CUDA device here, so nothing was run", file=sys.stderr)
        raise SystemExit(2)
    kind = "cpu" if options.on_cpu else "cuda"
    sizes = TINY if options.on_cpu else QUICK if options.quick else FULL
    figures = measure(sizes, torch.device("cpu") if options.on_cpu else torch.device("cuda", 0))
    figures["device"] = "cpu" if options.on_cpu else torch.cuda.get_device_name(0)
    if options.on_cpu:
        print(json.dumps(figures))
        return
    console = Console(width=None if sys.stdout.isatty() else 130)
    print_targets(targets(figures), f"On {figures['device']}", console)
    suffix = "-quick" if options.quick else ""
    paths = (
        write_targets(targets(figures), f"device{suffix}"),
        write_json(figures, f"device-cells{suffix}"),
    )
    console.print(f"written from a {kind} device: " + ", ".join(map(str, paths)), highlight=False)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-device", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller experts, fewer steps")
    parser.add_argument(
        "--on-cpu",
        action="store_true",
        help="run the code on the CPU, to see that it runs: prints JSON whose figures mean nothing",
    )
    return parser.parse_args()


def measure(sizes: Sizes, device: torch.device) -> dict[str, Figures]:
    """All figures, by part."""
    return {
        "collector": cells.collector(sizes, device),
        "staging": cells.staging(sizes, device),
        "commit": cells.commit(sizes, device),
        "digest": cells.digest(sizes, device),
        "graph": cells.graph(device),
        "ipc": ipc(sizes, device),
    }


def ipc(sizes: Sizes, device: torch.device) -> Figures:
    """Two processes on the one device pull from each other; of the slower one.

    Raises:
        SystemExit: a process failed; the text is what it said last.
    """
    module = [sys.executable, "-m", "benchmarks.device_ipc"]
    numbers = [str(number) for number in (sizes.row, sizes.rows, max(5, sizes.steps // 50))]
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [*module, folder, str(rank), device.type, *numbers],
                cwd=Path(__file__).resolve().parents[1],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            ended = [process.communicate(timeout=300) for process in processes]
        finally:
            for process in processes:
                process.kill()
    for process, (_, errors) in zip(processes, ended, strict=True):
        if process.returncode:
            raise SystemExit(f"bench-device: a process of the IPC part failed: {errors[-2000:]}")
    first, second = (json.loads(output) for output, _ in ended)
    return {
        "transport": first["transport"],
        "right": first["right"] and second["right"],
        "gb_s": min(first["gb_s"], second["gb_s"]),
        "ms": max(first["ms"], second["ms"]),
    }


def targets(figures: dict[str, Figures]) -> list[Target]:
    """What was asked beside what was measured."""
    heat, stage, commit = figures["collector"], figures["staging"], figures["commit"]
    digest, ipc = figures["digest"], figures["ipc"]
    by_ipc = ipc["transport"] == "ipc"
    return [
        at_most("collector: time in a call, p50, us", heat["p50_us"], 50),
        at_most("collector: time in a call, p99, us", heat["p99_us"], 200),
        at_least("collector: calls that did not wait for the device", heat["ahead"], 0.99),
        _true("collector: every token recorded once", heat["right"]),
        at_most("staging: step time beside it, over alone", stage["inflation"], 1.05),
        at_most("commit: time on the host, us", commit["host_us"], 500),
        at_least("digest: speed over that of a copy", digest["ratio"], 0.5),
        _true("CUDA graph: routes by a commit's tables", figures["graph"]["right"]),
        _true("CUDA IPC between two processes: every byte", by_ipc and ipc["right"]),
        at_least("CUDA IPC: speed, GB/s", ipc["gb_s"] if by_ipc else float("nan"), 20),
    ]


def _true(name: str, holds: bool) -> Target:
    return Target(name, "yes" if holds else "no", "yes", holds)


if __name__ == "__main__":
    main()
